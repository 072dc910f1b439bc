"""The C allocator's treatment of memory that a training step frees."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names of the two settings, from malloc.h
_LARGEST_KEPT = 2**30  # bytes of an allocation


def keep_freed_memory() -> None:
    """Makes the C allocator keep what this process frees, so that the next step need not get it from the system again.

    A step allocates and frees the same tensors as the one before, such as the logits of a chunk. By default glibc
    returns those above 32 MiB to the system at once and maps new pages for the next ones, which the system fills with
    zeros: on a CPU that takes some percent of a step. No result depends on it. The process holds as much as at its
    peak and the unused memory between tensors. Variables `MALLOC_…` that the user has set have precedence, and other C
    libraries have no such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)  # the largest value it takes
