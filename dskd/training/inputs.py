"""The inputs of training: opened, checked against each other, and hashed into the run's recipe."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, Recipe, read_manifest, verify_files
from dskd.config import Config
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.precision import resolve_precision
from dskd.random_numbers import derived_seed
from dskd.senses.dictionary import load_dictionary, require_fitting
from dskd.students.copies import warn_of_old_copies
from dskd.students.student import find_student, require_configured_student
from dskd.training.data.collator import Collator
from dskd.training.data.distribution_candidates import CandidateRows
from dskd.training.data.positions import SensePositions, TargetPositions
from dskd.training.data.sense_bank import bank_is_on_device, load_bank
from dskd.training.models.teacher_source import TeacherSource, require_fitting_states, require_states, source_of_fit
from dskd.training.models.width_map import width_of_map
from dskd.training.schedule import Schedule

# Settings of `train` that change how a run executes but, except for rounding, not its result.
_NOT_IN_RECIPE = {
    "activation_checkpointing",
    "checkpoint_every",
    "collective_timeout_s",
    "compile_losses",
    "keep_every",
    "keep_last",
    "learning_rate_batch_size",  # the recipe holds the rate computed from this and the rule
    "learning_rate_rule",
    "loss_chunk_size",
    "micro_batch_size",
    "num_workers",
    "sense_bank",
    "shard_cache",
    "shard_remote",
}


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a run, checked to fit together."""

    teacher: ModelFolder
    student: ModelFolder
    senses: Manifest
    shards: Manifest
    vectors_path: Path
    num_senses: int  # rows of the sense dictionary
    source: TeacherSource
    fit_source: TeacherSource | None  # of the teacher's states, to fit the width map; None if the run has no such map


def load_inputs(config: Config, teacher: ModelFolder | None = None) -> TrainingInputs:
    """Finds the inputs of training and checks that they fit together.

    `teacher` is the config's, if it was found before.

    Raises:
        UserError: naming both sides of the first mismatch.
    """
    teacher, student = teacher or find_teacher(config), find_student(config)
    require_configured_student(config, teacher, student)
    dictionary, senses = load_dictionary(config)
    require_fitting(dictionary, senses, teacher, _width_of_senses(config, teacher, student))
    train_shards = shards.load_manifest(config, "train")
    source = TeacherSource.of(config, train_shards)
    require_states(config, source)
    if source.kind == "top_n":
        shards.require_teacher_cache(config, "train", train_shards)
        _require_one_vocabulary(config, teacher, student)
    is_mapped = width_of_map(config.loss, student, teacher) is not None
    fit_source = source_of_fit(config, source) if is_mapped else None
    return TrainingInputs(
        teacher, student, senses, train_shards, dictionary.path, dictionary.num_rows, source, fit_source
    )


def _width_of_senses(config: Config, teacher: ModelFolder, student: ModelFolder) -> int:
    """Returns the width that the sense embeddings must have.

    It is the teacher's width; for a cut student we take the student's, which differs only if it was cut from another
    teacher.
    """
    model = student if config.student.origin == "cut" else teacher
    return int(model.load_config().hidden_size)


def build_collator(
    config: Config, inputs: TrainingInputs, schedule: Schedule, source: TeacherSource | None = None
) -> Collator:
    """Builds the collator whose batches hold what the loss of the run reads.

    Args:
        config: the experiment.
        inputs: the run's inputs.
        schedule: its batches.
        source: where the models read the teacher (:attr:`dskd.training.models.pair.ModelPair.source`), if it is not
            `inputs.source`.
    """
    loss, source = config.loss, source or inputs.source
    positions = candidates = targets = None
    if loss.reads("sense_rows"):
        positions = SensePositions.of(loss, derived_seed(config.seed, "train", "positions"))
    if loss.reads("candidate_rows"):
        candidates = CandidateRows.of(loss, derived_seed(config.seed, "train", "candidates"), inputs.num_senses)
    if loss.position_share < 1:
        targets = TargetPositions(derived_seed(config.seed, "train", "targets"), loss.position_share)
    return Collator(
        None if bank_is_on_device(config) else inputs.vectors_path,
        positions,
        micro_batch_size=schedule.micro_batch_size,
        candidates=candidates,
        targets=targets,
        lexical=loss.reads("lexical_marks"),
        teacher_cache=source.kind == "top_n",
        states=source.columns,
    )


def load_sense_bank(config: Config, inputs: TrainingInputs, world: World) -> torch.Tensor | None:
    """Returns all sense embeddings [R, D] on the device, or None if batches bring their own rows."""
    return load_bank(inputs.vectors_path, world.device) if bank_is_on_device(config) else None


def _require_one_vocabulary(config: Config, teacher: ModelFolder, student: ModelFolder) -> None:
    # A stored distribution (n tokens, one probability for all others) cannot be restricted to the tokens both have.
    sizes = [folder.load_config().vocab_size for folder in (teacher, student)]
    if sizes[0] != sizes[1]:
        remedy = "cut the student from this teacher (`dskd student`)"
        if config.student.origin != "cut":
            remedy = "choose a student with the teacher's number, store its states (annotation.store: [teacher_states])"
        raise UserError(
            f"teacher.mode: cached needs the same vocabulary size in teacher and student, but {teacher.path} has "
            f"{sizes[0]} tokens and {student.path} has {sizes[1]}; {remedy}, or set teacher.mode to zero3 or resident"
        )


def verify_inputs(config: Config, inputs: TrainingInputs) -> None:
    """Compares every file of dictionary, student and shards with its manifest, and the shards with the other inputs.

    Files of remote shards are compared later, when they are read. Warns if the student's copies of small files are old.
    """
    verify_files(inputs.vectors_path.parent, inputs.senses)
    student = read_manifest(inputs.student.path, kinds.STUDENT.name)
    verify_files(inputs.student.path, student)
    warn_of_old_copies(config, inputs.teacher)
    shards.require_fitting(
        config,
        "train",
        inputs.shards,
        senses=inputs.senses.digest,
        teacher=inputs.teacher.digest,
        tokenizer=inputs.teacher.tokenizer_digest,
    )
    for source in (inputs.source, inputs.fit_source):
        if source is not None:
            require_fitting_states(config, source, inputs.teacher.load_config().hidden_size)


def recipe(config: Config, inputs: TrainingInputs | None = None) -> Recipe:
    """Returns the recipe of a run: all that determines its result. The number of ranks is not part of it.

    Args:
        config: the experiment.
        inputs: the run's inputs, if they are loaded already.
    """
    inputs = inputs or load_inputs(config)
    train = {key: value for key, value in config.train.as_dict().items() if key not in _NOT_IN_RECIPE}
    train["learning_rate"] = config.train.peak_learning_rate  # set directly or computed from the batch size
    loss = config.loss.as_dict()
    if config.loss.position_share == 1:  # so that runs from before this key stay up to date
        del loss["position_share"]
    student = {key: value for key, value in config.student.as_dict().items() if key.startswith("train_")}
    settings = {
        "loss": loss,
        "train": train,
        "student": student,
        "seed": config.seed,
        "precision": resolve_precision(config.precision),
        # The most probable tokens are not the whole distribution, so reading them is another objective. States give the
        # numbers that a loaded teacher gives.
        "teacher": {"mode": "cached" if inputs.source.kind == "top_n" else "loaded"},
    }
    digests = {
        "student": inputs.student.digest,
        "shards": shards.digest_without_states(inputs.shards),
        "senses": inputs.senses.digest,
    }
    return Recipe(kinds.CHECKPOINT.name, digests, settings, inputs.teacher.digest, inputs.teacher.tokenizer_digest)


def margin_of(config: Config, manifest: Manifest) -> float:
    """Returns the margin in units of |h - s|² / D: the config's, or `relative_margin` times the teacher's own distance
    to antonyms, which the shards' manifest records.
    """
    if config.loss.relative_margin is None:
        return config.loss.margin
    return config.loss.relative_margin * manifest.facts["teacher_antonym_distance"]
