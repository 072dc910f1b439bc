"""The option and the order of tests, for all processes of pytest. Fixtures are in support/shared_fixtures.py."""

import os
from pathlib import Path

import pytest

# Ranks of one machine share its cores, and sums in another order differ in their last bits: one thread for everything
# that is compared bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two ranks cannot share a GPU, and tests compare with what the CPU computes: only test_gpu.py and tests/gpu/
# compute on GPUs.
os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_configure(config: pytest.Config) -> None:
    """Loads the fixtures, except in the process that only distributes tests to workers: it would import for seconds."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiny",
        type=Path,
        metavar="FOLDER",
        help="keep the work directory that many tests share, and use it again; for work on tests, "
        "because it is not rebuilt when the code changes",
    )


# The files that take longest, in this order.
_LONGEST = (
    "test_quickstart.py",  # if SmolLM2 is here; otherwise it is skipped
    "test_pipeline.py",
    "test_gguf_teacher.py",
    "test_kept_reading.py",
    "test_stored_states.py",
    "test_training.py",
    "test_width_map.py",
    "test_tracking_outages.py",
    "test_other_students.py",
    "test_architectures.py",
    "test_shipped_configs.py",
    "test_plan.py",
    "test_memory.py",
    "test_stopping.py",
    "test_storing_states.py",
    "test_faults.py",
    "test_tracking.py",
    "test_gpu_plan.py",
    "test_interruption.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts test files so that no worker waits for another, and both end at about the same time.

    The first file makes `tiny`. Meanwhile the other worker has the long files that do not need it. Then come the long
    files that need it, the others that need it, and the rest, which are short.
    """
    users = dict.fromkeys(item.path for item in items if "tiny" in getattr(item, "fixturenames", ()))
    rank = {name: number for number, name in enumerate(_LONGEST)}
    first = min(users, key=lambda path: rank.get(path.name, len(rank)), default=None)

    def place(item: pytest.Item) -> tuple[int, int]:
        needs_tiny = item.path in users
        if item.path == first:
            return 0, 0
        if item.path.name in rank:
            return 1 + needs_tiny, rank[item.path.name]
        return 4 - needs_tiny, 0

    items.sort(key=place)
