"""O_i, P_i and N_i against a brute-force recomputation, position by position."""

import numpy as np
import pytest
import torch
from small_dictionaries import all_vectors, save_dictionary
from torch.nn import functional as F

from dskd.senses.dictionary import SenseDictionary
from dskd.senses.entries import Entries
from dskd.shards.search import Searcher

V, SPANS, D, KAPPA = 30, 6, 8, 3


def _csr(pairs):
    heads = torch.tensor([head for head, _ in pairs], dtype=torch.int64)
    offsets = F.pad(torch.bincount(heads, minlength=V).cumsum(0), (1, 0))
    return offsets, torch.tensor([tail for _, tail in pairs], dtype=torch.int32)


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    """Tokens and spans with 0 to 4 rows, some of them equal, and random relations; 0 to 5 neighbours a token."""
    from dskd.senses.dictionary import read_dictionary

    random = np.random.default_rng(0)
    sizes = torch.tensor(random.integers(0, 5, V + SPANS))
    synonyms, antonyms = set(), set()
    for head in range(0, V, 2):
        tails = random.permutation([entry for entry in range(V + SPANS) if entry != head])
        first, second = random.integers(0, 6, 2)
        synonyms |= {(head, int(tail)) for tail in tails[:first]}
        antonyms |= {(head, int(tail)) for tail in tails[first : first + second]}
    synonym_offsets, synonym_entries = _csr(sorted(synonyms))
    antonym_offsets, antonym_entries = _csr(sorted(antonyms))
    entries = Entries(
        V,
        torch.zeros(SPANS, 3, dtype=torch.int32),
        synonym_offsets,
        synonym_entries,
        antonym_offsets,
        antonym_entries,
    )
    vectors = torch.tensor(random.normal(size=(int(sizes.sum()), D))).bfloat16()
    vectors[5] = vectors[2]  # a tie
    path = tmp_path_factory.mktemp("senses") / "senses.safetensors"
    save_dictionary(path, vectors, torch.ones(len(vectors), dtype=torch.int64), F.pad(sizes.cumsum(0), (1, 0)), entries)
    return read_dictionary(path)


def _oracle(dictionary: SenseDictionary, state: np.ndarray, target: int) -> tuple[list[int], list[int], list[int]]:
    vectors = all_vectors(dictionary).double().numpy()
    entries, offsets = dictionary.entries, dictionary.entry_offsets.tolist()

    def rows(entry):
        return list(range(offsets[entry], offsets[entry + 1]))

    def neighbours(kind):
        starts = getattr(entries, f"{kind}_offsets").tolist()
        return getattr(entries, f"{kind}_entries").tolist()[starts[target] : starts[target + 1]]

    def nearest(candidates):
        ordered = sorted(set(candidates), key=lambda row: (round(float(((vectors[row] - state) ** 2).sum()), 4), row))
        return (ordered[:KAPPA] + [-1] * KAPPA)[:KAPPA]

    synonyms, antonyms = neighbours("synonym"), neighbours("antonym")
    pool = rows(target) + [row for entry in synonyms for row in rows(entry)] if synonyms or antonyms else []
    return nearest(rows(target)), nearest(pool), nearest([row for entry in antonyms for row in rows(entry)])


@pytest.mark.parametrize("resident_rows", [10_000, 20, 0])
def test_every_position_agrees_with_brute_force(dictionary, resident_rows):
    """Wherever the rows are, and with frequent targets (more than a tile of one) as well as rare ones."""
    generator = torch.Generator().manual_seed(1)
    states, targets = torch.randn(400, D, generator=generator), torch.randint(0, V, (400,), generator=generator)
    targets[:100] = targets[0]
    frequencies = torch.bincount(targets, minlength=V)
    searcher = Searcher(dictionary, KAPPA, torch.device("cpu"), frequencies, memory_budget=resident_rows * 2 * D)
    nearest = searcher.search(states, targets)
    for i in range(400):
        expected = _oracle(dictionary, states[i].double().numpy(), int(targets[i]))
        assert (
            nearest.own_rows[i].tolist(),
            nearest.synonym_rows[i].tolist(),
            nearest.antonym_rows[i].tolist(),
        ) == expected


def test_a_batch_without_targets_finds_nothing(dictionary):
    nearest = Searcher(dictionary, KAPPA, torch.device("cpu")).search(
        torch.empty(0, D), torch.empty(0, dtype=torch.long)
    )
    assert nearest.own_rows.shape == nearest.synonym_rows.shape == nearest.antonym_rows.shape == (0, KAPPA)


def test_the_brute_force_search_covers_every_kind_of_position(dictionary):
    kinds = {
        tuple(ids[0] >= 0 for ids in _oracle(dictionary, np.zeros(D), target)) for target in range(V)
    }  # (has senses, has P_i, has N_i)
    assert {(True, False, False), (True, True, True), (True, True, False), (False, False, False)} <= kinds


def test_no_row_is_both_pulled_and_pushed(dictionary):
    generator = torch.Generator().manual_seed(2)
    states, targets = torch.randn(200, D, generator=generator), torch.randint(0, V, (200,), generator=generator)
    nearest = Searcher(dictionary, KAPPA, torch.device("cpu")).search(states, targets)
    columns = (nearest.own_rows.tolist(), nearest.synonym_rows.tolist(), nearest.antonym_rows.tolist())
    for pulled, also_pulled, pushed in zip(*columns, strict=True):
        assert not ({*pulled, *also_pulled} & set(pushed)) - {-1}


def test_the_mean_antonym_distance_is_that_of_the_rows_found(dictionary):
    states, targets = torch.randn(50, D, generator=torch.Generator().manual_seed(3)), torch.arange(50) % V
    nearest = Searcher(dictionary, KAPPA, torch.device("cpu")).search(states, targets)
    vectors = all_vectors(dictionary).float()
    for state, rows, distance in zip(
        states, nearest.antonym_rows.tolist(), nearest.antonym_distance.tolist(), strict=True
    ):
        of_rows = [float(((vectors[row] - state) ** 2).mean()) for row in rows if row >= 0]
        assert distance == pytest.approx(sum(of_rows) / max(len(of_rows), 1), rel=1e-4, abs=1e-6)
