"""Words in Context (Pilehvar and Camacho-Collados, NAACL 2019), from its published files.

Each line of `NAME.data.txt` is a pair of sentences, word<TAB>N or V<TAB>i-j<TAB>sentence<TAB>sentence; i and j are the
indices of the word among the words between spaces, from 0. Each line of `NAME.gold.txt`, in the same folder, is T or F:
whether the word means the same in both sentences. A pair's score is the cosine of the model's states at the ends of
both words. `wic_auc` is the ROC AUC of the scores, chance .5. `wic_accuracy` is the accuracy of calling a pair the same
if its score reaches a threshold, the one that is most accurate on another file; chance is the share of the larger
class.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from dskd.errors import UserError
from dskd.evaluation.lexical.scores import Item
from dskd.evaluation.lexical.states import Tokens, tokenize

ACCURACY, AUC = "wic_accuracy", "wic_auc"
_DATA, _GOLD = ".data.txt", ".gold.txt"
_FORMAT = "word<TAB>N|V<TAB>i-j<TAB>sentence<TAB>sentence"
_SAME = {"T": True, "F": False}


class Marked(NamedTuple):
    """A sentence and the word `text[start:stop]` in it."""

    text: str
    start: int
    stop: int


class Pair(NamedTuple):
    """A pair of sentences with the same word."""

    name: str  # FILE:LINE
    word: str
    one: Marked
    other: Marked
    is_same: bool

    def tokenize(self, tokenizer: Any) -> tuple[Tokens, Tokens] | None:
        """Returns both sentences as a model reads them, or None if a token of a word has letters outside the word."""
        one, other = (tokenize(tokenizer, *marked) for marked in (self.one, self.other))
        return None if one is None or other is None else (one, other)


def gold_of(data: Path) -> Path:
    """Returns the path of the file with the answers to a file of sentences."""
    return data.with_name(data.name.removesuffix(_DATA) + _GOLD)


def read_wic(file: str, key: str) -> list[Pair]:
    """Reads the pairs of a data file and its gold file. Raises a UserError when a file that `key` of the config names
    is missing or cannot be read, or a line is not in the format; it says which line, and why.
    """
    path = Path(file).expanduser()
    if not path.name.endswith(_DATA):
        raise UserError(f"{key}: expected a data file of Words in Context, called NAME{_DATA}, found {path}")
    data, gold = _lines(path, key), _lines(gold_of(path), key)
    if len(data) != len(gold):
        raise UserError(
            f"{gold_of(path)}: it has {len(gold):,} lines, but {path.name} has {len(data):,}; fetch both again, in the "
            "same version"
        )
    if not data:
        raise UserError(f"{key}: {path} is empty; fetch it again")
    pairs = []
    for number, (line, answer) in enumerate(zip(data, gold, strict=True), start=1):
        if answer.strip() not in _SAME:
            raise UserError(f"{gold_of(path)}:{number}: expected T or F, found {answer.strip()[:20]!r}")
        fields = line.split("\t")
        try:
            if len(fields) != 5:
                raise ValueError(f"it has {len(fields)} fields")
            word, part, indices, *sentences = (field.strip() for field in fields)
            if part not in ("N", "V"):
                raise ValueError(f"the part of speech is {part!r}")
            one, other = _marked(indices, sentences)
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected {_FORMAT}; {error}") from None
        pairs.append(Pair(f"{path.name}:{number}", word, one, other, _SAME[answer.strip()]))
    _require_indices_of_the_word(pairs, path)
    return pairs


def _require_indices_of_the_word(pairs: Sequence[Pair], path: Path) -> None:
    """Raises a UserError unless most indices are of the pair's word: nearly every form of a word begins with its first
    letter.
    """
    marked = [(pair.word, mark.text[mark.start : mark.stop]) for pair in pairs for mark in (pair.one, pair.other)]
    others = [(word, other) for word, other in marked if word[:1].casefold() != other[:1].casefold()]
    if 2 * len(others) > len(marked):
        word, other = others[0]
        raise UserError(
            f"{path}: in {len(others):,} of {len(marked):,} sentences the index is that of another word, such as "
            f"{other!r} instead of {word!r}; an index counts the words between spaces, from 0"
        )


def _lines(path: Path, key: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(
            f"{key}: {path} cannot be read ({error.strerror}); name a data file with its gold file in the same folder"
        ) from None
    # Not splitlines(), which also divides at characters that may be in a sentence, such as U+2028.
    return text.removesuffix("\n").split("\n") if text else []


def _marked(indices: str, sentences: Sequence[str]) -> list[Marked]:
    numbers = indices.split("-")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"the indices of the word are {indices!r} and should look like 2-5")
    marked = []
    for number, text in zip(map(int, numbers), sentences, strict=True):
        words = text.split(" ")
        if number >= len(words) or not words[number]:
            raise ValueError(f"{text[:40]!r} has no word {number}")
        start = len(" ".join(words[:number])) + bool(number)
        marked.append(Marked(text, start, start + len(words[number])))
    return marked


def similarities(states: torch.Tensor) -> np.ndarray:
    """Returns the cosine [n] of each pair; rows 2 i and 2 i + 1 of the states [2 n, D] are the sentences of pair i."""
    return F.cosine_similarity(states[::2].double(), states[1::2].double(), dim=-1).numpy()


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the threshold that makes the fewest mistakes; the lowest of equal ones.

    A pair counts as the same if its score is at least the threshold. The threshold is halfway between two adjacent
    scores, or infinite on either side.
    """
    distinct = np.unique(scores)
    thresholds = np.concatenate([[-np.inf], (distinct[:-1] + distinct[1:]) / 2, [np.inf]])
    accuracies = [float(np.mean((scores >= threshold) == labels)) for threshold in thresholds]
    return float(thresholds[int(np.argmax(accuracies))])


def accuracy(pairs: Sequence[Pair], scores: np.ndarray, threshold: float) -> list[Item]:
    """Returns one item per pair."""
    share = sum(pair.is_same for pair in pairs) / len(pairs)
    return [
        Item(
            ACCURACY, f"wic:{pair.word}", pair.name, float((score >= threshold) == pair.is_same), max(share, 1 - share)
        )
        for pair, score in zip(pairs, scores, strict=True)
    ]
