"""A place on the hosts of a lab where trainings are submitted to their SLURM."""

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from config_files import write_config
from repository import REPOSITORY
from tracked_results import losses_of

from cluster_lab.slurm import Slurm
from dskd.config.reading import load_config
from dskd.tracking import read_runs
from dskd.training.checkpoints import checkpoint

TRAIN = REPOSITORY / "cluster" / "slurm" / "train.sbatch"
JOB_S = 400
# In the environment of the submitter; ranks import the clone nevertheless.
PYTHON = {"PYTHONPATH": "/elsewhere"}


@dataclass(frozen=True)
class Site:
    """A work directory on the disk that the nodes share, and a cluster.env for it."""

    slurm: Slurm
    folder: Path
    config: Path

    def submit(self, *overrides: str, env: str = "", gpus: Collection[str] = ("--gpus-per-node=2",)) -> int:
        """Submits a training on both nodes, with more lines of cluster.env."""
        file = self.write_env(env)
        options = ["--nodes=2", *gpus, f"--chdir={REPOSITORY}", f"--output={self.folder}/%j.log"]
        return self.slurm.submit(TRAIN, *overrides, options=options, env={"DSKD_ENV": str(file), **PYTHON})

    def write_env(self, more: str = "") -> Path:
        """Writes the repository's own cluster.env, followed by the values of this site and further lines."""
        own = (REPOSITORY / "cluster" / "slurm" / "cluster.env").read_text(encoding="utf-8")
        file = self.folder / f"{len(list(self.folder.glob('*.env')))}.env"
        values = {"VENV": sys.prefix, "CONFIG": self.config, "LOGS": self.folder, "NODES": 2, "GPUS_PER_NODE": 2}
        lines = [f"DSKD_{name}='{value}'" for name, value in values.items()]
        # Preflight starts all ranks once more, so only tests about it turn it on.
        file.write_text("\n".join([own, *lines, "DSKD_PREFLIGHT=", more, ""]), encoding="utf-8")
        return file

    def log(self, job: int) -> str:
        """Returns the output of a job."""
        return (self.folder / f"{job}.log").read_text(errors="replace")

    def wait(self, job: int, state: str) -> dict[str, str]:
        """Waits for the job's end, which must be in `state`."""
        shown = self.slurm.wait(job, JOB_S)
        assert shown["JobState"] == state, self.log(job)
        return shown

    def wait_for_checkpoint(self, job: int, run: str, step: int = 1) -> int:
        """Waits until a run has a checkpoint of that step or a later one; returns its step."""
        loaded = load_config(self.config, [f"run={run}"])

        def step_of_newest() -> int:
            newest = checkpoint.latest(loaded)
            return 0 if newest is None else newest.step

        self.until(lambda: step_of_newest() >= step, job)
        return step_of_newest()

    def wait_for_attempt(self, job: int, number: int) -> None:
        """Waits until attempt `number` of a job runs; the first is 0."""
        self.until(lambda: f"Restarts={number}" in self.shown(job) and "JobState=RUNNING" in self.shown(job), job)

    def shown(self, job: int) -> str:
        """Returns the output of `scontrol show job`."""
        return self.slurm.run("scontrol", "--oneliner", "show", "job", str(job))

    def wait_for_line(self, job: int, text: str, times: int = 1) -> None:
        """Waits until a job has printed a text `times` times."""
        log = self.folder / f"{job}.log"
        self.until(lambda: log.exists() and self.log(job).count(text) >= times, job)

    @contextlib.contextmanager
    def dead(self, host: str) -> Iterator[None]:
        """Switches a host off during the block, and afterwards on again with its node daemon."""
        self.slurm.lab.halt(host)
        try:
            yield
        finally:
            self.slurm.lab.boot(host)
            self.slurm.start_node(host)

    def stand_in(self, name: str, deepspeed: str) -> Path:
        """Makes a virtual environment in which `deepspeed` is a shell script of these lines."""
        programs = self.folder / name / "bin"
        programs.mkdir(parents=True)
        for program, lines in (("deepspeed", deepspeed), ("python", f'exec {sys.executable} "$@"')):
            (programs / program).write_text(f"#!/bin/bash\n{lines}\n")
            (programs / program).chmod(0o755)
        return programs.parent

    def runs(self, run: str) -> list:
        """Returns the tracked runs of that name."""
        return [one for one in read_runs(load_config(self.config)) if one.name == run]

    def losses(self, run: str) -> list[tuple[int, float]]:
        """Returns (step, loss) of a run; there must be one tracked run of that name."""
        config = yaml.safe_load(self.config.read_text())
        return losses_of(write_config(self.folder / f"{run}.yaml", config, run=run))

    def until(self, condition: Callable[[], bool], job: int) -> None:
        """Waits for a condition while the job has not ended."""
        deadline = time.monotonic() + JOB_S
        while not condition():
            assert self.slurm.state(job) in ("PENDING", "RUNNING", "COMPLETING"), self.log(job)
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.1)
