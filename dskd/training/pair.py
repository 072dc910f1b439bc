"""Teacher and student in training, loaded together because the student can reuse the teacher's lowest layers."""

from dataclasses import dataclass
from typing import Any

import torch

from dskd.artifacts.manifest import read_manifest
from dskd.config import Config
from dskd.console import say
from dskd.distributed.collectives import main_first
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.models.causal_lm import fits_without_lower_layers
from dskd.models.folder import ModelFolder
from dskd.models.frozen import FrozenModel, load_frozen
from dskd.models.precision import compute_dtype
from dskd.models.trunk import HandOver, TrunkError, missing_source, trunk_depth
from dskd.training.student import load_student
from dskd.training.trunk import difference


@dataclass
class ModelPair:
    """The models of a run.

    There is no teacher if no term of the loss needs one, or if its distributions are in the shards.
    """

    teacher: FrozenModel | None
    engine: Any  # the student's DeepSpeed engine
    trunk: HandOver | None = None

    @property
    def trunk_depth(self) -> int:
        """Number of layers that the teacher computes for the student."""
        return 0 if self.trunk is None else self.trunk.depth

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate of the student's next update."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def run_teacher(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Runs the teacher, if there is one, on `input_ids` [B, T].

        Args:
            input_ids: token ids [B, T].
            position_ids: positions within documents, or None.
            options: passed to the teacher's base model.

        Returns:
            The teacher's last hidden states [B, T, D] or None, and the student's inputs: the states [B, T, D] of the
            shared trunk or, without a trunk, the token ids.
        """
        states = None if self.teacher is None else self.teacher.hidden_states(input_ids, position_ids, **options)
        return states, input_ids if self.trunk is None else self.trunk.take()

    @torch.no_grad()
    def student_logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """Returns the logits [B, T, V] of the student in training. Every rank must call it.

        `options`, such as an attention mask, are passed to the base models.
        """
        _, inputs = self.run_teacher(input_ids, position_ids, **options)
        return self.engine(inputs, position_ids, decoder_options=options)


def load_pair(
    config: Config,
    world: World,
    teacher_folder: ModelFolder,
    student_folder: ModelFolder,
    *,
    margin: float,
    accumulation_steps: int,
    teacher: FrozenModel | None = None,
    load_universal: bool = False,
) -> ModelPair:
    """Loads the student and, if the run needs it, the teacher; decides whether they share a trunk.

    Args:
        config: the experiment.
        world: the ranks.
        teacher_folder: the teacher.
        student_folder: the cut student.
        margin: of the sense loss, in units of |h - s|² / D.
        accumulation_steps: micro-batches per rank and optimizer step.
        teacher: a teacher that is already loaded, for use by several pairs.
        load_universal: the student resumes from a checkpoint of another number of ranks
            (:mod:`dskd.training.universal_checkpoint`).

    Raises:
        UserError: if a model is unsuitable, or `student.shared_trunk` is `on` although the trunk would not be exact.
    """
    depth, kept = main_first(lambda: _depth(config, teacher_folder, student_folder))
    if teacher is None and config.needs_teacher:
        teacher = load_frozen(teacher_folder, config, world, with_head=False)

    def load(trunk_depth: int) -> Any:
        return load_student(
            student_folder,
            config,
            world,
            teacher=teacher_folder if teacher is not None and config.loss.kd_weight else None,
            margin=margin,
            accumulation_steps=accumulation_steps,
            trunk_depth=trunk_depth,
            load_universal=load_universal,
        )

    engine = load(depth)
    if not depth:
        return ModelPair(teacher, engine)
    assert teacher is not None
    problem = difference(
        teacher,
        engine,
        twin=kept[depth],
        packed=config.corpus.packing == "documents",
        length=config.corpus.sequence_length,
        world=world,
        dtype=compute_dtype(config.precision, world.device),
    )
    if problem is None:
        say(f"  the teacher computes the lowest {depth} layers for both models")
        return ModelPair(teacher, engine, HandOver(teacher.decoder.layers, depth))
    _refuse_or_report(config, problem)
    engine.destroy()
    return ModelPair(teacher, load(0))


def _depth(config: Config, teacher: ModelFolder, student: ModelFolder) -> tuple[int, list[int]]:
    """Returns the number of layers of the shared trunk, and the indices of the teacher's layers in the student."""
    manifest = read_manifest(student.path, "student")
    kept = manifest.facts["layers"]
    tied = bool(getattr(student.load_config(), "tie_word_embeddings", False))
    try:
        depth = trunk_depth(
            config.student,
            kept=kept,
            same_teacher=manifest.teacher == teacher.digest,
            tied=tied,
            no_source=missing_source(config),
        )
        if depth and not fits_without_lower_layers(student, depth):
            raise TrunkError("in this architecture a layer's shape depends on its place")
        return depth, kept
    except TrunkError as problem:
        _refuse_or_report(config, str(problem))
        return 0, kept


def _refuse_or_report(config: Config, problem: str) -> None:
    if config.student.shared_trunk == "on":
        raise UserError(
            f"student.shared_trunk: on is not possible: {problem}; set it to auto, and the student computes "
            "all of its layers",
            known_to_all_ranks=True,
        )
    say(f"  the student computes all of its layers: {problem}")
