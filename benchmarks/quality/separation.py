"""A judge from outside: whether a model's states tell the senses of a word apart.

The sentences are WordNet's examples that the training text does not contain, and the measures those of `dskd`
(:mod:`dskd.evaluation.lexical.separation`): means over lemmas of the area under the ROC curve, with which the cosine of
the last hidden states tells two examples of one sense from two examples of different senses.

| measure | state |
|---|---|
| sense_separation | at the word's last token |
| sense_separation_target | at the token before the word, where the sense loss applies |

Shapes: n examples, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.quality.teacher import Rows, Student
from dskd.config import Config
from dskd.evaluation.lexical.contexts import Context
from dskd.evaluation.lexical.items import build_items, load_items
from dskd.evaluation.lexical.separation import MEASURE, lemmas_with_both, separation
from dskd.evaluation.lexical.states import Tokens
from dskd.models.files.folder import find_teacher
from dskd.random_numbers import derived_seed, random_bits

SEPARATION = (MEASURE, f"{MEASURE}_target")
_MOST = 200  # lemmas: a standard error of .025
_LONGEST = 24  # tokens of an example


@dataclass(frozen=True)
class Examples(Rows):
    """Examples of lemmas with several senses."""

    contexts: Sequence[Context]
    input_ids: torch.Tensor  # [n, T] int64, padded with 0 at the end
    places: torch.Tensor  # [2, n]: of each measure's state

    @classmethod
    def of(cls, config: Config) -> "Examples":
        """Finds the examples that the config's training text does not contain, and draws lemmas.

        Raises:
            UserError: when the teacher's tokenizer does not report the letters of its tokens.
        """
        items = load_items(config, build_items(config, find_teacher(config)))
        short = [
            (context, tokens)
            for context, tokens in zip(items.contexts, items.context_tokens, strict=True)
            if len(tokens.input_ids) <= _LONGEST
        ]
        lemmas = lemmas_with_both([context for context, _ in short])
        numbers = list(lemmas.values())
        order = random_bits(derived_seed(0, "lemmas"), torch.arange(len(numbers))).argsort(stable=True)
        drawn = [short[number] for at in order[:_MOST].tolist() for number in numbers[at]]
        return cls.packed([context for context, _ in drawn], [tokens for _, tokens in drawn])

    @classmethod
    def packed(cls, contexts: Sequence[Context], texts: Sequence[Tokens]) -> "Examples":
        """Returns examples with these tokens."""
        length = max((len(tokens.input_ids) for tokens in texts), default=0)
        rows = [tokens.input_ids + [0] * (length - len(tokens.input_ids)) for tokens in texts]
        places = [[tokens.last for tokens in texts], [tokens.first - 1 for tokens in texts]]
        return cls(contexts, torch.tensor(rows).reshape(-1, length).long(), torch.tensor(places).reshape(2, -1).long())

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its measures."""
        return SEPARATION if self.contexts else ()

    @torch.no_grad()
    def measure(self, student: Student, states: torch.Tensor) -> dict[str, float]:
        """Returns {measure: value} of a student whose upper layers get these `states` [n, T, D]."""
        if not self.contexts:
            return {}
        found = []
        for at in torch.arange(len(self.input_ids)).split(64):
            hidden = student(states[at], self.position_ids[at], self.attention_mask(at)).cpu()
            found.append(hidden[torch.arange(len(at)), self.places[:, at]])
        means = {}
        for name, at_word in zip(SEPARATION, torch.cat(found, dim=1), strict=True):
            scores = [item.total for item in separation(self.contexts, at_word)]
            means[name] = sum(scores) / len(scores)
        return means | {f"{MEASURE}_n": len(scores)}
