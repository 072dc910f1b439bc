"""Kills at any time: nothing that looks complete is left, and the next start ends with the very same bytes."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from config_files import write_config
from rank_processes import Rank, fork_ranks
from stages import build_inputs_of_ranks
from tiny_models import save_model

from dskd.artifacts.manifest import read_manifest, verify_files
from dskd.config.reading import load_config
from dskd.corpus.build import SPLITS

pytestmark = pytest.mark.slow
ARTIFACTS = {"senses": ("senses",), "shards": tuple(f"shards/{split}" for split in SPLITS)}
# The files that a stage saves while it works, from which the next start resumes.
PROGRESS = {"senses": ".states.partial/progress.json", "shards": "shards/.*.partial/.blocks/*/block.json"}
READING = ".reading.partial"  # what gathering keeps for annotation
KILLS = 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A work directory with everything before the sense dictionary, and the config that is written for it."""
    folder = tmp_path_factory.mktemp("prepared")
    words = [f"w{index}" for index in range(100)]
    save_model(folder / "teacher", words=words)
    choose = random.Random(0)
    paragraphs = [" ".join(choose.choices(words, k=60)) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    pairs = [f"w{i}\tsynonym\tw{i + 1}" for i in range(10, 60, 2)] + [
        f"w{i}\tantonym\tw{i + 30}" for i in range(10, 60)
    ]
    (folder / "own.tsv").write_text("\n".join(pairs), encoding="utf-8")
    settings = {
        "workdir": str(folder / "work"),
        "precision": "fp32",
        "teacher": {"path": str(folder / "teacher"), "mode": "resident"},
        "corpus": {"source": "files", "train": [str(folder / "text.txt")], "sequence_length": 32},
        "lexicon": {"wordnet": False, "tsv": [str(folder / "own.tsv")]},
        "senses": {"k": 4, "max_states": 40, "batch_size": 8, "memory_budget": 1e-4, "save_minutes": 0.0},
        "annotation": {"kappa": 3, "batch_size": 8, "store": ["teacher_states", "trunk_states"]},
        "student": {"layers": 3, "train_layers": 1},
    }
    config = write_config(folder / "config.yaml", settings)
    build_inputs_of_ranks(load_config(config))
    return settings


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """Returns the config of a work directory in which no stage was killed, and the seconds that each stage wrote."""
    config = _copy(prepared, tmp_path_factory.mktemp("undisturbed"))
    seconds = {}
    for stage, names in ARTIFACTS.items():
        processes = _start(stage, config)
        _wait_for_work(_work(config), names, processes[0])
        started = time.monotonic()
        assert _finish(processes) == [0], _log(config)
        seconds[stage] = time.monotonic() - started
        if stage == "senses":
            shutil.copytree(_work(config) / READING, config.parent / READING)  # annotation removes it
    return config, seconds


@pytest.mark.parametrize("stage", ARTIFACTS)
def test_kills_at_random_times_leave_nothing_half_written_and_change_no_byte(prepared, undisturbed, tmp_path, stage):
    reference, seconds = undisturbed
    config = _copy(prepared, tmp_path)
    work = _work(config)
    if stage == "shards":
        # Without the kept states: with them annotation would end before it can be killed.
        shutil.copytree(_work(reference) / "senses", work / "senses")
    choose = random.Random(stage)
    for number in range(KILLS):
        (process,) = _start(stage, config)
        if number + 1 < KILLS:
            _wait_for_work(work, ARTIFACTS[stage], process)
            time.sleep(seconds[stage] * choose.random() / 2)
        else:
            _wait_for_progress(work, stage, process)
        process.kill()
        for name in ARTIFACTS[stage]:
            if (work / name).exists():  # then it is whole
                verify_files(work / name, read_manifest(work / name, stage, made_by=""), made_by="")
    ranks = 2 if stage == "shards" else 1  # shards have the same bytes on any number of ranks
    assert _finish(_start(stage, config, ranks=ranks)) == [0] * ranks, _log(config)
    assert _content(work, stage) == _content(_work(reference), stage)
    assert "resuming" in _log(config)  # the last start continued a killed build
    if stage == "senses":
        assert _kept(work) == _kept(reference.parent)


@pytest.fixture(scope="module")
def killed(prepared, tmp_path_factory):
    """The settings of a work directory in which the build of senses was killed when it had saved some states."""
    config = _copy(prepared, tmp_path_factory.mktemp("killed"))
    (process,) = _start("senses", config)
    _wait_for_progress(_work(config), "senses", process)
    process.kill()
    return {**prepared, "workdir": str(_work(config))}


def test_three_ranks_resume_where_one_was_killed(killed, undisturbed, tmp_path):
    reference, _ = undisturbed
    config = _copy(killed, tmp_path)
    assert _finish(_start("senses", config, ranks=3)) == [0, 0, 0], _log(config)
    assert "resuming after" in _log(config)
    facts, expected = (read_manifest(_work(c) / "senses", "senses", made_by="").facts for c in (config, reference))
    assert facts == expected
    assert _kept(_work(config)) == _kept(reference.parent)


def test_a_kill_while_shards_are_published_costs_no_annotation(prepared, undisturbed, tmp_path):
    reference, _ = undisturbed
    config = _copy(prepared, tmp_path)
    shutil.copytree(_work(reference) / "senses", _work(config) / "senses")
    shutil.copytree(reference.parent / READING, _work(config) / READING)
    assert _finish(_start("shards", config, dies_in_hashing=True)) == [-signal.SIGKILL]
    assert not (_work(config) / "shards" / "train").exists()
    assert _finish(_start("shards", config)) == [0], _log(config)
    assert re.search(r"resuming: (\d+) of \1 blocks were written", _log(config))
    assert _content(_work(config), "shards") == _content(_work(reference), "shards")


def test_damaged_saved_states_are_gathered_again(killed, undisturbed, tmp_path):
    reference, _ = undisturbed
    config = _copy(killed, tmp_path)
    for run in (_work(config) / ".states.partial").glob("rank*"):
        run.write_bytes(run.read_bytes()[:-5])
    assert _finish(_start("senses", config)) == [0], _log(config)
    assert "gathering all states again" in _log(config)
    assert _content(_work(config), "senses") == _content(_work(reference), "senses")


def _work(config: Path) -> Path:
    return Path(load_config(config).workdir)


def _log(config: Path) -> str:
    return (config.parent / "log.txt").read_text()


def _wait_for_work(work: Path, names: tuple[str, ...], process) -> None:
    """Waits until a stage writes something, or has ended."""
    places = [(work / name).with_name(f".{Path(name).name}.partial") for name in names]
    while process.is_running() and not any(place.is_dir() for place in places):
        time.sleep(0.002)


def _wait_for_progress(work: Path, stage: str, process) -> None:
    """Waits until a stage has saved a part of its work, or has ended."""
    while process.is_running() and not any(work.glob(PROGRESS[stage])):
        time.sleep(0.002)


def _copy(prepared: dict, folder: Path) -> Path:
    shutil.copytree(prepared["workdir"], folder / "work")
    return write_config(folder / "config.yaml", {**prepared, "workdir": str(folder / "work")})


def _start(stage: str, config: Path, ranks: int = 1, **options) -> list[Rank]:
    from rank_jobs import build

    return fork_ranks(build, stage, config, ranks=ranks, log=config.parent / "log.txt", **options)


def _finish(processes: list[Rank]) -> list[int]:
    return [process.wait(120) for process in processes]


def _kept(work: Path) -> dict[str, bytes]:
    """The kept states, by their files."""
    return {file.name: file.read_bytes() for file in (work / READING).iterdir()}


def _content(work: Path, stage: str) -> dict[str, bytes]:
    return {
        f"{name}/{file.name}": file.read_bytes()
        for name in ARTIFACTS[stage]
        for file in (work / name).iterdir()
        if file.name != "manifest.json"
    }
