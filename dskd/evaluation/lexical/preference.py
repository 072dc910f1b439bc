"""Synonym against antonym: which of the two a language model rather puts into a sentence.

In a WordNet example a word that stands there as its lemma is replaced by a synonym and by an antonym of the sense that
the example illustrates (:mod:`dskd.evaluation.lexical.contexts`). The model prefers the one with the higher
log-likelihood of the whole sentence, so of the word and of how the sentence goes on. Chance is .5.

What would decide instead of meaning is held equal:

- frequency: both words occur in the training text, and no more than twice as often as each other (one is added to each
  count). What a model scores that knows frequencies only is still said (:mod:`dskd.evaluation.lexical.surface`);
- tokens: both are as many tokens in the sentence, so the sum of log-likelihoods and their mean decide alike, and
  nothing has to be normalised;
- grammar: neither is inflected, both begin as "a" or "an" before it asks for, and neither stands in the sentence
  already.

Of several pairs the one with the most equal frequencies is taken, the first in the alphabet of equal ones.
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
    """A sentence with a synonym, and the same with an antonym."""

    cluster: str
    name: str
    synonym: Tokens
    antonym: Tokens
    frequencies: tuple[int, int]


def candidates_of(context: Context) -> list[tuple[str, str]]:
    """Pairs of a synonym and an antonym that fit the sentence, but for their frequencies and tokens."""
    if context.word != context.lemma:
        return []
    before = words_of(context.text[: context.start])[-1:]
    there = set(words_of(context.text))
    fit = [
        word
        for word in {*context.synonyms, *context.antonyms}
        if not there.intersection(words_of(word))
        and (before not in (("a",), ("an",)) or (word[0].lower() in _VOWELS) == (before == ("an",)))
    ]
    return sorted(itertools.product(set(context.synonyms) & set(fit), set(context.antonyms) & set(fit)))


def phrases_of(contexts: Iterable[Context]) -> set[Phrase]:
    """The words whose frequencies :func:`choices` has to know."""
    return {words_of(word) for context in contexts for pair in candidates_of(context) for word in pair}


def choices(contexts: Sequence[Context], frequencies: Mapping[Phrase, int], tokenizer: Any) -> list[Choice]:
    """The items, at most one a context, in the order of the contexts."""
    found = []
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
            found.append(best[1])
    return found


def _with(context: Context, word: str, tokenizer: Any) -> Tokens | None:
    text = context.text[: context.start] + word + context.text[context.stop :]
    tokens = tokenize(tokenizer, text, context.start, context.start + len(word))
    return tokens if tokens is not None and tokens.first > 0 else None  # the first token's likelihood is not known


def preference(found: Sequence[Choice], likelihoods: Sequence[float]) -> list[Item]:
    """An item a choice, from the log-likelihoods [2 n] of each one's synonym and antonym in turn; a tie is half."""
    return [
        Item(MEASURE, choice.cluster, choice.name, 0.5 + 0.5 * ((synonym > antonym) - (synonym < antonym)), 0.5)
        for choice, synonym, antonym in zip(found, likelihoods[::2], likelihoods[1::2], strict=True)
    ]
