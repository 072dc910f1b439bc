"""A judge from outside: whether a model tells antonyms from synonyms.

Reads pairs of words as AntSynNET has them, one a line: two words and 1 for antonyms or 0 for synonyms, tabs between.
Only pairs whose second word is one token count. The measures are areas under the ROC curve of a pair's score:

| measure | score |
|---|---|
| opposites | log p(word after "The opposite of OTHER is") - log p(word after "Another word for OTHER is") |
| opposites_new | the same, of the pairs alone that the study's own lexicon does not have |
| opposites_states | one minus the cosine of the last hidden states after "The word is WORD" and "The word is OTHER" |

Shapes: n pairs, T tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.quality.teacher import Rows, Student, Teacher
from dskd.errors import UserError
from dskd.evaluation.lexical.scores import roc_auc

_FRAMES = ("The opposite of {} is", "Another word for {} is")
_STATE_FRAME = "The word is {}"
_MOST = 500  # pairs: the standard error of the area is then about .02


class Pair(NamedTuple):
    """Two words."""

    one: str
    other: str
    are_antonyms: bool


def read_pairs(files: Sequence[Path]) -> list[Pair]:
    """Reads files of pairs.

    Raises:
        UserError: when a file cannot be read, or a line is not a pair.
    """
    found = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--pairs {file}: this is not a file of pairs ({error})") from None
        for number, line in enumerate(lines, start=1):
            match line.split("\t"):
                case [one, other, "0" | "1" as label]:
                    found.append(Pair(one, other, label == "1"))
                case _:
                    raise UserError(f"--pairs {file}:{number}: this line is not a pair of words with 0 or 1: {line!r}")
    return found


@dataclass
class Pairs(Rows):
    """Pairs of words in sentences."""

    # Padded at the end: all pairs in the first frame, then in the second; all first words, then all second ones.
    input_ids: torch.Tensor  # [4 n, T] int64
    last: torch.Tensor  # [4 n], the position of each sentence's last token
    words: torch.Tensor  # [n], the tokens that complete them
    are_antonyms: torch.Tensor  # [n] bool
    are_new: torch.Tensor  # [n] bool: not in the study's own lexicon

    @classmethod
    def read(cls, files: Sequence[Path], teacher: Teacher, known: Collection[frozenset[str]]) -> "Pairs":
        """Reads files of pairs; of many usable pairs, evenly spaced ones are used.

        Args:
            files: the files.
            teacher: the teacher, for its tokenizer.
            known: the pairs of words that the study's own lexicon has.

        Raises:
            UserError: when a line is not a pair, or no antonyms or no synonyms can be used.
        """
        usable, frames, words = [], [], []
        for pair in read_pairs(files):
            word = teacher.tokenizer.encode(f" {pair.other}", add_special_tokens=False)
            if len(word) == 1:
                texts = [frame.format(pair.one) for frame in _FRAMES]
                texts += [_STATE_FRAME.format(each) for each in (pair.one, pair.other)]
                frames.append([teacher.tokenizer.encode(text) for text in texts])
                words.append(word[0])
                usable.append(pair)
        if len({pair.are_antonyms for pair in usable}) < 2:
            raise UserError(f"--pairs {', '.join(map(str, files))}: no antonyms or no synonyms that are one token")
        kept = range(0, len(words), -(-len(words) // _MOST))
        rows = [frames[pair][which] for which in range(len(frames[0])) for pair in kept]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        are_antonyms = torch.tensor([usable[pair].are_antonyms for pair in kept])
        are_new = torch.tensor([frozenset((usable[pair].one, usable[pair].other)) not in known for pair in kept])
        return cls(tokens, last, torch.tensor(words)[list(kept)], are_antonyms, are_new)

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its measures."""
        new = ("opposites_new",) if self._has_new else ()
        return "opposites", *new, "opposites_states"

    @property
    def _has_new(self) -> bool:
        of_new = self.are_antonyms[self.are_new]
        return bool(of_new.any() and not of_new.all())

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
        new = self.are_new
        of_new = (
            {
                "opposites_new": _area(by_words.cpu()[new], self.are_antonyms[new]),
                "opposites_new_n": int(new.sum()),
            }
            if self._has_new
            else {}
        )
        return of_new | {
            "opposites": _area(by_words, self.are_antonyms),
            "opposites_states": _area(1 - F.cosine_similarity(one, other), self.are_antonyms),
            "opposites_n": len(self.words),
        }


def _area(scores: torch.Tensor, is_positive: torch.Tensor) -> float:
    return roc_auc(scores.cpu().numpy(), is_positive.cpu().numpy())
