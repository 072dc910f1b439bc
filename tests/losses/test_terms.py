"""The table of the loss terms, against what computes, divides, records and shows them."""

import pytest
import torch

from dskd.compare import metrics, wording
from dskd.config import LossConfig
from dskd.distributed.world import World
from dskd.losses.terms import SUMS, TERMS, curve_titles
from dskd.training.data.packed_step import Counts
from dskd.training.step import _means, _normalizers


def test_every_mean_has_a_denominator_and_every_weight_is_a_key_of_the_config():
    for term in TERMS:
        assert term.mean_over in SUMS or isinstance(getattr(Counts(8, 5, 3, 0, 9), term.mean_over), int), term
        assert term.needs is None or term.needs in LossConfig.model_fields, term


def test_a_minimised_term_is_divided_by_the_denominator_of_its_reported_mean():
    world = World(0, 2, 0, torch.device("cpu"))
    counts = Counts(targets=8, senses=5, relations=3, lexical=0, tokens=9)
    normalizers = _normalizers(counts, world, accumulation_steps=3)
    sums = dict.fromkeys(SUMS, 1.0)
    means = _means(sums, counts)
    for term in TERMS:
        if term.kind == "term":
            assert normalizers.of(term.name) / (2 * 3) == pytest.approx(means[term.name]), term


@pytest.mark.parametrize(
    ("loss", "computed"),
    [
        ({"kd_weight": 0, "sense_weight": 0}, {"ce"}),
        ({"hidden_weight": 1, "sense_weight": 0}, {"ce", "kl", "hidden"}),
        ({}, {"ce", "kl", "sense", "sense_synonym", "sense_antonym", "sense_own", "active_hinges"}),
        ({"sense_form": "distribution"}, {"ce", "kl", "sense", "sense_teacher_entropy"}),
    ],
)
def test_a_run_records_the_terms_that_its_loss_computes(loss, computed):
    assert {term.name for term in TERMS if term.is_computed(LossConfig(**loss))} == computed


def test_curves_and_comparisons_show_the_loss_and_its_terms_under_the_same_labels():
    expected = {
        "train/loss": "loss",
        "train/ce": "cross-entropy (nats)",
        "train/kl": "divergence from the teacher (nats)",
        "train/sense": "sense loss",
        "train/hidden": "hidden-state distance",
    }
    assert curve_titles() == expected
    assert {metric: wording.label(metric) for metric in metrics.CURVES} == expected
    assert wording.label("train/sense_own") == "sense own"
