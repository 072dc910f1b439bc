"""The tracked runs that the tests of several files compare."""

import shutil

import pytest
import yaml
from compared_runs import EXPERIMENT, track_runs
from tiny_work import NO_RUNS


@pytest.fixture(scope="session")
def tracked(tmp_path_factory, no_runs):
    """A config, and {name: run id} of its runs (see `track_runs`)."""
    folder = tmp_path_factory.mktemp("compare")
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {"workdir": str(folder / "work"), "teacher": {"path": "a/b"}, "tracking": {"experiment": EXPERIMENT}}
        )
    )
    (folder / "work").mkdir()
    shutil.copyfile(no_runs, folder / "work" / NO_RUNS)
    return path, track_runs(path)
