"""Shared fixtures: tiny models, and one work directory that the real pipeline made on two ranks."""

import atexit
import contextlib
import fcntl
import functools
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster_lab.slurm
import pytest
import torch
import yaml
from cluster_lab import hosts
from cluster_lab.hosts import Lab
from cluster_lab.slurm import Slurm

from dskd.artifacts.hashing import hash_files
from dskd.artifacts.lock import release_lock
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.corpus.build import read_wordnet_documents
from dskd.distributed.node_cache import streaming_names
from dskd.distributed.rendezvous import free_port, initialize
from dskd.distributed.world import LAUNCHER_VARIABLES, World
from dskd.lexicon.relations import Pairs
from dskd.lexicon.wordnet import open_wordnet
from dskd.lexicon.wordnet_relations import read_wordnet
from dskd.models.frozen import load_frozen
from dskd.tracking import read_history, read_runs, tracker

REPOSITORY = Path(__file__).resolve().parent.parent
# Ranks of one machine share its cores, and sums in another order differ in their last bits: one thread for everything
# that is compared bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Two ranks cannot share a GPU, and tests compare with what the CPU computes: only test_gpu.py computes on GPUs.
os.environ["DS_ACCELERATOR"] = "cpu"

# By the fork server, beside what programs import at their beginning: DeepSpeed compiles Muon's kernels whatever the
# optimizer is, transformers imports an architecture and MLflow its store when they are asked for.
IMPORTED_LATE = [
    "forked_rank",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "matplotlib.backends.backend_agg",
    "dskd.shards.dataset",
]
ONE_RANK = World(0, 1, 0, torch.device("cpu"))

TINY = {
    "run": "dskd",
    "seed": 3,
    "precision": "fp32",
    "teacher": {
        "train_from_scratch": {
            "vocab_size": 2048,
            "num_layers": 4,
            "hidden_size": 64,
            "num_heads": 2,
            "train_tokens": 60_000,
            "batch_size": 32,
        }
    },
    "corpus": {"source": "files", "sequence_length": 32, "max_sequences": 96, "max_validation_sequences": 38},
    "senses": {"key": "target", "k": 3, "max_states": 20, "batch_size": 8},
    "annotation": {"kappa": 2, "batch_size": 8, "teacher_top_n": 4},
    "student": {"layers": 2, "train_layers": 1},
    "loss": {"min_relations": 3},
    "train": {
        "learning_rate": 1.0e-3,
        "steps": 6,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "checkpoint_every": 3,
        "num_workers": 1,
        "loss_chunk_size": 50,
        "collective_timeout_s": 120,
    },
    "tracking": {"experiment": "tests"},
    "evaluation": {"batch_size": 4, "samples": 3, "sample_tokens": 8},
}


@dataclass(frozen=True)
class Finished:
    """A program that has ended."""

    exit_code: int
    output: str


class Rank:
    """A process that was started by :func:`start_ranks`."""

    def __init__(self, process: Any, log: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._log = log

    def is_running(self) -> bool:
        """True until it has ended."""
        return self._process.is_alive()

    def wait(self, timeout_s: float) -> int:
        """Its exit code, negative when a signal ended it."""
        self._process.join(timeout_s)
        assert not self.is_running(), f"still runs after {timeout_s} s; so far:\n{self.output}"
        return self._process.exitcode

    def kill(self) -> None:
        """Kills it with its children, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join(10)

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text()


def run_program(
    name: str, config: Path, *arguments: str, ranks: int = 1, timeout_s: int = 240, check: bool = True
) -> Finished:
    """Runs a program of `launcher/` on so many ranks, with the variables that a launcher sets."""
    return finish(start_ranks(name, config, *arguments, ranks=ranks), timeout_s, check=check)


def start_ranks(name: str, config: Path, *arguments: str, ranks: int = 1, absent: Collection[int] = ()) -> list[Rank]:
    """Starts the ranks of a program of `launcher/`, but for those that are absent, and returns at once."""
    from forked_rank import run_launcher

    program = REPOSITORY / "launcher" / name
    return fork_ranks(run_launcher, program, ["--config", str(config), *arguments], ranks=ranks, absent=absent)


def finish(processes: Sequence[Rank], timeout_s: float = 240, *, check: bool = True) -> Finished:
    """Waits for ranks; with `check` all of them must have done their work."""
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    finished = Finished(max(codes, key=abs), "\n".join(process.output for process in processes))
    if check:
        assert not any(codes), finished.output
    return finished


def fork_ranks(
    target: Callable[..., None],
    *arguments: Any,
    ranks: int = 1,
    absent: Collection[int] = (),
    log: Path | None = None,
    **options: Any,
) -> list[Rank]:
    """Starts `target(*arguments, environment, log, **options)` as so many ranks of a job, printing to the end of `log`,
    or each to a file of its own."""
    context = _fork_server()
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    started = []
    for rank in sorted(set(range(ranks)) - set(absent)):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        path = log or Path(tempfile.mkstemp(dir=_logs())[1])
        process = context.Process(target=target, args=(*arguments, environment, path), kwargs=options)
        process.start()
        started.append(Rank(process, path))
    return started


@functools.cache
def _fork_server() -> Any:
    # The server imports what is preloaded with no path but Python's own.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*(str(REPOSITORY / place) for place in ("tests/support", "tests", ".")), *([before] if before else [])]
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_LATE)
    first = context.Process(target=os.getpid)  # the server starts, and imports, with its first process
    first.start()
    first.join()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


@functools.cache
def _logs() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dskd-test-logs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def open_dataset(folder: Path, cache: Path) -> Any:
    """An MDS folder as mosaicml-streaming opens it, with nothing of ours but a free name in shared memory."""
    from streaming import StreamingDataset  # here, as in `link` and `server`: this file is imported once more, by xdist

    with streaming_names(cache, ONE_RANK):
        return StreamingDataset(remote=str(folder), local=str(cache / "mds"), batch_size=1, validate_hash="xxh64")


def losses_of(config: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    """(step, value) of a measure of the config's run, as MLflow has it; there must be one tracked run of that name."""
    loaded = load_config(config)
    (run,) = [run for run in read_runs(loaded) if run.name == loaded.run]
    return read_history(loaded, run.run_id, name)


def update_manifest(folder: Path, **changes: object) -> None:
    """Makes the manifest of a changed artifact fit its files again, as if it had been made that way."""
    manifest = folder / "manifest.json"
    content = {**json.loads(manifest.read_text()), "files": hash_files(folder), **changes}
    manifest.write_text(json.dumps(content))


def replace_at_loading(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts another model into `folder` when an evaluation loads its first one, as another job's export would."""

    def load(*arguments: Any) -> Any:
        with (folder / "config.json").open("a") as stream:
            stream.write("\n")
        update_manifest(folder)
        return load_frozen(*arguments)

    monkeypatch.setattr("dskd.evaluation.models.load_frozen", load)


def write_config(path: Path, base: dict, **changes: object) -> Path:
    """Writes a YAML config: `base` with whole sections or top-level keys replaced."""
    path.write_text(yaml.safe_dump({**base, **changes}), encoding="utf-8")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny",
        type=Path,
        metavar="FOLDER",
        help="keep the work directory that many tests share, and use it again; for work on tests, since a change of "
        "the code does not make it again",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file that needs `tiny` comes first and makes it; meanwhile others have some of those that do not need it,
    of which the others come last: they are short, and no worker waits long for the last file of another.
    """
    users = {item.path for item in items if "tiny" in getattr(item, "fixturenames", ())}
    first = next((item.path for item in items if item.path in users), None)
    paths = list(dict.fromkeys(item.path for item in items if item.path not in users))
    meanwhile = set(paths[: len(paths) // 3])
    items.sort(key=lambda item: (item.path != first, item.path not in meanwhile, item.path not in users))


@pytest.fixture(scope="session")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a work directory that the pipeline made on two ranks.

    Ranks are started as those of other tests are; tests/test_pipeline.py has DeepSpeed's launcher start them.

    Text and relations are a part of WordNet's, written to files: reading all of it in every process would take longer
    than the rest. `corpus.source: wordnet` and `lexicon.wordnet` have tests of their own.
    """
    kept = request.config.getoption("--tiny")
    if kept is not None:
        folder = kept.resolve()
    elif "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "tiny"  # of all workers
    else:
        folder = tmp_path_factory.mktemp("tiny")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes it, the others wait
        if not (folder / "printed.txt").exists():
            _make_tiny(folder)
    return folder / "tiny.yaml"


def _make_tiny(folder: Path) -> None:
    from mlflow import MlflowClient

    from dskd import pipeline

    wordnet = open_wordnet()
    documents = itertools.islice(read_wordnet_documents(wordnet), 4000)
    lines = "".join(f"{json.dumps({'text': document.text})}\n" for document in documents)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    relations = Pairs(read_wordnet(wordnet)).resolved()
    short = [r for r in relations if len(r.head) <= 6 and len(r.tail) <= 8]
    pairs = "".join(f"{r.head}\t{r.relation}\t{r.tail}\n" for r in short)
    own = "# head, relation, tail\nlarge\tsynonym\tgreat\nlarge\tantonym\tsmall\n"
    (folder / "own.tsv").write_text(own + pairs, encoding="utf-8")
    config = write_config(
        folder / "tiny.yaml",
        TINY,
        workdir=str(folder / "work"),
        corpus={**TINY["corpus"], "train": [str(folder / "text.jsonl")]},
        lexicon={"wordnet": False, "tsv": [str(folder / "own.tsv")]},
    )
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(pipeline, "launch", launch_forked)
        patch.setattr("dskd.distributed.stopping.listen", lambda: None)  # signals to this process are pytest's
        pipeline.run_pipeline(config, [])
    release_lock(folder / "work" / pipeline.LOCK)
    MlflowClient(f"sqlite:///{folder / NO_RUNS}").search_experiments()
    (folder / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")


def launch_forked(_: Config, program: str, arguments: Sequence[str]) -> None:
    """In place of the pipeline's own, which DeepSpeed's launcher starts: two ranks, as those of other tests."""
    from forked_rank import run_launcher

    finish(fork_ranks(run_launcher, REPOSITORY / "launcher" / program, list(arguments), ranks=2), timeout_s=540)


@pytest.fixture(autouse=True)
def _launcher_variables() -> Iterator[None]:
    """Restores the launcher's variables: programs of one process remove them, others set them, and DeepSpeed and
    mosaicml-streaming read them at any time."""
    names = (*LAUNCHER_VARIABLES, "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def world() -> World:
    """One rank, in the test's own process: for what needs DeepSpeed and no second rank."""
    return initialize()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two hosts, node1 and node2; skipped with the reason where there can be none."""
    if reason := hosts.why_not():
        pytest.skip(reason)
    lab = Lab()
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def slurm(lab: Lab) -> Iterator[Slurm]:
    """A SLURM on the two hosts."""
    if reason := cluster_lab.slurm.why_not():
        pytest.skip(reason)
    slurm = Slurm(lab)
    yield slurm
    slurm.close()


@pytest.fixture
def copy_of_tiny(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a config with a work directory of its own that starts with some of the artifacts of `tiny`."""
    return functools.partial(copy_work, tiny, tmp_path)


def copy_work(config: Path, folder: Path, *artifacts: str, **changes: object) -> Path:
    """A config in `folder` with a work directory of its own, which starts with some of the artifacts of `config`'s."""
    base = yaml.safe_load(config.read_text(encoding="utf-8"))
    source, target = Path(base["workdir"]), folder / "work"
    target.mkdir(parents=True, exist_ok=True)
    for artifact in artifacts:
        if artifact == NO_RUNS:
            shutil.copyfile(config.parent / NO_RUNS, target / NO_RUNS)
        else:
            shutil.copytree(source / artifact, target / artifact)
    return write_config(folder / "config.yaml", base, **{"workdir": str(target), **changes})


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Makes a folder one that this process may only read: for root, who may write everywhere, as a mount."""
    with contextlib.ExitStack() as undo:

        def protect(folder: Path) -> None:
            if os.geteuid():
                mode = folder.stat().st_mode
                folder.chmod(0o500)
                undo.callback(folder.chmod, mode)
                return
            mount = ["mount", "--bind", folder, folder]
            tried = subprocess.run(mount, capture_output=True, text=True)
            if tried.returncode:
                pytest.skip(f"root may write everywhere, and cannot mount here: {tried.stderr.strip()}")
            undo.callback(subprocess.run, ["umount", folder], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

        yield protect


@pytest.fixture
def link(server, monkeypatch):
    from mlflow_server import Link

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracker, "_RETRY_AFTER_S", 0.1)
    monkeypatch.setattr(tracker, "_FLUSH_TIMEOUT_IN_HASTE_S", 0.5)
    link = Link(server)
    link.mend()
    yield link
    link.cut()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from mlflow_server import Server

    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


# To make MLflow's tables takes longer than most tests train; where `tiny` is made the product makes them.
NO_RUNS = "mlflow.db"
BEFORE_TRAINING: Sequence[str] = (
    *("corpus", "lexicon", "teacher", "sequences", "senses", "shards", "student"),
    NO_RUNS,
)
