"""Steps as the loader reads them from small shards of random samples."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_processes import ONE_RANK
from safetensors.torch import save_file

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.distributed.world import World
from dskd.shards import COLUMNS, join_blocks
from dskd.shards.writing import write_block
from dskd.training.data.collator import Collator
from dskd.training.data.loader import Collate, load_steps
from dskd.training.data.packed_step import StepBatches
from dskd.training.schedule import Schedule

T, K, SAMPLES, ROWS = 24, 2, 43, 30
SCHEDULE = Schedule(global_batch_size=8, micro_batch_size=2, accumulation_steps=4, steps_per_epoch=5, total_steps=13)


def write_shards(folder: Path) -> None:
    """Writes a work directory with shards of samples of many lengths, and the vectors of a sense dictionary."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(SAMPLES):
        columns = {name: random.integers(0, ROWS, (T, K)).astype(np.int32) for name in COLUMNS if "ids" in name}
        columns["input_ids"] = random.integers(0, 99, T).astype(np.int32)
        columns["loss_mask"] = (np.arange(T) < random.integers(0, T)).astype(np.uint8)
        columns["document_starts"] = (np.arange(T) == 0).astype(np.uint8)
        samples.append(columns)
    blocks = [folder / "blocks" / str(number) for number in range(3)]
    for number, block in enumerate(blocks):
        write_block(block, iter(samples[number::3]))
    with build_artifact(folder / "shards" / "train", Recipe("shards")) as building:
        join_blocks(building.folder, blocks)
    save_file({"vectors": torch.randn(ROWS, 4).bfloat16()}, folder / "senses.safetensors")


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
    world: World = ONE_RANK,
    **options: Any,
) -> Generator[StepBatches, None, None]:
    """Yields the steps of `SCHEDULE` from `start_step` on."""
    collate = collate or Collator(None, None, micro_batch_size=SCHEDULE.micro_batch_size)
    config = config_of(folder, num_workers)
    return load_steps(config, SCHEDULE, collate, cache, world, start_step=start_step, **options)
