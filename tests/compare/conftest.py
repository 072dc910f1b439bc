"""The tracked runs that the tests of several files compare."""

import shutil

import pytest
from compared_runs import EXPERIMENT, track_runs
from config_files import MINIMAL, write_config
from tiny_work import NO_RUNS


@pytest.fixture(scope="session")
def tracked(tmp_path_factory, no_runs):
    """A config, and {name: run id} of its runs (see `track_runs`)."""
    folder = tmp_path_factory.mktemp("compare")
    path = folder / "config.yaml"
    write_config(path, MINIMAL, workdir=str(folder / "work"), tracking={"experiment": EXPERIMENT})
    (folder / "work").mkdir()
    shutil.copyfile(no_runs, folder / "work" / NO_RUNS)
    return path, track_runs(path)
