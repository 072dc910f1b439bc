"""Words after a space, capitalized, and at the beginning of a text, with a tokenizer of a few plain tokens."""

import pytest
from relations import relations_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dskd.senses.entries import build_entries

# Ġ is a space. Words that are not here are split into letters.
TOKENS = [
    "Ġbig",
    "ĠBig",
    "Big",
    "Ġlarge",
    "ĠLarge",
    "Ġhuge",
    "Huge",
    "Ġvery",
    "Ġsmall",
    "Small",
    "ĠTiny",
    "Tiny",
    "the",
]


@pytest.fixture(scope="module")
def tokenizer():
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "Ġ"]
    pieces = [*TOKENS, *letters]
    # Longest match by score: a whole word is always better than its letters.
    vocabulary = [("<unk>", -100.0), *[(piece, -1.0 if piece in TOKENS else -50.0) for piece in pieces]]
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def _neighbours(tokenizer, relations, *forms):
    """{token of a head: its synonyms, antonyms}, as the tokenizer spells them."""
    entries, counts = build_entries(relations, tokenizer, len(tokenizer), forms)
    spelled = tokenizer.convert_ids_to_tokens
    names = [spelled(token) for token in range(len(tokenizer))]
    names += ["".join(spelled([t for t in span if t >= 0])) for span in entries.span_tokens.tolist()]
    found = {}
    for token in range(len(tokenizer)):
        sides = []
        for kind in ("synonym", "antonym"):
            offsets, tails = getattr(entries, f"{kind}_offsets"), getattr(entries, f"{kind}_entries")
            sides.append({names[tail] for tail in tails[offsets[token] : offsets[token + 1]]})
        if any(sides):
            found[names[token]] = tuple(sides)
    return found, counts


PAIRS = ("big|large|synonym", "big|very huge|synonym", "big|small|antonym")


def test_without_surface_forms_only_words_after_a_space_count(tokenizer):
    found, counts = _neighbours(tokenizer, relations_of(*PAIRS))
    assert found == {
        "Ġbig": ({"Ġlarge", "ĠveryĠhuge"}, {"Ġsmall"}),
        "Ġlarge": ({"Ġbig"}, set()),
        "Ġsmall": (set(), {"Ġbig"}),
    }
    assert not [name for name in counts if name.startswith(("capitalized", "sentence"))]


def test_capitalized_forms_of_one_token_are_heads_and_neighbours(tokenizer):
    found, counts = _neighbours(tokenizer, relations_of(*PAIRS), "capitalized")
    both = ({"Ġlarge", "ĠLarge", "ĠveryĠhuge"}, {"Ġsmall"})  # " Small" has several tokens
    assert found == {
        "Ġbig": both,
        "ĠBig": both,
        "Ġlarge": ({"Ġbig", "ĠBig"}, set()),
        "ĠLarge": ({"Ġbig", "ĠBig"}, set()),
        "Ġsmall": (set(), {"Ġbig", "ĠBig"}),
    }
    assert (counts["capitalized_heads"], counts["capitalized_neighbours"]) == (2, 2)


def test_both_surface_forms_can_be_used_together(tokenizer):
    found, counts = _neighbours(tokenizer, relations_of(*PAIRS), "capitalized", "sentence_initial")
    assert set(found) == {"Ġbig", "ĠBig", "Big", "Ġlarge", "ĠLarge", "Ġsmall", "Small"}
    assert found["Big"] == ({"Ġlarge", "ĠLarge", "ĠveryĠhuge"}, {"Ġsmall", "Small"})
    assert found["Small"] == (set(), {"Ġbig", "ĠBig", "Big"})
    assert (counts["sentence_initial_heads"], counts["sentence_initial_neighbours"]) == (2, 2)


def test_a_word_that_is_one_token_only_in_a_surface_form_is_a_head_in_that_form(tokenizer):
    found, counts = _neighbours(tokenizer, relations_of("tiny|small|synonym"), "capitalized", "sentence_initial")
    assert set(found) == {"Tiny", "ĠTiny", "Ġsmall", "Small"}  # " tiny" has five tokens
    assert found["Ġsmall"] == ({"ĠTiny", "Tiny"}, set())
    assert "head_is_not_one_token" not in counts


def test_words_that_begin_with_a_capital_have_no_other_forms(tokenizer):
    found, _ = _neighbours(tokenizer, relations_of("Big|large|synonym"), "sentence_initial")
    assert found == {"ĠBig": ({"Ġlarge"}, set()), "Ġlarge": ({"ĠBig"}, set())}


def test_no_token_is_its_own_neighbour_nor_both_synonym_and_antonym(tokenizer):
    relations = relations_of("big|Big|synonym", "big|large|synonym", "Big|large|antonym")
    found, _ = _neighbours(tokenizer, relations, "capitalized")
    assert found["ĠBig"][0] == {"Ġbig", "ĠLarge", "Ġlarge"}
    assert found["Ġbig"][0] == {"ĠBig", "ĠLarge", "Ġlarge"}
    assert not any(synonyms & antonyms for synonyms, antonyms in found.values())
    assert not any(token in synonyms | antonyms for token, (synonyms, antonyms) in found.items())
