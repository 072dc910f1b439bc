"""What is said without a traceback: the user's mistakes, outages, and ranks that are lost. Everything else is a fault
of ours and keeps its own.
"""

USER_ERROR_EXIT_CODE = 2
FAULT_EXIT_CODE = 1  # schedulers may retry it


class UserError(Exception):
    """Bad input. The message names the culprit (file, key or line), what was found, what would be right and what to do.

    Programs print it without a traceback and exit with :data:`USER_ERROR_EXIT_CODE`. Schedulers must not retry it.
    """

    def __init__(self, message: str, *, known_to_all_ranks: bool = False) -> None:
        super().__init__(message)
        # Raised by every rank for the same reason: rank 0 says it for all.
        self.known_to_all_ranks = known_to_all_ranks

    @property
    def exit_code(self) -> int:
        """What a program ends with."""
        return USER_ERROR_EXIT_CODE


class OutageError(UserError):
    """What may mend itself, or be better on another node: said like a mistake, and to be retried."""

    @property
    def exit_code(self) -> int:
        """What a program ends with."""
        return FAULT_EXIT_CODE


class LostPeerError(Exception):
    """Ranks are missing, and those that are left cannot go on without them; starting all of them again may do."""


def listed(headline: str, problems: list[str], limit: int = 20) -> str:
    """`headline` and the problems under it, a line each; of very many only the first, and how many more."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … and {len(problems) - limit:,} more")
    return "\n".join([f"{headline}:", *lines])
