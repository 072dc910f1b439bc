"""Memory that a training step frees: kept for the next one."""

import os
import platform
import subprocess
import sys

import pytest

# A process twice allocates, fills and frees 48 MiB, more than glibc keeps by default, and prints the pages it got.
_PROGRAM = """
import ctypes, resource
from dskd.training.freed_memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(48 * 2**20)
    ctypes.memset(block, 1, 48 * 2**20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
print(pages(), pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize(("variables", "is_kept"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_what_a_step_frees_is_kept_for_the_next_unless_the_user_has_set_the_allocator(variables, is_kept):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True
    ).stdout
    first, second = map(int, output.split())
    of_block = 0.9 * 48 * 2**20 / os.sysconf("SC_PAGE_SIZE")
    assert first >= of_block
    assert second < of_block / 100 if is_kept else second >= of_block
