"""Training on two hosts, with a launcher on each: to the end, and through a cut link and a host whose processes die."""

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cluster_lab.hosts import HostProcess, Lab
from config_files import write_config
from repository import REPOSITORY
from tiny_work import BEFORE_TRAINING, TINY, copy_work
from tracked_results import losses_of

from dskd.config.reading import load_config
from dskd.training.checkpoints import checkpoint

pytestmark = pytest.mark.cluster

STEPS, TIMEOUT_S = 60, 30  # ranks of one host may start so much later than those of the other
# What a launcher needs beyond the time-out: time for torch to notice, and DeepSpeed's 30 s for ranks that hang.
PATIENCE_S = TIMEOUT_S + 60


@dataclass(frozen=True)
class Site:
    """A work directory on the disk that the hosts share."""

    lab: Lab
    folder: Path
    config: Path

    def start(self, *arguments: str) -> list[HostProcess]:
        """Starts training with two ranks per host."""
        return self._launch(str(REPOSITORY / "launcher" / "train.py"), "--config", str(self.config), *arguments)

    def start_module(self, verb: str) -> list[HostProcess]:
        """Starts a verb of `dskd` in the same way."""
        return self._launch("--module", "dskd", verb, "--config", str(self.config))

    def _launch(self, *program: str) -> list[HostProcess]:
        """Starts a launcher on each host, as a user does on hosts without ssh."""
        hostfile = self.folder / "hosts"
        hostfile.write_text("".join(f"{host} slots=2\n" for host in self.lab.hosts))
        env = os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
        common = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", self.lab.hosts[0], "--master_port", "29500"]
        return [
            self.lab.start(host, ["deepspeed", *common, "--node_rank", str(rank), *program], env, cwd=REPOSITORY)
            for rank, host in enumerate(self.lab.hosts)
        ]

    def wait_for_checkpoint(self, launchers: Sequence[HostProcess], step: int) -> int:
        """Waits for a checkpoint of this step or a later one; returns its step."""
        loaded = load_config(self.config)
        deadline = time.monotonic() + 240
        while (newest := checkpoint.latest(loaded)) is None or newest.step < step:
            assert all(one.poll() is None for one in launchers), output(launchers)
            assert time.monotonic() < deadline, output(launchers)
            time.sleep(0.05)
        return newest.step


def output(launchers):
    return "\n".join(one.output for one in launchers)


@pytest.fixture(scope="module")
def site(lab, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-hosts")
    settings = {**TINY["train"], "steps": STEPS, "checkpoint_every": 10, "collective_timeout_s": TIMEOUT_S}
    config = copy_work(tiny, folder, *BEFORE_TRAINING, train=settings)
    return Site(lab, folder, config)


@pytest.fixture(scope="module")
def undisturbed(site):
    launchers = site.start("run=undisturbed")
    assert [one.wait(300) for one in launchers] == [0, 0], output(launchers)
    return _losses(site, "undisturbed")


def test_two_hosts_train_to_the_end(undisturbed):
    assert [step for step, _ in undisturbed] == list(range(1, STEPS + 1))


def test_a_cut_link_ends_every_rank_and_the_run_resumes_from_the_last_checkpoint(site, undisturbed):
    def cut():
        site.lab.cut_link("node2")

    first, second = _lose(site, "cut", cut)
    for ranks, launcher, lost in (((0, 1), first, "ranks 2, 3 (node2)"), ((2, 3), second, "ranks 0, 1 (node1)")):
        assert launcher.wait(PATIENCE_S) not in (0, 2, 75), launcher.output
        named = re.findall(rf"\[rank (\d), node\d\] {re.escape(lost)} cannot be reached", launcher.output)
        # The first rank that reports it ends, and its launcher may then end the other before it reports it too.
        assert named and {int(rank) for rank in named} <= set(ranks), launcher.output
    site.lab.mend_link("node2")
    _go_on(site, "cut", undisturbed)


def test_a_host_whose_processes_die_is_named_and_the_run_resumes(site, undisturbed):
    def kill():
        pids = site.lab.run("node2", "pgrep", "-f", r"launcher/train\.py").split()
        site.lab.run("node2", "kill", "-KILL", *pids)

    survivor, dead = _lose(site, "killed", kill)
    assert survivor.wait(PATIENCE_S) not in (0, 2, 75)
    assert re.search(r"\[rank \d, node1\] ranks 2, 3 \(node2\) are not there any more", survivor.output)
    assert dead.wait(10) == -9
    _go_on(site, "killed", undisturbed)


def test_preflight_names_the_host_with_different_storage(site):
    """The host mounts something else at the work directory; everything else that preflight checks is right."""
    site.lab.run("node2", "mount", "-t", "tmpfs", "none", str(site.folder / "work"))
    try:
        launchers = site.start_module("preflight")
        codes = [one.wait(120) for one in launchers]
    finally:
        site.lab.run("node2", "umount", str(site.folder / "work"))
    assert codes == [1, 1], output(launchers)
    printed = launchers[0].output
    for rank in (2, 3):
        assert f"rank {rank} (node2): {site.folder / 'work'} is not the folder that rank 0 writes to" in printed
    assert "(node1)" not in printed
    assert re.search(r"^node2  +2  +cpu", printed, re.MULTILINE)
    assert "Traceback" not in output(launchers)


def _lose(site, run, disturb):
    launchers = site.start(f"run={run}")
    site_of_run = _of_run(site, run)
    site_of_run.wait_for_checkpoint(launchers, 10)
    disturb()
    return launchers


def _go_on(site, run, undisturbed):
    newest = checkpoint.latest(load_config(_of_run(site, run).config))
    assert 10 <= newest.step < STEPS
    launchers = site.start(f"run={run}", "--resume")
    assert [one.wait(300) for one in launchers] == [0, 0], output(launchers)
    assert f"from step {newest.step}" in output(launchers)
    assert _losses(site, run) == undisturbed


def _of_run(site, run):
    config = yaml.safe_load(site.config.read_text())
    return Site(site.lab, site.folder, write_config(site.folder / f"{run}.yaml", config, run=run))


def _losses(site, run):
    return losses_of(_of_run(site, run).config)
