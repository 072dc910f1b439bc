"""The settings of a training of the study: which layers it keeps and trains, its optimizer, and its loss."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from dskd.config import LossConfig

Keep = Literal["ends", "first", "even", "importance"]
# The student's state that the sense loss reads for a target: the last state of the position that predicts it; the last
# state of the position that reads it; or, there, the lowest trained layer's. The last two pass through a trained map.
SensesAt = Literal["prediction", "reading", "middle"]
Weights = Literal["equal", "lexical", "senses", "senses of others", "rarity", "entropy"]


@dataclass(frozen=True)
class Settings:
    """The settings of a training. A result names all of them."""

    # The student: layers of the teacher, of which the upper ones are trained.
    keep: Keep = "ends"
    layers: int = 15
    train_layers: int = 2
    train_norm: bool = False
    train_head: bool = False
    # The optimizer. The learning rate rises over the warm-up and then falls to 0.
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices, with AdamW for what is none
    learning_rate: float = 5e-4  # of AdamW
    muon_rate: float = 5e-3  # of Muon, if that is the optimizer
    batch_size: int = 16  # sequences
    epochs: float = 1.0
    warmup: float = 0.05  # share of the steps
    decay: Literal["cosine", "linear"] = "cosine"
    beta2: float = 0.999
    weight_decay: float = 0.0
    position_share: float = 1.0  # of the positions, drawn at random in every step
    # The loss, in addition to the terms of `dskd.config.LossConfig`.
    ce_weight: float = 1.0
    kd_weight: float = 0.7
    temperature: float = 2.0
    hidden_weight: float = 0.0
    sense_weight: float = 0.0
    sense_form: Literal["distance", "distribution"] = "distance"
    synonym_weight: float = 1.0
    antonym_weight: float = 1.0
    relative_margin: float | None = None  # of the push, in the teacher's own mean distance to antonyms; None: 1
    sense_own: bool = True  # also pull to the target's own senses
    sense_at: SensesAt = "prediction"
    sense_words: Literal["related", "random"] = "related"  # random: other words as frequent for synonyms and antonyms
    antonyms: Literal["all", "nearer"] = "all"  # nearer: no pull or push unless the teacher is nearer to an antonym
    weights: Weights = "equal"  # of the positions in CE and KL
    weights_power: float = 1.0  # the weights are raised to it
    lexical_divergence: float = 0.0  # weight of the divergence over a target, its synonyms and antonyms alone
    lexical_words: Literal["related", "random"] = "related"  # random: as many words of the same frequency instead
    # Share of the cross-entropy's target mass that the target and its synonyms divide among them as the teacher's
    # probabilities do; with random `lexical_words` the target and these.
    synonym_targets: float = 0.0

    def __post_init__(self) -> None:
        """Checks that no term would read states that another setting has replaced."""
        if self.sense_at != "prediction" and (self.hidden_weight or self.sense_form != "distance"):
            raise ValueError("sense_at: only the sense loss as a distance can read other states")

    @classmethod
    def of(cls, changes: Mapping[str, Any]) -> "Settings":
        """Returns the settings that differ from the defaults as `changes` say."""
        return replace(cls(), **changes)

    @property
    def all(self) -> dict[str, Any]:
        """{setting: value}."""
        return asdict(self)

    @property
    def loss(self) -> LossConfig:
        """The terms that `dskd` computes."""
        shared = {field.name for field in fields(self)} & set(LossConfig.model_fields)
        return LossConfig(**{name: getattr(self, name) for name in shared})
