"""The shapes of a job's models, without any weights: the teacher's from its config.json, and the student's."""

import functools
from dataclasses import dataclass

from torch import nn

from dskd.config import Config, StudentConfig
from dskd.errors import UserError
from dskd.models.structure.trained import choose_trained
from dskd.models.structure.trunk import TrunkError, refuse_if_required, trunk_depth
from dskd.plan.architecture import Architecture, architecture_of_student
from dskd.shards import TRUNK_STATES
from dskd.shards.storing_states import stored_trunk_depth
from dskd.students.spacing import choose_layers, chosen_layers, require_removable
from dskd.training.models.teacher_source import TeacherSource, reads_logits
from dskd.training.models.width_map import has_width_map


@dataclass(frozen=True)
class Weight:
    """A parameter of a model."""

    name: str
    numel: int
    is_matrix: bool
    is_trained: bool = False

    def share(self, world_size: int) -> int:
        """Returns the number of its elements that a rank holds under ZeRO-3."""
        return -(-self.numel // world_size)


@dataclass(frozen=True)
class Shapes:
    """The weights of a model, grouped by the modules that own them, in the order in which the modules run.

    Modules that only contain other modules are included, without weights.
    """

    modules: tuple[tuple[Weight, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, *, without: nn.Module | None = None) -> "Shapes":
        """Collects the weights of a model, except those of the module `without`."""
        modules, seen = [], set()
        for prefix, module in model.named_modules():
            own = {name: weight for name, weight in module.named_parameters(recurse=False) if id(weight) not in seen}
            seen |= {id(weight) for weight in own.values()}
            if module is not without:
                modules.append(
                    tuple(
                        Weight(f"{prefix}.{name}", weight.numel(), weight.dim() > 1, weight.requires_grad)
                        for name, weight in own.items()
                    )
                )
        return cls(tuple(modules))

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Returns all weights."""
        return tuple(weight for module in self.modules for weight in module)

    @property
    def numel(self) -> int:
        """Returns the number of elements of all weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def trained_numel(self) -> int:
        """Returns the number of elements of the trained weights."""
        return sum(weight.numel for weight in self.weights if weight.is_trained)

    def share(self, world_size: int, *, trained_only: bool = False) -> int:
        """Returns the number of elements that a rank holds, of all weights or only of the trained ones."""
        return sum(w.share(world_size) for w in self.weights if w.is_trained or not trained_only)

    def persistent(self, threshold: int) -> int:
        """Returns the number of elements of weights so small that ZeRO-3 leaves them gathered."""
        return sum(weight.numel for weight in self.weights if weight.numel <= threshold)


@dataclass(frozen=True)
class StudentShapes:
    """The student as training loads it, without the layers that the teacher computes for it."""

    architecture: "Architecture"  # of the model that the layers are from: the teacher, unless the student is another
    layers: list[int]  # its layers that the student consists of
    is_assumed: bool  # they have not been measured yet, and are those of `ends`
    trunk: int  # the number of lowest layers that the teacher computes for it
    why_no_trunk: str | None
    shapes: Shapes  # of the part that training loads
    whole_numel: int  # elements of the student as it is exported
    teacher_matrix: int  # elements of a copy of the teacher's output matrix; 0 unless the student trains its own
    trains_head: bool  # the output matrix is trained, perhaps because it is tied to trained embeddings


@functools.cache
def teacher_shapes(architecture: Architecture) -> Shapes:
    """Returns the teacher's weights in training: without an untied output matrix, which is in the student's head."""
    model = architecture.build()
    output = model.get_output_embeddings()
    is_tied = output.weight is model.get_input_embeddings().weight
    return Shapes.of(model, without=None if is_tied else output)


def plan_student(config: Config, architecture: Architecture) -> StudentShapes:
    """Returns the student, and which of its weights would be trained. `architecture` is the teacher's.

    Raises a UserError when the teacher has no such layers, nothing would be trained, the config requires a shared trunk
    that is not possible, or training would refuse the model that is the student.
    """
    if config.student.origin != "cut":
        return _other_student(config, architecture)
    layers, is_assumed = _planned_layers(config, architecture)
    architecture.check_kinds(layers)
    whole = _Cut.of(architecture, tuple(layers), 0, config.student)
    source, why = TeacherSource.planned(config), None
    try:
        trunk = trunk_depth(
            config.student, kept=layers, same_teacher=True, tied=whole.is_tied, no_source=source.missing_trunk
        )
    except TrunkError as problem:
        refuse_if_required(config.student, str(problem))
        trunk, why = 0, str(problem)
    loaded = _Cut.of(architecture, tuple(layers), trunk, config.student)
    needs_copy = loaded.trains_output and reads_logits(source.kind, config.loss)
    matrix = loaded.output_numel if needs_copy else 0
    return StudentShapes(
        architecture, layers, is_assumed, trunk, why, loaded.shapes, whole.numel, matrix, loaded.trains_output
    )


def _other_student(config: Config, teacher: Architecture) -> StudentShapes:
    """Returns the student that is another model than the teacher, of which training loads all."""
    architecture = architecture_of_student(config, teacher)
    architecture.check(config)
    values, teacher_values = architecture.values(), teacher.values()
    layers = list(range(values["num_hidden_layers"]))
    whole = _Cut.of(architecture, tuple(layers), 0, config.student)
    reads_matrix = reads_logits(TeacherSource.planned(config).kind, config.loss)
    matrix = teacher_values["vocab_size"] * teacher_values["hidden_size"] * reads_matrix
    shapes, own, width = whole.shapes, values["hidden_size"], teacher_values["hidden_size"]
    if has_width_map(config.loss, own, width):
        shapes = Shapes((*shapes.modules, (Weight("width_map.weight", own * width, True, True),)))
    why = config.student.why_no_trunk
    return StudentShapes(architecture, layers, False, 0, why, shapes, whole.numel, matrix, whole.trains_output)


def trunk_to_store(config: Config, architecture: Architecture) -> int:
    """Returns the depth of the trunk whose states annotation stores; 0 if it stores none. Raises a UserError where
    annotation would, because teacher and student share no layers.
    """
    if TRUNK_STATES not in config.annotation.store:
        return 0
    layers, _ = _planned_layers(config, architecture)
    is_tied = _Cut.of(architecture, tuple(layers), 0, config.student).is_tied
    return stored_trunk_depth(config.student, kept=layers, tied=is_tied)


def _planned_layers(config: Config, architecture: Architecture) -> tuple[list[int], bool]:
    """Returns the teacher's layers that the student keeps, and whether they are only assumed: with `spacing:
    importance` they are known when the student is cut. Raises a UserError when the teacher has no such layers.
    """
    student, count = config.student, architecture.values()["num_hidden_layers"]
    if not student.is_measured:
        return choose_layers(student, count), False
    require_removable(student, count)
    try:
        return chosen_layers(config, count), False
    except UserError:  # no student is cut yet, or with other keys
        return choose_layers(student.model_copy(update={"spacing": "ends"}), count), True


@dataclass(frozen=True)
class _Cut:
    """The facts that a plan needs about a cut model; they are cached, as large models take a second to build."""

    shapes: Shapes
    numel: int
    output_numel: int
    trains_output: bool
    is_tied: bool

    @staticmethod
    @functools.cache
    def of(architecture: Architecture, layers: tuple[int, ...], trunk: int, student: StudentConfig) -> "_Cut":
        """Builds a student and returns its facts, without the lowest `trunk` layers and, if `trunk` > 0, embeddings."""
        model = architecture.build(layers=list(layers), first_layer=trunk)
        numel = sum(weight.numel() for weight in model.parameters())
        embeddings, output = model.get_input_embeddings(), model.get_output_embeddings().weight
        is_tied = embeddings.weight is output
        choose_trained(model, student, first_layer=trunk)
        shapes = Shapes.of(model, without=embeddings if trunk else None)
        return _Cut(shapes, numel, output.numel(), output.requires_grad, is_tied)
