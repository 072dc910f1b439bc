"""States that gathering keeps: shards made from them are those of two readings, and what does not fit is not used."""

import errno
import functools
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from config_files import write_config
from rank_processes import run_program
from safetensors.numpy import load_file
from stages import build_inputs_of_ranks
from tiny_models import save_model
from tiny_work import launch_forked

from dskd import pipeline
from dskd.artifacts.lock import release_lock
from dskd.artifacts.tensor_file import create_tensors
from dskd.config.reading import load_config
from dskd.models.running.frozen import Decoder
from dskd.senses.build import build_senses
from dskd.shards.annotate import annotate
from dskd.shards.reading import ReadingKeeper, build_senses_and_keep_states
from dskd.shards.writing import BlockWriter

READING = ".reading.partial"
KEPT = "takes the teacher's states from"
AGAIN = "runs the teacher over the training text: "


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The settings of a work directory with all that gathering reads: 64 sequences, of which a block has 4."""
    folder = tmp_path_factory.mktemp("prepared")
    words = [f"w{index}" for index in range(100)]
    for seed in (0, 1):
        save_model(folder / f"teacher{seed}", seed=seed, words=words)
    choose = random.Random(0)
    paragraphs = [" ".join(choose.choices(words, k=choose.randint(5, 70))) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    pairs = [f"w{i}\tsynonym\tw{i + 1}\nw{i}\tantonym\tw{i + 30}" for i in range(10, 60, 2)]
    (folder / "own.tsv").write_text("\n".join(pairs), encoding="utf-8")
    settings = {
        "workdir": str(folder / "work"),
        "precision": "fp32",
        "teacher": {"path": str(folder / "teacher0"), "mode": "resident"},
        "corpus": {
            **{"source": "files", "train": [str(folder / "text.txt")], "sequence_length": 32},
            **{"packing": "documents", "max_sequences": 64, "max_validation_sequences": 6},
        },
        "lexicon": {"wordnet": False, "tsv": [str(folder / "own.tsv")]},
        "senses": {"k": 4, "max_states": 40, "batch_size": 4, "save_minutes": 0.0},
        "annotation": {"kappa": 3, "batch_size": 4, "store": ["teacher_states", "trunk_states"]},
        "student": {"layers": 3, "train_layers": 1},
    }
    build_inputs_of_ranks(load_config(write_config(folder / "config.yaml", settings)))
    return settings


@pytest.fixture
def copy(prepared, tmp_path):
    """Returns a function that copies the work directory and returns the config of the copy."""

    def make(name, *options, source=None, **changes):
        shutil.copytree(source or prepared["workdir"], tmp_path / name)
        path = write_config(tmp_path / f"{name}.yaml", {**prepared, "workdir": str(tmp_path / name), **changes})
        return load_config(path, options)

    return make


@pytest.fixture
def rows_read(monkeypatch):
    """Counts how often a teacher runs over each row of tokens."""
    counts = Counter()
    forward = Decoder.forward

    def count(self, inputs, *args, **options):
        counts.update(map(tuple, inputs.tolist()))
        return forward(self, inputs, *args, **options)

    monkeypatch.setattr(Decoder, "forward", count)
    return counts


def _shards(config):
    folder = config.path("shards", "train")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def _reading(config):
    return {file.name: file.read_bytes() for file in config.path(READING).glob("*")}


@pytest.fixture
def two_readings(copy, world):
    """The shards for which the teacher has read the text twice."""
    config = copy("two")
    build_senses(config, world)
    annotate(config, world)
    return _shards(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("precision=bf16", "senses.key=target"), ("annotation.store=[teacher_states]",)]
)
def test_shards_of_one_reading_are_those_of_two_bit_for_bit(copy, world, rows_read, capfd, options):
    found, readings = [], []
    for build in (build_senses, build_senses_and_keep_states):
        config = copy(build.__name__, *options)
        rows_read.clear()
        build(config, world)
        assert config.path(READING).exists() == (build is not build_senses)
        annotate(config, world)
        rows = load_file(config.path("sequences", "train.safetensors"))["input_ids"]
        readings.append({rows_read[tuple(row)] for row in rows.tolist()})
        found.append(_shards(config))
        assert not config.path(READING).exists()
    assert found[0] == found[1]
    assert readings == [{2}, {1}]
    printed = capfd.readouterr().err
    assert (printed.count(AGAIN), printed.count(KEPT)) == (1, 1)


@pytest.mark.slow
def test_any_ranks_keep_the_same_files_and_make_the_same_shards_of_them(copy, world, tmp_path):
    """Also in batches of other sizes."""
    one, two = copy("one"), copy("two")
    build_senses_and_keep_states(one, world)
    run_program("build_senses.py", tmp_path / "two.yaml", ranks=2)
    kept = _reading(two)
    assert _reading(one) == kept
    assert len(kept) == 17  # of 64 sequences in batches of 4, and the recipe's digest
    again = copy("again", "annotation.batch_size=3", source=two.path())
    annotate(again, world)
    run_program("annotate.py", tmp_path / "two.yaml", ranks=2)
    assert _shards(again) == _shards(two)
    assert not two.path(READING).exists()


def _stop_after(monkeypatch, owner, name, calls):
    """Replaces a method by one that fails after some calls."""
    method, made = getattr(owner, name), []

    def stop(*args, **options):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(1)
        return method(*args, **options)

    monkeypatch.setattr(owner, name, stop)


@pytest.mark.slow
def test_stopped_gathering_and_annotation_continue_from_what_is_kept(copy, world, two_readings, rows_read, capfd):
    config = copy("stopped")
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, ReadingKeeper, "keep", 7)
        with pytest.raises(KeyboardInterrupt):
            build_senses_and_keep_states(config, world)
    first = load_file(config.path("sequences", "train.safetensors"))["input_ids"][:24].tolist()
    rows_read.clear()
    build_senses_and_keep_states(config, world)
    assert not any(rows_read[tuple(row)] for row in first)  # the states of these were saved
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(patch, BlockWriter, "finish", 5)
        with pytest.raises(KeyboardInterrupt):
            annotate(config, world)
    assert config.path(READING).exists()
    rows_read.clear()
    annotate(config, world)
    assert not any(rows_read[tuple(row)] for row in first)
    assert "resuming: 5 of 16 blocks" in capfd.readouterr().err
    assert _shards(config) == two_readings
    assert not config.path(READING).exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["teacher", "text", "precision", "depth", "columns", "missing"])
def test_kept_states_that_do_not_fit_are_removed_and_the_teacher_reads(
    copy, world, two_readings, prepared, change, capfd
):
    options = {
        "precision": ["precision=bf16"],
        "depth": ["student.layers=4", "student.train_layers=1"],
        "columns": ["annotation.store=[teacher_states]"],
    }.get(change, [])
    changes = {}
    if change == "teacher":
        changes["teacher"] = {**prepared["teacher"], "path": prepared["teacher"]["path"][:-1] + "1"}
    other = copy("other", *options, **changes)
    if change == "text":
        other = copy("text", corpus={**prepared["corpus"], "max_sequences": 63})
        build_inputs_of_ranks(other)
    build_senses_and_keep_states(other, world)
    config = copy("config")
    build_senses(config, world)
    shutil.copytree(other.path(READING), config.path(READING))
    if change == "missing":
        file = config.path(READING, f"{8:012d}.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
    capfd.readouterr()
    annotate(config, world)
    problem = "has the states of 8 of 64 sequences" if change == "missing" else "is of another teacher, text, precision"
    assert f"{AGAIN}{config.path(READING)} {problem}" in capfd.readouterr().err
    assert _shards(config) == two_readings
    assert not config.path(READING).exists()


def test_without_space_for_both_nothing_is_kept_and_nothing_fails(copy, world, monkeypatch, capfd):
    config = copy("full")
    size = 2 * 64 * 32 * 32 * 4  # both columns at most
    usage = SimpleNamespace(free=2 * size * 0.8)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage)
        build_senses_and_keep_states(config, world)
    printed = capfd.readouterr().err
    assert "keeps no states for annotation, which will run the teacher again: " in printed
    assert "not enough disk space for the states that annotation.store names" in printed
    assert config.path("senses").exists()
    assert not config.path(READING).exists()


@pytest.mark.slow
def test_a_disk_that_becomes_full_costs_only_the_kept_states(copy, world, monkeypatch, two_readings, capfd):
    config, calls = copy("full"), []

    def fail(*args):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return create_tensors(*args)

    monkeypatch.setattr("dskd.shards.reading.create_tensors", fail)
    build_senses_and_keep_states(config, world)
    assert "removing the kept states: annotation runs the teacher again" in capfd.readouterr().err
    assert not config.path(READING).exists()
    assert len(calls) == 5
    annotate(config, world)
    assert _shards(config) == two_readings
    # A disk that is too full for the shards only because of the kept states loses these.
    monkeypatch.undo()
    shutil.rmtree(config.path("shards"))
    shutil.rmtree(config.path("senses"))
    build_senses_and_keep_states(config, world)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: SimpleNamespace(free=10**9 if not config.path(READING).exists() else 100_000)
    )
    annotate(config, world)
    assert "the disk has no room for" in capfd.readouterr().err
    assert _shards(config) == two_readings


@pytest.mark.slow
def test_states_are_not_kept_for_shards_that_stay_up_to_date(copy, world, capfd):
    config = copy("current")
    build_senses(config, world)
    annotate(config, world)
    build_senses_and_keep_states(config, world, force=True)
    assert "annotation need not run" not in capfd.readouterr().err
    shutil.rmtree(config.path("senses"))
    build_senses_and_keep_states(config, world)
    assert "annotation need not run" in capfd.readouterr().err
    assert not config.path(READING).exists()  # the dictionary is the same again
    build_senses_and_keep_states(copy("more", "annotation.teacher_top_n=3"), world)
    assert not config.path().with_name("more").joinpath(READING).exists()


@pytest.mark.slow
def test_the_pipeline_reads_once_and_is_up_to_date_afterwards(copy, monkeypatch, tmp_path, dskd):
    monkeypatch.setattr(pipeline, "launch", functools.partial(launch_forked, ranks=1))
    monkeypatch.setattr("dskd.distributed.stopping.listen", lambda: None)  # pytest handles signals to this process
    config = copy("work")
    path = tmp_path / "work.yaml"
    pipeline.run_pipeline(path, [], until="senses")
    assert config.path(READING).exists()
    assert dskd("inspect", "senses", "--config", path)[0] == 0
    assert dskd("status", "--config", path)[0] == 3
    pipeline.run_pipeline(path, [], until="shards")
    assert not config.path(READING).exists()
    assert dskd("inspect", "shards", "--config", path)[0] == 0
    release_lock(config.path(pipeline.LOCK))
