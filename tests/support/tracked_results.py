"""The record of a run in MLflow."""

from pathlib import Path

from dskd.config.reading import load_config
from dskd.tracking import read_history, read_runs


def losses_of(config: Path, name: str = "train/loss", *overrides: str) -> list[tuple[int, float]]:
    """Returns (step, value) of a measure of the config's run in MLflow, which must have one run of that name."""
    loaded = load_config(config, list(overrides))
    (run,) = [run for run in read_runs(loaded) if run.name == loaded.run]
    return read_history(loaded, run.run_id, name)
