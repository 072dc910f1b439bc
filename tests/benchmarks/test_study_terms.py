"""The terms of the loss that only the study of good students has, and its words and scores."""

import pytest
import torch

from benchmarks.quality.terms import lexical_divergence, synonym_targets
from benchmarks.quality.text import similar_words


def test_a_divergence_over_few_words_is_that_of_their_renormalised_probabilities():
    torch.manual_seed(0)
    matrix, own, other = torch.randn(9, 4), torch.randn(3, 4), torch.randn(3, 4)
    targets, related = torch.tensor([0, 1, 2]), torch.tensor([[3, 4, -1], [-1, -1, -1], [5, -1, -1]])
    expected = []
    for position, words in ((0, [0, 3, 4]), (2, [2, 5])):
        student, teacher = (((each @ matrix.T)[position, words] / 2).softmax(-1) for each in (own, other))
        expected.append(4 * (teacher * (teacher / student).log()).sum())
    found = lexical_divergence(own, other, matrix, targets, related, 2.0)
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert lexical_divergence(own, other, matrix, targets, torch.full((3, 2), -1), 2.0) == 0


def test_synonym_targets_are_a_cross_entropy_with_a_divided_target():
    torch.manual_seed(0)
    matrix, own, other = torch.randn(9, 4), torch.randn(2, 4), torch.randn(2, 4)
    targets, synonyms, share = torch.tensor([0, 1]), torch.tensor([[3, 4], [-1, -1]]), 0.2
    log_chances = (own @ matrix.T).log_softmax(-1)
    divided = torch.zeros(2, 9)
    divided[[0, 1], targets] = 1.0
    divided[0, 0] -= share
    divided[0, [0, 3, 4]] += share * (other @ matrix.T)[0, [0, 3, 4]].softmax(-1)
    plain = -log_chances[[0, 1], targets].mean()
    added = synonym_targets(own, other, matrix, targets, synonyms, share)
    assert plain + added == pytest.approx(float(-(divided * log_chances).sum(-1).mean()), rel=1e-5)


def test_similar_words_have_similar_counts_and_are_others():
    counts = torch.arange(200.0).square()
    is_word = torch.arange(200) % 2 == 0
    others = similar_words(counts, is_word)
    assert sorted(others.tolist()) == list(range(200))
    assert not (others == torch.arange(200)).any()
    assert (is_word[others] == is_word).all()
    assert ((others - torch.arange(200)).abs() < 128).all()
