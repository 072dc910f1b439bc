"""Gathers a sample of the teacher's states for each token, on all ranks (docs/method.md, section 2).

The state at a position belongs to a token: the token that the teacher predicts there, or the actual next token
(`senses.key`). Each state is sent to the rank that owns its token, which keeps a bounded random sample
(:mod:`dskd.senses.reservoir`). A state's priority is a function of (seed, sequence, position), so the sample is the
same for any number of ranks, any batch size and any order of arrival.

Every few minutes all ranks write their states to disk and rank 0 records the progress. An interrupted gathering resumes
from there, even with another number of ranks.
"""

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from dskd.artifacts.manifest import write_json
from dskd.artifacts.tensor_file import is_whole
from dskd.config import SensesConfig
from dskd.console import progress_bar, say, warn
from dskd.corpus.sequences import Sequences, TokenBatch
from dskd.distributed.collectives import broadcast_json, gather_json, on_main
from dskd.distributed.world import World
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.readouts import predict
from dskd.models.structure.output_head import OutputHead
from dskd.random_numbers import derived_seed, random_bits
from dskd.senses.reservoir import Reservoir
from dskd.senses.states import read_states_of, states_of

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class GatheringProgress:
    """The progress of a gathering: these runs hold exactly the states of the first `sequences_done` sequences."""

    sequences_done: int
    runs: list[str]


class StateKeeper(Protocol):
    """An object that keeps all states for another stage, before gathering draws its sample from them."""

    def keep(self, batch: TokenBatch, first: int, hidden: torch.Tensor) -> None:
        """Keeps the last hidden states [B, T, D] of a batch, of which `first` is the number of the first sequence.

        A rank without work left calls it, too, with a batch without tokens.
        """

    def flush(self) -> None:
        """Waits until everything kept so far is on disk."""


def read_progress(folder: Path) -> GatheringProgress:
    """Reads the progress of an interrupted gathering from its folder; without a progress file nothing is done yet.

    A progress file that is unreadable, or names a run that is missing or truncated, counts as no progress, and causes a
    warning.
    """
    file = folder / _PROGRESS
    if not file.is_file():
        return GatheringProgress(0, [])
    try:
        progress = GatheringProgress(**json.loads(file.read_text(encoding="utf-8")))
        damaged = [run for run in progress.runs if not is_whole(folder / run)]
    except (ValueError, TypeError):
        damaged = [_PROGRESS]
    if damaged:
        warn(f"{folder}: damaged: {', '.join(damaged)}; gathering all states again")
        return GatheringProgress(0, [])
    return progress


def gather_states(
    teacher: FrozenModel,
    sequences: Sequences,
    settings: SensesConfig,
    seed: int,
    world: World,
    folder: Path,
    keeper: StateKeeper | None = None,
) -> list[Path]:
    """Runs the teacher over all sequences and writes the sample of its states to runs in `folder`.

    Every rank must call it. Rank v mod world_size owns token v. `keeper` gets all states, if there is one. Returns the
    paths of the runs of all ranks.
    """
    # This rank continues its own runs. Runs of a gathering with another number of ranks stay as they are: reading the
    # sample merges all runs.
    progress = GatheringProgress(**on_main(lambda: asdict(_resume(folder))))
    name = f"rank{world.rank}of{world.world_size}"
    others = [run for run in progress.runs if not run.split("-")[0].endswith(f"of{world.world_size}")]
    reservoir = Reservoir(
        teacher.vocab_size,
        settings.max_states,
        teacher.hidden_size,
        settings.memory_bytes,
        folder,
        name,
        [run for run in progress.runs if run.split("-")[0] == name],
    )
    priority_seed = derived_seed(seed, "senses", "priority")

    def save(sequences_done: int) -> GatheringProgress:
        if keeper is not None:
            keeper.flush()  # before the progress says that these sequences are done
        runs = [*others, *(run for runs in gather_json(reservoir.flush()) for run in runs)]
        saved = GatheringProgress(sequences_done, sorted(runs))
        on_main(lambda: write_json(folder / _PROGRESS, asdict(saved)))
        reservoir.remove_obsolete()
        return saved

    saved_at = time.monotonic()
    done_tokens = int(sequences.lengths[: progress.sequences_done].sum())
    with progress_bar(total=sequences.num_tokens, label="gathering states", unit="tokens", initial=done_tokens) as bar:
        for first, done, batch in rank_batches(sequences, settings.batch_size, world, progress.sequences_done):
            has_target = batch.has_target.to(teacher.device)
            # The state and the token of each position that has a target.
            if settings.key == "predicted":
                hidden, predicted = read_states_of(teacher, batch, first, functools.partial(_predict_at, has_target))
                tokens = predicted.cpu()
            else:
                hidden = states_of(teacher, batch, first)
                tokens = batch.input_ids.roll(-1, dims=1)[batch.has_target]
            if keeper is not None:
                keeper.keep(batch, first, hidden)
            sequence, position = batch.has_target.nonzero(as_tuple=True)
            priorities = random_bits(priority_seed, sequence + first, position)
            states = hidden[has_target]
            # Only the owner of a token knows its threshold, so every state is sent. The owner copies to the CPU only
            # those that can still get into the sample.
            tokens, priorities, states = _to_owners(tokens, priorities, states.to(torch.bfloat16), world)
            eligible = reservoir.can_enter(tokens, priorities)
            reservoir.add(tokens[eligible], priorities[eligible], states[eligible.to(states.device)].cpu())
            bar.update(min(batch.num_tokens * world.world_size, bar.total - bar.n))
            # All ranks must save at the same batch, so rank 0's clock decides.
            if broadcast_json(time.monotonic() - saved_at >= 60 * settings.save_minutes):
                save(done)
                saved_at = time.monotonic()
    return [folder / run for run in save(len(sequences)).runs]


def rank_batches(
    sequences: Sequences, batch_size: int, world: World, start: int = 0
) -> Iterator[tuple[int, int, TokenBatch]]:
    """Yields this rank's batches of the sequences from `start` on.

    The ranks take batches in turn (:meth:`dskd.distributed.world.World.turns`). A rank that has no work left gets a
    batch without targets.

    Yields:
        The number of the batch's first sequence, the number of sequences that all ranks together have done after this
        batch, and the batch.
    """
    starts = range(start, len(sequences), batch_size)
    for turn, number in enumerate(world.turns(len(starts)), start=1):
        first = 0 if number is None else starts[number]
        batch = sequences.batch(first, min(first + batch_size, len(sequences)))
        done = min(start + turn * world.world_size * batch_size, len(sequences))
        yield first, done, batch.without_targets() if number is None else batch


def _predict_at(positions: torch.Tensor, hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    return predict(hidden[positions], head)


def _resume(folder: Path) -> GatheringProgress:
    """Reads the progress, prints where the gathering resumes, and deletes all runs that the progress does not name."""
    progress = read_progress(folder)
    for file in folder.glob("*.safetensors"):
        if file.name not in progress.runs:
            file.unlink()
    for file in folder.glob(".*.partial"):
        file.unlink()
    if progress.sequences_done:
        say(f"  resuming after {progress.sequences_done:,} sequences")
    return progress


def _to_owners(
    tokens: torch.Tensor, priorities: torch.Tensor, states: torch.Tensor, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sends each state to the rank that owns its token, and returns what this rank receives.

    Received tokens [n] and priorities [n] are on the CPU, and states [n, D] on this rank's device.
    """
    if world.world_size == 1:
        return tokens, priorities, states
    # Sort by owner, and send every rank the number of states to expect from this one.
    owner = tokens % world.world_size
    order = owner.argsort(stable=True)
    sent = torch.bincount(owner, minlength=world.world_size)
    device = world.device
    received = _exchange(sent, [1] * world.world_size, [1] * world.world_size, device).cpu()
    splits = sent.tolist(), received.tolist()
    # Send bf16 as bytes: gloo does not support the type.
    bits = _exchange(states[order.to(states.device)].view(torch.uint8), *splits, device)
    return (
        _exchange(tokens[order], *splits, device).cpu(),
        _exchange(priorities[order], *splits, device).cpu(),
        bits.view(torch.bfloat16),
    )


def _exchange(tensor: torch.Tensor, sent: list[int], received: list[int], device: torch.device) -> torch.Tensor:
    output = tensor.new_empty((sum(received), *tensor.shape[1:]), device=device)
    dist.all_to_all_single(output, tensor.to(device).contiguous(), received, sent)
    return output
