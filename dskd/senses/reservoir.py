"""A bounded random sample of each token's states, in bounded memory: states that do not fit are spilled to disk.

Each state has a random priority, and the sample keeps the `max_states` states with the lowest priorities of every
token. So the sample depends only on the set of states offered, not on their order, on spills, or on the rank that
offered them.

States on disk are in *runs*: safetensors files with `tokens` [n] int32, `priorities` [n] int64 and `states` [n, D]
bf16, sorted by token, then by priority. A run is written under a temporary name and renamed when it is complete.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dskd.artifacts.tensor_file import create_tensors, map_tensor
from dskd.senses.csr import offsets_of

_CHUNK_BYTES = 32 * 2**20  # size of the states copied at once
_SPILL_SHARE = 0.75  # spill if the memory is still fuller than this after dropping states outside the sample
_MAX_RUNS = 12  # more runs than this are merged into one, so that disk use stays close to the size of the sample


@dataclass(frozen=True)
class TokenStates:
    """The states of some tokens, n in all, sorted by token, then by priority."""

    tokens: torch.Tensor  # [m] distinct tokens, ascending
    offsets: torch.Tensor  # [m+1]; the states of tokens[j] are offsets[j]:offsets[j+1]
    states: torch.Tensor  # [n, D] bf16


class Reservoir:
    """A sample of the states offered: for every token, the `max_states` states with the lowest priorities.

    States beyond the memory budget, in bytes, are written to runs in `folder`, whose names begin with `name`, which is
    different for each rank. `runs` are names of runs there, from an interrupted gathering, that belong to the sample.
    """

    def __init__(
        self,
        vocab_size: int,
        max_states: int,
        hidden_size: int,
        memory_budget: int,
        folder: Path,
        name: str,
        runs: Sequence[str] = (),
    ) -> None:
        self._max_states = max_states
        self._hidden_size = hidden_size
        self._folder, self._name = folder, name
        self._runs = list(runs)
        self._flushed = set(runs)
        self._obsolete: list[str] = []
        self._number = 1 + max((int(run.split("-")[-1].split(".")[0]) for run in runs), default=-1)
        capacity = max(2, memory_budget // (2 * hidden_size + 16))
        # Allocating the whole budget costs nothing yet: pages take memory only when they are written to.
        self._tokens = torch.empty(capacity, dtype=torch.int64)
        self._priorities = torch.empty(capacity, dtype=torch.int64)
        self._states = torch.empty(capacity, hidden_size, dtype=torch.bfloat16)
        self._size = 0
        # When a token has `max_states` states, its threshold is the highest of their priorities: states at or above it
        # cannot get into the sample and are dropped at once.
        self._thresholds = torch.full((vocab_size,), torch.iinfo(torch.int64).max)
        for run in self._runs:
            self._learn_thresholds(*_keys(self._folder / run))

    def can_enter(self, tokens: torch.Tensor, priorities: torch.Tensor) -> torch.Tensor:
        """Returns a mask [n] of the states that can still get into the sample; the others need not be copied."""
        return priorities < self._thresholds[tokens]

    def add(self, tokens: torch.Tensor, priorities: torch.Tensor, states: torch.Tensor) -> None:
        """Adds states [n, D] with their tokens [n] and priorities [n]."""
        start = 0
        while start < len(tokens):
            # When the memory is full, drop what is outside the sample; write to disk only if that frees too little.
            if self._size == len(self._tokens):
                self._compact()
                if self._size > _SPILL_SHARE * len(self._tokens):
                    self._spill()
            stop = min(len(tokens), start + len(self._tokens) - self._size)
            slots = slice(self._size, self._size + stop - start)
            self._tokens[slots] = tokens[start:stop]
            self._priorities[slots] = priorities[start:stop]
            self._states[slots] = states[start:stop].to(torch.bfloat16)
            self._size, start = slots.stop, stop

    def flush(self) -> list[str]:
        """Writes everything to disk, and returns the names of the runs that together hold the sample.

        Runs that an earlier call returned stay on disk until :meth:`remove_obsolete`, even if others replace them: a
        progress file may still name them.
        """
        if self._size:
            self._compact()
            self._spill()
        self._flushed = set(self._runs)
        return list(self._runs)

    def remove_obsolete(self) -> None:
        """Deletes the runs that were merged into others."""
        for name in self._obsolete:
            (self._folder / name).unlink(missing_ok=True)
        self._obsolete.clear()

    def _compact(self) -> None:
        """Drops states that are outside the sample, and compacts the others in place, without a copy of all states."""
        # Sort the keys, but not the states: moving each kept state once, in ascending order, needs no second buffer.
        tokens, priorities = self._tokens[: self._size], self._priorities[: self._size]
        order, kept = _select(tokens, priorities, self._max_states)
        self._learn_thresholds(tokens[order], priorities[order])
        rows = order[kept].sort().values
        step = max(1, _CHUNK_BYTES // (2 * self._hidden_size))
        for first in range(0, len(rows), step):
            source = rows[first : first + step]  # ascending, and never before their new place, so no row is overwritten
            slots = slice(first, first + len(source))
            for tensor in (self._tokens, self._priorities, self._states):
                tensor[slots] = tensor[source]
        self._size = len(rows)

    def _spill(self) -> None:
        tokens, priorities = self._tokens[: self._size], self._priorities[: self._size]
        order, _ = _select(tokens, priorities, self._max_states)
        self._runs.append(
            self._write_run(tokens[order], priorities[order], lambda first, last: self._states[order[first:last]])
        )
        self._size = 0
        if len(self._runs) > _MAX_RUNS:
            self._merge()

    def _merge(self) -> None:
        runs = [self._folder / name for name in self._runs]
        states = [map_tensor(run, "states", "BF16") for run in runs]
        tokens, priorities, which, row = _select_from_runs(runs, self._max_states)
        self._learn_thresholds(tokens, priorities)
        merged = self._write_run(
            tokens, priorities, lambda first, last: _read(states, which[first:last], row[first:last])
        )
        for run in self._runs:
            # The progress file still names the runs of the last flush, so they stay until the next one is recorded.
            if run in self._flushed:
                self._obsolete.append(run)
            else:
                (self._folder / run).unlink()
        self._runs = [merged]

    def _write_run(
        self, tokens: torch.Tensor, priorities: torch.Tensor, read_states: Callable[[int, int], torch.Tensor]
    ) -> str:
        name = f"{self._name}-{self._number:05d}.safetensors"
        self._number += 1
        partial = self._folder / f".{name}.partial"
        shapes = {
            "tokens": ("I32", (len(tokens),)),
            "priorities": ("I64", (len(tokens),)),
            "states": ("BF16", (len(tokens), self._hidden_size)),
        }
        step = max(1, _CHUNK_BYTES // (2 * self._hidden_size))
        with create_tensors(partial, shapes) as maps:
            maps["tokens"][:] = tokens.numpy()
            maps["priorities"][:] = priorities.numpy()
            for first in range(0, len(tokens), step):
                states = read_states(first, min(first + step, len(tokens)))
                maps["states"][first : first + step] = states.view(torch.uint16).numpy()
        partial.rename(self._folder / name)
        return name

    def _learn_thresholds(self, tokens: torch.Tensor, priorities: torch.Tensor) -> None:
        """Lowers a token's threshold to its max_states-th priority; expects states sorted by token, then priority."""
        index_in_token = _place_in_token(tokens)
        full = index_in_token == self._max_states - 1
        bounded = tokens[full]
        self._thresholds[bounded] = torch.minimum(self._thresholds[bounded], priorities[full])


class SampledStates:
    """The sample that several runs, from any number of ranks, hold together: `max_states` states per token, read by
    ranges of tokens. `share` (r, n) reads only the tokens v with v mod n = r.
    """

    def __init__(self, paths: Sequence[Path], max_states: int, share: tuple[int, int] = (0, 1)) -> None:
        self._states = [map_tensor(path, "states", "BF16") for path in paths]
        tokens, _, self._which, self._row = _select_from_runs(paths, max_states, share)
        self.tokens, self.counts = tokens.unique_consecutive(return_counts=True)
        self._offsets = offsets_of(self.counts)

    @property
    def hidden_size(self) -> int:
        """The states' hidden size D; 0 if there are no runs."""
        return self._states[0].shape[1] if self._states else 0

    def ranges(self, memory_budget: int) -> Iterator[TokenStates]:
        """Yields the states of all tokens, in batches of whole tokens that fit into `memory_budget` bytes.

        A token that does not fit alone is a batch by itself.
        """
        rows = max(1, memory_budget // max(1, 2 * self.hidden_size))
        for start, stop in split_tokens(self._offsets, rows):
            first, last = int(self._offsets[start]), int(self._offsets[stop])
            states = _read(self._states, self._which[first:last], self._row[first:last])
            yield TokenStates(self.tokens[start:stop], self._offsets[start : stop + 1] - first, states)


def split_tokens(offsets: torch.Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Yields ranges (start, stop) of tokens, each with at most `rows` rows in all, but at least one token."""
    start = 0
    while start < len(offsets) - 1:
        fitting = int(torch.searchsorted(offsets, offsets[start] + rows, right=True)) - 1
        stop = max(start + 1, min(fitting, len(offsets) - 1))
        yield start, stop
        start = stop


def _keys(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the tokens [n] and priorities [n] of a run."""
    tokens, priorities = map_tensor(path, "tokens", "I32"), map_tensor(path, "priorities", "I64")
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(np.array(priorities))


def _select_from_runs(
    runs: Sequence[Path], max_states: int, share: tuple[int, int] = (0, 1)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selects the sample from all runs.

    Returns its tokens, its priorities, the number of the run that holds each state and the row in that run, each [n]
    and sorted by token, then by priority.
    """
    tokens, priorities, which, row = [], [], [], []
    for number, run in enumerate(runs):
        run_tokens, run_priorities = _keys(run)
        rows = (run_tokens % share[1] == share[0]).nonzero().squeeze(-1)
        tokens.append(run_tokens[rows])
        priorities.append(run_priorities[rows])
        which.append(torch.full((len(rows),), number, dtype=torch.int16))
        row.append(rows)
    if not runs:
        empty = torch.empty(0, dtype=torch.int64)
        return empty, empty, empty, empty
    all_tokens, all_priorities = torch.cat(tokens), torch.cat(priorities)
    order, kept = _select(all_tokens, all_priorities, max_states)
    order = order[kept]
    return all_tokens[order], all_priorities[order], torch.cat(which)[order], torch.cat(row)[order]


def _read(runs: Sequence[np.ndarray], which: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Reads states [n, D] bf16: row `row[j]` of the mapped states of run `which[j]` for every j."""
    states = torch.empty(len(which), runs[0].shape[1] if runs else 0, dtype=torch.bfloat16)
    for number in which.unique().tolist():
        places = (which == number).nonzero().squeeze(-1)
        bits = runs[number][row[places].numpy()]
        states[places] = torch.from_numpy(bits).view(torch.bfloat16)
    return states


def _select(tokens: torch.Tensor, priorities: torch.Tensor, max_states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts states by token, then by priority. Returns the order [n], and a mask [n] in that order of the first
    `max_states` states of each token.
    """
    order = priorities.argsort(stable=True)
    order = order[tokens[order].argsort(stable=True)]
    return order, _place_in_token(tokens[order]) < max_states


def _place_in_token(tokens: torch.Tensor) -> torch.Tensor:
    """Returns 0, 1, 2 … within each stretch of equal tokens [n]."""
    _, counts = tokens.unique_consecutive(return_counts=True)
    return torch.arange(len(tokens)) - offsets_of(counts)[:-1].repeat_interleave(counts)
