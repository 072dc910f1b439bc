"""Teacher and student in training, loaded together because the student can reuse the teacher's lowest layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dskd.artifacts import kinds
from dskd.artifacts.manifest import read_manifest
from dskd.config import Config
from dskd.console import say
from dskd.distributed.collectives import main_first
from dskd.distributed.world import World
from dskd.models.checks.agreement import probe_inputs
from dskd.models.files.folder import ModelFolder
from dskd.models.running.frozen import FrozenModel, load_frozen
from dskd.models.running.precision import compute_dtype
from dskd.models.structure.causal_lm import destroy_engine, fits_without_upper_layers
from dskd.models.structure.trunk import HandOver, TrunkError, refuse_if_required, require_same_shapes, trunk_depth
from dskd.shards import TEACHER_STATES, TRUNK_STATES, StoredStates
from dskd.training.models.student import load_student
from dskd.training.models.teacher_source import TeacherSource, reads_logits
from dskd.training.models.trunk_check import LayerRun, StoredTrunk, difference, run_counterpart, run_trunk_once
from dskd.training.models.width_map import width_of_map


@dataclass
class ModelPair:
    """The models of a run.

    There is no teacher if no term of the loss needs one, or if the shards have what the loss reads of it.
    """

    teacher: FrozenModel | None
    engine: Any  # the student's DeepSpeed engine
    source: TeacherSource
    trunk: HandOver | StoredTrunk | None = None

    @property
    def trunk_depth(self) -> int:
        """Number of layers that the student does not compute itself."""
        return 0 if self.trunk is None else self.trunk.depth

    def describe(self, config: Config) -> str:
        """Returns a line about what computes the states that training reads: of the teacher, and of a shared trunk."""
        line = self.source.describe(config)
        if isinstance(self.trunk, StoredTrunk):
            computed = "layer computes" if self.trunk.depth == 1 else f"{self.trunk.depth} layers compute"
            return f"{line}; the shards have what the lowest {computed}; the student runs those above"
        if self.trunk is not None:
            layers = "layer" if self.trunk.depth == 1 else f"{self.trunk.depth} layers"
            return f"{line}; the teacher computes the lowest {layers} for both models"
        return line

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate of the student's next update."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def inputs_of(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Returns what the student's forward needs for a micro-batch: from the batch, if the shards have it.

        Returns:
            The teacher's last hidden states [B, T, D] or None, and the student's inputs: the states [B, T, D] of the
            shared trunk or, without a trunk, the token ids [B, T].
        """
        if self.teacher is not None:
            return self.run_teacher(batch["input_ids"], batch.get("position_ids"))
        inputs = batch[TRUNK_STATES] if isinstance(self.trunk, StoredTrunk) else batch["input_ids"]
        return batch.get(TEACHER_STATES), inputs

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
        return states, self.trunk.take() if isinstance(self.trunk, HandOver) else input_ids

    @torch.no_grad()
    def probe(self, config: Config, world: World) -> dict[str, torch.Tensor]:
        """Runs the student in training on the tokens on which its export is checked. Every rank must call it.

        Returns:
            The inputs (:func:`dskd.models.checks.agreement.probe_inputs`), and the student's `logits` [1, T, V].
        """
        if isinstance(self.trunk, StoredTrunk):
            inputs, student_inputs = self.trunk.probe, self.trunk.probe_states
        else:
            base, vocab_size = self.engine.module.decoder.base, self.engine.module.head.weight.ds_shape[0]
            inputs = probe_inputs(base, vocab_size, config.corpus.sequence_length, world.device)
            _, student_inputs = self.run_teacher(**inputs)
        options = {name: value for name, value in inputs.items() if name not in ("input_ids", "position_ids")}
        logits = self.engine(student_inputs, inputs.get("position_ids"), decoder_options=options)
        return {**inputs, "logits": logits}

    def close(self, *, keep_teacher: bool = False) -> None:
        """Frees the models' memory; with `keep_teacher`, the teacher stays loaded."""
        destroy_engine(self.engine)
        if isinstance(self.trunk, HandOver):
            self.trunk.close()
        if self.teacher is not None and not keep_teacher:
            self.teacher.close()


def load_pair(
    config: Config,
    world: World,
    teacher_folder: ModelFolder,
    student_folder: ModelFolder,
    *,
    margin: float,
    accumulation_steps: int,
    source: TeacherSource,
    teacher: FrozenModel | None = None,
    load_universal: bool = False,
) -> ModelPair:
    """Loads the student and, if the run needs it, the teacher; decides whether they share a trunk.

    Args:
        config: the experiment.
        world: the ranks.
        teacher_folder: the teacher.
        student_folder: the untrained student.
        margin: of the sense loss, in units of |h - s|² / D.
        accumulation_steps: micro-batches per rank and optimizer step.
        source: where the run reads the teacher.
        teacher: a teacher that is already loaded, for use by several pairs; only if `source` is a loaded one.
        load_universal: the student resumes from a checkpoint of another number of ranks
            (:mod:`dskd.training.checkpoints.universal`).

    Returns:
        The models. Their `source` reads no trunk from the shards if the student computes all of its layers.

    Raises:
        UserError: if a model is unsuitable, or `student.shared_trunk` is `on` although the trunk would not be exact.
    """
    assert teacher is None or source.kind == "loaded", f"a teacher is loaded, but the source is {source.kind}"
    depth, kept = main_first(lambda: _depth(config, teacher_folder, student_folder, source))
    if source.kind == "loaded" and teacher is None:
        teacher = load_frozen(teacher_folder, config, world, with_head=False)
    # Before the student is loaded, so that its lowest layers and the engine are never in memory together.
    trunk: StoredTrunk | None = None
    expected: list[LayerRun] = []
    if depth and source.reads_trunk:
        trunk, expected = run_trunk_once(student_folder, config, world, depth)

    def load(trunk_depth: int) -> Any:
        return load_student(
            student_folder,
            config,
            world,
            teacher=teacher_folder if reads_logits(source.kind, config.loss) else None,
            margin=margin,
            accumulation_steps=accumulation_steps,
            trunk_depth=trunk_depth,
            load_universal=load_universal,
            mapped_width=width_of_map(config.loss, student_folder, teacher_folder),
        )

    engine = load(depth)
    without_trunk = replace(source, reads_trunk=False)
    if not depth:
        return ModelPair(teacher, engine, without_trunk)
    if teacher is not None:
        expected = run_counterpart(teacher, kept[depth], config, world)
    problem = difference(engine, expected, world=world, dtype=compute_dtype(config.precision, world.device))
    if problem is not None:
        _refuse_or_report(config, problem)
        destroy_engine(engine)
        return ModelPair(teacher, load(0), without_trunk)
    if trunk is not None:
        return ModelPair(None, engine, source, trunk)
    assert teacher is not None
    return ModelPair(teacher, engine, source, HandOver(teacher.decoder.layers, depth))


def _depth(config: Config, teacher: ModelFolder, student: ModelFolder, source: TeacherSource) -> tuple[int, list[int]]:
    """Returns the number of layers of the shared trunk, and the indices of the teacher's layers in the student."""
    manifest = read_manifest(student.path, kinds.STUDENT.name)
    kept = manifest.facts.get("layers", [])
    tied = bool(getattr(student.load_config(), "tie_word_embeddings", False))
    try:
        if config.student.origin != "cut":
            raise TrunkError(str(config.student.why_no_trunk))
        depth = trunk_depth(
            config.student,
            kept=kept,
            same_teacher=manifest.teacher == teacher.digest,
            tied=tied,
            no_source=source.missing_trunk,
        )
        if depth and source.reads_trunk:
            assert source.stored is not None
            depth = starting_depth(source.stored, depth, count=len(kept))
        if depth:
            require_same_shapes(student, depth)
        if depth and source.reads_trunk and not fits_without_upper_layers(student, depth + 1):
            raise TrunkError("in this architecture a layer's shape depends on the number of layers")
        return depth, kept
    except TrunkError as problem:
        _refuse_or_report(config, str(problem))
        return 0, kept


def starting_depth(stored: StoredStates, depth: int, *, count: int) -> int:
    """Returns the number of layers that the student of a run does not compute, because the shards have their output.

    Args:
        stored: the states in the shards, with `trunk_states`.
        depth: the number of lowest layers that the run shares with the teacher.
        count: the number of the student's layers.

    Raises:
        TrunkError: if the stored states enter a layer above those.
    """
    if stored.trunk_depth > depth:
        raise TrunkError(
            f"the trunk_states of the shards enter layer {stored.trunk_depth}, but this run shares only the "
            f"{'lowest layer' if depth == 1 else f'lowest {depth} layers'} with the teacher; with those that enter "
            f"layer {depth}, a step would compute {count - depth} of its {count} layers; to store them, make the "
            f"shards again with `{kinds.SHARDS.made_by}` and the section student of this run"
        )
    return stored.trunk_depth


def _refuse_or_report(config: Config, problem: str) -> None:
    refuse_if_required(config.student, problem)
    say(f"  the student computes all of its layers: {problem}")
