"""The common part of the programs of `launcher/` and the `dskd` command: arguments, ranks, errors and exit codes.

Exit codes: 0 done; 1 a bug (with a traceback), an outage, or lost ranks; 2 bad input, with a message and no traceback
(a scheduler must not retry it); 75 stopped by TERM or USR1, and the same command continues (training: with
`--resume`); 130 interrupted from the keyboard.
"""

import argparse
import atexit
import contextlib
import errno
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dskd.artifacts.disk_space import DISK_IS_FULL
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.console import allow_any_text, say
from dskd.distributed.shared_memory import describe_shortage
from dskd.distributed.stopping import Stopped, StopRequest, deferred, ignore, listen
from dskd.distributed.torch_errors import is_lack_of_shared_memory
from dskd.distributed.world import World, current_rank, is_main_process, launched_ranks
from dskd.errors import (
    FAULT_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    STOPPED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    LostPeerError,
    UserError,
    first_line,
)

_RANK_0_REPORTS_FIRST_S = 8.0  # on a busy machine the launcher takes seconds to end the other ranks
_OVERRIDES_HELP = (
    "replaces the value in the file, for example loss.sense_weight=0 or run=kd; values are YAML, as in the file; "
    "`dskd config` explains every key"
)


def build_parser(description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Builds a parser with the arguments that every program of `launcher/` has."""
    allow_any_text()  # before the parser prints its help
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    # DeepSpeed's launcher passes this option. It is ignored: ranks are read from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_verb(
    verbs: argparse._SubParsersAction,
    name: str,
    run_verb: Callable[[argparse.Namespace], int | None],
    *,
    text: str,
    epilog: str,
    description: str | None = None,
) -> argparse.ArgumentParser:
    """Adds a verb of `dskd` to the parsers of all verbs, and returns its parser.

    `run_verb` runs it with the parsed arguments and returns the exit code, None for 0. `text` is its line in the list
    of verbs, `epilog` has its examples, and `description`, by default `text`, is above its arguments.
    """
    parser = verbs.add_parser(
        name,
        help=text,
        description=description or f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run_verb=run_verb, parser=parser)
    return parser


def add_config_arguments(
    parser: argparse.ArgumentParser,
    *,
    is_required: bool = True,
    metavar: str = "section.key=value",
    text: str = _OVERRIDES_HELP,
) -> None:
    """Adds `--config FILE` and the overrides, called `metavar` and explained by `text` in the help."""
    parser.add_argument("--config", type=Path, required=is_required, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=text)


def parse(parser: argparse.ArgumentParser, *lists: str) -> argparse.Namespace:
    """Parses the command line. Overrides may be anywhere after the verb, even after an option that takes several names.

    `lists` are these options: what contains `=` after them is an override. An unknown option after a verb is refused
    with the verb's usage.
    """
    args, rest = parser.parse_known_args()  # argparse takes only the first group of overrides if the line has several
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(args, "overrides"):
        args.overrides += rest
    for name in lists:
        words = getattr(args, name)
        if words is not None:
            overrides, names = split_overrides(words)
            args.overrides += overrides
            setattr(args, name, names)
    return args


def whole_number(least: int) -> Callable[[str], int]:
    """Returns the parser of an argument that is a number, `least` or more."""

    def parse_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, found {text!r}")
        return int(text)

    return parse_number


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides among the words of a command line, which contain `=`, and the other words."""
    return [word for word in words if "=" in word], [word for word in words if "=" not in word]


def run(action: Callable[[], int | None]) -> int:
    """Runs a program's work and returns its exit code: that of `action` (None counts as 0) or that of the error.

    Prints user errors without a traceback.
    """
    try:
        return action() or 0
    except UserError as error:
        with deferred() as end:  # when the first rank has ended, the launcher sends TERM to the others
            if is_main_process():
                _print_error(error)
            elif not error.known_to_all_ranks and (error.unknown_to_rank_0 or not _rank_0_has_reported(end)):
                _print_error(error, f"[rank {current_rank()}] ")
        return error.exit_code
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of the output has closed it, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno not in DISK_IS_FULL:
            raise
        if not error.filename and (shortage := describe_shortage()):
            _print_error(f"{error.strerror}; {shortage}. Completed files are kept")
            return USER_ERROR_EXIT_CODE
        file = f" ({error.filename})" if error.filename else ""
        _print_error(
            f"{error.strerror}{file}; completed files are kept. Free some space, or set workdir to another disk "
            "(or --output, if the command has it), and run the same command again: it resumes"
        )
        return USER_ERROR_EXIT_CODE
    except UnicodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding == "utf-8":
            raise
        _print_error(
            f"{error}. The locale's encoding is {encoding}, which lacks this character; set LC_ALL=C.UTF-8, and unset "
            "PYTHONUTF8"
        )
        return USER_ERROR_EXIT_CODE
    except LostPeerError as error:
        _print_error(error)
        return FAULT_EXIT_CODE
    except Stopped as stopped:
        say(str(stopped) or "stopped on request; completed files are kept")
        return STOPPED_EXIT_CODE
    except KeyboardInterrupt:
        say("interrupted; completed files are kept")
        return INTERRUPTED_EXIT_CODE


def _print_error(error: object, start: str = "") -> None:
    print(f"{start}error: {error}", file=sys.stderr, flush=True)


def _rank_0_has_reported(end: StopRequest) -> bool:
    """Waits for a while; returns True if a request to stop arrives.

    Most errors occur on every rank. A request then means that rank 0 has printed the error and ended, so this rank need
    not print it.
    """
    deadline = time.monotonic() + _RANK_0_REPORTS_FIRST_S
    with contextlib.suppress(KeyboardInterrupt):
        while not end.is_pending and time.monotonic() < deadline:
            time.sleep(0.05)
        return end.is_pending
    return True


def run_stage(description: str | None, epilog: str, build: Callable[..., object], *, help_of_force: str) -> NoReturn:
    """Runs a program of `launcher/` that builds an artifact on all ranks, and whose only option is `--force`.

    Args:
        description: what the program does, for its help.
        epilog: its examples.
        build: called with the config, the ranks and `force=`; it imports what it needs, so that `--help` is quick.
        help_of_force: the help of `--force`.
    """
    parser = build_parser(description, epilog)
    parser.add_argument("--force", action="store_true", help=help_of_force)
    args = parse(parser)
    run_on_ranks(args, lambda config, world: build(config, world, force=args.force))


def run_on_ranks(
    args: argparse.Namespace,
    action: Callable[[Config, World], object],
    *,
    check: Callable[[Config, int], object] = lambda config, ranks: None,
) -> NoReturn:
    """Reads the config, joins the ranks, calls `action` with both, and exits; handles errors like :func:`run`.

    `check` gets the config and the number of ranks, and refuses in a moment what they alone show to be wrong.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)

    def join_and_act() -> None:
        try:
            config = load_config(args.config, args.overrides)
            check(config, launched_ranks())
        except UserError as error:
            raise UserError(str(error), known_to_all_ranks=True) from None
        from dskd.distributed.peers import meet_peers  # imported here so that what is above does not wait for torch
        from dskd.distributed.rendezvous import initialize, shutdown

        listen()  # the launcher also ends its ranks with TERM, and the tracked run must then be marked as ended
        world = initialize(config.train.collective_timeout_s)
        peers = meet_peers(world)
        try:
            action(config, world)
        except RuntimeError as error:  # torch raises it for a failed collective, among other things
            lost = peers.find_lost()
            if lost is None:
                if is_lack_of_shared_memory(error) and (shortage := describe_shortage(is_known=True)):
                    raise UserError(f"{shortage}. Completed files are kept") from error
                raise
            raise LostPeerError(
                f"[rank {world.rank}, {peers.host}] {lost}; this rank cannot continue without them, so it ends too. "
                f"Start all ranks again (training: with --resume). Noticed by: {first_line(error)}"
            ) from error
        shutdown()

    try:
        exit_code = run(join_and_act)
    finally:
        ignore()
        # Otherwise Python would wait for the workers: a loader's worker can hang in mosaicml-streaming after a shard
        # that it could not fetch, and ignores the TERM by which Python ends it (see dskd/training/data/loader.py).
        for worker in multiprocessing.active_children():
            worker.kill()
    # Threads of gloo can still hold tensors when the interpreter shuts down, and then abort a process that has finished
    # its work (pytorch issue 190489). So run the exit handlers and end the process without shutting it down.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
