"""The entries of the sense dictionary: tokens and spans, and their relations, from the words of the lexicon.

A relation has a head and a neighbour, both words. " word", the head with a space before it, must be one token, and
the head must have at least three letters. A neighbour is a span of one to three tokens (docs/method.md, section 1).
Entries 0…V-1 are the tokens, and entries from V on are spans of two or three tokens.

:mod:`dskd.models.words` has the rules for the tokens of a word.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from dskd.config import Config
from dskd.errors import UserError
from dskd.lexicon.relations import Relation, load_lexicon
from dskd.models.words import MIN_HEAD_LETTERS, tokenize_form, tokenize_words
from dskd.senses.csr import Csr, offsets_of

MAX_SPAN_TOKENS = 3


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
