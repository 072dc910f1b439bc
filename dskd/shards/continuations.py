"""The teacher goes on with texts, greedily: training samples are text and continuation (docs/method.md, section 4).

The end-of-text token that ends a text is taken off, and the teacher adds c tokens, where c in 1 … N is a function of
(seed, sequence): the paper cuts its sequences at a random point within the continuation. N is the config's, or less for
a text that may only be answered with fewer (:mod:`dskd.corpus.tasks.documents`). A continuation ends earlier at an
end-of-text token, which is kept, and at the length of the sequence.

A batch costs one pass over its texts and N - 1 passes over one token a text: keys and values are kept. Texts are padded
on the left, so that all of them go on in the same column. Shapes: B texts, T tokens, P the longest text of the batch.
"""

from dataclasses import replace
from typing import Any

import torch

from dskd.corpus.sequences import TokenBatch
from dskd.models.frozen import FrozenModel
from dskd.models.generation import end_tokens, generate_greedily
from dskd.random_numbers import derived_seed, random_bits


class Continuer:
    """How the texts of a run go on."""

    def __init__(self, teacher: FrozenModel, max_tokens: int, seed: int) -> None:
        """Takes a `teacher` with its output matrix; `max_tokens` is N, `seed` the run's."""
        self._teacher = teacher
        self._max_tokens = max_tokens
        self._seed = derived_seed(seed, "annotation", "continuation")
        # What packing put at the end of a text, and all that ends a generation.
        self._text_end, self._ends = end_tokens(teacher.folder)

    def wanted_tokens(self, first: int, count: int, at_most: torch.Tensor | None = None) -> torch.Tensor:
        """How many tokens c each of the sequences is to go on by, from `first` on: [count] int64 in 1 … N.

        Where a sequence may go on by fewer than N tokens, `at_most` [count] says by how many.
        """
        limits: Any = self._max_tokens if at_most is None else at_most.clamp(max=self._max_tokens)
        return 1 + random_bits(self._seed, torch.arange(first, first + count)) % limits

    def extend(self, batch: TokenBatch, first: int) -> tuple[TokenBatch, int]:
        """The batch with its texts continued, and how many tokens were added.

        A text stays as it is where it goes on in the next sequence, where there is no room, and where nothing but its
        end is in this sequence. All ranks must call this equally often.

        Args:
            batch: sequences of one text each, padded on the right.
            first: the number of its first sequence.
        """
        lengths = _lengths(batch)
        prompt_lengths, room = self._room(batch.input_ids, lengths)
        wanted = self.wanted_tokens(first, len(lengths), batch.continuation_tokens).minimum(room)
        # A text that has no room takes part with its first token, so that all ranks make equally many passes.
        added = generate_greedily(
            self._teacher,
            batch.input_ids,
            prompt_lengths.where(wanted > 0, 1),
            self._max_tokens,
            # What is said behind the end of the sequence is not kept.
            last_position=batch.input_ids.shape[1] - 1,
        )
        ended = torch.isin(added, torch.tensor(self._ends, dtype=torch.int64))
        # Up to the first end of text, and that one too.
        kept = (ended.int().cumsum(dim=1) - ended.int() == 0) & (torch.arange(added.shape[1]) < wanted[:, None])
        counts = kept.sum(dim=1)
        input_ids = batch.input_ids.clone()
        rows, columns = kept.nonzero(as_tuple=True)
        input_ids[rows, prompt_lengths[rows] + columns] = added[kept]
        lengths = torch.where(counts > 0, prompt_lengths + counts, lengths)
        has_target = torch.arange(input_ids.shape[1]) < lengths[:, None] - 1
        extended = replace(batch, input_ids=input_ids, has_target=has_target, num_tokens=int(lengths.sum()))
        return extended, int(counts.sum())

    def _room(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many tokens [B] of each sequence are the text to go on with, and for how many more [B] there is room."""
        prompt_lengths = lengths.clone()
        sequence_length = input_ids.shape[1]
        if self._text_end is None:  # packing marked no ends
            return prompt_lengths, sequence_length - lengths
        last = input_ids.gather(1, (lengths[:, None] - 1).clamp(min=0)).squeeze(1)
        is_end = (last == self._text_end) & (lengths > 1)
        prompt_lengths[is_end] -= 1
        return prompt_lengths, torch.where(is_end, sequence_length - prompt_lengths, 0)


def _lengths(batch: TokenBatch) -> torch.Tensor:
    """The real tokens [B] of sequences of one text each: one more than there are targets, and those are the first."""
    return batch.has_target.sum(dim=1) + 1
