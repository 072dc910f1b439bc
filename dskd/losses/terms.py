"""The terms of the loss: one table for the training step, MLflow, and comparisons.

A new term is a row here, its computation in :mod:`dskd.losses.head`, and its weight in
:class:`dskd.config.LossConfig`.
"""

from dataclasses import dataclass
from typing import Literal

from dskd.config import LossConfig


@dataclass(frozen=True)
class Term:
    """A number that the output head sums over positions, and that is reported as a mean."""

    name: str
    # A number of positions (:class:`dskd.training.data.packed_step.Counts`), or a sum of the head. A minimised term,
    # too, is divided by it, so there it is a field of :class:`dskd.losses.head.Normalizers`.
    mean_over: str
    label: str  # in pictures and comparisons
    # term: weighted and minimised; part: a part of a term, without its weight; indicator: reported only;
    # neither direction is better
    kind: Literal["term", "part", "indicator"] = "term"
    needs: str | None = None  # key of `loss`; not computed if it is 0. None: always computed, as CE is with ce_weight 0
    sense_form: str | None = None  # only computed with this `loss.sense_form`
    weight: str | None = None  # of a term: the key of `loss` with its weight
    formula: str = ""  # of a term, for model cards: what is weighted, with keys of `loss` in braces

    @property
    def metric(self) -> str:
        """The name of its mean in MLflow."""
        return f"train/{self.name}"

    def is_computed(self, loss: LossConfig) -> bool:
        """Returns True if the head computes it with this loss."""
        is_needed = self.needs is None or getattr(loss, self.needs) > 0
        return is_needed and self.sense_form in (None, loss.sense_form)


# In the order in which they are shown.
TERMS = (
    Term("ce", "targets", "cross-entropy (nats)", weight="ce_weight", formula="cross-entropy with the next token"),
    Term(
        "kl",
        "targets",
        "divergence from the teacher (nats)",
        needs="kd_weight",
        weight="kd_weight",
        formula="T² × {divergence} (T = {temperature:g})",
    ),
    Term(
        "sense",
        "senses",
        "sense loss",
        needs="sense_weight",
        weight="sense_weight",
        formula="sense loss (form: {sense_form})",
    ),
    Term(
        "hidden",
        "targets",
        "hidden-state distance",
        needs="hidden_weight",
        weight="hidden_weight",
        formula="squared distance to the teacher's last hidden state, per dimension",
    ),
    Term("sense_synonym", "relations", "sense synonym", "part", "sense_weight", "distance"),
    Term("sense_antonym", "relations", "sense antonym", "part", "sense_weight", "distance"),
    Term("sense_own", "own", "sense own", "part", "sense_weight", "distance"),
    Term("active_hinges", "hinges", "active hinges", "indicator", "sense_weight", "distance"),
    Term("sense_teacher_entropy", "senses", "sense teacher entropy", "indicator", "sense_weight", "distribution"),
)
DENOMINATORS = {term.name: term.mean_over for term in TERMS}
SUMS = (*(term.name for term in TERMS), "hinges")  # all sums that the head returns, in this order

LOSS_METRIC, LOSS_LABEL = "train/loss", "loss"  # the weighted sum of the terms


def labels() -> dict[str, str]:
    """Returns {metric: label} of the loss, its terms and their parts."""
    return {LOSS_METRIC: LOSS_LABEL} | {term.metric: term.label for term in TERMS}


def curve_titles() -> dict[str, str]:
    """Returns {metric: label} of the loss and its terms, the curves that a run shows."""
    return {LOSS_METRIC: LOSS_LABEL} | {term.metric: term.label for term in TERMS if term.kind == "term"}
