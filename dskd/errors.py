"""The one exception that is the user's to mend; everything else is a fault of ours and keeps its traceback."""

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """Bad input. The message names the culprit (file, key or line), what was found, what would be right and what to do.

    Programs print it without a traceback and exit with :data:`USER_ERROR_EXIT_CODE`. Schedulers must not retry it.
    """
