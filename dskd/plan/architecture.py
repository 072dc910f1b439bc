"""The architecture of a job's models: finding, fetching and checking their config.json."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.config import Config, CorpusConfig
from dskd.errors import UserError, first_line, listed
from dskd.models.checks.architecture import check_architecture
from dskd.models.files.folder import ModelFolder, gguf_hint, refuse_file
from dskd.models.files.gguf_file import read_gguf
from dskd.models.files.model_config import load_json
from dskd.models.gguf.config import read_config
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.cut_config import cut_config
from dskd.models.structure.layers import check_kinds
from dskd.plan.known_models import KNOWN_MODELS
from dskd.students.new import config_values, intermediate_size

_NAME_IT = "name the teacher's config.json with --teacher-config FILE, which is all that a plan needs"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


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

    def key_value_width(self) -> int:
        """Returns the width of a token's keys in a layer, and of its values. Raises the errors of :meth:`values`."""
        values = self.values()
        heads = values["num_attention_heads"]
        width: int = values.get("head_dim") or values["hidden_size"] // heads
        return (values.get("num_key_value_heads") or heads) * width

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

    def numel(self) -> int:
        """Returns the number of parameters, each counted once also if the embeddings are tied to the output matrix."""
        return sum(weight.numel() for weight in self.build().parameters())

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
            yield ModelFolder(Path(path), "", source=named_by)
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


def find_architecture(config: Config, teacher_config: Path | None) -> Architecture:
    """Returns the teacher's architecture, from `teacher_config`, the config's recipe, the teacher's folder, or the Hub.
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
    """Returns the architecture of the model that `key` names: a folder, or a model of the Hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (hint := gguf_hint(folder, key)):
            raise UserError(f"{key}: {folder} is not a Hugging Face model folder: there is no config.json{hint}")
        return _read(folder / "config.json", named_by=key, advice=advice)
    refuse_file(key, path)
    if (known := KNOWN_MODELS.get(path.lower())) is not None:
        return Architecture(json.dumps(known), f"{key}: {path}")
    return _read(_fetch(key, path, revision, advice=advice), named_by=f"{key}: {path}", advice=advice)


def architecture_of_student(config: Config, teacher: Architecture) -> Architecture:
    """Returns the architecture of a student that is not cut from the teacher."""
    student = config.student
    if student.path is not None:
        return _find("student.path", student.path, student.revision, advice="name a folder that has one")
    assert student.from_config is not None
    values = config_values(student.from_config, teacher.values()["vocab_size"], config.corpus.sequence_length)
    return Architecture(json.dumps(values), "student.from_config")


def _read_gguf(config: Config) -> Architecture:
    """Returns the architecture of a GGUF file or, if it is not here, of the teacher that was made from it."""
    file, built_file = Path(str(config.teacher.path)).expanduser(), config.path(kinds.TEACHER.folder, "config.json")
    if not file.is_file() and built_file.is_file():
        return _read(built_file, named_by="teacher.path", advice=_NAME_IT)
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
            finding = f"found {value!r}" if named else "it is missing"
            problems.append(f"{key}: expected a number, 1 or more; {finding}")
    if problems:
        raise UserError(listed(f"{where} is not the config.json of a decoder", problems))


def _fetch(key: str, name: str, revision: str | None, *, advice: str) -> Path:
    """Returns the path of the config.json of a model of the Hub, after fetching it if it is not in the cache. Raises a
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
            f"{key}: {name!r} is not a folder here, and its config.json cannot be fetched from the Hub "
            f"({reason}); {advice}"
        ) from None


def _require_hub() -> None:
    """Raises OSError if the Hub cannot be reached; without a network the library would retry for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OSError:
        raise OSError(f"{constants.ENDPOINT} cannot be reached from here") from None
