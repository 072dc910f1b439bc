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
    """Two sentences with the same word."""

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


def read_wic(place: str, key: str) -> list[Pair]:
    """Reads the pairs of a data file and its gold file.

    Args:
        place: the data file.
        key: the config's key, for messages.

    Raises:
        UserError: when a file is missing or cannot be read, or a line is not in the format; the message says which
            line, and why.
    """
    path = Path(place).expanduser()
    if not path.name.endswith(_DATA):
        raise UserError(f"{key}: {path} is not called NAME{_DATA}, as Words in Context is published; name that file")
    data, gold = _lines(path, key), _lines(gold_of(path), key)
    if len(data) != len(gold):
        raise UserError(
            f"{gold_of(path)}: it has {len(gold):,} lines, but {path.name} has {len(data):,}; the two belong to "
            "different versions, or a download was cut"
        )
    if not data:
        raise UserError(f"{key}: {path} is empty; is it whole?")
    pairs = []
    for number, (line, answer) in enumerate(zip(data, gold, strict=True), start=1):
        if answer.strip() not in _SAME:
            raise UserError(f"{gold_of(path)}:{number}: expected T or F, found {answer.strip()[:20]!r}")
        fields = line.split("\t")
        try:
            if len(fields) != 5:
                raise ValueError(f"it has {len(fields)} fields")
            word, part, places, *sentences = (field.strip() for field in fields)
            if part not in ("N", "V"):
                raise ValueError(f"the part of speech is {part!r}")
            one, other = _marked(places, sentences)
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected {_FORMAT}; {error}") from None
        pairs.append(Pair(f"{path.name}:{number}", word, one, other, _SAME[answer.strip()]))
    _check_places(pairs, path)
    return pairs


def _check_places(pairs: Sequence[Pair], path: Path) -> None:
    """Refuses a file most of whose places are other words: a form of a word nearly always has its first letter."""
    marked = [(pair.word, mark.text[mark.start : mark.stop]) for pair in pairs for mark in (pair.one, pair.other)]
    others = [(word, found) for word, found in marked if word[:1].casefold() != found[:1].casefold()]
    if 2 * len(others) > len(marked):
        word, found = others[0]
        raise UserError(
            f"{path}: in {len(others):,} of {len(marked):,} sentences the places name another word than the pair's, "
            f"such as {found!r} for {word!r}; places count the words between spaces, from 0"
        )


def _lines(path: Path, key: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(
            f"{key}: {path} cannot be read ({error.strerror}); name the data file, its gold file beside it"
        ) from None
    # Not splitlines(), which also divides at characters that may be in a sentence, such as U+2028.
    return text.removesuffix("\n").split("\n") if text else []


def _marked(places: str, sentences: Sequence[str]) -> list[Marked]:
    numbers = places.split("-")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"the places of the word are {places!r}, not such as 2-5")
    found = []
    for number, text in zip(map(int, numbers), sentences, strict=True):
        words = text.split(" ")
        if number >= len(words) or not words[number]:
            raise ValueError(f"{text[:40]!r} has no word {number}")
        start = len(" ".join(words[:number])) + bool(number)
        found.append(Marked(text, start, start + len(words[number])))
    return found


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
