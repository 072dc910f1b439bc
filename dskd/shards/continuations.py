"""The teacher's greedy continuations of texts, for samples of text and continuation (docs/method.md, section 4).

The text's end-of-text token is removed, and the teacher adds c tokens. c is random in 1 … N, because the paper cuts its
sequences at a random point within the continuation, and is a function of (seed, sequence). N comes from the config;
some texts have a smaller limit of their own (:mod:`dskd.corpus.tasks.documents`). A continuation ends earlier at an
end-of-text token, which is kept, or at the sequence length.

A batch costs one pass over its texts and N - 1 passes over one token per text, since keys and values are cached. Texts
are padded on the left, so that all of them continue in the same column. Shapes: B texts, T tokens, P the longest text
of the batch.
"""

from dataclasses import replace
from typing import Any

import torch

from dskd.corpus.sequences import TokenBatch
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.generation import end_tokens, generate_greedily
from dskd.random_numbers import derived_seed, random_bits


class Continuer:
    """The teacher, set up to continue the texts of a run."""

    def __init__(self, teacher: FrozenModel, max_tokens: int, seed: int) -> None:
        """Stores a `teacher` that has its output matrix, `max_tokens`, which is N, and the run's `seed`."""
        self._teacher = teacher
        self._max_tokens = max_tokens
        self._seed = derived_seed(seed, "annotation", "continuation")
        # The token that packing puts at the end of a text, and all tokens that end a generation.
        self._text_end, self._ends = end_tokens(teacher.folder)

    def draw_lengths(self, first: int, count: int, at_most: torch.Tensor | None = None) -> torch.Tensor:
        """Returns c [count] int64, the number of tokens in 1 … N to add to each of `count` sequences from `first` on.

        `at_most` [count] limits c further for each sequence.
        """
        limits: Any = self._max_tokens if at_most is None else at_most.clamp(max=self._max_tokens)
        return 1 + random_bits(self._seed, torch.arange(first, first + count)) % limits

    def extend(self, batch: TokenBatch, first: int) -> tuple[TokenBatch, int]:
        """Returns the batch with its texts continued, and the number of tokens added.

        A text stays unchanged if it continues in the next sequence, if there is no room, or if the sequence holds only
        the end of the text. All ranks must call this the same number of times.

        Args:
            batch: sequences of one text each, padded on the right.
            first: the number of the batch's first sequence.
        """
        lengths = _lengths(batch)
        prompt_lengths, room = self._room(batch.input_ids, lengths)
        limits = self.draw_lengths(first, len(lengths), batch.continuation_tokens).minimum(room)
        # A text without room takes part with its first token only, so that all ranks run the same number of passes.
        added = generate_greedily(
            self._teacher,
            batch.input_ids,
            prompt_lengths.where(limits > 0, 1),
            self._max_tokens,
            # Tokens after the end of the sequence are not kept.
            last_position=batch.input_ids.shape[1] - 1,
        )
        ended = torch.isin(added, torch.tensor(self._ends, dtype=torch.int64))
        # Keep the first c tokens, but only up to the first end-of-text token, and that one too.
        kept = (ended.int().cumsum(dim=1) - ended.int() == 0) & (torch.arange(added.shape[1]) < limits[:, None])
        counts = kept.sum(dim=1)
        # Put the kept tokens after each text, over its end-of-text token.
        input_ids = batch.input_ids.clone()
        rows, columns = kept.nonzero(as_tuple=True)
        input_ids[rows, prompt_lengths[rows] + columns] = added[kept]
        lengths = torch.where(counts > 0, prompt_lengths + counts, lengths)
        has_target = torch.arange(input_ids.shape[1]) < lengths[:, None] - 1
        extended = replace(batch, input_ids=input_ids, has_target=has_target, num_tokens=int(lengths.sum()))
        return extended, int(counts.sum())

    def _room(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the length [B] of each text without its end-of-text token, and how many tokens [B] may follow it.

        No tokens may follow a text that does not end in this sequence, if packing marks ends.
        """
        prompt_lengths = lengths.clone()
        sequence_length = input_ids.shape[1]
        if self._text_end is None:  # packing marked no ends
            return prompt_lengths, sequence_length - lengths
        last = input_ids.gather(1, (lengths[:, None] - 1).clamp(min=0)).squeeze(1)
        is_end = (last == self._text_end) & (lengths > 1)
        prompt_lengths[is_end] -= 1
        return prompt_lengths, torch.where(is_end, sequence_length - prompt_lengths, 0)


def _lengths(batch: TokenBatch) -> torch.Tensor:
    """Returns the number of real tokens [B] of sequences of one text each: one more than the sequence has targets."""
    return batch.has_target.sum(dim=1) + 1
