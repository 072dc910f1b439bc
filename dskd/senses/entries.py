"""The entries of the sense dictionary: tokens and spans, and their relations, from the words of the lexicon.

A relation has a head and a neighbour, both words. " word", the head with a space before it, must be one token, and
the head must have at least three letters. A neighbour is a span of one to three tokens (docs/method.md, section 1).
Entries 0…V-1 are the tokens, and entries from V on are spans of two or three tokens.

A word counts only if its tokens decode to that word, contain no special token, such as the unknown token, and are
tokens of the model: a tokenizer can have more. Otherwise one token would collect the relations of all words that the
tokenizer does not know, and a token that the model lacks would be taken for a span, whose entry has its number.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from dskd.config import Config
from dskd.errors import UserError
from dskd.lexicon.relations import Relation, load_lexicon
from dskd.senses.csr import Csr, offsets_of

MAX_SPAN_TOKENS = 3
MIN_HEAD_LETTERS = 3


@dataclass(frozen=True)
class Entries:
    """The words and relations of the lexicon in terms of tokens. E entries: V tokens, then E-V spans."""

    vocab_size: int
    span_tokens: torch.Tensor  # [E-V, 3] int32, padded with -1
    synonym_offsets: torch.Tensor  # [V+1] int64
    synonym_entries: torch.Tensor  # int32
    antonym_offsets: torch.Tensor  # [V+1] int64
    antonym_entries: torch.Tensor  # int32

    @property
    def num_entries(self) -> int:
        """The number of entries, E."""
        return self.vocab_size + len(self.span_tokens)

    def neighbours(self, relation: str) -> Csr:
        """Returns, for each token [V], the entries that are its synonyms or its antonyms, in ascending order."""
        return Csr(getattr(self, f"{relation}_offsets"), getattr(self, f"{relation}_entries"))

    def tokens_of(self, entry: int) -> list[int]:
        """Returns the token ids of an entry: one for a token, two or three for a span."""
        if entry < self.vocab_size:
            return [entry]
        return [token for token in self.span_tokens[entry - self.vocab_size].tolist() if token >= 0]

    def find(self, tokens: Sequence[int]) -> int | None:
        """Returns the entry that has exactly these tokens, or None if there is none."""
        if len(tokens) == 1:
            return tokens[0]
        if not 1 < len(tokens) <= MAX_SPAN_TOKENS:
            return None
        padded = self.span_tokens.new_tensor([*tokens, *[-1] * (MAX_SPAN_TOKENS - len(tokens))])
        matches = (self.span_tokens == padded).all(-1).nonzero()
        return self.vocab_size + int(matches[0]) if len(matches) else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns every tensor by its name in the dictionary's file."""
        return {name: getattr(self, name) for name in ENTRY_TENSORS}


ENTRY_TENSORS = tuple(field.name for field in fields(Entries) if field.name != "vocab_size")


def load_entries(config: Config, tokenizer: Any, vocab_size: int) -> tuple[Entries, dict[str, int]]:
    """Builds the entries from `WORKDIR/lexicon`, as :func:`build_entries`. Raises a UserError when there is no lexicon,
    or when none of its pairs can be used with this tokenizer.
    """
    relations = load_lexicon(config)
    entries, counts = build_entries(relations, tokenizer, vocab_size, config.senses.surface_forms)
    if not counts["synonym_pairs"] and not counts["antonym_pairs"]:
        words = sorted({relation.head for relation in relations})
        wordnet = f" (WordNet: {', '.join(config.lexicon.languages)})" if config.lexicon.wordnet else ""
        raise UserError(
            f"no pair of the lexicon{wordnet} can be used with the tokenizer of "
            f"{tokenizer.name_or_path or 'the teacher'}: none of its {len(words):,} words ({', '.join(words[:3])}, …) "
            "is one token after a space and has a neighbour of one to three tokens (pairs dropped: "
            f"{describe_dropped_pairs(counts)}). Use a lexicon in the teacher's language, or another teacher"
        )
    return entries, counts


def describe_dropped_pairs(counts: Mapping[str, int]) -> str:
    """Returns a text with the number of dropped pairs by reason, from the counts of :func:`build_entries`."""
    return ", ".join(
        f"{count:,} because the {reason.replace('_', ' ')}"
        for reason, count in counts.items()
        if reason.startswith(("head_is_", "neighbour_is_"))
    )


def build_entries(
    relations: Iterable[Relation], tokenizer: Any, vocab_size: int, surface_forms: Sequence[str] = ()
) -> tuple[Entries, dict[str, int]]:
    """Tokenizes the words of the relations and drops the pairs that the tokenizer cannot express.

    In addition to " word", a word that begins with a small letter has the `surface_forms`: `capitalized` is " Word",
    and `sentence_initial` is "Word" at the very beginning of a text. A form counts only if it is one token. Then it
    has the neighbours of the word, and is a neighbour of the heads that the word is a neighbour of.

    Returns:
        The entries, and counts for the report: usable pairs, dropped pairs by reason, words that the tokenizer or the
        model does not know, and for each form how many of its tokens are heads and how many are neighbours.
    """
    # Tokenize every word, and every surface form of every word, once.
    relations = list(relations)
    words = sorted({word for relation in relations for word in (relation.head, relation.tail)})
    tokens_of = dict(zip(words, tokenize_words(words, tokenizer, vocab_size), strict=True))
    forms_of = {form: tokenize_form(words, form, tokenizer, vocab_size) for form in dict.fromkeys(surface_forms)}
    counts: Counter[str] = Counter(unknown_words=sum(not tokens for tokens in tokens_of.values()))
    # Pair every form of the head that is one token with every form of the neighbour that is one to three tokens; count
    # the reasons for dropping the other pairs.
    pairs: dict[str, set[tuple[int, tuple[int, ...]]]] = {"synonym": set(), "antonym": set()}
    for relation in relations:
        heads, tails = [tokens_of[relation.head]], [tokens_of[relation.tail]]
        heads += [token for of in forms_of.values() if (token := of.get(relation.head))]
        tails += [token for of in forms_of.values() if (token := of.get(relation.tail))]
        heads = [head for head in heads if len(head) == 1]
        tails = [tail for tail in tails if 1 <= len(tail) <= MAX_SPAN_TOKENS]
        if not heads:
            known = bool(tokens_of[relation.head])
            counts["head_is_not_one_token" if known else "head_is_unknown_to_the_tokenizer"] += 1
        elif len(relation.head) < MIN_HEAD_LETTERS:
            counts["head_is_shorter_than_three_letters"] += 1
        elif not tails:
            known = bool(tokens_of[relation.tail])
            counts["neighbour_is_longer_than_three_tokens" if known else "neighbour_is_unknown_to_the_tokenizer"] += 1
        else:
            pairs[relation.relation] |= {(head[0], tail) for head in heads for tail in tails if head != tail}
    # The tokenizer may drop case or accents, so that two words have the same tokens and a pair can be both a synonym
    # and an antonym pair. Training must not both pull a position to a row and push it away, so the synonym pair wins.
    pairs["antonym"] -= pairs["synonym"]
    spans = sorted({tail for kind in pairs.values() for _, tail in kind if len(tail) > 1})
    # Number the spans after the tokens, and store each relation as CSR: the entries of token v from offsets[v] on.
    entry_of_span = {span: vocab_size + index for index, span in enumerate(spans)}
    csr: dict[str, torch.Tensor] = {}
    for name, kind in pairs.items():
        edges = sorted((head, entry_of_span.get(tail, tail[0])) for head, tail in kind)
        heads_of_edges = torch.tensor([head for head, _ in edges], dtype=torch.int64)
        csr[f"{name}_offsets"] = offsets_of(torch.bincount(heads_of_edges, minlength=vocab_size))
        csr[f"{name}_entries"] = torch.tensor([entry for _, entry in edges], dtype=torch.int32)
        counts[f"{name}_pairs"] = len(edges)
        counts[f"tokens_with_{name}s"] = len({head for head, _ in edges})
    # For the report: how many tokens of each surface form are used as heads and as neighbours.
    counts["spans"] = len(spans)
    used_heads = {(head,) for kind in pairs.values() for head, _ in kind}
    used_tails = {tail for kind in pairs.values() for _, tail in kind}
    for form, tokens in forms_of.items():
        counts[f"{form}_heads"] = len(used_heads.intersection(tokens.values()))
        counts[f"{form}_neighbours"] = len(used_tails.intersection(tokens.values()))
    padded = [[*span, *[-1] * (MAX_SPAN_TOKENS - len(span))] for span in spans]
    span_tokens = torch.tensor(padded, dtype=torch.int32).reshape(-1, MAX_SPAN_TOKENS)
    return Entries(vocab_size, span_tokens, **csr), dict(counts)


def tokenize_words(words: list[str], tokenizer: Any, vocab_size: int | None = None) -> list[tuple[int, ...]]:
    """Returns the token ids of each word as they are inside a text, after a space: " word".

    It tokenizes "the word" and removes the tokens of "the". Tokenizing " word" alone would give other ids with
    tokenizers that add a space of their own at the beginning of a text. A word that the tokenizer does not know gets
    no ids, and so does one with an id that is not below `vocab_size`, which the model does not know.
    """
    if not words:
        return []
    before = "the"
    prefix = tokenizer(before, add_special_tokens=False)["input_ids"]
    batch = tokenizer([f"{before} {word}" for word in words], add_special_tokens=False)["input_ids"]
    tokens = [tuple(ids[len(prefix) :]) if ids[: len(prefix)] == prefix else () for ids in batch]
    return _tokens_of_known_words(words, tokens, tokenizer, vocab_size)


def tokenize_form(
    words: list[str], form: str, tokenizer: Any, vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Returns {word: its token} for the words that are one token in a surface form (see :func:`build_entries`)."""
    capitalized = {word: upper + word[1:] for word in words if word[0].islower() and len(upper := word[0].upper()) == 1}
    if not capitalized:
        return {}
    texts = list(capitalized.values())
    if form == "sentence_initial":
        batch = [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        tokens = _tokens_of_known_words(texts, batch, tokenizer, vocab_size)
    else:
        tokens = tokenize_words(texts, tokenizer, vocab_size)
    return {word: ids for word, ids in zip(capitalized, tokens, strict=True) if len(ids) == 1}


def _tokens_of_known_words(
    words: list[str], tokens: list[tuple[int, ...]], tokenizer: Any, vocab_size: int | None
) -> list[tuple[int, ...]]:
    """Returns the tokens of each word, or no tokens if they do not represent the word.

    They do not if one of them is a special token or none of the model's, or if they decode to other text. The latter
    happens with tokenizers that drop case, accents, or characters that they do not know.
    """
    special = {*tokenizer.all_special_ids, *(i for i, added in tokenizer.added_tokens_decoder.items() if added.special)}

    def known(ids: tuple[int, ...]) -> bool:
        return vocab_size is None or max(ids, default=0) < vocab_size

    texts = tokenizer.batch_decode([list(ids) for ids in tokens], clean_up_tokenization_spaces=False)
    return [
        ids if special.isdisjoint(ids) and known(ids) and _comparable(word) == _comparable(text) else ()
        for word, ids, text in zip(words, tokens, texts, strict=True)
    ]


def _comparable(text: str) -> str:
    # Decoders add or remove spaces between pieces, and some leave sentencepiece's sign for a space. Tokenizers
    # normalise full-width letters and composed accents; it is still the same word.
    return "".join(unicodedata.normalize("NFKC", text).replace("▁", " ").split())
