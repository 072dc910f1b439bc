"""A real SLURM on the hosts of a lab: munged, slurmctld on the switch, a slurmd on every other host."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from cluster_lab.hosts import SWITCH, HostProcess, Lab

PREEMPTOR_PARTITION, PARTITION = "high", "main"
ENDED = frozenset(("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"))
_COMMANDS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "scontrol": "slurm-client",
}
_CONFIG = """\
ClusterName=lab
SlurmctldHost={switch}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its credential to expire before it starts again.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=5
SlurmdTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
{nodes}
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName={preemptor} Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Returns why this machine cannot run SLURM, or None if it can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = {package for command, package in _COMMANDS.items() if shutil.which(command, path=path) is None}
    return f"SLURM is not installed: apt-get install {' '.join(sorted(missing))}" if missing else None


class Slurm:
    """A SLURM with two GPUs per node, which are dummy devices. Jobs of partition `high` preempt those of `main`."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "slurm"
        self.folder.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        self._write_config()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        }
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemons = {
            "munged": self._daemon(
                SWITCH, "munged", "--foreground", "--force", *munge, f"--socket={self.folder}/munge.sock"
            )
        }
        self._until((self.folder / "munge.sock").is_socket, "munged has no socket")
        self._daemons["slurmctld"] = self._daemon(SWITCH, "slurmctld", "-D", "-i")
        for host in lab.hosts:
            self.start_node(host)
        self._until(lambda: self._idle_nodes() == len(lab.hosts), "the nodes are not idle")

    def start_node(self, host: str) -> None:
        """Starts the node daemon of a host."""
        self._daemons[host] = self._daemon(host, "slurmd", "-D", "-N", host)

    def run(self, *argv: str, timeout_s: float = 60) -> str:
        """Runs a command of SLURM, and returns its output; it must succeed."""
        return self.lab.run(SWITCH, *argv, env=self.environment, timeout_s=timeout_s)

    def submit(self, script: Path, *arguments: str, options: Collection[str] = (), env: Mapping[str, str] = {}) -> int:
        """Submits a batch script and returns the job's number; `env` overrides the submitter's environment."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        printed = self.lab.run(SWITCH, *command, env={**self.environment, **env})
        return int(printed.split(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """Returns the fields of `scontrol show job`: JobState, Restarts, ExitCode, Reason and so on."""
        printed = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(re.findall(r"(\S+?)=(\S*)", printed))

    def state(self, job: int) -> str:
        """Returns the job's state, such as RUNNING."""
        return self.show(job)["JobState"]

    def wait(self, job: int, timeout_s: float, states: Collection[str] = ENDED) -> dict[str, str]:
        """Waits until the job is in one of the states, and returns its fields."""
        self._until(lambda: self.state(job) in states, f"job {job} is not {' or '.join(sorted(states))}", timeout_s)
        return self.show(job)

    def cancel_all(self) -> None:
        """Ends all jobs, and waits until they are gone."""
        self.run("scancel", "--user=root", "--quiet")
        self._until(lambda: not self.run("squeue", "--noheader"), "jobs do not end", 60)

    def close(self) -> None:
        """Ends the daemons; the lab ends all other processes."""
        for host in (*self.lab.hosts, "slurmctld", "munged"):
            self._daemons[host].send_signal(15)
        for host in (*self.lab.hosts, "slurmctld", "munged"):
            try:
                self._daemons[host].wait(10)
            except AssertionError:
                self._daemons[host].send_signal(9)

    def _write_config(self) -> None:
        nodes = []
        for host in self.lab.hosts:
            nodes.append(
                f"NodeName={host} NodeAddr={self.lab.address[host]} CPUs=2 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
            )
        for index in range(2):  # SLURM schedules GPUs only if they have device files
            os.mknod(self.folder / f"gpu{index}", 0o20666, os.makedev(1, 3))
        hosts = ",".join(self.lab.hosts)
        (self.folder / "gres.conf").write_text(f"NodeName={hosts} Name=gpu File={self.folder}/gpu[0-1]\n")
        text = _CONFIG.format(
            switch=SWITCH,
            address=self.lab.address[SWITCH],
            folder=self.folder,
            nodes="\n".join(nodes),
            partition=PARTITION,
            preemptor=PREEMPTOR_PARTITION,
        )
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _daemon(self, host: str, *argv: str) -> HostProcess:
        log = self.folder / f"{argv[0]}-{host}.out"
        return self.lab.start(host, argv, self.environment, log=log)

    def _idle_nodes(self) -> int:
        try:
            return len(self.run("sinfo", "-h", "-N", "-p", PARTITION, "-t", "idle", "-o", "%N", timeout_s=10).split())
        except (AssertionError, subprocess.TimeoutExpired):  # the controller is not listening yet
            return 0

    def _until(self, condition: Callable[[], bool], complaint: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} has ended:\n{daemon.output}"
            assert time.monotonic() < deadline, f"{complaint} after {timeout_s} s"
            time.sleep(0.1)
