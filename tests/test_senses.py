"""Entries, the reservoir, spans and the dictionary's file, each against a plain recomputation."""

import numpy as np
import pytest
import torch
from tiny_models import word_tokenizer

from dskd.config import SensesConfig
from dskd.errors import UserError
from dskd.lexicon.relations import Relation, resolve
from dskd.random_numbers import random_bits
from dskd.senses.build import cluster
from dskd.senses.dictionary import map_vectors, read_dictionary, save_dictionary
from dskd.senses.entries import build_entries, tokenize_words
from dskd.senses.gather import Reservoir, TokenStates
from dskd.senses.spans import compose_spans

WORDS = ["big", "large", "huge", "small", "of", "very", "the", "size", "ox"]


def _relations(*lines):
    return resolve(Relation(*line.split("|"), "test") for line in lines)[0]


def test_entries_of_a_hand_made_lexicon():
    tokenizer = word_tokenizer(WORDS)
    ids = tokenizer.get_vocab()
    entries, counts = build_entries(
        _relations(
            "big|large|synonym",
            "big|very large|synonym",
            "big|small|antonym",
            "ox|big|synonym",  # "ox" has two letters: no head, but a neighbour
            "big|of the very big size|synonym",  # five tokens: no neighbour
        ),
        tokenizer,
        vocab_size=len(ids),
    )

    def neighbours(kind, word):
        offsets = getattr(entries, f"{kind}_offsets")
        return getattr(entries, f"{kind}_entries")[offsets[ids[word]] : offsets[ids[word] + 1]].tolist()

    span = len(ids)
    assert entries.span_tokens.tolist() == [[ids["very"], ids["large"], -1]]
    assert neighbours("synonym", "big") == sorted([ids["large"], ids["ox"], span])
    assert neighbours("synonym", "large") == [ids["big"]]
    assert neighbours("synonym", "ox") == []
    assert neighbours("antonym", "small") == [ids["big"]]
    assert counts["neighbour_is_longer_than_three_tokens"] == 1
    assert counts["head_is_shorter_than_three_letters"] == 1
    assert counts["head_is_not_one_token"] == 2  # the two spans as heads


def test_words_are_tokenized_as_they_stand_inside_a_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A tokenizer that puts a space of its own before a text, as sentencepiece does.
    vocabulary = {
        token: i for i, token in enumerate(["<unk>", "▁", "▁the", "▁big", "big", "t", "h", "e", "b", "i", "g"])
    }
    inner = Tokenizer(models.Unigram([(token, -1.0 - i) for token, i in vocabulary.items()], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert tokenize_words(["big"], tokenizer) == [(vocabulary["▁big"],)]


def test_the_reservoir_keeps_the_lowest_priorities_in_any_order_of_arrival():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 7, (500,), generator=generator)
    priorities = random_bits(3, torch.arange(500))
    states = torch.arange(500.0).unsqueeze(-1).repeat(1, 4)

    def sample(order, step, buffer_states):
        reservoir = Reservoir(7, 5, 4, buffer_states=buffer_states)
        for start in range(0, 500, step):
            part = order[start : start + step]
            reservoir.add(tokens[part], priorities[part], states[part])
        return reservoir.finish()

    expected = {
        token: [i for i in sorted(range(500), key=lambda i: int(priorities[i])) if tokens[i] == token][:5]
        for token in range(7)
    }
    for order, step, buffer_states in [(torch.arange(500), 50, 10), (torch.randperm(500, generator=generator), 7, 64)]:
        found = sample(order, step, buffer_states)
        assert found.tokens.tolist() == list(range(7))
        for index, token in enumerate(found.tokens.tolist()):
            rows = found.states[found.offsets[index] : found.offsets[index + 1], 0]
            assert rows.tolist() == [float(torch.tensor(float(i)).bfloat16()) for i in expected[token]]


def test_a_token_with_few_states_keeps_them_as_they_are():
    states = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = TokenStates(torch.tensor([2, 5]), torch.tensor([0, 3, 9]), states)
    tokens, sizes, vectors, counts = cluster(found, SensesConfig(k=3), 0, torch.device("cpu"))
    assert tokens.tolist() == [2, 5]
    assert sizes.tolist() == [3, 3]
    assert torch.equal(vectors[:3], states[:3].float())
    assert counts.tolist()[:3] == [1, 1, 1]
    assert int(counts[3:].sum()) == 6


def test_spans_are_composed_as_in_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 3, 3, 5, 8])  # token 1 has no sense
    vectors = torch.randn(8, 4, generator=generator)
    counts = torch.arange(1, 9)
    spans = torch.tensor([[0, 2, -1], [2, 3, 0], [0, 1, -1], [1, 0, 2]], dtype=torch.int32)
    found, behind, sizes = compose_spans(spans, vectors, counts, offsets, k=3)

    expected, expected_behind, expected_sizes = [], [], []
    for span in spans.tolist():
        tokens = [token for token in span if token >= 0]
        rows_of = [range(int(offsets[token]), int(offsets[token + 1])) for token in tokens]
        if not all(len(rows) for rows in rows_of):
            expected_sizes.append(0)
            continue
        expected_sizes.append(len(rows_of[0]))
        for first in rows_of[0]:
            matched = [first]
            for rows in rows_of[1:]:
                mean = vectors[matched].mean(0)
                matched.append(min(rows, key=lambda row: float((vectors[row] - mean).norm())))
            expected.append(vectors[matched].mean(0))
            expected_behind.append(int(counts[matched].sum()))
    assert sizes.tolist() == expected_sizes
    torch.testing.assert_close(found, torch.stack(expected))
    assert behind.tolist() == expected_behind


@pytest.fixture
def dictionary_file(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    entries, _ = build_entries(_relations("big|very large|synonym"), tokenizer, len(tokenizer))
    sizes = torch.ones(entries.num_entries, dtype=torch.int64)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    vectors = torch.randn(entries.num_entries, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_dictionary(tmp_path / "senses.safetensors", vectors, sizes, offsets, entries)
    return tmp_path / "senses.safetensors", vectors


def test_mapped_rows_are_those_of_the_file(dictionary_file):
    path, vectors = dictionary_file
    mapped = map_vectors(path)
    rows = torch.from_numpy(np.asarray(mapped[[3, 0]])).view(torch.bfloat16)
    assert torch.equal(rows, vectors[[3, 0]])
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 0


def test_a_dictionary_is_read_as_it_was_written(dictionary_file):
    path, vectors = dictionary_file
    dictionary = read_dictionary(path)
    assert torch.equal(dictionary.vectors(), vectors)
    assert dictionary.num_rows == len(vectors)
    assert dictionary.entries.span_tokens.shape == (1, 3)


def test_a_damaged_dictionary_is_refused(dictionary_file, tmp_path):
    path, _ = dictionary_file
    data = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-10])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_dictionary(tmp_path / "cut.safetensors")
    from safetensors.torch import save_file

    save_file({"vectors": torch.zeros(1, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="lacks antonym_entries"):
        read_dictionary(tmp_path / "other.safetensors")
