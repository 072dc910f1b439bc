"""Entries, the reservoir, spans and the dictionary's file, each against a plain recomputation."""

import numpy as np
import pytest
import torch
from relations import relations_of
from small_dictionaries import all_vectors, save_dictionary
from tiny_models import word_tokenizer

from dskd.artifacts.building import Building
from dskd.artifacts.manifest import Recipe
from dskd.config import SensesConfig
from dskd.errors import UserError
from dskd.random_numbers import random_bits
from dskd.senses.build import _finish, _prepare
from dskd.senses.cluster import cluster
from dskd.senses.dictionary import map_vectors, read_dictionary
from dskd.senses.entries import build_entries, tokenize_words
from dskd.senses.reservoir import Reservoir, SampledStates, TokenStates
from dskd.senses.spans import compose_spans, span_sizes

WORDS = ["big", "large", "huge", "small", "of", "very", "the", "size", "ox"]


def test_entries_of_a_hand_made_lexicon():
    tokenizer = word_tokenizer(WORDS)
    ids = tokenizer.get_vocab()
    entries, counts = build_entries(
        relations_of(
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


def test_words_get_the_tokens_that_they_have_inside_a_text():
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


ROW_BYTES = 2 * 4 + 16  # of a state of 4 dimensions with its token and priority


@pytest.mark.parametrize(
    ("shuffled", "step", "budget_rows", "flush_every", "ranks"),
    [
        (False, 50, 10_000, 0, 1),  # everything fits
        (True, 7, 40, 0, 1),  # spills
        (True, 33, 25, 60, 1),  # spills less than one offer, and is flushed so often that runs are merged
        (True, 20, 60, 100, 3),
    ],
)
def test_the_sample_has_the_lowest_priorities_for_any_memory_budget(
    tmp_path, shuffled, step, budget_rows, flush_every, ranks
):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 7, (1500,), generator=generator)
    priorities = random_bits(3, torch.arange(1500))
    states = torch.randn(1500, 4, generator=generator).bfloat16()
    order = torch.randperm(1500, generator=generator) if shuffled else torch.arange(1500)
    reservoirs = [Reservoir(7, 5, 4, budget_rows * ROW_BYTES, tmp_path, f"rank{rank}") for rank in range(ranks)]
    for number, start in enumerate(range(0, 1500, step)):
        for rank, reservoir in enumerate(reservoirs):
            part = order[start : start + step]
            part = part[tokens[part] % ranks == rank]
            part = part[reservoir.can_enter(tokens[part], priorities[part])]
            reservoir.add(tokens[part], priorities[part], states[part])
            if flush_every and number % (flush_every // step or 1) == 0:
                reservoir.flush()
                reservoir.remove_obsolete()
    runs = [tmp_path / run for reservoir in reservoirs for run in reservoir.flush()]
    expected = {
        token: [i for i in sorted(range(1500), key=lambda i: int(priorities[i])) if tokens[i] == token][:5]
        for token in range(7)
    }
    for readers, budget in ((1, 10**6), (2, 3 * 4 * 2)):
        found: dict[int, torch.Tensor] = {}
        for rank in range(readers):
            for some in SampledStates(runs, 5, (rank, readers)).ranges(budget):
                for index, token in enumerate(some.tokens.tolist()):
                    assert token % readers == rank
                    found[token] = some.states[some.offsets[index] : some.offsets[index + 1]]
        assert sorted(found) == list(range(7))
        for token, rows in expected.items():
            assert torch.equal(found[token], states[rows])


def test_a_reservoir_resumes_from_the_runs_of_the_last_flush(tmp_path):
    priorities = random_bits(5, torch.arange(300))
    tokens, states = torch.arange(300) % 3, torch.randn(300, 4).bfloat16()
    first = Reservoir(3, 4, 4, 50 * ROW_BYTES, tmp_path, "rank0")
    first.add(tokens[:150], priorities[:150], states[:150])
    noted = first.flush()
    first.add(tokens[150:], priorities[150:], states[150:])  # lost: no flush recorded the runs of these
    second = Reservoir(3, 4, 4, 50 * ROW_BYTES, tmp_path, "rank0", noted)
    assert not second.can_enter(tokens, priorities).all()  # the runs give it thresholds
    second.add(tokens[150:], priorities[150:], states[150:])
    (found,) = SampledStates([tmp_path / run for run in second.flush()], 4).ranges(10**6)
    expected = [i for token in range(3) for i in sorted(range(token, 300, 3), key=lambda i: int(priorities[i]))[:4]]
    assert torch.equal(found.states, states[expected])


def test_a_sample_without_states_is_empty(tmp_path):
    assert Reservoir(3, 4, 4, 1000, tmp_path, "rank0").flush() == []
    assert list(SampledStates([], 4).ranges(1000)) == []


def test_a_token_with_few_states_keeps_them_as_they_are():
    states = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampled = TokenStates(torch.tensor([2, 5]), torch.tensor([0, 3, 9]), states)
    found = cluster(sampled, SensesConfig(k=3), 0, torch.device("cpu"))
    assert found.tokens.tolist() == [2, 5]
    assert found.sizes.tolist() == [3, 3]
    assert torch.equal(found.vectors[:3], states[:3])
    assert found.counts.tolist()[:3] == [1, 1, 1]
    assert int(found.counts[3:].sum()) == 6


def test_equal_states_are_one_sense():
    states = torch.cat([torch.ones(30, 4), torch.zeros(20, 4), torch.randn(30, 4, generator=torch.Generator())])
    sampled = TokenStates(torch.tensor([1, 2]), torch.tensor([0, 50, 80]), states.bfloat16())
    found = cluster(sampled, SensesConfig(k=5), 0, torch.device("cpu"))
    assert found.sizes.tolist() == [2, 5]
    assert sorted(found.counts[:2].tolist()) == [20, 30]
    assert found.vectors[:2].float().sum(-1).sort().values.tolist() == pytest.approx([0, 4], abs=1e-5)
    assert len(found.vectors) == len(found.counts) == 7


def test_states_per_sense_limits_the_number_of_senses():
    states = torch.randn(3 + 8 + 25, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampled = TokenStates(torch.tensor([1, 2, 7]), torch.tensor([0, 3, 11, 36]), states)
    found = cluster(sampled, SensesConfig(k=4, states_per_sense=5), 0, torch.device("cpu"))
    assert found.sizes.tolist() == [1, 2, 4]  # 3/5 and 8/5 rounded up; 25/5 is more than k
    torch.testing.assert_close(found.vectors[0], states[:3].float().mean(0).bfloat16())
    assert [int(part.sum()) for part in found.counts.split(found.sizes.tolist())] == [3, 8, 25]


def test_a_build_ends_well_if_its_folder_of_states_is_a_link(tmp_path):
    building, states = (Building(tmp_path / kind, Recipe(kind)) for kind in ("senses", "states"))
    _prepare(building, states, force=False)
    elsewhere = states.folder.rename(tmp_path / "elsewhere")
    states.folder.symlink_to(elsewhere)
    _prepare(building, states, force=False)
    assert states.folder.is_symlink()  # the build resumes from them
    _finish(building, states, keep_states=False)
    assert building.path.is_dir()
    assert not states.folder.is_symlink()


def test_spans_are_composed_as_in_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 3, 3, 5, 8])  # token 1 has no sense
    vectors = torch.randn(8, 4, generator=generator)
    counts = torch.arange(1, 9)
    spans = torch.tensor([[0, 2, -1], [2, 3, 0], [0, 1, -1], [1, 0, 2]], dtype=torch.int32)
    sizes = span_sizes(spans, offsets, 3)
    pieces = list(compose_spans(spans, lambda rows: vectors[rows], counts, offsets, k=3))
    found, counts_of_spans = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    expected, expected_counts, expected_sizes = [], [], []
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
            expected_counts.append(int(counts[matched].sum()))
    assert sizes.tolist() == expected_sizes
    torch.testing.assert_close(found, torch.stack(expected))
    assert counts_of_spans.tolist() == expected_counts


@pytest.fixture
def dictionary_file(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    entries, _ = build_entries(relations_of("big|very large|synonym"), tokenizer, len(tokenizer))
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
    assert torch.equal(all_vectors(dictionary), vectors)
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
