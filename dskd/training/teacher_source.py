"""The source of what training reads of the teacher: a teacher that it loads, or the shards."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest
from dskd.config import Config, LossConfig
from dskd.errors import UserError
from dskd.models.precision import resolve_precision
from dskd.shards import PRECISION_OF, TEACHER_STATES, TRUNK_STATES, Stored

Kind = Literal["none", "loaded", "states", "top_n"]
_LOADED = ("resident", "zero3")  # values of `teacher.mode`


@dataclass(frozen=True)
class TeacherSource:
    """The source of what a run reads of the teacher, decided by the config and the manifest of the shards.

    `kind` is `none` if no term of the loss reads the teacher, and `loaded` if a teacher runs in each step. With
    `states` the shards have its last hidden states, which give the same losses. With `top_n` they have its most
    probable tokens.
    """

    kind: Kind
    stored: Stored | None = None  # the states that the shards hold; None if they hold none, or the run reads none
    reads_trunk: bool = False  # the student starts from `trunk_states`

    @classmethod
    def of(cls, config: Config, shards: Manifest | None = None) -> "TeacherSource":
        """Returns the source for the config's run; without the manifest of `shards` there are no stored states."""
        stored = None if shards is None or config.teacher.mode in _LOADED else Stored.of(shards)
        columns = () if stored is None else stored.columns
        kind = kind_of(config, columns)
        return cls(kind) if kind == "loaded" else cls(kind, stored, TRUNK_STATES in columns)

    @property
    def columns(self) -> dict[str, torch.dtype]:
        """{column of states that a batch holds: its type}."""
        if self.stored is None:
            return {}
        chosen = {TEACHER_STATES: self.kind == "states", TRUNK_STATES: self.reads_trunk}
        return {column: getattr(torch, self.stored.dtype) for column, reads in chosen.items() if reads}

    @property
    def missing_trunk(self) -> str | None:
        """The reason why nothing provides the states of a shared trunk; None if a loaded teacher or the shards do."""
        if self.kind == "loaded" or self.reads_trunk:
            return None
        if self.kind == "none":
            return "no term of the loss reads the teacher"
        return "no teacher is loaded, and the shards have no trunk_states (annotation.store)"

    def describe(self, config: Config) -> str | None:
        """Returns a line about what runs; None if that follows from the config."""
        if self.kind == "states":
            return "training reads the teacher's states from the shards; no teacher is loaded"
        if self.kind == "top_n":
            top_n = config.annotation.teacher_top_n
            return f"training reads the teacher's {top_n} most probable tokens from the shards; no teacher is loaded"
        if self.kind == "loaded" and config.teacher.mode == "auto" and TEACHER_STATES in config.annotation.store:
            return (
                "the teacher is loaded: annotation.store names teacher_states, but these shards have none; to store "
                f"them, make the shards again with `{kinds.SHARDS.made_by}`"
            )
        return None


def kind_of(config: Config, columns: Collection[str]) -> Kind:
    """Returns the kind of source for the config's run if the shards have these columns of states."""
    if not config.loss.needs_teacher:
        return "none"
    if config.teacher.mode in _LOADED:
        return "loaded"
    if TEACHER_STATES in columns:
        return "states"
    # Not the most probable tokens with `auto`: they are another objective, which nobody asked for.
    return "loaded" if config.teacher.mode == "auto" else "top_n"


def reads_logits(kind: Kind, loss: LossConfig) -> bool:
    """Returns True if the head computes the teacher's logits from its states, for which it needs its output matrix."""
    return kind in ("loaded", "states") and loss.kd_weight > 0


def require_states(config: Config, source: TeacherSource) -> None:
    """Checks that the shards have the states that the loss reads, if `teacher.mode: cached` lets it read nothing else.

    Raises:
        UserError: if they do not; it names the command that makes them again.
    """
    loss = config.loss
    if source.kind == "top_n" and (loss.hidden_weight or loss.compares_sense_distributions):
        reader = f"loss.hidden_weight {loss.hidden_weight:g}" if loss.hidden_weight else "loss.sense_form: distribution"
        raise UserError(
            f"{config.path(kinds.SHARDS.folder, 'train')}: the shards have no teacher_states, which {reader} reads "
            f"with teacher.mode: cached; make the shards again with `{kinds.SHARDS.made_by}` and annotation.store: "
            "[teacher_states], or set teacher.mode to zero3"
        )


def require_fitting_states(config: Config, source: TeacherSource, hidden_size: int) -> None:
    """Checks that the states in the shards are what the models compute here: of their type, and D = `hidden_size`.

    Raises:
        UserError: if they are not, with both values and the command that makes them again.
    """
    stored = source.stored
    if stored is None or not source.columns:
        return
    where = f"{config.path(kinds.SHARDS.folder, 'train')}: the shards have states of the teacher"
    again = f"make the shards again with `{kinds.SHARDS.made_by}`, or set teacher.mode to zero3 to load the teacher"
    precision = PRECISION_OF.get(stored.dtype)
    if precision is None:
        raise UserError(f"{where} of type {stored.dtype}, and training computes in bfloat16 or float32; {again}")
    if precision != (own := resolve_precision(config.precision)):
        here = f"precision: auto is {own} on this machine" if config.precision == "auto" else f"precision is {own}"
        raise UserError(
            f"{where} in {precision}, but {here}, and training needs the numbers that it would compute itself; set "
            f"precision to {precision}, {again}"
        )
    if stored.hidden_size != hidden_size:
        raise UserError(
            f"{where} with {stored.hidden_size} values, but this teacher's have {hidden_size} (hidden_size of its "
            f"config.json); {again}"
        )
