"""The arms of the study: ways to train a student, each with what is tried of it and what it is compared with.

A *look* trains an arm with one value, `look`, and the seeds `LOOK_SEEDS`, and measures it on the validation part:
cheap, and a lead. For a result, arms are tried on the validation part with the seed `TUNING_SEED`; the value with the
lowest KL to the teacher is chosen. Those marked as `tested` are then trained with other seeds and measured once on the
test part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from benchmarks.quality.settings import Settings

TUNING_SEED = 100  # none of the test's: a value that fits a seed's batches has no advantage there
TEST_SEEDS = (0, 1, 2, 3, 4)
LOOK_SEEDS = (100, 101, 102)
CHOSEN_BY = "kl"  # the lowest on the validation part


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

    def settings(self, chosen: Mapping[str, Any], value: Any = None) -> Settings:
        """Returns the settings of a trial.

        Args:
            chosen: the chosen values of the arms that it builds on, by name.
            value: the value that is tried, None if nothing is tuned.
        """
        return Settings.of(self._changes(chosen) | ({} if self.tuned is None else {self.tuned: value}))

    def look_settings(self) -> Settings:
        """Returns the settings of a look: every value on the way is the look's."""
        chosen, arm = {}, self
        while arm.based_on is not None:
            arm = BY_NAME[arm.based_on]
            chosen[arm.name] = arm.look
        return self.settings(chosen, self.look)

    def values(self, chosen: Mapping[str, Any]) -> tuple[Any, ...]:
        """Returns the values to try, at least one; (None,) if nothing is tuned."""
        if self.tuned is None:
            return (None,)
        inherited = getattr(Settings.of(self._changes(chosen)), self.tuned)
        return tuple(dict.fromkeys((inherited, *self.trials) if self.keeps else self.trials))

    def _changes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.based_on is not None:
            below = BY_NAME[self.based_on]
            found = below._changes(chosen)
            if below.tuned is not None:
                found[below.tuned] = chosen[below.name]
        return found | dict(self.changes)


def _plain(
    name: str,
    description: str,
    changes: Mapping[str, Any],
    tuned: str | None = None,
    trials: tuple[float, ...] = (),
    *,
    look: float | None = None,
    based_on: str = "warmup",
) -> Arm:
    """Returns a way of plain distillation that is tested against `kd`."""
    return Arm(name, description, changes, tuned, trials, based_on, look=look, against=("kd",), tested=True)


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


def _with_senses(name: str, description: str, changes: Mapping[str, Any] = MappingProxyType({})) -> Arm:
    return _added(name, description, "sense_weight", (0.1, 0.3, 1.0), changes, against=("hidden",))


ARMS = (
    # The optimizer, one setting after the other, on CE + KD 5 at a third of the positions, which makes it cheap.
    Arm("batch", "sequences in a step", {"kd_weight": 5.0, "position_share": 0.35}, "batch_size", (1, 2, 4, 8), look=4),
    Arm("rate", "learning rate", {}, "learning_rate", (2.5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "batch", look=0.0005),
    Arm("batch again", "sequences in a step, at that rate", {}, "batch_size", (1, 2, 4, 8), "rate", look=4),
    Arm("beta2", "AdamW's second constant", {}, "beta2", (0.95, 0.99), "batch again", look=0.999),
    Arm("decay", "the fall of the rate", {}, "decay", ("linear",), "beta2", look="cosine"),
    Arm("warmup", "share of steps in which the rate rises", {}, "warmup", (0.01, 0.2), "decay", look=0.05),
    Arm(
        "muon",
        "Muon for the matrices",
        {"optimizer": "muon"},
        "learning_rate",
        (2e-3, 5e-3, 1e-2, 2e-2),
        "warmup",
        keeps=False,
        look=0.005,
    ),
    # Which layers.
    Arm("first", "the paper's cut: the lowest layers", {"keep": "first"}, based_on="warmup"),
    Arm("even", "evenly spaced layers", {"keep": "even"}, based_on="warmup"),
    Arm("importance", "without the block that changes states least", {"keep": "importance"}, based_on="warmup"),
    Arm("3 layers", "three layers trained", {"train_layers": 3}, based_on="warmup"),
    Arm("norm", "the final norm trained, too", {"train_norm": True}, based_on="warmup"),
    # Plain distillation, tuned once more; the arms that follow build on it.
    _plain("ce", "cross-entropy alone", {"kd_weight": 0.0}, "learning_rate", (1e-3, 4e-3), look=1e-3),
    _plain("kd paper", "CE + KL with the paper's weight", {"kd_weight": 0.7}),
    Arm("kd", "CE + KL", {}, "kd_weight", (1.5, 15.0), "warmup", look=5.0, tested=True),
    _plain("temperature", "the KL at another temperature", {}, "temperature", (1.0, 4.0), based_on="kd", look=1.0),
    # As long as with .35 of the positions, at the cost that layers and head have here.
    _plain(
        "all positions",
        "all positions in the loss, for as long",
        {"position_share": 1.0, "epochs": 0.48},
        based_on="kd",
    ),
    _plain(
        "few positions",
        "fewer positions in the loss, for as long",
        {"position_share": 0.15, "epochs": 1.5},
        based_on="kd",
    ),
    _added("hidden", "+ distance to the teacher's last state", "hidden_weight", (0.3, 1.0, 5.0)),
    # Senses, each with its controls.
    _with_senses("senses", "+ the paper's sense loss"),
    _with_senses("synonyms", "+ the sense loss without antonyms", {"antonym_weight": 0.0}),
    _with_senses("antonyms", "+ the sense loss without synonyms", {"synonym_weight": 0.0}),
    _with_senses("distribution", "+ the divergence of distributions over senses", {"sense_form": "distribution"}),
    _added(
        "divergence",
        "+ the divergence over a target's synonyms and antonyms alone",
        "lexical_divergence",
        (0.3, 1.0, 3.0),
        against=("divergence random",),
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
    ),
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
    _added("entropy", "by the teacher's entropy", "weights_power", (-0.5, 0.5, 1.0), {"weights": "entropy"}, look=0.5),
)
BY_NAME = {arm.name: arm for arm in ARMS}
