"""The terms of the loss: one table for the configuration's checks, the training step, MLflow, comparisons and cards.

A new term is a row here, its weight in :class:`dskd.config.LossConfig`, and its computation in
:mod:`dskd.losses.head`. Only an input that no other term reads takes more: training must bring it to the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dskd.config.training import LossConfig

# What a term reads in addition to the student's states and the labels:
# lexical_marks: whether a target has a synonym or antonym, if `loss.lexical_weight` is not 1
# teacher_probabilities: the teacher's distribution over the vocabulary, which its last hidden states give, too
# teacher_states: the teacher's last hidden states
# sense_rows: rows of the sense dictionary that belong to a position's token, its synonyms and antonyms
# candidate_rows: the rows among which student and teacher are compared, drawn in each step
Input = Literal["lexical_marks", "teacher_probabilities", "teacher_states", "sense_rows", "candidate_rows"]


@dataclass(frozen=True)
class Term:
    """A number that the output head sums over positions, and that is reported as a mean."""

    name: str
    # A number of positions (:class:`dskd.training.data.packed_step.Counts`), or a sum of the head. Minimised terms
    # are divided by it too, so for them it names a field of :class:`dskd.losses.head.Normalizers`.
    mean_over: str
    label: str  # in pictures and comparisons
    weight: str  # the key of `loss` with its weight; of a part or an indicator, with the weight of its term
    # term: weighted and minimised; part: a part of a term, without its weight; indicator: reported only;
    # neither direction is better
    kind: Literal["term", "part", "indicator"] = "term"
    sense_form: str | None = None  # only computed with this `loss.sense_form`
    is_always_computed: bool = False  # even if its weight is 0
    formula: str = ""  # of a term, for model cards: what is weighted, with keys of `loss` in braces
    reads: tuple[Input, ...] = ()  # of a term
    reads_in_form: Mapping[str, tuple[Input, ...]] = field(default_factory=dict)  # more, by `loss.sense_form`

    @property
    def metric(self) -> str:
        """The name of its mean in MLflow."""
        return f"train/{self.name}"

    def is_weighted(self, loss: "LossConfig") -> bool:
        """Returns True if its weight is not 0."""
        return bool(getattr(loss, self.weight) > 0)

    def is_computed(self, loss: "LossConfig") -> bool:
        """Returns True if the head computes it with this loss."""
        return (self.is_always_computed or self.is_weighted(loss)) and self.sense_form in (None, loss.sense_form)

    def inputs(self, loss: "LossConfig") -> tuple[Input, ...]:
        """Returns what it reads with this loss; nothing if its weight is 0."""
        if not self.is_weighted(loss):
            return ()
        inputs = *self.reads, *self.reads_in_form.get(loss.sense_form, ())
        return tuple(name for name in inputs if name != "lexical_marks" or loss.lexical_weight != 1)

    def key_that_reads(self, name: Input, loss: "LossConfig") -> tuple[str, str]:
        """Returns the key that makes it read this input, with its value, and the change after which it would not."""
        if name in self.reads:
            return f"loss.{self.weight} {getattr(loss, self.weight):g}", f"loss.{self.weight} to 0"
        return f"loss.sense_form: {loss.sense_form}", "loss.sense_form to distance"


# In the order in which they are shown.
TERMS = (
    Term(
        "ce",
        "targets",
        "cross-entropy (nats)",
        "ce_weight",
        is_always_computed=True,
        formula="cross-entropy with the next token",
        reads=("lexical_marks",),
    ),
    Term(
        "kl",
        "targets",
        "divergence from the teacher (nats)",
        "kd_weight",
        formula="T² × {divergence} (T = {temperature:g})",
        reads=("lexical_marks", "teacher_probabilities"),
    ),
    Term(
        "sense",
        "senses",
        "sense loss",
        "sense_weight",
        formula="sense loss (form: {sense_form})",
        reads=("sense_rows",),
        reads_in_form={"distribution": ("teacher_states", "candidate_rows")},
    ),
    Term(
        "hidden",
        "targets",
        "hidden-state distance",
        "hidden_weight",
        formula="squared distance to the teacher's last hidden state, per dimension",
        reads=("teacher_states",),
    ),
    Term("sense_synonym", "relations", "sense synonym", "sense_weight", "part", "distance"),
    Term("sense_antonym", "relations", "sense antonym", "sense_weight", "part", "distance"),
    Term("sense_own", "own", "sense own", "sense_weight", "part", "distance"),
    Term("active_hinges", "hinges", "active hinges", "sense_weight", "indicator", "distance"),
    Term("sense_teacher_entropy", "senses", "sense teacher entropy", "sense_weight", "indicator", "distribution"),
)


def minimised_terms() -> list[Term]:
    """Returns the terms that a weight can add to the loss."""
    return [term for term in TERMS if term.kind == "term"]
