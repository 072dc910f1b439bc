"""A judge from outside: whether a model tells antonyms from synonyms.

Reads pairs of words as AntSynNET has them, one a line: two words and 1 for antonyms or 0 for synonyms, tabs between.
Only pairs whose second word is one token count. Both measures are areas under the ROC curve of a pair's score:

| measure | score |
|---|---|
| opposites | log p(word after "The opposite of OTHER is") - log p(word after "Another word for OTHER is") |
| opposites_states | one minus the cosine of the last hidden states after "The word is WORD" and "The word is OTHER" |

Shapes: n pairs, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn import functional as F

from benchmarks.quality.teacher import Student, Teacher
from dskd.errors import UserError

_FRAMES = ("The opposite of {} is", "Another word for {} is")
_STATE_FRAME = "The word is {}"
_MOST = 500  # pairs: the standard error of the area is then about .02


@dataclass
class Pairs:
    """Pairs of words in sentences."""

    measures: ClassVar[tuple[str, ...]] = ("opposites", "opposites_states")
    # Padded at the end: all pairs in the first frame, then in the second; all first words, then all second ones.
    input_ids: torch.Tensor  # [4 n, T] int64
    last: torch.Tensor  # [4 n], the position of each sentence's last token
    words: torch.Tensor  # [n], the tokens that complete them
    are_antonyms: torch.Tensor  # [n] bool

    @classmethod
    def read(cls, files: Sequence[Path], teacher: Teacher) -> "Pairs":
        """Reads files of pairs; of all pairs that can be used, those at even distances count.

        Raises:
            UserError: when a line is no pair, or hardly a pair can be used.
        """
        frames, words, labels = [], [], []
        for file in files:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--pairs {file}: this is no file of pairs ({error})") from None
            for number, line in enumerate(lines, start=1):
                match line.split("\t"):
                    case [one, other, "0" | "1" as label]:
                        word = teacher.tokenizer.encode(f" {other}", add_special_tokens=False)
                        if len(word) == 1:
                            texts = [frame.format(one) for frame in _FRAMES]
                            texts += [_STATE_FRAME.format(each) for each in (one, other)]
                            frames.append([teacher.tokenizer.encode(text) for text in texts])
                            words.append(word[0])
                            labels.append(label == "1")
                    case _:
                        raise UserError(f"--pairs {file}:{number}: this line is no pair of words with 0 or 1: {line!r}")
        if len(set(labels)) < 2:
            raise UserError(f"--pairs {', '.join(map(str, files))}: no antonyms or no synonyms that are one token")
        kept = range(0, len(words), -(-len(words) // _MOST))
        rows = [frames[pair][which] for which in range(len(frames[0])) for pair in kept]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        chosen = list(kept)
        return cls(tokens, last, torch.tensor(words)[chosen], torch.tensor(labels)[chosen])

    @torch.no_grad()
    def measure(self, student: Student, states: torch.Tensor) -> dict[str, float]:
        """Returns {measure: value} of a student whose upper layers get these `states` [4 n, T, D]."""
        found = []
        for at in torch.arange(len(self.input_ids)).split(64):
            hidden = student(states[at], self.position_ids[at], self.attention_mask(at))
            found.append(hidden[torch.arange(len(at)), self.last[at]])
        opposite, alike, one, other = torch.cat(found).chunk(4)
        chances = F.linear(torch.cat([opposite, alike]), student.output_matrix).log_softmax(-1)
        chances = chances.gather(-1, self.words.repeat(2)[:, None].to(chances.device)).squeeze(-1)
        by_words = chances[: len(self.words)] - chances[len(self.words) :]
        return {
            "opposites": area_under_curve(by_words, self.are_antonyms),
            "opposites_states": area_under_curve(1 - F.cosine_similarity(one, other), self.are_antonyms),
            "opposites_n": len(self.words),
        }

    @property
    def position_ids(self) -> torch.Tensor:
        """The positions [4 n, T]."""
        return torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids)

    def attention_mask(self, at: torch.Tensor) -> torch.Tensor:
        """Returns which positions each position of the rows `at` sees: every row is one document."""
        length = self.input_ids.shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril().expand(len(at), 1, -1, -1)


def area_under_curve(scores: torch.Tensor, is_positive: torch.Tensor) -> float:
    """Returns the probability that a positive has a higher score than a negative; ties count half."""
    from scipy import stats

    positives, negatives = scores[is_positive], scores[~is_positive]
    found = stats.mannwhitneyu(positives.cpu().numpy(), negatives.cpu().numpy())
    return float(found.statistic) / (len(positives) * len(negatives))
