"""The shares of synonyms nearer than antonyms, for dictionaries with known answers."""

import pytest
import torch
from small_dictionaries import save_dictionary
from torch.nn import functional as F

from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.inspection.geometry import COMPARISONS, measure_geometry, report_geometry
from dskd.senses.dictionary import SenseDictionary, read_dictionary
from dskd.senses.entries import Entries

FIRST, SECOND, OTHER_HEAD = 0, 5, 6  # tokens with relations
SYNONYM, NEAR_ANTONYM, FAR_ANTONYM, WITHOUT_SENSES, SPAN = 1, 2, 3, 4, 8


def _dictionary(folder, rows: dict[int, list[list[float]]], synonyms, antonyms, counts=None) -> SenseDictionary:
    """A dictionary of 8 tokens and a span."""
    sizes = torch.tensor([len(rows.get(entry, [])) for entry in range(9)])
    vectors = torch.tensor([row for entry in range(9) for row in rows.get(entry, [])])
    relations = []
    for pairs in (synonyms, antonyms):
        heads = torch.tensor([head for head, _ in pairs], dtype=torch.int64)
        relations += [F.pad(torch.bincount(heads, minlength=8).cumsum(0), (1, 0))]
        relations += [torch.tensor([tail for _, tail in pairs], dtype=torch.int32)]
    entries = Entries(8, torch.zeros(1, 3, dtype=torch.int32), *relations)
    counts = torch.ones(len(vectors), dtype=torch.int64) if counts is None else torch.tensor(counts)
    save_dictionary(folder / "senses.safetensors", vectors, counts, F.pad(sizes.cumsum(0), (1, 0)), entries)
    return read_dictionary(folder / "senses.safetensors")


def test_shares_by_hand(tmp_path):
    """By L2 the synonym is between the antonyms; by cosine it is farther than both. All heads count alike."""
    dictionary = _dictionary(
        tmp_path,
        {
            FIRST: [[1.0, 0.0], [3.0, 0.0], [1.0, 0.0]],  # with its weights: (2, 0)
            SYNONYM: [[2.0, 2.0]],  # 4 away
            NEAR_ANTONYM: [[3.0, 0.0]],  # 1
            FAR_ANTONYM: [[6.0, 0.0]],  # 16
            SECOND: [[10.0, 0.0]],
            OTHER_HEAD: [[-4.0, 0.0]],
            SPAN: [[2.0, 0.0]],
        },
        synonyms=[(FIRST, SYNONYM), (FIRST, WITHOUT_SENSES), (FIRST, SPAN), (SECOND, FAR_ANTONYM), (OTHER_HEAD, SPAN)],
        antonyms=[(FIRST, NEAR_ANTONYM), (FIRST, FAR_ANTONYM), (SECOND, NEAR_ANTONYM), (SECOND, WITHOUT_SENSES)],
        counts=[1, 2, 1, 1, 1, 1, 1, 1, 1],
    )
    shares = measure_geometry(dictionary, seed=0)
    first, second = {"L2": 0.5, "cosine": 0.0}, {"L2": 1.0, "cosine": 0.5}  # 4² against 7²; both of one direction
    for distance, of in shares.items():
        share = of[COMPARISONS[0]]
        expected = (first[distance], second[distance])
        assert share.value == pytest.approx(sum(expected) / 2)
        assert share.standard_error == pytest.approx(abs(expected[0] - expected[1]) / 2)
        assert share.heads == 2


def test_the_other_words_are_heads_without_a_relation_to_it(tmp_path):
    """SECOND's only other word is OTHER_HEAD, which is nearer than the antonym and farther than the synonym."""
    dictionary = _dictionary(
        tmp_path,
        {SECOND: [[0.0, 0.0]], SYNONYM: [[1.0, 1.0]], OTHER_HEAD: [[2.0, 2.0]], NEAR_ANTONYM: [[3.0, 3.0]]},
        synonyms=[(SECOND, SYNONYM), (OTHER_HEAD, SYNONYM)],
        antonyms=[(SECOND, NEAR_ANTONYM)],
    )
    assert [share.value for share in measure_geometry(dictionary, seed=0)["L2"].values()] == [1.0, 1.0, 0.0]


def test_random_rows_are_at_chance_and_exchanging_the_relations_mirrors_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = {token: torch.randn(3, 4, generator=generator).tolist() for token in range(8)}
    one, other = [(0, 1), (0, 2), (3, 4)], [(0, 5), (3, 6), (3, 7)]
    value, mirrored = (
        measure_geometry(_dictionary(tmp_path, rows, *relations), seed=0)["cosine"][COMPARISONS[0]].value
        for relations in ((one, other), (other, one))
    )
    assert value + mirrored == pytest.approx(1)


def test_a_dictionary_without_a_word_with_both_relations_has_no_shares(tmp_path):
    assert measure_geometry(_dictionary(tmp_path, {0: [[1.0]], 1: [[1.0]]}, [(0, 1)], []), seed=0) is None


def test_the_report_is_a_table_or_an_error_that_names_what_is_missing(tiny, tmp_path, capsys):
    report_geometry(load_config(tiny))
    printed = capsys.readouterr().out
    assert all(comparison in printed for comparison in COMPARISONS)
    with pytest.raises(UserError, match=r"build_senses\.py"):
        report_geometry(load_config(tiny, [f"workdir={tmp_path}"]))
