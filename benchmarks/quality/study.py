"""The definition of the study: the arms, the trials of each, the seeds, and the factors that are changed one by one.

An arm is plain data: the keys in which it differs from `study.yaml`, one key that is tuned, and the arm whose tuned
weights it uses. All arms have the same number of trials, except those with the paper's weights, which are not tuned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = Path(__file__).with_name("study.yaml")
TEST_SEEDS = (0, 1, 2, 3, 4)
FACTOR_SEEDS = (0, 1, 2)
TUNING_SEEDS = (100,)  # none of the test's, so that a weight that fits a seed's batches has no advantage there
CHOSEN_BY = "perplexity"  # on the validation part; the lowest


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    name: str
    description: str  # for the report
    keys: Mapping[str, Any]  # the keys in which it differs from study.yaml
    tuned_key: str  # the key that is tuned
    trials: tuple[float, ...]  # values to try; a single value is used without tuning
    based_on: str | None = None  # the arm whose keys and tuned value it also has
    extra_values: tuple[float, ...] = ()  # values tried in addition, which cannot be chosen
    # The variant of an arm that is only reported: it was trained with a key that the config no longer has.
    past_variant: str | None = None

    @property
    def is_tuned(self) -> bool:
        """True if there are several trials to choose from."""
        return len(self.trials) > 1


_SENSES = (0.1, 0.3, 1.0, 3.0)
_DSKD: dict[str, Any] = {"loss.sense_form": "distance"}

ARMS = (
    Arm(
        "ce",
        "plain fine-tuning: CE alone. It has no weight; its weight decay is tried instead",
        {"loss.kd_weight": 0, "loss.sense_weight": 0},
        "train.weight_decay",
        (0.0, 1e-3, 1e-2, 1e-1),
    ),
    Arm(
        "kd",
        "CE + KL",
        {"loss.sense_weight": 0},
        "loss.kd_weight",
        (1.4, 2.8, 5.6, 11.2),
        # The first grid was 0.35 to 2.8, and its end was best; in the second grid the end is best again.
        extra_values=(0.35, 0.7, 22.4, 44.8),
    ),
    Arm("kd-paper", "CE + KL with the paper's weight", {"loss.sense_weight": 0}, "loss.kd_weight", (0.7,)),
    Arm(
        "dskd-paper",
        "the same + the whole sense loss with the paper's weight",
        {**_DSKD, "loss.kd_weight": 0.7},
        "loss.sense_weight",
        (1.0,),
    ),
    Arm("kd-hidden", "KD + distance to the teacher's hidden state", {}, "loss.hidden_weight", (3, 10, 30, 100), "kd"),
    Arm(
        "kd-own",
        "KD + the pull to own senses",
        {**_DSKD, "loss.synonym_weight": 0, "loss.antonym_weight": 0},
        "loss.sense_weight",
        _SENSES,
        "kd",
    ),
    Arm(
        "kd-synonyms",
        "KD + the pull to own senses and synonyms",
        {**_DSKD, "loss.antonym_weight": 0},
        "loss.sense_weight",
        _SENSES,
        "kd",
    ),
    Arm("dskd", "KD + the whole sense loss; no own row among the antonyms'", _DSKD, "loss.sense_weight", _SENSES, "kd"),
    Arm(
        "dskd-papers-rule",
        "the same with own rows among the antonyms', as in the published code",
        _DSKD,
        "loss.sense_weight",
        _SENSES,
        "kd",
        past_variant="papers-rule",
    ),
    Arm("hidden-dskd", "kd-hidden + the whole sense loss", _DSKD, "loss.sense_weight", _SENSES, "kd-hidden"),
    Arm(
        "hidden-distribution",
        "kd-hidden + the sense loss as a divergence of distributions",
        {"loss.sense_form": "distribution"},
        "loss.sense_weight",
        _SENSES,
        "kd-hidden",
    ),
    Arm(
        "hidden-distribution-own",
        "the same with own and random rows alone, without synonyms and antonyms",
        {"loss.sense_form": "distribution", "loss.sense_candidates": ("own", "random")},
        "loss.sense_weight",
        _SENSES,
        "kd-hidden",
    ),
    Arm(
        "hidden-lexical",
        "kd-hidden with CE and KL weighted where the target has a relation; a control without senses",
        {},
        "loss.lexical_weight",
        (0.8, 1.2, 1.5, 2.0),
        "kd-hidden",
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}
BASELINES = ("kd", "kd-hidden")  # arms that the others are compared with, seed by seed
NUM_TRIALS = 4


@dataclass(frozen=True)
class Factor:
    """A factor that may decide whether senses help; it is changed in all of the compared arms."""

    name: str
    keys: Mapping[str, Any]
    shares: tuple[str, ...]  # artifacts that it shares with the study itself

    @property
    def keeps_baseline(self) -> bool:
        """True if the change affects neither an arm without senses nor the positions at which it is measured.

        A change of `senses.key` gives other words senses, so other targets count as lexical.
        """
        return set(self.keys) <= {"senses.k", "annotation.kappa"}


_TO_TEACHER = ("lexicon", "corpus", "teacher")
_TO_SENSES = (*_TO_TEACHER, "sequences", "student", "senses")
_RECIPE = "teacher.train_from_scratch"

FACTOR_BASELINE = "kd-hidden"  # with the weights tuned for the study
FACTOR_ARMS = (FACTOR_BASELINE, "hidden-dskd", "hidden-distribution")
# The arms with senses get the paper's own weight, because the tuned weights change the student very little.
FACTOR_SENSE_WEIGHT = 1.0
FACTORS = (
    Factor("k 1", {"senses.k": 1}, (*_TO_TEACHER, "sequences", "student")),
    Factor("kappa 1", {"annotation.kappa": 1}, _TO_SENSES),
    Factor("teacher trained 3 times as long", {f"{_RECIPE}.train_tokens": 2_550_000}, ("lexicon", "corpus")),
    Factor("1 layer trained", {"student.train_layers": 1}, (*_TO_SENSES, "shards")),
    Factor("3 layers trained", {"student.train_layers": 3}, (*_TO_SENSES, "shards")),
    Factor("kappa 10", {"annotation.kappa": 10}, _TO_SENSES),
    Factor("a quarter of the text", {"corpus.max_sequences": 400}, _TO_TEACHER),
    Factor("k 10", {"senses.k": 10}, (*_TO_TEACHER, "sequences", "student")),
    Factor("senses of predicted tokens", {"senses.key": "predicted"}, (*_TO_TEACHER, "sequences", "student")),
    Factor("300 steps", {"train.steps": 300}, (*_TO_SENSES, "shards")),
    Factor("teacher of 8 layers", {f"{_RECIPE}.num_layers": 8, "student.layers": 4}, ("lexicon", "corpus")),
    Factor("vocabulary of 2048", {f"{_RECIPE}.vocab_size": 2048}, ("lexicon", "corpus")),
    Factor("vocabulary of 8192", {f"{_RECIPE}.vocab_size": 8192}, ("lexicon", "corpus")),
)


def is_needed(factor: Factor | None, arm: str) -> bool:
    """Returns True if an arm has to be trained with a factor changed.

    `factor` None means the study itself with `FACTOR_SENSE_WEIGHT`.
    """
    if arm == FACTOR_BASELINE and (factor is None or factor.keeps_baseline):
        return False  # the test has already trained it
    return arm in FACTOR_ARMS


def keys_of(arm: Arm, chosen: Mapping[str, float]) -> dict[str, Any]:
    """Returns all keys in which an arm differs from `study.yaml`, except its own tuned key.

    Args:
        arm: the arm.
        chosen: the tuned values, by name, of the arms that it adds to.
    """
    if arm.based_on is None:
        return dict(arm.keys)
    below = BY_NAME[arm.based_on]
    inherited = keys_of(below, chosen) | {below.tuned_key: chosen[below.name]}
    if arm.tuned_key == "loss.sense_weight":  # the arms that it adds to set it to 0
        inherited.pop("loss.sense_weight", None)
    return inherited | dict(arm.keys)
