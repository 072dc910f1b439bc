"""Steps as the loader reads them from small shards of random samples."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from rank_processes import ONE_RANK

from dskd.config import Config
from dskd.training.collator import Collator
from dskd.training.loader import Collate, load_steps
from dskd.training.packed_step import StepBatches
from dskd.training.schedule import Schedule

T, K, SAMPLES, ROWS = 24, 2, 43, 30
SCHEDULE = Schedule(global_batch_size=8, micro_batch_size=2, accumulation_steps=4, steps_per_epoch=5, total_steps=13)


def config_of(folder: Path, num_workers: int = 0, **sections: Any) -> Config:
    """Returns the config of a work directory for a loader with that many workers."""
    return Config(
        workdir=str(folder), teacher={"train_from_scratch": {}}, train={"num_workers": num_workers}, **sections
    )


def steps_of(
    folder: Path,
    cache: Path,
    num_workers: int = 0,
    start_step: int = 0,
    collate: Collate | None = None,
    **options: Any,
) -> Generator[StepBatches, None, None]:
    """Yields the steps of `SCHEDULE` from `start_step` on."""
    collate = collate or Collator(None, None, micro_batch_size=SCHEDULE.micro_batch_size)
    config = config_of(folder, num_workers)
    return load_steps(config, SCHEDULE, collate, cache, ONE_RANK, start_step=start_step, **options)
