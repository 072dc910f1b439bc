"""The whole pipeline, as a user runs it, and what it does again when something changed."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import REPOSITORY
from task_files import PLACES
from tiny_models import ARCHITECTURES, save_model
from tiny_work import launch_forked
from transformers import AutoModelForCausalLM

from dskd import pipeline
from dskd.artifacts.lock import release_lock
from dskd.compare.text import compare
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.corpus.build import build_corpus
from dskd.corpus.sequences import build_sequences
from dskd.errors import UserError
from dskd.evaluation.held_out_text import evaluate
from dskd.lexicon.build import build_lexicon
from dskd.models.cutting import build_student
from dskd.models.folder import find_teacher
from dskd.senses.build import build_senses
from dskd.shards.annotate import annotate
from dskd.training.export import build_export
from dskd.training.train import train

pytestmark = pytest.mark.slow


def _pipeline(config, *overrides, timeout_s=300):
    command = [sys.executable, str(REPOSITORY / "launcher" / "pipeline.py"), "--config", str(config), *overrides]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s)


def _stages_run(finished):
    return re.findall(r"^== (\w+)", finished.stderr, re.MULTILINE)


def test_it_ends_with_a_table_a_picture_and_the_way_to_mlflow(tiny):
    printed = (tiny.parent / "printed.txt").read_text()
    for model in ("teacher", "cut student, untrained", "dskd"):
        assert re.search(rf"^{model}  +[\d,.]+  +0\.\d+  +[01]\.\d+  +[\d,.]+  +[01]\.\d+$", printed, re.MULTILINE), (
            model
        )
    assert re.search(r"^status +finished$", printed, re.MULTILINE)
    picture = Path(re.search(r"^Loss curves: (.+)$", printed, re.MULTILINE).group(1))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "mlflow ui --backend-store-uri sqlite:///" in printed


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the pipeline in this process, its ranks as those of other tests; returns the stages that ran, and what was
    printed to standard output and error."""
    monkeypatch.setattr(pipeline, "launch", launch_forked)
    monkeypatch.setattr("dskd.distributed.stopping.listen", lambda: None)  # signals to this process are pytest's

    def run(config, *overrides, until=None):
        capsys.readouterr()
        try:
            pipeline.run_pipeline(config, overrides, until=until)
        finally:
            release_lock(load_config(config).path(pipeline.LOCK))
        printed, said = capsys.readouterr()
        return re.findall(r"^== (\w+)", said, re.MULTILINE), printed, said

    return run


def test_a_second_call_does_nothing_and_a_changed_loss_repeats_only_what_depends_on_it(copy_of_tiny, run_here):
    artifacts = ("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    config = copy_of_tiny(*artifacts, "checkpoints", "export", "evaluation")
    stages, _, said = run_here(config, "tracking.enabled=false")
    assert stages == []
    assert "up to date: lexicon, corpus, teacher, sequences, student, senses, shards, train dskd" in said

    # The ranks of this one are started by DeepSpeed's launcher, as a user's.
    changed = ("loss.sense_weight=0.5", "tracking.enabled=false")
    trained = _pipeline(config, *changed, "--until", "train dskd")
    assert trained.returncode == 0, trained.stderr
    assert _stages_run(trained) == ["train"]
    assert "up to date: lexicon, corpus, teacher, sequences, student, senses, shards" in trained.stderr
    stages, _, said = run_here(config, *changed)
    assert stages == ["export", "evaluate"]
    assert "up to date: lexicon, corpus, teacher, sequences, student, senses, shards, train dskd" in said


def test_benchmarks_that_the_config_names_are_asked_last_and_once(copy_of_tiny, monkeypatch):
    monkeypatch.setattr(pipeline, "launch", launch_forked)
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


@pytest.mark.parametrize(
    ("architecture", "packing"), [*((name, "documents") for name in ARCHITECTURES), ("llama", "none")]
)
def test_any_decoder_can_be_the_teacher(tmp_path, world, architecture, packing):
    """Another teacher, the user's own text and relations: every stage, on one rank, to a model that loads."""
    words = [f"w{index}" for index in range(100)]
    save_model(tmp_path / "teacher", architecture, words=words)
    paragraphs = [" ".join(words[(7 * i + 3 * j) % 100] for j in range(20)) for i in range(150)]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    pairs = [f"w{i}\tsynonym\tw{i + 1}" for i in range(10, 60, 2)] + [
        f"w{i}\tantonym\tw{i + 30}" for i in range(10, 60)
    ]
    (tmp_path / "own.tsv").write_text("\n".join(pairs), encoding="utf-8")
    config = Config(
        workdir=str(tmp_path / "work"),
        precision="fp32",
        teacher={"path": str(tmp_path / "teacher")},
        corpus={
            "source": "files",
            "train": (str(tmp_path / "text.txt"),),
            "sequence_length": 16,
            "packing": packing,
        },
        lexicon={"wordnet": False, "tsv": (str(tmp_path / "own.tsv"),)},
        senses={"k": 3, "key": "predicted"},
        annotation={"kappa": 2},
        student={"layers": 2, "train_layers": 1, "spacing": "even"},
        loss={"relative_margin": 1.0},
        train={"steps": 3, "global_batch_size": 8, "num_workers": 0},
    )
    build_lexicon(config)
    build_corpus(config)
    teacher = find_teacher(config)
    build_sequences(config, teacher.load_tokenizer(), teacher.tokenizer_digest)
    build_senses(config, world)
    annotate(config, world)
    build_student(config)
    train(config, world)
    build_export(config)
    evaluate(config, world)
    exported = AutoModelForCausalLM.from_pretrained(config.path("export", "dskd"))
    assert type(exported).__name__ == type(ARCHITECTURES[architecture]()).__name__
    assert exported.config.num_hidden_layers == 2
    if architecture == "qwen2":
        assert exported.lm_head.weight is exported.model.embed_tokens.weight
    printed = compare(config)
    for part in ("teacher", "cut student, untrained", "train/sense", "Loss curves"):
        assert part in printed


def test_it_stops_after_the_stage_that_is_named(copy_of_tiny, run_here):
    config = copy_of_tiny("corpus", "lexicon", "teacher")
    stages, printed, _ = run_here(config, until="student")
    assert stages == ["sequences", "student"]
    work = {path.name for path in (config.parent / "work").iterdir() if not path.name.startswith(".")}
    assert work == {"corpus", "lexicon", "teacher", "sequences", "student"}
    assert "Loss curves" not in printed

    with pytest.raises(UserError) as error:
        run_here(config, until="training")
    assert str(error.value).startswith(
        "--until training: there is no such stage; stages of this config: lexicon, corpus, teacher"
    )


def test_a_request_is_passed_on_until_the_ranks_that_are_just_being_started_hear_it(copy_of_tiny, tmp_path):
    config = copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    command = [sys.executable, str(REPOSITORY / "launcher" / "pipeline.py"), "--config", str(config)]
    log = tmp_path / "log"
    with log.open("w") as stream:
        overrides = ("tracking.enabled=false", "train.steps=100000")
        process = subprocess.Popen([*command, *overrides], cwd=REPOSITORY, stdout=stream, stderr=stream)
    deadline = time.monotonic() + 120
    while "$ deepspeed" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # they do not listen yet
    process.terminate()
    assert process.wait(120) == 75, log.read_text()
    assert "stopping: waiting for the ranks to save their progress" in log.read_text()


def test_a_failing_rank_ends_the_pipeline_with_its_own_message_and_code(copy_of_tiny):
    config = copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student")
    finished = _pipeline(config, "student.train_layers=0", "tracking.enabled=false")
    assert finished.returncode == 2
    assert finished.stderr.count("nothing would be trained") == 1
    assert "Traceback" not in finished.stderr
