"""Recognises errors of torch by their texts, because torch raises a RuntimeError for all of them."""


def is_death_of_worker(error: BaseException) -> bool:
    """Returns True for the error of a loader's worker that was killed or exited."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def is_lack_of_shared_memory(error: BaseException) -> bool:
    """Returns True for an error that full shared memory can cause: no room for a batch, or a worker's bus error.

    A loader that waits for a worker names the signal that killed it only in the cause of its error.
    """
    text = f"{error} {error.__cause__}"
    return isinstance(error, RuntimeError) and ("shared memory" in text or "Bus error" in text)
