"""The whole pipeline, and the stages that it repeats when something changed.

Some tests start ranks with DeepSpeed's launcher, as users do, which takes long to import; the others fork one rank.
"""

import functools
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from rank_processes import run_program, start_ranks
from stages import build_inputs_of_training
from task_files import PLACES
from tiny_models import save_model
from tiny_work import NO_RUNS, launch_forked
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from dskd import pipeline
from dskd.cli.launching import launch
from dskd.compare.text import compare
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.evaluation.held_out_text import evaluate
from dskd.models.files.folder import find_teacher
from dskd.training.exporting.export import build_export
from dskd.training.train import train

pytestmark = pytest.mark.slow
ONE_GPU = 'pipeline.launcher_args=["--num_gpus", "1"]'  # one rank, with or without a GPU


@pytest.fixture
def one_rank(monkeypatch):
    """Lets the pipeline fork one rank for each stage, without DeepSpeed's launcher."""
    monkeypatch.setattr(pipeline, "launch", functools.partial(launch_forked, ranks=1))


def _stages_run(finished):
    return re.findall(r"^== (\w+)", finished.output, re.MULTILINE)


def test_the_pipeline_ends_with_a_table_a_picture_and_the_command_for_mlflow(tiny):
    printed = (tiny.parent / "printed.txt").read_text()
    for model in ("teacher", "student before training", "dskd"):
        assert re.search(rf"^{model}  +[\d,.]+  +0\.\d+  +[01]\.\d+  +[\d,.]+  +[01]\.\d+$", printed, re.MULTILINE), (
            model
        )
    assert re.search(r"^status +finished$", printed, re.MULTILINE)
    picture = Path(re.search(r"^Loss curves: (.+)$", printed, re.MULTILINE).group(1))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "mlflow ui --backend-store-uri sqlite:///" in printed
    for part in ("The same prompts, continued by each model", "Words with very different senses"):
        assert part in printed, part
    assert re.search(r"^\w+: \d senses, of \d+ states$", printed, re.MULTILINE)
    export = load_config(tiny).path("export", "dskd")
    assert f"  dskd  {export}\n" in printed
    assert f'  chat = pipeline("text-generation", "{export}")\n' in printed
    assert "Held-out text:" in (export / "README.md").read_text()


def test_a_second_call_does_nothing_and_a_changed_loss_repeats_only_what_depends_on_it(copy_of_tiny, one_rank):
    artifacts = ("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    config = copy_of_tiny(*artifacts, "checkpoints", "export", "evaluation")
    again = run_program("pipeline.py", config, "tracking.enabled=false")
    assert _stages_run(again) == []
    assert "up to date: lexicon, corpus, teacher, sequences, student, senses, shards, train dskd" in again.output

    changes = ["loss.sense_weight=0.5", "tracking.enabled=false"]
    loaded = load_config(config, changes)
    stages = pipeline.plan_stages(loaded, config, changes, lambda: find_teacher(loaded))
    for name in ("train dskd", "export dskd"):
        (stale,) = [stage for stage in stages if not stage.is_current()]
        assert stale.name == name
        stale.build()
    assert [stage.name for stage in stages if not stage.is_current()] == ["evaluation"]


def test_benchmarks_that_the_config_names_are_evaluated_last_and_once(copy_of_tiny, one_rank):
    artifacts = ("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    path = copy_of_tiny(*artifacts, "export", "evaluation")
    overrides = [
        "tracking.enabled=false",
        "tasks.evaluate=[piqa]",
        f"tasks.piqa={PLACES['piqa']}",
        "tasks.choice_shots=1",
    ]
    config = load_config(path, overrides)
    stage = pipeline.plan_stages(config, path, overrides, lambda: find_teacher(config))[-1]
    assert stage.name == "tasks"
    assert not stage.is_current()
    stage.build()
    assert stage.is_current()
    assert {folder.parent.name for folder in config.path("tasks").glob("*/piqa")} == {"teacher", "student", "dskd"}


def test_another_decoder_can_be_the_teacher(tiny, tmp_path, world):
    """Another teacher, the user's own text and relations: every stage, on one rank, to a model that loads.

    Its embeddings are tied and each document is a sequence, unlike those of `tiny`. A Mistral is trained by
    test_shipped_configs.py.
    """
    words = [f"w{index}" for index in range(100)]
    save_model(tmp_path / "teacher", "qwen2", words=words)
    paragraphs = [" ".join(words[(7 * i + 3 * j) % 100] for j in range(20)) for i in range(150)]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    pairs = [f"w{i}\tsynonym\tw{i + 1}" for i in range(10, 60, 2)] + [
        f"w{i}\tantonym\tw{i + 30}" for i in range(10, 60)
    ]
    (tmp_path / "own.tsv").write_text("\n".join(pairs), encoding="utf-8")
    config = Config(
        workdir=str(tmp_path / "work"),
        precision="fp32",
        teacher={"path": str(tmp_path / "teacher"), "mode": "resident"},
        corpus={
            "source": "files",
            "train": (str(tmp_path / "text.txt"),),
            "sequence_length": 16,
            "packing": "none",
        },
        lexicon={"wordnet": False, "tsv": (str(tmp_path / "own.tsv"),)},
        senses={"k": 3, "key": "predicted"},
        annotation={"kappa": 2},
        student={"layers": 2, "train_layers": 1, "spacing": "even"},
        loss={"relative_margin": 1.0},
        train={"steps": 3, "global_batch_size": 8, "num_workers": 0},
    )
    config.path().mkdir()
    shutil.copyfile(tiny.parent / NO_RUNS, config.path(NO_RUNS))
    build_inputs_of_training(config, world)
    train(config, world)
    build_export(config)
    evaluate(config, world)
    exported = AutoModelForCausalLM.from_pretrained(config.path("export", "dskd"))
    assert type(exported) is Qwen2ForCausalLM
    assert exported.config.num_hidden_layers == 2
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    printed = compare(config)
    for part in ("teacher", "student before training", "train/sense", "Loss curves"):
        assert part in printed


def test_until_names_the_last_stage_to_run(copy_of_tiny):
    config = copy_of_tiny("corpus", "lexicon", "teacher")
    finished = run_program("pipeline.py", config, "--until", "student")
    assert _stages_run(finished) == ["sequences", "student"]
    work = {path.name for path in (config.parent / "work").iterdir() if not path.name.startswith(".")}
    assert work == {"corpus", "lexicon", "teacher", "sequences", "student"}
    assert "Loss curves" not in finished.output

    unknown = run_program("pipeline.py", config, "--until", "training", check=False)
    assert unknown.exit_code == 2
    assert "--until training: there is no such stage; stages of this config: lexicon, corpus, teacher" in unknown.output
    assert "Traceback" not in unknown.output


def test_a_stage_that_succeeds_ends_the_launcher_without_an_error(copy_of_tiny, capfd):
    """It prints its help, for time. How a rank ends that has worked, test_stages.py and others see in forked ranks."""
    path = copy_of_tiny()
    launch(load_config(path, [ONE_GPU]), "build_senses.py", ["--config", str(path), "--help"])
    assert "Gathers the teacher's states" in capfd.readouterr().err


def test_a_request_to_stop_is_repeated_until_starting_ranks_handle_it(copy_of_tiny):
    config = copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    (process,) = start_ranks("pipeline.py", config, "tracking.enabled=false", "train.steps=100000", ONE_GPU)
    deadline = time.monotonic() + 120
    while "$ deepspeed" not in process.output and process.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # they do not listen yet
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 75, process.output
    assert "stopping: waiting for the ranks to save their progress" in process.output


def test_a_failing_rank_ends_the_pipeline_with_its_own_message_and_code(copy_of_tiny):
    config = copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    # What only the two ranks find wrong, which the launcher starts by default.
    finished = run_program("pipeline.py", config, "train.global_batch_size=7", "tracking.enabled=false", check=False)
    assert finished.exit_code == 2, finished.output
    assert finished.output.count("7 sequences cannot be divided among 2 ranks") == 1
    assert "Traceback" not in finished.output
