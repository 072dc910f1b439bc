"""The teacher's passes over a batch of text: it continues the texts, if the config says so, and reads the result."""

from dataclasses import dataclass

import torch

from dskd.corpus.sequences import TokenBatch
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.readouts import TopTokens, top_tokens
from dskd.models.structure.trunk import HandOver
from dskd.senses.states import read_states_of, states_of
from dskd.shards.continuations import Continuer


@dataclass(frozen=True)
class TextRead:
    """A batch that the teacher has read, and continued if the config says so, with the teacher's states for it."""

    batch: TokenBatch
    hidden: torch.Tensor  # [B, T, D]
    top: TopTokens | None  # the teacher's most probable tokens, for the positions that have a target
    trunk: torch.Tensor | None  # [B, T, D], the states that enter the layer at which the shared trunk ends
    continued_tokens: int


@dataclass(frozen=True)
class TextReader:
    """The teacher's passes over a batch: the same number for every batch, because all ranks must take part in each."""

    teacher: FrozenModel
    continuer: Continuer | None
    top_n: int
    chunk_size: int
    trunk: HandOver | None = None

    def read(self, batch: TokenBatch, first: int) -> TextRead:
        """Runs the teacher on a batch; `first` is the number of its first sequence."""
        added = 0
        if self.continuer is not None:
            batch, added = self.continuer.extend(batch, first)
        top = None
        if self.top_n:
            has_target = batch.has_target.to(self.teacher.device)
            hidden, top = read_states_of(
                self.teacher,
                batch,
                first,
                lambda hidden, head: top_tokens(hidden[has_target], head, self.top_n, self.chunk_size),
            )
        else:
            hidden = states_of(self.teacher, batch, first)
        # The states of the last pass: those before it, if there were any, were for the continuation.
        return TextRead(batch, hidden, top, None if self.trunk is None else self.trunk.take(), added)

    def close(self) -> None:
        """Removes its hook from the teacher."""
        if self.trunk is not None:
            self.trunk.close()
