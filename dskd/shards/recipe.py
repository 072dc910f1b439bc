"""The inputs of annotation and the recipe of its shards: what their content depends on, and which are out of date."""

from dataclasses import dataclass

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, Recipe, is_current
from dskd.config import Config
from dskd.corpus.build import SPLITS
from dskd.corpus.sequences import Sequences, load_sequences
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder
from dskd.models.running.generation import ends_of_answers_only
from dskd.models.running.precision import resolve_precision
from dskd.senses.dictionary import SenseDictionary, load_fitting_dictionary
from dskd.shards.schema import TRUNK_STATES, StoredStates
from dskd.shards.storing_states import plan_stored


@dataclass(frozen=True)
class AnnotationInputs:
    """The inputs of annotation, checked to fit together."""

    teacher: ModelFolder
    dictionary: SenseDictionary
    senses: Manifest  # of the dictionary
    sequences: dict[str, Sequences]  # by split
    text: Manifest  # of the sequences
    stored: StoredStates | None  # the teacher's states to store of the training text


def open_inputs(config: Config, teacher: ModelFolder) -> AnnotationInputs:
    """Opens what annotation reads.

    Raises:
        UserError: when the dictionary or the sequences are missing, damaged or made with another teacher or tokenizer,
            when `annotation.teacher_top_n` is more than the teacher's number of tokens, or when the states that
            `annotation.store` names cannot be stored.
    """
    dictionary, senses = load_fitting_dictionary(config, teacher)
    vocab_size, top_n = teacher.load_config().vocab_size, config.annotation.teacher_top_n
    if top_n > vocab_size:
        raise UserError(
            f"annotation.teacher_top_n: {top_n} is more than the {vocab_size} tokens that {teacher.path} has; set it "
            "to 64, say, or 0 to store none"
        )
    sequences = {}
    for split in SPLITS:
        sequences[split], text = load_sequences(config, split, teacher.tokenizer_digest)
    return AnnotationInputs(teacher, dictionary, senses, sequences, text, plan_stored(config, teacher))


@dataclass(frozen=True)
class TeacherUse:
    """The use of the teacher for a split's text beyond the nearest rows; none for held-out text.

    On held-out text the teacher itself is run, and the text stays as it is.
    """

    continuation_tokens: int = 0  # by which it continues each text at most
    top_n: int = 0  # how many of its most probable tokens are stored
    stored: StoredStates | None = None  # its states that are stored

    @classmethod
    def of(cls, config: Config, stored: StoredStates | None, split: str) -> "TeacherUse":
        """Returns the use for a split; `stored` are the states to store of the training text."""
        if split != "train":
            return cls()
        return cls(config.annotation.continuation_tokens, config.annotation.teacher_top_n, stored)

    @property
    def reads_logits(self) -> bool:
        """True if the teacher's output layer is needed."""
        return self.continuation_tokens > 0 or self.top_n > 0


def recipe(config: Config, split: str, inputs: AnnotationInputs) -> Recipe:
    """Returns the recipe of a split's shards: every input and setting that affects their content.

    The batch size does not, nor does the memory budget.
    """
    settings = config.annotation.as_dict() | {"precision": resolve_precision(config.precision)}
    for key in ("batch_size", "memory_budget"):
        del settings[key]
    # Leave out keys whose value changes nothing, so that shards written before a key existed stay up to date.
    use = TeacherUse.of(config, inputs.stored, split)
    if not use.top_n:
        del settings["teacher_top_n"]
    if use.stored is None:
        del settings["store"]
    elif TRUNK_STATES in use.stored.columns:
        settings["trunk_depth"] = use.stored.trunk_depth  # nothing else of the student changes what is stored
    if use.continuation_tokens:
        settings["seed"] = config.seed
        if ends := ends_of_answers_only(inputs.teacher):
            settings["answer_ends"] = ends
    else:
        del settings["continuation_tokens"]
    return Recipe(
        kinds.SHARDS.name,
        {"senses": inputs.senses.digest, "sequences": inputs.text.digest},
        settings,
        teacher=inputs.teacher.digest,
        tokenizer=inputs.teacher.tokenizer_digest,
    )


def stale_splits(config: Config, inputs: AnnotationInputs) -> list[str]:
    """Returns the splits whose shards are missing or were made with another recipe."""
    return [
        split
        for split in SPLITS
        if not is_current(config.path(kinds.SHARDS.folder, split), recipe(config, split, inputs))
    ]
