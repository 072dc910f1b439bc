"""The source of what training reads of the teacher: a teacher that it loads, or the shards."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest
from dskd.config import Config, LossConfig
from dskd.errors import UserError
from dskd.models.running.precision import resolve_precision
from dskd.shards import PRECISION_OF, TEACHER_STATES, TRUNK_STATES, StoredStates

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
    stored: StoredStates | None = None  # the states that the shards hold; None if they hold none
    reads_trunk: bool = False  # the student starts from `trunk_states`

    @classmethod
    def of(cls, config: Config, shards: Manifest | None = None) -> "TeacherSource":
        """Returns the source for the config's run; without the manifest of `shards` there are no stored states."""
        stored = None if shards is None else StoredStates.of(shards)
        return cls._from(config, () if stored is None else stored.columns, stored)

    @classmethod
    def planned(cls, config: Config) -> "TeacherSource":
        """Returns the source for the config's run if the shards have what `annotation.store` names, without `stored`,
        which only shards that exist can give.
        """
        return cls._from(config, config.annotation.store)

    @classmethod
    def _from(cls, config: Config, columns: Collection[str], stored: StoredStates | None = None) -> "TeacherSource":
        kind = _kind_of(config, columns)
        if kind == "loaded" or config.teacher.mode in _LOADED:
            return cls(kind, stored)
        return cls(kind, stored, TRUNK_STATES in columns)

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

    def describe(self, config: Config) -> str:
        """Returns a line about what training reads of the teacher."""
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
        if self.kind == "loaded":
            where = "whole on every rank" if config.teacher.mode == "resident" else "sharded over the ranks"
            return f"the teacher is loaded, {where}"
        return "no term of the loss reads the teacher, so none is loaded"

    def describe_unread(self, config: Config) -> str | None:
        """Returns a line about states in the shards that training does not read, with the reason; None if there are
        none. Why a student without a shared trunk reads no `trunk_states` is reported where that is decided.
        """
        held = () if self.stored is None else self.stored.columns
        reason = why_unread(config, held, self.columns)
        return None if reason is None else f"the shards have {reason}"


def why_unread(config: Config, held: Collection[str], read: Collection[str]) -> str | None:
    """Returns which stored columns training does not read, why, and what to set.

    Args:
        config: the experiment.
        held: the columns of states in the shards.
        read: those that training reads.

    Returns:
        The end of a sentence; None if it reads all, or the student computes all layers for a reason of its own.
    """
    unread = [column for column in held if column not in read]
    if not unread:
        return None
    mode, both = config.teacher.mode, f"annotation.store to [{TEACHER_STATES}, {TRUNK_STATES}]"
    lacks_states = config.loss.needs_teacher and TEACHER_STATES not in held
    if mode in _LOADED:
        why = f"teacher.mode is {mode}; set teacher.mode to auto" + (f", and {both}" if lacks_states else "")
    elif mode == "auto" and lacks_states:
        why = f"there are no {TEACHER_STATES}, so the teacher runs, and computes them again; set {both}"
    elif TEACHER_STATES in unread and not config.loss.needs_teacher:
        why = "no term of the loss reads the teacher"
    elif TEACHER_STATES in unread:
        why = f"annotation.store does not name them, but annotation.teacher_top_n is set; set {both}"
    elif config.student.shared_trunk == "off":
        why = "student.shared_trunk is off; set it to auto"
    else:
        return None
    return f"{' and '.join(unread)}, which training does not read, because {why}"


def _kind_of(config: Config, columns: Collection[str]) -> Kind:
    if not config.loss.needs_teacher:
        return "none"
    if config.teacher.mode in _LOADED:
        return "loaded"
    # With `cached` the config says what is read: shards may have both.
    names_top_n = config.teacher.mode == "cached" and TEACHER_STATES not in config.annotation.store
    if TEACHER_STATES in columns and not (names_top_n and config.annotation.teacher_top_n):
        return "states"
    # Not the most probable tokens with `auto`: they are another objective, which nobody asked for.
    return "loaded" if config.teacher.mode == "auto" else "top_n"


def as_annotated(config: Config, shards: Manifest | None) -> Config:
    """Returns the config that also names the states in `shards` which training reads with `teacher.mode: cached`.

    Training looks at the shards; with this config, :meth:`TeacherSource.planned` finds the same source.
    """
    if shards is None or config.teacher.mode != "cached":
        return config
    store = {*config.annotation.store, *TeacherSource.of(config, shards).columns}
    in_order = tuple(column for column in (TEACHER_STATES, TRUNK_STATES) if column in store)
    return config.model_copy(update={"annotation": config.annotation.model_copy(update={"store": in_order})})


def reads_logits(kind: Kind, loss: LossConfig) -> bool:
    """Returns True if the head computes the teacher's logits from its states, for which it needs its output matrix."""
    return kind in ("loaded", "states") and loss.reads("teacher_probabilities")


def require_states(config: Config, source: TeacherSource) -> None:
    """Checks that the shards have the states that the loss reads, if `teacher.mode: cached` lets it read nothing else.

    Raises:
        UserError: if they do not; it names the command that makes them again.
    """
    loss, annotation = config.loss, config.annotation
    if source.kind == "top_n" and TEACHER_STATES in annotation.store and not annotation.teacher_top_n:
        raise UserError(
            f"{config.path(kinds.SHARDS.folder, 'train')}: annotation.store names teacher_states, but these shards "
            f"were made without them; make them again with `{kinds.SHARDS.made_by}`, or set "
            "teacher.mode to zero3"
        )
    if source.kind == "top_n" and (readers := loss.keys_that_read("teacher_states")):
        raise UserError(
            f"{config.path(kinds.SHARDS.folder, 'train')}: the shards have no teacher_states, which teacher.mode: "
            f"cached reads for {readers}; make the shards again with `{kinds.SHARDS.made_by}` and annotation.store: "
            "[teacher_states], or set teacher.mode to zero3"
        )


def source_of_fit(config: Config, source: TeacherSource) -> TeacherSource:
    """Returns the source of the teacher's states for the fit of the width map (:mod:`dskd.training.width_fit`).

    It is that of the run, `source`, if the loss reads these states, too. Otherwise the shards may have them, or a
    teacher is loaded for the fit.

    Raises:
        UserError: if the shards have no states, and `teacher.mode: cached` loads no teacher.
    """
    is_stored = source.stored is not None and TEACHER_STATES in source.stored.columns
    if source.kind in ("loaded", "states"):
        return replace(source, reads_trunk=False)
    if is_stored and config.teacher.mode not in _LOADED:
        return TeacherSource("states", source.stored)
    if config.teacher.mode != "cached":
        return TeacherSource("loaded", source.stored)
    raise UserError(
        f"{config.path(kinds.SHARDS.folder, 'train')}: the shards have no teacher_states. The student's states have "
        "another width than the teacher's, and the map between them, for "
        f"{config.loss.keys_that_read('sense_rows', 'teacher_states')}, starts from a fit to the teacher's states, "
        "which teacher.mode: cached reads from the shards; make them again "
        f"with `{kinds.SHARDS.made_by}` and annotation.store: [teacher_states], or set teacher.mode to zero3"
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
