"""Jobs that meet in one work directory: they wait for each other, and notice what another one replaced."""

import contextlib
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import yaml
from artifact_folders import replace_at_loading
from config_files import write_config
from rank_jobs import act_on_nodes
from rank_processes import finish, fork_ranks

from dskd import pipeline
from dskd.artifacts.building import Building
from dskd.artifacts.lock import hold_lock
from dskd.artifacts.manifest import Recipe
from dskd.config.reading import load_config
from dskd.errors import OutageError
from dskd.evaluation import held_out_text as evaluation
from dskd.evaluation.held_out_text import evaluate
from dskd.senses.build import build_senses
from dskd.training.exporting.export import build_export

pytestmark = pytest.mark.slow
_OTHERS = multiprocessing.get_context("fork")


@contextlib.contextmanager
def _held_by_another_process(lock: Path):
    held, done = _OTHERS.Event(), _OTHERS.Event()
    process = _OTHERS.Process(target=lambda: (hold_lock(lock, "works"), held.set(), done.wait()))
    process.start()
    assert held.wait(60)
    yield
    done.set()
    process.join()


def test_an_evaluation_that_another_process_made_in_the_meantime_is_kept(copy_of_tiny, world, monkeypatch, tmp_path):
    path = copy_of_tiny("teacher", "student", "senses", "shards", "evaluation")
    config = load_config(path, ["tracking.enabled=false", "teacher.mode=resident"])
    target, theirs = config.path("evaluation", "student"), tmp_path / "theirs"
    target.rename(theirs)
    (theirs / "mark").touch()
    is_building = _OTHERS.Event()

    def publish():
        Building(target, Recipe("evaluation")).clear()
        is_building.set()
        time.sleep(0.3)
        theirs.rename(target)

    def measure(*arguments, label, **options):
        examples = real(*arguments, label=label, **options)
        if label == "evaluating":
            _OTHERS.Process(target=publish).start()
            assert is_building.wait(60)
        return examples

    real = evaluation.measure
    monkeypatch.setattr(evaluation, "measure", measure)
    evaluate(config, world)
    assert (target / "mark").exists()
    evaluate(config, world, force=True)
    assert not (target / "mark").exists()


def test_a_model_that_was_replaced_before_its_turn_is_not_evaluated(copy_of_tiny, world, monkeypatch):
    config = load_config(copy_of_tiny("teacher", "student", "senses", "shards", "export"), ["tracking.enabled=false"])
    replace_at_loading(monkeypatch, config.path("export", "dskd"))
    with pytest.raises(OutageError, match="export/dskd: the model was replaced after the evaluation began"):
        evaluate(config, world)
    assert sorted(path.name for path in config.path("evaluation").iterdir()) == ["student", "teacher"]


def test_ranks_that_find_different_models_are_reported_with_their_node(copy_of_tiny, tmp_path):
    config = copy_of_tiny("teacher", "student", "senses", "shards", "export")
    other = shutil.copytree(load_config(config).path(), tmp_path / "other")
    shutil.rmtree(other / "export")
    lacks_it = write_config(tmp_path / "other.yaml", yaml.safe_load(config.read_text()), workdir=str(other))
    ranks = fork_ranks(act_on_nodes, evaluate, [config, lacks_it], ranks=2, hosts=["node0", "node1"])
    ended = finish(ranks, 60, check=False)
    assert [rank.wait(0) for rank in ranks] == [1, 1], ended.output
    assert ended.output.count("error: node1 finds the models teacher (") == 1
    assert "Traceback" not in ended.output


def test_a_second_pipeline_names_the_first_at_once_and_ends_with_a_retryable_code(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "config.yaml", {"workdir": str(tmp_path / "work"), "teacher": {"path": "t"}})
    monkeypatch.setattr("dskd.distributed.stopping.listen", lambda: None)  # signals to this process are pytest's
    monkeypatch.setattr(pipeline, "LOCK_PATIENCE_S", 0.1)
    lock = tmp_path / "work" / pipeline.LOCK
    with _held_by_another_process(lock), pytest.raises(OutageError, match="runs the pipeline in this work directory"):
        pipeline.run_pipeline(config, [])
    assert capsys.readouterr().err.count("runs the pipeline in this work directory; waiting for it") == 1


def test_states_that_another_build_gathers_are_left_alone(copy_of_tiny, world):
    config = load_config(copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses"))
    states = config.path(".states.partial")
    states.mkdir()
    with _held_by_another_process(config.path(".states.lock")):
        build_senses(config, world)
        assert states.exists()
    build_senses(config, world)
    assert not states.exists()


def test_an_export_that_is_up_to_date_is_left_as_it_is(copy_of_tiny, capsys):
    config = load_config(copy_of_tiny("teacher", "student", "checkpoints", "export"), ["tracking.enabled=false"])
    folder = config.path("export", "dskd").stat()
    build_export(config)
    assert "up to date: " in capsys.readouterr().err
    assert config.path("export", "dskd").stat().st_ino == folder.st_ino
