"""Exceptions reported without a traceback: user errors, outages and lost ranks.

Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Sequence

# The exit codes of all programs (docs/running.md); 0 is success.
FAULT_EXIT_CODE = 1  # schedulers may retry it
USER_ERROR_EXIT_CODE = 2
UNFIT_EXIT_CODE = 3  # `dskd plan`: the job will not fit
UNFINISHED_EXIT_CODE = 3  # `dskd status`: the run is not finished
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: running the same command again continues
INTERRUPTED_EXIT_CODE = 130  # by the keyboard


class UserError(Exception):
    """An error caused by bad input.

    The message names the source (file, key or line), what was found, what would be right and what to do. Programs print
    it without a traceback and exit with :data:`USER_ERROR_EXIT_CODE`. Schedulers must not retry it.
    """

    def __init__(self, message: str, *, known_to_all_ranks: bool = False, unknown_to_rank_0: bool = False) -> None:
        super().__init__(message)
        # True if every rank raises it for the same reason: then only rank 0 prints it.
        self.known_to_all_ranks = known_to_all_ranks
        # True if rank 0 does not raise it: then this rank prints it without waiting for rank 0.
        self.unknown_to_rank_0 = unknown_to_rank_0

    @property
    def exit_code(self) -> int:
        """Exit code of a program that this error ends."""
        return USER_ERROR_EXIT_CODE


class OutageError(UserError):
    """An error that may disappear by itself or on another node: reported like a user error, but worth a retry."""

    @property
    def exit_code(self) -> int:
        """Exit code of a program that this error ends."""
        return FAULT_EXIT_CODE


class LostPeerError(Exception):
    """The error of ranks that cannot continue because others are missing; restarting all ranks may help."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's text after the name of its type, or the name alone if it has no text."""
    name = type(error).__name__
    return f"{name}: {first_line(error)[:300]}" if str(error).strip() else name


def shortened(items: Sequence[object], limit: int = 20, *, total: int | None = None) -> str:
    """Returns the first `limit` of `total` items, separated by commas, with a mark if there are more."""
    more = ", …" if (len(items) if total is None else total) > min(limit, len(items)) else ""
    return f"{', '.join(map(str, items[:limit]))}{more}"


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, whose plural ends with s: "1 rank", "1,024 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(headline: str, problems: list[str], limit: int = 20) -> str:
    """Formats `headline` and the problems below it, one per line: at most `limit`, then the number of the others."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … and {len(problems) - limit:,} more")
    return "\n".join([f"{headline}:", *lines])
