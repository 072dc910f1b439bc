"""A soak test: short runs are killed and resumed until each is done, and nothing may be lost.

    python -m benchmarks.soak                            # 50 kills, about a quarter of an hour on two cores
    python -m benchmarks.soak --kills 20 --ranks 4 --seed 1 --output FILE.json

Everything up to the shards is made from `configs/smoke.yaml`, and one training runs undisturbed. Then annotations and
trainings of the same config are started with DeepSpeed's launcher, killed with -9 and started again. The target of a
kill and its time are drawn at random:

    target  one rank, with its loader's workers; the launcher and all processes below it; or the launcher alone, whose
            ranks are killed a moment later, as a scheduler does with the remains of a job
    time    at any time of its start or of its steps, or while it writes a checkpoint; a fifth of the kills hit
            annotation

In the end every training must have the undisturbed training's loss at every step, bit for bit, and its weights, and the
shards must be the same bytes: a sample that was lost or repeated would show. Otherwise the exit code is 1.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import REPOSITORY, build_parser, machine, parse, publish
from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.distributed.rendezvous import free_port
from dskd.tracking import read_history
from dskd.training.checkpoints import checkpoint

CONFIG = REPOSITORY / "configs" / "smoke.yaml"
_WHO = ("a rank", "launcher and ranks", "launcher alone")
_WHEN = ("starting", "in its steps", "writing a checkpoint")
_KILLS_OF_A_TRAINING = 6
_PATIENCE_S = 300  # time for the other ranks to end after one of them


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the draws of targets and times")
    args = parse(parser, arguments)
    at_start = machine()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dskd-soak-") as folder:
        soak = Soak(Path(folder), args.ranks, random.Random(args.seed))
        soak.prepare()
        soak.annotate_killed(args.kills // 5)
        trainings = 0
        while soak.survived < args.kills:
            trainings += 1
            soak.train_killed(f"killed-{trainings}", args.kills)
            print(f"{soak.survived} kills survived, {time.monotonic() - started:,.0f} s", flush=True)
    rows = [[what, who, when, str(count)] for (what, who, when), count in sorted(soak.kills.items())]
    rows.append(["all", "", "", str(soak.survived)])
    rows.append([f"{trainings} trainings", "", "finished, equal to an undisturbed one", f"{soak.starts} starts"])
    results = {
        "kills": {", ".join(kill): count for kill, count in soak.kills.items()},
        "survived": soak.survived,
        "trainings": trainings,
        "starts": soak.starts,
        "seconds": time.monotonic() - started,
    }
    publish(args, "benchmarks.soak", ("what", "target of the kill", "when", "kills survived"), rows, results, at_start)


class Job:
    """A program of `launcher/` on several ranks, started by DeepSpeed's launcher."""

    def __init__(self, program: str, config: Path, overrides: Sequence[str], ranks: int, log: Path) -> None:
        self._program = program
        self._log = log
        self._start = log.stat().st_size if log.exists() else 0
        deepspeed = Path(sys.executable).parent / "deepspeed"
        launcher = [deepspeed, "--num_gpus", ranks, "--master_port", free_port()]
        command = [*launcher, REPOSITORY / "launcher" / program, "--config", config, *overrides]
        with log.open("a") as stream:
            self._process = subprocess.Popen(
                [str(part) for part in command], cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT
            )
        self._seen: set[psutil.Process] = set()

    def is_running(self) -> bool:
        """Returns True while the launcher or any process below it runs."""
        return bool(self._processes())

    @property
    def output(self) -> str:
        """The text that the job has printed."""
        return self._log.read_text(errors="replace")[self._start :]

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits for a condition; returns False if the job ends first."""
        while not condition():
            if self._process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def kill(self, who: str, draw: random.Random) -> bool:
        """Kills a part of the job, and waits until no process is left; returns False if there was nothing to kill."""
        processes = self._processes()
        ranks = [p for p in processes if any(Path(part).name == self._program for part in _command(p)[:4])]
        if self._process.poll() is not None or not processes or (who == "a rank" and not ranks):
            return False
        if who == "launcher and ranks":
            _kill(processes)
        elif who == "launcher alone":
            _kill(p for p in processes if p not in ranks)
            time.sleep(draw.uniform(0, 2))
            _kill(self._processes())
        else:
            # A loader's workers have the same command as their rank, but their parent is the rank, not the launcher.
            rank = draw.choice([p for p in ranks if _parent(p) not in ranks])
            _kill([rank, *(p for p in ranks if _parent(p) == rank)])
        self.wait()
        return True

    def wait(self) -> int:
        """Waits until no process of the job is left; returns the launcher's exit code."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.is_running():
            self._process.poll()
            if time.monotonic() > deadline:
                _kill(self._processes())
                raise SystemExit(
                    f"a job did not end within {_PATIENCE_S} s after a kill; it had printed:\n{self.output}"
                )
            time.sleep(0.05)
        return self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            self._seen.add(psutil.Process(self._process.pid))
        for process in list(self._seen):
            with suppress(psutil.NoSuchProcess):
                self._seen.update(process.children(recursive=True))
        self._seen = {process for process in self._seen if _is_alive(process)}
        return list(self._seen)


class Soak:
    """The soak test: it starts and kills jobs, and compares their results with those of undisturbed ones."""

    def __init__(self, folder: Path, ranks: int, draw: random.Random) -> None:
        self._folder, self._ranks, self._draw = folder, ranks, draw
        self._overrides = [f"workdir={folder / 'work'}", "train.collective_timeout_s=60"]
        self._annotation_s = 0.0
        self._start_s = self._steps_s = 0.0  # durations of an undisturbed training
        self._undisturbed: Any = None
        self.kills: Counter[tuple[str, str, str]] = Counter()
        self.starts = 0

    @property
    def survived(self) -> int:
        """Number of kills so far; the job continued after each of them."""
        return sum(self.kills.values())

    def prepare(self) -> None:
        """Makes everything up to the shards, and trains once undisturbed."""
        pipeline = [sys.executable, REPOSITORY / "launcher" / "pipeline.py", "--config", CONFIG, "--until", "shards"]
        subprocess.run([str(part) for part in [*pipeline, *self._overrides]], check=True)
        job, started = self._start("train.py", "undisturbed"), time.monotonic()
        job.wait_until(lambda: "steps of" in job.output)
        self._start_s = time.monotonic() - started
        job.wait()
        self._steps_s = time.monotonic() - started - self._start_s
        self._undisturbed = self._result("undisturbed")

    def annotate_killed(self, kills: int) -> None:
        """Annotates again until `kills` kills are survived, and checks that the shards stay the same bytes."""
        config = self._config("undisturbed")
        expected = self._shards()
        shutil.rmtree(config.path(kinds.SHARDS.folder))
        started = time.monotonic()
        self._start("annotate.py", "undisturbed").wait()
        usual_s = time.monotonic() - started
        self._require_shards(expected)
        shutil.rmtree(config.path(kinds.SHARDS.folder))
        while self.survived < kills:
            job, who = self._start("annotate.py", "undisturbed"), self._draw.choice(_WHO)
            time.sleep(self._draw.uniform(0, usual_s))
            if job.kill(who, self._draw):
                self.kills["annotation", who, "at any time"] += 1
            else:  # the job was done before the kill
                job.wait()
                self._require_shards(expected)
                shutil.rmtree(config.path(kinds.SHARDS.folder))
        self._start("annotate.py", "undisturbed").wait()
        self._require_shards(expected)

    def train_killed(self, run: str, kills: int) -> None:
        """Trains a run to its end, and kills it at most :data:`_KILLS_OF_A_TRAINING` times on the way.

        No more kills follow once the soak test has survived `kills` altogether.
        """
        config = self._config(run)
        of_this_run = 0
        while of_this_run < _KILLS_OF_A_TRAINING and self.survived < kills:
            job, who, when = self._start("train.py", run), self._draw.choice(_WHO), self._draw.choice(_WHEN)
            if not (self._wait_for(when, job, config) and job.kill(who, self._draw)):
                job.wait()  # the job was done before the kill
                break
            self.kills["training", who, when] += 1
            of_this_run += 1
            checkpoint.latest(config, verify=True)  # raises if all checkpoints are damaged
        else:
            self._start("train.py", run).wait()
        if self._result(run) != self._undisturbed:
            raise SystemExit(
                f"run {run} differs from the undisturbed one in losses or weights; kills so far: {dict(self.kills)}"
            )

    def _wait_for(self, when: str, job: Job, config: Config) -> bool:
        if when == "starting":
            time.sleep(self._draw.uniform(0, self._start_s))
            return True
        if not job.wait_until(lambda: "steps of" in job.output):
            return False
        if when == "in its steps":
            time.sleep(self._draw.uniform(0, self._steps_s))
            return True
        base = kinds.checkpoint_folder(config)
        is_writing = job.wait_until(lambda: any(base.glob(".step-*.partial")))
        time.sleep(self._draw.uniform(0, 0.1))
        return is_writing

    def _start(self, program: str, run: str) -> Job:
        self.starts += 1
        more = ["--resume", f"run={run}"] if program == "train.py" else []
        return Job(program, CONFIG, [*self._overrides, *more], self._ranks, self._folder / f"{run}.log")

    def _config(self, run: str) -> Config:
        return load_config(CONFIG, [*self._overrides, f"run={run}"])

    def _result(self, run: str) -> Any:
        """Returns (step, loss) of every step, and the digest of the trained weights."""
        config = self._config(run)
        newest = checkpoint.latest(config, verify=True)
        if newest is None or not newest.is_final:
            log = (self._folder / f"{run}.log").read_text(errors="replace")
            raise SystemExit(f"run {run} did not finish; it printed:\n{log}")
        losses = read_history(config, newest.manifest.facts["mlflow_run_id"], "train/loss")
        return losses, newest.manifest.files[checkpoint.TRAINED_FILE]["sha256"]

    def _shards(self) -> list[str]:
        return [self._manifest(split).digest for split in ("train", "validation")]

    def _manifest(self, split: str) -> Manifest:
        return read_manifest(self._config("undisturbed").path(kinds.SHARDS.folder, split), "shards", made_by="the soak")

    def _require_shards(self, expected: list[str]) -> None:
        if self._shards() != expected:
            raise SystemExit(f"killed annotations wrote different shards; kills so far: {dict(self.kills)}")


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def _parent(process: psutil.Process) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        return process.parent()
    return None


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _kill(processes: Any) -> None:
    for process in list(processes):
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
