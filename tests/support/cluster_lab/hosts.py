"""Hosts made of kernel namespaces, each with its own network interface, name, processes and shared memory.

They share the disk, as the nodes of a cluster share a file system. Processes that this one starts hold the hosts and
the switch that connects them: when it ends, in whatever way, nothing is left. Two labs on one machine do not see each
other.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SWITCH = "ctl"
_SWITCH_ADDRESS = "10.77.0.254"
_COMMANDS = {"unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "ip": "iproute2"}
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
# /proc and /dev/shm are the host's own. So is /etc/hosts, because gloo resolves its own host's name.
_SET_UP = """set -e
hostname "$1"; mount --bind "$2" /etc/hosts; mount -t tmpfs -o size=2g shm /dev/shm; ip link set lo up
echo up; exec env --ignore-signal=CHLD sleep infinity"""


def why_not() -> str | None:
    """Returns why this machine cannot have hosts, or None if it can."""
    if not sys.platform.startswith("linux"):
        return "hosts need the namespaces of Linux"
    if os.geteuid():
        return "making hosts (network namespaces) needs root"
    for command, package in _COMMANDS.items():
        if shutil.which(command) is None:
            return f"there is no `{command}`; install the Debian package {package}"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "name", "a", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


class HostProcess:
    """A program that runs on a host."""

    def __init__(self, entered: subprocess.Popen, log: Path) -> None:
        self._entered = entered
        self.log = log
        self.pid = self._find_program()

    def poll(self) -> int | None:
        """Returns the exit code, negative if a signal ended the program, or None while it runs."""
        return self._entered.poll()

    def wait(self, timeout_s: float) -> int:
        """Waits for the program to end, and returns its exit code."""
        try:
            return self._entered.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the program still runs after {timeout_s} s; it has printed:\n{self.output}"
            ) from None

    def send_signal(self, number: int) -> None:
        """Sends a signal to the program, but not to its children."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """The output of the program and its children so far."""
        return self.log.read_text(errors="replace")

    def _find_program(self) -> int | None:
        """Returns the program's pid. It is a child of `nsenter`, because only children enter another PID namespace."""
        children = Path(f"/proc/{self._entered.pid}/task/{self._entered.pid}/children")
        while self._entered.poll() is None:
            with contextlib.suppress(OSError):
                if found := children.read_text().split():
                    return int(found[0])
            time.sleep(0.005)
        return None


class Lab:
    """Hosts with addresses 10.77.0.1, 10.77.0.2, … on one switch, which is a host itself (`ctl`, 10.77.0.254).

    `aliases` gives hosts further names, such as those with dots that a cluster's DNS gives to pods.
    """

    def __init__(self, hosts: Sequence[str] = ("node1", "node2"), aliases: Mapping[str, Sequence[str]] = {}) -> None:
        self.hosts = tuple(hosts)
        # Not in pytest's folders: the paths of sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="dskd-lab-"))
        self.address = {SWITCH: _SWITCH_ADDRESS} | {host: f"10.77.0.{i}" for i, host in enumerate(self.hosts, 1)}
        lines = [" ".join((address, host, *aliases.get(host, ()))) for host, address in self.address.items()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._holders: dict[str, subprocess.Popen] = {}
        self._init: dict[str, int] = {}
        with contextlib.ExitStack() as undone:
            undone.callback(self.close)
            self._boot(SWITCH)
            self._ip(SWITCH, "link add switch type bridge", f"addr add {_SWITCH_ADDRESS}/24 dev switch")
            self._ip(SWITCH, "link set switch up")
            for host in self.hosts:
                self.boot(host)
            undone.pop_all()  # everything has started, so keep it

    def boot(self, host: str) -> None:
        """Starts a host, or restarts a halted one; no program runs on it yet."""
        self._boot(host)
        self._ip(SWITCH, f"link add {self._port(host)} type veth peer name eth0 netns {self._init[host]}")
        self._ip(SWITCH, f"link set {self._port(host)} master switch up")
        # Use the same address as before: the other hosts remember it, and would not find a new one at once.
        self._ip(host, f"link set eth0 address 02:00:00:00:00:{self.hosts.index(host) + 1:02x}")
        self._ip(host, f"addr add {self.address[host]}/24 dev eth0", "link set eth0 up")

    def halt(self, host: str) -> None:
        """Disconnects a host and kills all its processes, like a power cut."""
        holder = self._holders.pop(host)
        holder.kill()  # this kills the first process of the namespace, and thereby all others
        holder.wait()

    def cut_link(self, host: str) -> None:
        """Pulls the host's cable, without notice to any process."""
        self._ip(SWITCH, f"link set {self._port(host)} down")

    def mend_link(self, host: str) -> None:
        """Plugs the host's cable in again."""
        self._ip(SWITCH, f"link set {self._port(host)} up")

    def start(
        self,
        host: str,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        cwd: Path | None = None,
        log: Path | None = None,
        first_in_namespace: bool = False,
    ) -> HostProcess:
        """Starts a program on a host and returns at once.

        Args:
            host: one of `hosts`, or SWITCH.
            argv: the program and its arguments.
            env: the whole environment; by default, this process's.
            cwd: the working directory; by default, this process's.
            log: the file for its output.
            first_in_namespace: whether it gets process ID 1, as in a container, where no signal has a default effect.
        """
        if log is None:
            handle, name = tempfile.mkstemp(dir=self.folder, prefix="log-")
            os.close(handle)
            log = Path(name)
        inside = [] if not first_in_namespace else ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*self._enter(host), *inside, "env", f"--chdir={cwd or Path.cwd()}", *argv]
        with log.open("ab") as out:
            entered = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        process = HostProcess(entered, log)
        if first_in_namespace and process.pid is not None:
            process.pid = _only_child(process.pid)
        return process

    def run(self, host: str, *argv: str, env: Mapping[str, str] | None = None, timeout_s: float = 60) -> str:
        """Runs a program on a host, and returns its output; it must succeed."""
        finished = subprocess.run(
            [*self._enter(host), "env", f"--chdir={Path.cwd()}", *argv],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert finished.returncode == 0, f"{argv}: exit code {finished.returncode}: {finished.stdout}{finished.stderr}"
        return finished.stdout

    def close(self) -> None:
        """Ends all hosts and removes the lab's folder."""
        for host in list(self._holders):
            self.halt(host)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _boot(self, host: str) -> None:
        # The kernel kills the holder when this process ends, and the namespaces' processes when the holder does.
        holding = ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        set_up = ["--propagation", "private", "sh", "-c", _SET_UP, "sh", host, str(self.folder / "hosts")]
        holder = subprocess.Popen(
            [*holding, *set_up],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._holders[host] = holder
        line = holder.stdout.readline()
        assert line == "up\n", f"{host} does not start: {line}{holder.stdout.read()}"
        self._init[host] = _only_child(holder.pid)

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "--target", str(self._init[host]), *_NAMESPACES, "--"]

    def _ip(self, host: str, *commands: str) -> None:
        for command in commands:
            entered = ["nsenter", f"--net=/proc/{self._init[host]}/ns/net", "ip", *command.split()]
            done = subprocess.run(entered, capture_output=True, text=True)
            assert done.returncode == 0, f"ip {command}: {done.stderr}"

    def _port(self, host: str) -> str:
        return f"port{self.hosts.index(host)}"


def _only_child(pid: int, timeout_s: float = 10) -> int:
    deadline = time.monotonic() + timeout_s
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while time.monotonic() < deadline:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.005)
    raise AssertionError(f"process {pid} has started no child within {timeout_s} s")
