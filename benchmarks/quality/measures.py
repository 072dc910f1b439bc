"""Measures of students on one part of the held-out text, position by position against the teacher.

| measure | definition, over target positions |
|---|---|
| kl | mean of KL(teacher ‖ student) of the next token, temperature 1, in nats |
| agreement | share of positions whose most probable token is the teacher's |
| perplexity | exp of the mean cross-entropy |
| lexical_perplexity | perplexity over positions whose target has a synonym or antonym |
| choice | share of positions with related words where the target is the most probable of it and these |
| preference | share of positions with both kinds of related words where the synonyms are more probable on average |

Outside judges: `opposites`, `opposites_new` and `opposites_states` tell antonyms from synonyms
(:mod:`benchmarks.quality.pairs`), `sense_separation` and `sense_separation_target` a word's senses
(:mod:`benchmarks.quality.separation`), and the names of benchmarks are accuracies on their questions
(:mod:`benchmarks.quality.questions`).

Related words are tokens of the vocabulary. Shapes: N positions, V vocabulary, D hidden.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.quality.questions import QUESTIONS
from benchmarks.quality.separation import SEPARATION
from benchmarks.quality.text import Text, Words

BY_TEXT = ("kl", "agreement", "perplexity", "lexical_perplexity", "choice", "preference")
OUTSIDE = (
    "opposites",
    "opposites_new",
    "opposites_states",
    *SEPARATION,
    *(f"{name}{kind}" for name in QUESTIONS for kind in ("", "_norm")),
)
MEASURES = (*BY_TEXT, *OUTSIDE)
DIGITS = {"kl": 4, "agreement": 4, "perplexity": 1, "lexical_perplexity": 0, "choice": 4, "preference": 4}
DIGITS |= dict.fromkeys(OUTSIDE, 3)
_AGAINST_UNTRAINED = ("choice", "preference")
_CHUNK = 128


class _Sums(NamedTuple):
    """Values [N] at the positions of a chunk; NaN where a measure is not defined."""

    kl: torch.Tensor
    agreement: torch.Tensor
    nll: torch.Tensor
    lexical_nll: torch.Tensor
    choice: torch.Tensor
    preference: torch.Tensor


@torch.no_grad()
def measure(
    states: torch.Tensor, matrix: torch.Tensor, teacher_matrix: torch.Tensor, text: Text, at: torch.Tensor, words: Words
) -> dict[str, float]:
    """Returns {measure: value} on the sequences `at` [n] of a text.

    Args:
        states: a model's last hidden states [n, T, D] on these sequences.
        matrix: its output matrix [V, D].
        teacher_matrix: the teacher's.
        text: the held-out text.
        at: indices of the sequences.
        words: related words.
    """
    mask = text.loss_mask[at]
    columns = (states.cpu()[mask], text.teacher_states[at][mask], text.labels[at][mask], text.lexical[at][mask])
    parts = list(_parts(columns, matrix, teacher_matrix, words))
    found = {name: torch.cat([getattr(part, name) for part in parts]).cpu().double() for name in _Sums._fields}
    means = {name: float(values.nanmean()) for name, values in found.items()}
    return {
        "kl": means["kl"],
        "agreement": means["agreement"],
        "perplexity": float(torch.tensor(means["nll"]).exp()),
        "lexical_perplexity": float(torch.tensor(means["lexical_nll"]).exp()),
        "choice": means["choice"],
        "choice_n": int(found["choice"].isfinite().sum()),
        "preference": means["preference"],
        "preference_n": int(found["preference"].isfinite().sum()),
    }


def is_at_chance(measures: Mapping[str, float], name: str, untrained: Mapping[str, float] | None = None) -> bool:
    """Returns True if the teacher, with these measures, is less than two standard errors above chance on one of them.

    Such a measure says nothing about what a student learned from the teacher. Chance at `choice` and `preference` is
    the score of the `untrained` student, which can be above one half without any knowledge of the text. It is
    undefined for measures without a count or that are not shares.
    """
    kind = name.removesuffix("_norm").removesuffix("_states").removesuffix("_target")
    count = measures.get(f"{kind}_n")
    if not count or not math.isfinite(measures.get(name, math.nan)):
        return False
    if name in _AGAINST_UNTRAINED:
        chance = math.nan if untrained is None else untrained[name]
    else:
        chance = measures.get(f"{kind}_chance", 0.5)
    # The area under the curve, of as many antonyms as synonyms, has the variance 1/(3n) at chance.
    variance = 1 / (3 * count) if kind.startswith("opposites") else chance * (1 - chance) / count
    return measures[name] - chance < 2 * variance**0.5


def _parts(
    columns: tuple[torch.Tensor, ...], matrix: torch.Tensor, teacher_matrix: torch.Tensor, words: Words
) -> Iterator[_Sums]:
    related_words = words.related.to(matrix.device)
    for chunk in zip(*(column.split(_CHUNK) for column in columns), strict=True):
        states, teacher_states, labels, lexical = (column.to(matrix.device) for column in chunk)
        own = F.linear(states, matrix).log_softmax(-1)
        teacher = F.linear(teacher_states, teacher_matrix).log_softmax(-1)
        kl = (teacher.exp() * (teacher - own)).sum(-1)
        agreement = (own.argmax(-1) == teacher.argmax(-1)).float()
        nll = -own.gather(-1, labels[:, None]).squeeze(-1)
        related = related_words[labels]
        exists = related >= 0
        chances = own.gather(-1, related.clamp(min=0)).masked_fill(~exists, -torch.inf)
        choice = (chances.amax(-1) < -nll).float().masked_fill(~exists.any(-1), torch.nan)
        half = related.shape[-1] // 2
        synonyms, antonyms = (
            (chances.exp() * exists)[:, part].sum(-1) / exists[:, part].sum(-1)
            for part in (slice(0, half), slice(half, None))
        )  # NaN without words
        both = exists[:, :half].any(-1) & exists[:, half:].any(-1)
        preference = (synonyms > antonyms).float().masked_fill(~both, torch.nan)
        yield _Sums(kl, agreement, nll, nll.masked_fill(~lexical, torch.nan), choice, preference)


def describe(measures: Mapping[str, float]) -> str:
    """Returns the measures as one line."""
    return ", ".join(f"{name} {measures[name]:.{DIGITS[name]}f}" for name in MEASURES if name in measures)
