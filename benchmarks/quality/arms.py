"""The arms of the study: ways to train a student, each with what is tried of it and what it is compared with.

A *look* trains an arm with one value, `look`, and the seeds `LOOK_SEEDS`, and measures it on the validation part:
cheap, and a lead. For a result, arms are tried on the validation part with the seed `TUNING_SEED`; the value with the
lowest KL to the teacher is chosen. Those marked as `tested` are then trained with other seeds and measured once on the
test part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from benchmarks.quality.settings import Settings

TUNING_SEED = 100  # none of the test's: a value that fits a seed's batches has no advantage there
TEST_SEEDS = (0, 1, 2, 3, 4)
LOOK_SEEDS = (100, 101, 102)
CHOSEN_BY = "kl"  # the lowest on the validation part


# CPU seconds of the study's teacher on one core, for a sequence and for a step of AdamW: of a trained layer, of a
# trained output matrix, and of what is always there. The head's are those of a sequence with all positions in the loss.
# They fit the trainings of 2026-11-30; the report compares them with the seconds of its own trainings.
_SEQUENCE_S, _LAYER_S, _HEAD_S, _MATRIX_S = 0.01, 0.045, 0.36, 0.09
_LAYER_STEP_S, _MATRIX_STEP_S = 0.03, 0.48


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    name: str
    description: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # settings that differ from those it builds on
    tuned: str | None = None  # the setting of which several values are tried
    trials: tuple[Any, ...] = ()
    based_on: str | None = None  # the arm whose settings it also has, with the value chosen there
    look: Any = None  # the value of looks, which need no tuning
    keeps: bool = True  # the value of the arm it builds on is a trial, too: tuning may find nothing better
    against: tuple[str, ...] = ()  # the arms that it is compared with, seed by seed
    tested: bool = False
    # It reads as much of the text as the arm that it builds on can in the same time; if it tunes the batch, as much as
    # can be read in the time of one epoch in steps of one sequence. What builds on it reads as much.
    as_long: bool = False

    def settings(self, chosen: Mapping[str, Any], value: Any = None, *, is_look: bool = False) -> Settings:
        """Returns the settings of a trial.

        Args:
            chosen: the chosen values of the arms that it builds on, by name.
            value: the value that is tried, None if nothing is tuned.
            is_look: read one epoch whatever the batch is, because looks choose none.
        """
        tried = {} if self.tuned is None else {self.tuned: value}
        found = Settings.of(self._changes(chosen, is_look=is_look) | tried)
        if not self.as_long or (is_look and self._is_of_batch):
            return found
        if self.based_on is None or self._is_of_batch:
            base = replace(found, batch_size=1, epochs=1.0)
        else:
            base = BY_NAME[self.based_on].settings(chosen, chosen[self.based_on], is_look=is_look)
        return replace(found, epochs=round(base.epochs * time_of_sequence(base) / time_of_sequence(found), 2))

    def look_settings(self) -> Settings:
        """Returns the settings of a look: every value on the way is the look's."""
        chosen, arm = {}, self
        while arm.based_on is not None:
            arm = BY_NAME[arm.based_on]
            chosen[arm.name] = arm.look
        return self.settings(chosen, self.look, is_look=True)

    def values(self, chosen: Mapping[str, Any]) -> tuple[Any, ...]:
        """Returns the values to try, at least one; (None,) if nothing is tuned."""
        if self.tuned is None:
            return (None,)
        inherited = getattr(Settings.of(self._changes(chosen)), self.tuned)
        return tuple(dict.fromkeys((inherited, *self.trials) if self.keeps else self.trials))

    @property
    def _is_of_batch(self) -> bool:
        return self.tuned == "batch_size"

    def _changes(self, chosen: Mapping[str, Any], *, is_look: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.based_on is not None:
            below = BY_NAME[self.based_on]
            found = below._changes(chosen, is_look=is_look)
            if below.tuned is not None:
                found[below.tuned] = chosen[below.name]
            if below.as_long:
                found["epochs"] = below.settings(chosen, chosen[below.name], is_look=is_look).epochs
        return found | dict(self.changes)


def time_of_sequence(settings: Settings) -> float:
    """Returns the CPU seconds that a training with AdamW spends on a sequence, for arms that take equally long."""
    layers, has_matrix, share = settings.train_layers, settings.train_head, settings.position_share
    step = layers * _LAYER_STEP_S + has_matrix * _MATRIX_STEP_S
    return _SEQUENCE_S + layers * _LAYER_S + share * (_HEAD_S + has_matrix * _MATRIX_S) + step / settings.batch_size


def _plain(
    name: str,
    description: str,
    changes: Mapping[str, Any],
    tuned: str | None = None,
    trials: tuple[float, ...] = (),
    *,
    look: float | None = None,
    based_on: str = "warmup",
    as_long: bool = False,
) -> Arm:
    """Returns a way of plain distillation that is tested against `kd`."""
    against = ("kd",)
    return Arm(
        name, description, changes, tuned, trials, based_on, look=look, against=against, tested=True, as_long=as_long
    )


def _cut(name: str, description: str, changes: Mapping[str, Any], trials: tuple[float, ...] = ()) -> tuple[Arm, ...]:
    """Returns arms with other layers or parameters trained: in as many steps as `kd`, and in as much time if that
    differs; with `trials`, learning rates are tried.
    """
    tuned, look = ("learning_rate", 5e-4) if trials else (None, None)
    same_steps = _plain(name, description, changes, tuned, trials, look=look, based_on="kd")
    if changes.keys() <= {"keep", "train_norm"}:
        return (same_steps,)
    description += ", in equal time"
    return (
        same_steps,
        _plain(f"{name}, as long", description, changes, tuned, trials, look=look, based_on="kd", as_long=True),
    )


def _added(
    name: str,
    description: str,
    setting: str,
    trials: tuple[float, ...],
    changes: Mapping[str, Any] = MappingProxyType({}),
    *,
    look: float = 1.0,
    against: tuple[str, ...] = (),
) -> Arm:
    """Returns an arm that adds something of the strength `setting` to plain distillation, and is tested against it."""
    against = ("kd", *against)
    return Arm(name, description, changes, setting, trials, "kd", look=look, keeps=False, against=against, tested=True)


_PLAIN = ("hidden", "lexical weight")  # what adds no senses, but could gain the same


def _with_senses(
    name: str,
    description: str,
    changes: Mapping[str, Any] = MappingProxyType({}),
    *,
    against: tuple[str, ...] = _PLAIN,
) -> Arm:
    return _added(name, description, "sense_weight", (0.1, 0.3, 1.0), changes, against=against)


_BATCH = {"kd_weight": 5.0, "position_share": 0.35}
_PUSH = {"synonym_weight": 0.0, "sense_own": False, "relative_margin": 1.0}

# Arms by what they change, in the order in which they are tuned.
GROUPS: Mapping[str, tuple[Arm, ...]] = {
    "The optimizer": (
        # The optimizer, one setting after the other, on CE + KD 5 at a third of the positions, which makes it cheap.
        Arm("batch", "sequences in a step, at equal time", _BATCH, "batch_size", (1, 2, 4, 8), look=4, as_long=True),
        Arm("batch, equal tokens", "the same at equal tokens", _BATCH, "batch_size", (1, 2, 4, 8), look=4),
        Arm("rate", "learning rate", {}, "learning_rate", (2.5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "batch", look=0.0005),
        Arm(
            "batch again",
            "sequences in a step, at that rate and at equal time",
            {},
            "batch_size",
            (1, 2, 4, 8),
            "rate",
            look=4,
            as_long=True,
        ),
        Arm("batch again, equal tokens", "the same at equal tokens", {}, "batch_size", (1, 2, 4, 8), "rate", look=4),
        Arm("beta2", "AdamW's second constant", {}, "beta2", (0.95, 0.99), "batch again", look=0.999),
        Arm("decay", "the fall of the rate", {}, "decay", ("linear",), "beta2", look="cosine"),
        Arm("warmup", "share of steps in which the rate rises", {}, "warmup", (0.01, 0.2), "decay", look=0.05),
        Arm(
            "muon",
            "Muon for the layers' matrices and AdamW at its own rate for norms, in as many steps; with two trained "
            "layers and one sequence a step takes 5.6 times as long as AdamW's (415 s for 257 steps against 74 s, one "
            "core)",
            {"optimizer": "muon"},
            "muon_rate",
            (2e-3, 5e-3, 1e-2, 2e-2),
            "warmup",
            keeps=False,
            look=0.005,
        ),
    ),
    "Plain distillation": (
        # Plain distillation, tuned once more; the arms that follow build on it.
        _plain("ce", "cross-entropy alone", {"kd_weight": 0.0}, "learning_rate", (1e-3, 4e-3), look=1e-3),
        _plain("kd paper", "CE + KL with the paper's weight", {"kd_weight": 0.7}),
        Arm("kd", "CE + KL", {}, "kd_weight", (1.5, 15.0), "warmup", look=5.0, tested=True),
    ),
    "What is kept and trained": (
        # Which layers are kept, and what is trained.
        *_cut("first", "the paper's cut: the lowest layers", {"keep": "first"}),
        *_cut("even", "evenly spaced layers", {"keep": "even"}),
        *_cut("importance", "without the block that changes states least", {"keep": "importance"}),
        *_cut("norm", "the final norm trained, too", {"train_norm": True}),
        *_cut("3 layers", "three layers trained", {"train_layers": 3}),
        *_cut("4 layers", "four layers trained", {"train_layers": 4}),
        *_cut("6 layers", "six layers trained", {"train_layers": 6}),
        *_cut("importance, 3 layers", "the same of that cut", {"keep": "importance", "train_layers": 3}),
        *_cut("head", "the output matrix trained, too", {"train_head": True}, (1e-3, 2e-3)),
        *_cut("all layers", "all layers trained", {"train_layers": 15}, (1e-3, 2e-3)),
    ),
    "The loss": (
        # The loss.
        _plain("temperature", "the KL at another temperature", {}, "temperature", (1.0, 4.0), based_on="kd", look=1.0),
        _plain(
            "all positions",
            "all positions in the loss, in equal time",
            {"position_share": 1.0},
            based_on="kd",
            as_long=True,
        ),
        _plain(
            "few positions",
            "fewer positions in the loss, in equal time",
            {"position_share": 0.15},
            based_on="kd",
            as_long=True,
        ),
        _added("hidden", "+ distance to the teacher's last state", "hidden_weight", (1.0, 5.0, 20.0)),
    ),
    "The sense loss": (
        # Senses, each with its controls.
        _with_senses("senses", "+ the paper's sense loss", against=(*_PLAIN, "senses random")),
        _with_senses(
            "senses random",
            "control: random words for synonyms and antonyms",
            {"sense_words": "random"},
            against=("hidden",),
        ),
        _with_senses(
            "synonyms",
            "+ the sense loss without antonyms",
            {"antonym_weight": 0.0},
            against=(*_PLAIN, "synonyms random"),
        ),
        _with_senses(
            "synonyms random",
            "control: random words for synonyms",
            {"antonym_weight": 0.0, "sense_words": "random"},
            against=(),
        ),
        _with_senses(
            "antonyms",
            "+ the sense loss without synonyms",
            {"synonym_weight": 0.0},
            against=(*_PLAIN, "antonyms random"),
        ),
        _with_senses(
            "antonyms random",
            "control: random words for antonyms",
            {"synonym_weight": 0.0, "sense_words": "random"},
            against=(),
        ),
        _with_senses(
            "distribution",
            "+ the divergence of distributions over senses",
            {"sense_form": "distribution"},
            against=(*_PLAIN, "distribution random"),
        ),
        _with_senses(
            "distribution random",
            "control: random words for synonyms and antonyms",
            {"sense_form": "distribution", "sense_words": "random"},
            against=(),
        ),
        _with_senses(
            "senses after",
            "+ the sense loss after the word is read, through a map",
            {"sense_at": "reading"},
            against=("lexical weight", "senses after, random"),
        ),
        _with_senses(
            "senses after, random",
            "control: random words for synonyms and antonyms",
            {"sense_at": "reading", "sense_words": "random"},
            against=(),
        ),
        _with_senses(
            "senses in the middle",
            "+ the same from the lowest trained layer",
            {"sense_at": "middle"},
            against=("lexical weight", "senses after", "senses in the middle, random"),
        ),
        _with_senses(
            "senses in the middle, random",
            "control: random words for synonyms and antonyms",
            {"sense_at": "middle", "sense_words": "random"},
            against=(),
        ),
        # What the teacher lacks: a push from antonyms and nothing else, up to the teacher's own mean distance to them.
        _with_senses(
            "push", "+ the push from antonyms alone", _PUSH, against=("lexical weight", "push everywhere, random")
        ),
        _with_senses(
            "push everywhere, random", "control: from random words", _PUSH | {"sense_words": "random"}, against=()
        ),
        _with_senses(
            "push where wrong",
            "+ the same where the teacher is nearer to antonyms than to synonyms",
            {**_PUSH, "antonyms": "nearer"},
            against=("lexical weight", "push", "push random"),
        ),
        _with_senses(
            "push random",
            "control: from random words, at these positions",
            {**_PUSH, "antonyms": "nearer", "sense_words": "random"},
            against=(),
        ),
    ),
    "Probabilities of related words": (
        _added(
            "divergence",
            "+ the divergence over a target's synonyms and antonyms alone",
            "lexical_divergence",
            (0.3, 1.0, 3.0),
            against=("lexical weight", "divergence random"),
        ),
        _added(
            "divergence random",
            "control: over random words of the same frequency",
            "lexical_divergence",
            (0.3, 1.0, 3.0),
            {"lexical_words": "random"},
        ),
        _added(
            "synonym targets",
            "+ a share of the target's mass for the teacher's synonyms of it",
            "synonym_targets",
            (0.05, 0.2, 0.4),
            look=0.2,
            against=("lexical weight", "synonym targets random"),
        ),
        _added(
            "synonym targets random",
            "control: for random words of the same frequency",
            "synonym_targets",
            (0.05, 0.2, 0.4),
            {"lexical_words": "random"},
            look=0.2,
        ),
    ),
    "Weights of positions": (
        _added(
            "lexical weight",
            "positions with related words weigh more",
            "weights_power",
            (0.585, 1.0, 2.0),
            {"weights": "lexical"},
            look=0.585,
            against=("rarity",),
        ),
        _added(
            "weight by senses",
            "positions weigh by their target's number of senses",
            "weights_power",
            (0.3, 1.0, 2.0),
            {"weights": "senses"},
            against=("senses of others",),
        ),
        _added(
            "senses of others",
            "control: by the number of senses of another word as frequent",
            "weights_power",
            (0.3, 1.0, 2.0),
            {"weights": "senses of others"},
        ),
        _added(
            "rarity",
            "control without a dictionary: by how rare the target is",
            "weights_power",
            (0.15, 0.5, 1.0),
            {"weights": "rarity"},
            look=0.5,
        ),
        _added(
            "entropy",
            "by the teacher's entropy; no dictionary, so no control",
            "weights_power",
            (-0.5, 0.5, 1.0),
            {"weights": "entropy"},
            look=0.5,
        ),
    ),
}
ARMS = tuple(arm for group in GROUPS.values() for arm in group)
BY_NAME = {arm.name: arm for arm in ARMS}
