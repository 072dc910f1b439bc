"""A model's reading of sentences: its hidden states at a word, and the log-likelihood of a sentence.

Each sentence is a row of its own, not packed with others, so it has no context but itself. Shapes: B sentences,
T tokens, D hidden, N texts.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dskd.console import progress_bar
from dskd.distributed.collectives import sum_over_ranks
from dskd.distributed.world import World
from dskd.evaluation.batching import batches_by_length, padded
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.readouts import chunk_size, next_token
from dskd.models.structure.output_head import OutputHead

WORD, TARGET = 0, 1  # indices into the states: the word's last token, and the token before the word, which predicts it
_REDUCED_ELEMENTS = 2**24  # elements of the states that one collective operation sums over ranks


class Tokens(NamedTuple):
    """A text as a model reads it; the word in it is `input_ids[first : last + 1]`."""

    input_ids: list[int]
    first: int
    last: int


def tokenize(tokenizer: Any, text: str, start: int, stop: int) -> Tokens | None:
    """Returns the tokens of a text and which of them are the word `text[start:stop]`.

    Returns None if a token of the word has letters outside the word; a space, or the mark of one, may be part of its
    first token. The text begins as the training text does, with the tokens that the tokenizer puts first; an
    end-of-text token that the tokenizer adds is removed.
    """
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    while ids and ids[-1] == tokenizer.eos_token_id and spans[-1][0] == spans[-1][1]:
        ids, spans = ids[:-1], spans[:-1]
    inside = [number for number, (left, right) in enumerate(spans) if left < stop and right > start]
    if not inside or spans[inside[-1]][1] > stop or text[spans[inside[0]][0] : start].strip():
        return None
    return Tokens(ids, inside[0], inside[-1])


def read_states(
    model: FrozenModel, texts: Sequence[Tokens], batch_size: int, world: World, *, label: str = "reading"
) -> torch.Tensor:
    """Returns last hidden states [N, 2, D] float32, after the final norm, on every rank.

    `WORD` is the state at the last token of each text's word. `TARGET` is that at the token before the word, whose
    target is the word's first token; it is 0 if the word begins the text. All ranks must call this. The number of ranks
    does not change a state, and the size of the batches changes it only by rounding.
    """
    states = torch.zeros(len(texts), 2, model.hidden_size)
    for batch, input_ids in _batches(texts, batch_size, world, label):
        positions = torch.tensor([[texts[n].last, max(texts[n].first - 1, 0)] for n in batch] or [[0, 0]])
        hidden = model.hidden_states(input_ids)
        rows = torch.arange(len(positions), device=hidden.device)[:, None]
        read = hidden[rows, positions.to(hidden.device)].float().cpu()
        if batch:
            read[[texts[n].first == 0 for n in batch], TARGET] = 0.0
            states[batch] = read
    for part in states.split(max(1, _REDUCED_ELEMENTS // max(1, 2 * model.hidden_size))):
        part.copy_(sum_over_ranks(part.to(world.device)))  # one rank read each text, the others add zeros
    return states


def read_likelihoods(model: FrozenModel, texts: Sequence[Tokens], batch_size: int, world: World) -> torch.Tensor:
    """Returns the log-likelihood [N] float64 in nats of each text's tokens after its first one, on every rank.

    All ranks must call this. The number of ranks does not change a value, and the size of the batches changes it only
    by rounding.
    """
    likelihoods = torch.zeros(len(texts), dtype=torch.float64)
    logits_chunk = chunk_size(None, model.vocab_size, world.device)
    for batch, input_ids in _batches(texts, batch_size, world, "synonyms or antonyms"):
        sizes = torch.tensor([len(texts[n].input_ids) for n in batch] or [0])
        mask = torch.arange(1, input_ids.shape[1]) < sizes[:, None]
        labels = input_ids[:, 1:][mask].to(world.device)
        readout = functools.partial(_losses, mask=mask.to(world.device), labels=labels, logits_chunk=logits_chunk)
        losses = torch.zeros(mask.shape, dtype=torch.float64)
        losses[mask] = model.read(input_ids, None, readout).cpu()
        if batch:
            likelihoods[batch] = -losses.sum(dim=1)
    return sum_over_ranks(likelihoods.to(world.device)).cpu()


def _batches(texts: Sequence[Tokens], batch_size: int, world: World, label: str) -> Any:
    """Yields this rank's batches as (text indices, token ids [B, T]), and shows a progress bar."""
    lengths = [len(text.input_ids) for text in texts]
    with progress_bar(total=len(texts), label=label, unit="texts") as bar:
        for batch in batches_by_length(lengths, batch_size, world):
            yield batch, padded([texts[number].input_ids for number in batch])
            bar.update(min(len(batch) * world.world_size, bar.total - bar.n))


def _losses(
    hidden: torch.Tensor, head: OutputHead, *, mask: torch.Tensor, labels: torch.Tensor, logits_chunk: int
) -> torch.Tensor:
    return next_token(hidden[:, :-1][mask], labels, head, logits_chunk)[0]
