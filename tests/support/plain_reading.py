"""Parts of plain loops, with which tests compare training: its steps, and packed documents read one by one."""

import functools
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from rank_processes import ONE_RANK

from dskd import shards
from dskd.config import Config
from dskd.training.data.collator import Collator
from dskd.training.data.loader import load_steps
from dskd.training.data.packed_step import StepBatches
from dskd.training.schedule import Schedule, plan_schedule


def steps_of_run(config: Config, cache: Path) -> tuple[Schedule, Generator[StepBatches, None, None]]:
    """Returns the schedule of a run on one rank, and its steps with token ids and labels only."""
    schedule = plan_schedule(config, shards.load_manifest(config, "train"), 1)
    collate = Collator(None, None, micro_batch_size=schedule.micro_batch_size)
    return schedule, load_steps(config, schedule, collate, cache, ONE_RANK, start_step=0)


def run_apart(
    model: Any, sequences: torch.Tensor, end: int, depth: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs a transformers model on each of the documents in packed sequences [B, T], one by one.

    A document ends with the end-of-text token, or with its sequence. Returns logits [B·T, V], the last
    hidden states [B·T, D] or those that enter the layer `depth`, and whether the next token belongs to the same
    document [B·T] bool.
    """
    documents: list[list[int]] = []
    for row in sequences.tolist():
        documents.append([])
        for token in row:
            if documents[-1][-1:] == [end]:
                documents.append([])
            documents[-1].append(token)
    # Padding is many equal documents of one token: equal ones are run once.
    run = functools.cache(lambda *document: model(torch.tensor([document]), output_hidden_states=True))
    outputs = [run(*document) for document in documents]
    logits = torch.cat([output.logits[0] for output in outputs])
    states = torch.cat([output.hidden_states[depth][0] for output in outputs])
    return logits, states, torch.tensor([i + 1 < len(document) for document in documents for i in range(len(document))])
