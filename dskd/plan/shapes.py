"""The shapes of a job's models, without any weights: the teacher's from its config.json, and the student's."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dskd.artifacts import kinds
from dskd.config import Config, CorpusConfig, StudentConfig
from dskd.errors import UserError, first_line, listed
from dskd.models.architecture import check_architecture
from dskd.models.causal_lm import empty_model
from dskd.models.cut_config import cut_config
from dskd.models.folder import ModelFolder
from dskd.models.gguf.config import read_config
from dskd.models.gguf.file import read_gguf
from dskd.models.layers import check_kinds
from dskd.models.model_config import load_json
from dskd.models.trunk import TrunkError, refuse_if_required, trunk_depth
from dskd.plan.known_models import KNOWN_MODELS
from dskd.shards import TRUNK_STATES
from dskd.shards.stored_states import stored_trunk_depth
from dskd.students.new import config_values, intermediate_size
from dskd.students.spacing import choose_layers, chosen_layers, require_removable
from dskd.training.student import choose_trained
from dskd.training.teacher_source import TeacherSource, reads_logits
from dskd.training.width_map import has_width_map

_NAME_IT = "name the teacher's config.json with --teacher-config FILE, which is all that a plan needs"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


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
class Architecture:
    """The architecture of a job's teacher, as its config.json."""

    config: str  # JSON, as a string so that an architecture is hashable
    named_by: str  # where the config.json comes from, for messages

    def values(self) -> dict[str, Any]:
        """Returns the config.json as transformers completes it, with sizes under the names most architectures use.
        Raises a UserError when transformers cannot read it.
        """
        return _complete(self.config, self.named_by)

    def load_config(self) -> Any:
        """Loads the `PretrainedConfig`. Raises a UserError when transformers cannot read it."""
        with _folder_of(self.config, self.named_by) as folder:
            return folder.load_config()

    def build(self, *, layers: list[int] | None = None, first_layer: int = 0) -> Any:
        """Builds the causal LM on the meta device, with these layers (None: all), of which the `first_layer` lowest are
        left out. Raises a UserError when transformers cannot build the architecture.
        """
        values = json.loads(self.config)
        if layers is not None:
            values = cut_config(values, layers, self.values())
        with _folder_of(json.dumps(values), self.named_by) as folder:
            return empty_model(folder, first_layer=first_layer)

    def check(self, config: Config) -> None:
        """Raises a UserError for a teacher that training would refuse at its start."""
        _check(self, config.corpus)

    def check_kinds(self, layers: list[int]) -> None:
        """Raises a UserError for layers that cannot form a student."""
        if layers != list(range(len(layers))):
            _check_kinds(self, tuple(layers))


@contextlib.contextmanager
def _folder_of(config: str, named_by: str) -> Iterator[ModelFolder]:
    """Provides a temporary model folder with nothing but a config.json; in errors, `named_by` replaces its path."""
    with tempfile.TemporaryDirectory(prefix="dskd-plan-") as path:
        Path(path, "config.json").write_text(config, encoding="utf-8")
        try:
            yield ModelFolder(Path(path), "", "", source=named_by)
        except UserError as error:
            message = str(error).replace(str(Path(path, "config.json")), named_by)
            raise UserError(message.replace(path, named_by)) from None
        except (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            reason = first_line(error)
            raise UserError(
                f"{named_by}: transformers cannot build this architecture ({reason}); name the config.json of a "
                "decoder with --teacher-config"
            ) from None


# Cached, because each check builds the model, and a search for a change that fits asks for it a hundred times.
@functools.cache
def _check(architecture: Architecture, corpus: CorpusConfig) -> None:
    with _folder_of(architecture.config, architecture.named_by) as folder:
        check_architecture(folder, corpus)


@functools.cache
def _check_kinds(architecture: Architecture, layers: tuple[int, ...]) -> None:
    check_kinds(architecture.build(), architecture.build(layers=list(layers)), layers)


@functools.cache
def _complete(config: str, named_by: str) -> dict[str, Any]:
    built = Architecture(config, named_by).load_config()
    sizes = {key: getattr(built, key, None) for key in (*_SIZES, "num_key_value_heads", "head_dim")}
    return {**built.to_dict(), **{key: value for key, value in sizes.items() if isinstance(value, int)}}


@dataclass(frozen=True)
class Student:
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


def find_architecture(config: Config, teacher_config: Path | None) -> Architecture:
    """Returns the teacher's architecture, from `teacher_config`, the config's recipe, the teacher's folder, or the hub.
    Raises a UserError when no config.json is found, or it is not that of a decoder.
    """
    if teacher_config is not None:
        return _read(teacher_config, named_by="--teacher-config", advice=_NAME_IT)
    recipe, path = config.teacher.train_from_scratch, config.teacher.path
    if recipe is not None:
        values = {
            "model_type": "llama",
            "vocab_size": recipe.vocab_size,
            "hidden_size": recipe.hidden_size,
            "intermediate_size": intermediate_size(recipe.hidden_size),
            "num_hidden_layers": recipe.num_layers,
            "num_attention_heads": recipe.num_heads,
            "num_key_value_heads": recipe.num_heads,
        }
        return Architecture(json.dumps(values), "teacher.train_from_scratch")
    assert path is not None
    if config.teacher.is_gguf:
        return _read_gguf(config)
    return _find("teacher.path", path, config.teacher.revision, advice=_NAME_IT)


def _find(key: str, path: str, revision: str | None, *, advice: str) -> Architecture:
    """Returns the architecture of the model that `key` names: a folder, or a model of the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _read(folder / "config.json", named_by=key, advice=advice)
    if (known := KNOWN_MODELS.get(path.lower())) is not None:
        return Architecture(json.dumps(known), f"{key}: {path}")
    return _read(_fetch(key, path, revision, advice=advice), named_by=f"{key}: {path}", advice=advice)


def _architecture_of_student(config: Config, teacher: Architecture) -> Architecture:
    """Returns the architecture of a student that is not cut from the teacher."""
    student = config.student
    if student.path is not None:
        return _find("student.path", student.path, student.revision, advice="name a folder that has one")
    assert student.from_config is not None
    values = config_values(student.from_config, teacher.values()["vocab_size"], config.corpus.sequence_length)
    return Architecture(json.dumps(values), "student.from_config")


@functools.cache
def teacher_shapes(architecture: Architecture) -> Shapes:
    """Returns the teacher's weights in training: without an untied output matrix, which is in the student's head."""
    model = architecture.build()
    output = model.get_output_embeddings()
    is_tied = output.weight is model.get_input_embeddings().weight
    return Shapes.of(model, without=None if is_tied else output)


def plan_student(config: Config, architecture: Architecture) -> Student:
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
    return Student(
        architecture, layers, is_assumed, trunk, why, loaded.shapes, whole.numel, matrix, loaded.trains_output
    )


def _other_student(config: Config, teacher: Architecture) -> Student:
    """Returns the student that is another model than the teacher, of which training loads all."""
    architecture = _architecture_of_student(config, teacher)
    architecture.check(config)
    values, of_teacher = architecture.values(), teacher.values()
    layers = list(range(values["num_hidden_layers"]))
    whole = _Cut.of(architecture, tuple(layers), 0, config.student)
    reads_matrix = reads_logits(TeacherSource.planned(config).kind, config.loss)
    matrix = of_teacher["vocab_size"] * of_teacher["hidden_size"] * reads_matrix
    shapes, own, width = whole.shapes, values["hidden_size"], of_teacher["hidden_size"]
    if has_width_map(config.loss, own, width):
        shapes = Shapes((*shapes.modules, (Weight("width_map.weight", own * width, True, True),)))
    why = config.student.why_no_trunk
    return Student(architecture, layers, False, 0, why, shapes, whole.numel, matrix, whole.trains_output)


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


def _read_gguf(config: Config) -> Architecture:
    """Returns the architecture of a GGUF file or, if it is not here, of the teacher that was made from it."""
    file, made = Path(str(config.teacher.path)).expanduser(), config.path(kinds.TEACHER.folder, "config.json")
    if not file.is_file() and made.is_file():
        return _read(made, named_by="teacher.path", advice=_NAME_IT)
    return Architecture(json.dumps(read_config(read_gguf(file)).to_dict()), f"teacher.path: {file}")


def _read(path: Path, *, named_by: str, advice: str) -> Architecture:
    if not path.is_file():
        raise UserError(f"{named_by}: there is no file {path}; {advice}")
    try:
        values = load_json(path)
    except UserError as problem:
        raise UserError(f"{named_by}: {problem}") from None
    if not isinstance(values.get("model_type"), str):
        raise UserError(f"{named_by}: {path} has no model_type; it is not the config.json of a Hugging Face model")
    _require_decoder(values, f"{named_by}: {path}")
    return Architecture(json.dumps(values), f"{named_by}: {path}")


def _require_decoder(values: dict[str, Any], where: str) -> None:
    """Raises a UserError with all problems of values that are not a decoder's config.json."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    model_type = values["model_type"]
    if model_type in ENCODERS or (model_type not in DECODERS and not values.get("auto_map")):
        what = "an encoder" if model_type in ENCODERS else "unknown to transformers"
        raise UserError(
            f"{where}: model_type {model_type!r} is {what}; it has to be a decoder (a causal language model)"
        )
    problems = []
    aliases = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    for key in _SIZES:
        named = [name for name in (key, aliases.get(key, key)) if name in values]
        value = values[named[0]] if named else None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            found = f"found {value!r}" if named else "it is missing"
            problems.append(f"{key}: expected a number, 1 or more; {found}")
    if problems:
        raise UserError(listed(f"{where} is not the config.json of a decoder", problems))


def _fetch(key: str, name: str, revision: str | None, *, advice: str) -> Path:
    """Returns the path of the config.json of a model of the hub, after fetching it if it is not in the cache. Raises a
    UserError when it cannot be fetched.
    """
    if name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise UserError(f"{key}: there is no folder {name}; make it, or {advice}")
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            if not constants.HF_HUB_OFFLINE:
                _require_hub()
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"{key}: {name!r} is not a folder here, and its config.json cannot be fetched from the hub "
            f"({reason}); {advice}"
        ) from None


def _require_hub() -> None:
    """Raises OSError if the hub cannot be reached; without a network the library would retry for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OSError:
        raise OSError(f"{constants.ENDPOINT} cannot be reached from here") from None
