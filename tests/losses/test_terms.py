"""The table of the loss terms, against what computes, divides, records and shows them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from repository import REPOSITORY

from dskd.compare import metrics, wording
from dskd.config import LossConfig
from dskd.distributed.world import World
from dskd.losses.terms import SUMS, TERMS, curve_titles
from dskd.training.data.packed_step import Counts
from dskd.training.step import _means, _normalizers


def test_every_mean_has_a_denominator_and_every_weight_is_a_key_of_the_config():
    for term in TERMS:
        assert term.mean_over in SUMS or isinstance(getattr(Counts(8, 5, 3, 0, 9), term.mean_over), int), term
        assert term.weight in LossConfig.model_fields, term


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


# Adds rows to the table before any other module reads it, and prints what these make of the first, weighted or not, and
# of the input that each reads.
ADDED_TERMS = """
import json, sys
from pathlib import Path
from dskd.config import LossConfig, loss_terms

INPUTS = "teacher_states", "teacher_probabilities", "sense_rows"

class WithMore(LossConfig):
    teacher_states_weight: float = 0.0
    teacher_probabilities_weight: float = 0.0
    sense_rows_weight: float = 0.0

loss_terms.TERMS += tuple(
    loss_terms.Term(f"of_{name}", "targets", f"of {name}", f"{name}_weight", formula="{temperature:g}²", reads=(name,))
    for name in INPUTS
)

from plans import config_of
from torch import device
from dskd.compare import metrics, wording
from dskd.distributed.world import World
from dskd.losses.terms import SUMS, curve_titles
from dskd.training.exporting import card
from dskd.training.data.packed_step import Counts
from dskd.training.records import metrics_of
from dskd.training.data.sense_bank import bank_is_on_device
from dskd.training.step import Step, StepResult, _means, _normalizers
from dskd.training.models.teacher_source import TeacherSource, reads_logits

counts = Counts(targets=8, senses=5, relations=3, lexical=0, tokens=9)
step = Step(1, None, 0.1, 0.0, 0.0, False, False)
result = StepResult(0.0, _means(dict.fromkeys(SUMS, 4.0), counts), 9, 0.0, False)

def facts(name, weight):
    loss = WithMore(kd_weight=0, sense_weight=0, **{f"{name}_weight": weight})
    config = config_of(Path(sys.argv[1]), "train.sense_bank=device").model_copy(update={"loss": loss})
    return {
        "metric": metrics_of(step, result, loss, 1.0).get(f"train/of_{name}"),
        "normalizer": _normalizers(counts, World(0, 1, 0, device("cpu")), 1).of(f"of_{name}"),
        "curve": curve_titles()[f"train/of_{name}"],
        "is_compared": f"train/of_{name}" in metrics.CURVES,
        "label": wording.label(f"train/of_{name}"),
        "card": card._loss(loss),
        "teacher": TeacherSource.planned(config).kind,
        "reads_logits": reads_logits("loaded", loss),
        "is_mapped": loss.compares_states,
        "has_bank": bank_is_on_device(config),
    }

print(json.dumps({name: [facts(name, weight) for weight in (0, 2)] for name in INPUTS}))
"""
# {what the term reads: what it then needs}
NEEDS = {
    "teacher_states": {"teacher": "loaded", "is_mapped": True},
    "teacher_probabilities": {"teacher": "loaded", "reads_logits": True},
    "sense_rows": {"has_bank": True, "is_mapped": True},
}
NOTHING = {"teacher": "none", "reads_logits": False, "is_mapped": False, "has_bank": False}


@pytest.mark.slow
def test_a_row_is_enough_for_a_term_to_be_recorded_shown_and_fed(tmp_path):
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests/support")))
    command = [sys.executable, "-c", ADDED_TERMS, str(tmp_path)]
    finished = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    facts = json.loads(finished.stdout.splitlines()[-1])
    only_ce = "1 × cross-entropy with the next token"
    for name, needs in NEEDS.items():
        shown = {"normalizer": 1 / 8, "curve": f"of {name}", "is_compared": True, "label": f"of {name}"}
        assert facts[name] == [
            {**shown, **NOTHING, "metric": None, "card": only_ce},
            {**shown, **NOTHING, **needs, "metric": 4 / 8, "card": f"{only_ce} + 2 × 2²"},
        ]


def test_a_loss_reads_what_its_terms_read():
    assert not LossConfig(kd_weight=0, sense_weight=0).reads("lexical_marks", "teacher_probabilities", "sense_rows")
    assert LossConfig(lexical_weight=2).reads("lexical_marks")
    assert not LossConfig().reads("teacher_states")
    both = LossConfig(sense_form="distribution", hidden_weight=0.5)
    assert [term.name for term in both.readers("teacher_states")] == ["sense", "hidden"]
    assert both.keys_that_read("teacher_states") == "loss.sense_form: distribution and loss.hidden_weight 0.5"
    assert both.keys_that_read("sense_rows", "teacher_states") == "loss.sense_weight 1 and loss.hidden_weight 0.5"
    with pytest.raises(ValueError, match="every weight is 0"):
        LossConfig(ce_weight=0, kd_weight=0, sense_weight=0)
