"""Starts a program of `launcher/` on all ranks through DeepSpeed's launcher."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dskd.config import Config
from dskd.console import say
from dskd.distributed import stopping
from dskd.distributed.rendezvous import free_port
from dskd.distributed.world import uses_gpu
from dskd.errors import FAULT_EXIT_CODE, STOPPED_EXIT_CODE, USER_ERROR_EXIT_CODE, UserError

LAUNCHERS = Path(__file__).resolve().parent.parent.parent / "launcher"


class StageFailedError(Exception):
    """The error of a stage of several ranks that failed and has printed the reason itself.

    Its exit code is that of the stage for a user error or a stop, otherwise 1.
    """

    def __init__(self, message: str, exit_code: int = FAULT_EXIT_CODE) -> None:
        super().__init__(message)
        is_kept = exit_code in (USER_ERROR_EXIT_CODE, STOPPED_EXIT_CODE)
        self.exit_code = exit_code if is_kept else FAULT_EXIT_CODE


def launch(config: Config, program: str, arguments: Sequence[str]) -> None:
    """Starts a program of `launcher/` on all ranks and waits for it. Raises a StageFailedError if it failed, or a
    UserError if there is no `deepspeed` command.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    executable = shutil.which("deepspeed", path=path)
    if executable is None:
        raise UserError("there is no `deepspeed` next to this Python; install the package with its dependencies")
    shown = [*_launcher_arguments(config), str(LAUNCHERS / program), *arguments]
    say(f"$ deepspeed {shlex.join(shown)}")
    command, environment = [executable, "--quiet", *shown], os.environ | {"PATH": path}
    # Start a new session, so that signals can go to the launcher and all ranks together: a signal to the launcher alone
    # would leave the ranks running. The launcher inherits that USR1 is ignored; the ranks handle it.
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    process = subprocess.Popen(command, start_new_session=True, env=environment, stdout=sys.stderr)
    signal.signal(signal.SIGUSR1, handler)
    try:
        exit_code = _wait(process)
    except stopping.Stopped:  # `_wait` has waited for the ranks to end
        raise
    except BaseException:  # interruptions too must end the ranks, which would otherwise continue
        _end(process)
        raise
    if exit_code:
        raise StageFailedError(f"`{program}` failed with exit code {exit_code}", exit_code)


def _launcher_arguments(config: Config) -> Sequence[str]:
    arguments = config.pipeline.launcher_args
    if arguments is None:
        arguments = () if uses_gpu() else ("--num_gpus", str(min(2, os.cpu_count() or 1)))
    if any(argument.startswith(("--master_port", "--hostfile", "-H")) for argument in arguments):
        return arguments
    # Choose a free port: two pipelines on one machine must not both use the launcher's default port.
    return ("--master_port", str(free_port()), *arguments)


def _wait(process: subprocess.Popen) -> int:
    """Returns the launcher's exit code; passes a request to stop on to the ranks and waits for their end."""
    try:
        return process.wait()
    except stopping.Stopped:
        say("stopping: waiting for the ranks to save their progress")
        while process.poll() is None:
            # Repeated, because ranks that are still importing do not handle signals yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        raise


def _end(process: subprocess.Popen) -> None:
    """Ends the launcher and all of its ranks."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
