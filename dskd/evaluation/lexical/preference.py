"""Synonym against antonym: which of the two a language model prefers in a sentence.

A word that a WordNet example has in the form of its lemma is replaced by a synonym and by an antonym of the sense that
the example illustrates (:mod:`dskd.evaluation.lexical.contexts`). The model prefers the one with the higher
log-likelihood of the whole sentence, which includes the words after it. Chance is .5.

The two words are alike in what could decide instead of meaning:

- frequency: both occur in the training text, neither more than twice as often as the other (with one added to each
  count). :mod:`dskd.evaluation.lexical.surface` still reports the score of a model that knows only frequencies;
- tokens: both have the same number of tokens in the sentence, so the sum of log-likelihoods and their mean give the
  same preference, and no normalisation is needed;
- grammar: neither is inflected, both fit an "a" or "an" before them, and neither occurs in the sentence already.

If several pairs fit, the one with the most equal frequencies is used; of equal ones, the first in the alphabet.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dskd.evaluation.lexical.contexts import Context
from dskd.evaluation.lexical.scores import Item
from dskd.evaluation.lexical.states import Tokens, tokenize
from dskd.evaluation.lexical.training_text import Phrase, words_of

MEASURE = "synonym_preference"
_BAND = math.log(2)
_VOWELS = "aeiou"


class Choice(NamedTuple):
    """A sentence with a synonym, and the same sentence with an antonym."""

    cluster: str
    name: str
    synonym: Tokens
    antonym: Tokens
    frequencies: tuple[int, int]


def candidates_of(context: Context) -> list[tuple[str, str]]:
    """Returns the (synonym, antonym) pairs that fit the sentence; frequencies and tokens are not checked."""
    if context.word != context.lemma:
        return []
    before = words_of(context.text[: context.start])[-1:]
    words = set(words_of(context.text))
    fitting = [
        word
        for word in {*context.synonyms, *context.antonyms}
        if not words.intersection(words_of(word))
        and (before not in (("a",), ("an",)) or (word[0].lower() in _VOWELS) == (before == ("an",)))
    ]
    return sorted(itertools.product(set(context.synonyms) & set(fitting), set(context.antonyms) & set(fitting)))


def phrases_of(contexts: Iterable[Context]) -> set[Phrase]:
    """Returns the words whose frequencies :func:`choices` needs."""
    return {words_of(word) for context in contexts for pair in candidates_of(context) for word in pair}


def choices(contexts: Sequence[Context], frequencies: Mapping[Phrase, int], tokenizer: Any) -> list[Choice]:
    """Returns the items, at most one per context, in the order of the contexts."""
    items = []
    for context in contexts:
        best: tuple[float, Choice] | None = None
        for pair in candidates_of(context):
            counts = [frequencies.get(words_of(word), 0) for word in pair]
            distance = abs(math.log((counts[0] + 1) / (counts[1] + 1)))
            if min(counts) == 0 or distance > _BAND or (best is not None and distance >= best[0]):
                continue
            synonym, antonym = (_with(context, word, tokenizer) for word in pair)
            if synonym is None or antonym is None or len(synonym.input_ids) != len(antonym.input_ids):
                continue
            name = f"{context.synset}/{context.lemma}/{pair[0]}/{pair[1]}/{context.text}"
            best = distance, Choice(context.cluster, name, synonym, antonym, (counts[0], counts[1]))
        if best is not None:
            items.append(best[1])
    return items


def _with(context: Context, word: str, tokenizer: Any) -> Tokens | None:
    text = context.text[: context.start] + word + context.text[context.stop :]
    tokens = tokenize(tokenizer, text, context.start, context.start + len(word))
    return tokens if tokens is not None and tokens.first > 0 else None  # the first token has no likelihood


def preference(items: Sequence[Choice], likelihoods: Sequence[float]) -> list[Item]:
    """Returns one item per choice; a tie scores half.

    `likelihoods` [2 n] holds the log-likelihoods of each choice's two sentences, the synonym's before the antonym's.
    """
    return [
        Item(MEASURE, choice.cluster, choice.name, 0.5 + 0.5 * ((synonym > antonym) - (synonym < antonym)), 0.5)
        for choice, synonym, antonym in zip(items, likelihoods[::2], likelihoods[1::2], strict=True)
    ]
