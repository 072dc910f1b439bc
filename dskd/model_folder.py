"""Hugging Face model folders on disk: found, checked, identified, and read tensor by tensor.

Nothing here builds a model. A folder is the exchange format between stages: the teacher, the cut student and every
export are such folders, and all of them load with `AutoModelForCausalLM` and nothing of this package.
"""

import functools
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dskd.config import Config, TeacherConfig
from dskd.console import say
from dskd.errors import UserError, listed
from dskd.limits import check_limits
from dskd.manifest import digest_of_json, read_manifest, sha256_of_file, write_json
from dskd.model_config import block_fp8, read_model_config

# The number of the layer that a parameter belongs to, as all decoders of transformers name them.
LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
TEACHER_FOLDER = "teacher"
_SCALE = "_scale_inv"  # what block FP8 appends to the name of a matrix
_LFS_POINTER = b"version https://git-lfs"
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TEACHER_MADE_BY = "python launcher/pipeline.py --config FILE"


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder with safetensors weights, and the digests that identify it."""

    path: Path
    digest: str
    tokenizer_digest: str
    trust_remote_code: bool = False

    def config_values(self) -> dict[str, Any]:
        """Its config.json, as :func:`dskd.model_config.read_model_config` translates it."""
        return read_model_config(self.path, trust_remote_code=self.trust_remote_code)

    def load_config(self) -> Any:
        """The model's `PretrainedConfig`.

        Raises:
            UserError: when the installed transformers cannot read it.
        """
        from transformers import CONFIG_MAPPING, AutoConfig

        values = self.config_values()
        try:
            if "auto_map" in values and self.trust_remote_code:
                return AutoConfig.from_pretrained(self.path, trust_remote_code=True)
            return CONFIG_MAPPING[values["model_type"]].from_dict(values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise UserError(f"{self.path / 'config.json'}: transformers cannot read it ({error})") from None

    def load_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)


def find_teacher(config: Config) -> ModelFolder:
    """The teacher's folder: made by the pipeline, named by a path, or fetched from the hub.

    Raises:
        UserError: when it is missing, or is no model folder with safetensors weights.
    """
    teacher = config.teacher
    if teacher.path is None:
        folder = config.path(TEACHER_FOLDER)
        manifest = read_manifest(folder, "teacher", made_by=TEACHER_MADE_BY)
        return ModelFolder(folder, manifest.digest, tokenizer_digest(load_tokenizer(folder)))
    folder = _local_or_hub(teacher)
    check_model_folder(folder, named_by="teacher.path", trust_remote_code=teacher.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=teacher.trust_remote_code)
    digest = _digest_of_model(folder, cache=config.path(".teacher_digests.json"))
    found = ModelFolder(folder, digest, tokenizer_digest(tokenizer), teacher.trust_remote_code)
    check_limits(config, folder, found.load_config(), tokenizer)
    return found


def check_model_folder(folder: Path, *, named_by: str, trust_remote_code: bool = False) -> None:
    """Refuses a folder that lacks what a model needs, or holds a model that cannot be read.

    Raises:
        UserError: with everything that is missing, or with what the model is.
    """
    problems = []
    if not (folder / "config.json").is_file():
        problems.append("there is no config.json")
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / WEIGHTS_INDEX).is_file():
        others = sorted(file.name for file in folder.glob("*.bin")) + sorted(file.name for file in folder.glob("*.pt"))
        hint = f" (there is {others[0]}: convert it, dskd does not read pickles)" if others else ""
        if (folder / "adapter_config.json").is_file():
            hint = (
                " (there is adapter_config.json: this is a LoRA adapter; merge it into its base model, and save that)"
            )
        problems.append(f"there are no weights: neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}{hint}")
    tokenizer_files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in tokenizer_files):
        problems.append("there is no tokenizer: neither tokenizer.json nor tokenizer.model nor vocab.json")
    weights = sorted(file.name for file in folder.glob("model*.safetensors*"))
    problems += [
        f"{name} is a git-lfs pointer and not the file itself; fetch it with `git lfs pull`"
        for name in ("config.json", *tokenizer_files, *weights)
        if _is_lfs_pointer(folder / name)
    ]
    if problems:
        raise UserError(listed(f"{named_by}: {folder} is not a Hugging Face model folder", problems))
    read_model_config(folder, named_by=named_by, trust_remote_code=trust_remote_code)


def _is_lfs_pointer(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def renumber_layer(name: str, number: int) -> str:
    """The name of the same parameter in another layer."""
    return LAYER_NAME.sub(lambda layer: layer.group().replace(f".{layer.group(1)}.", f".{number}."), name, count=1)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: when transformers cannot read it.
    """
    from transformers import AutoTokenizer

    with _without_false_alarm():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            needs = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
            missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
            remedy = "; its tokenizer.model needs two packages: pip install sentencepiece protobuf" * (
                needs and bool(missing)
            )
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{folder}: the tokenizer cannot be loaded ({reason}){remedy}") from None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


@contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Leaves out one warning of transformers 4.57, which takes any local folder without `transformers_version` in its
    config.json, and any of a version up to 4.57.2, for a Mistral tokenizer with a wrong regular expression. Nothing
    would be mended by the option it names: a tokenizer is used as the teacher was trained with it.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "fix_mistral_regex" not in record.getMessage()

    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def tokenizer_digest(tokenizer: Any) -> str:
    """Identity of a tokenizer by what it does: equal for copies of it in different folders."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest_of_json([type(tokenizer).__name__, vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id])


class TensorReader:
    """The tensors of a folder's safetensors files by name, one at a time, through memory maps.

    Matrices in block FP8 are read in the type that config.json names for the model (bfloat16 if it names none): codes
    times scales. The scales are no tensors of their own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = _tensor_files(folder)
        self._open: dict[str, Any] = {}
        values = _json_or_empty(folder / "config.json")
        self._block = block_fp8(values)
        stored_type = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
        self._type = getattr(torch, str(stored_type).removeprefix("torch."), torch.bfloat16)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of their files."""
        return [name for name in self._file_of if not self._is_scale(name)]

    def __contains__(self, name: str) -> bool:
        return name in self._file_of and not self._is_scale(name)

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor.

        Raises:
            UserError: when its file is damaged, or it is in FP8 without scales that fit.
        """
        tensor = self._file(name).get_tensor(name)
        if self._block is None or name + _SCALE not in self._file_of:
            return tensor
        scales = self._file(name + _SCALE).get_tensor(name + _SCALE).float()
        rows, columns = self._block
        blocks = tuple(-(-size // by) for size, by in zip(tensor.shape, self._block, strict=False))
        if tensor.ndim != 2 or tuple(scales.shape) != blocks:
            raise UserError(
                f"{self._folder}: {name}{_SCALE} has shape {list(scales.shape)}; {name}, of shape "
                f"{list(tensor.shape)}, needs one of {list(blocks)} for blocks of {rows} × {columns}"
            )
        scales = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return (tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]).to(self._type)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it.

        Raises:
            UserError: when its file is damaged.
        """
        return tuple(self._file(name).get_slice(name).get_shape())

    def stored_type(self, name: str) -> str:
        """The type in which a tensor is read, as safetensors names it, such as F32, BF16 or I8.

        Raises:
            UserError: when its file is damaged.
        """
        if self._block is not None and name + _SCALE in self._file_of:
            return "F32"
        return str(self._file(name).get_slice(name).get_dtype())

    def _is_scale(self, name: str) -> bool:
        return self._block is not None and name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._file_of

    def _file(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = open_safetensors(self._folder / file)
        return self._open[file]


def open_safetensors(path: Path) -> Any:
    """A memory-mapped safetensors file.

    Raises:
        UserError: when it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); was its download or copy cut?") from None


def _json_or_empty(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # refused elsewhere, with the reason
        return {}


def _tensor_files(folder: Path) -> dict[str, str]:
    """{name of a tensor: its file}. Of two sets of weights it is the single file, as transformers chooses."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS_FILE).is_file():
        if index.is_file():
            _say_once(
                f"  {folder}: {WEIGHTS_FILE} is read, as transformers does; {WEIGHTS_INDEX} and its files are not"
            )
        return dict.fromkeys(open_safetensors(folder / WEIGHTS_FILE).keys(), WEIGHTS_FILE)
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from None


@functools.cache
def _say_once(message: str) -> None:
    say(message)


@functools.cache  # one question to the hub a process
def _local_or_hub(teacher: TeacherConfig) -> Path:
    assert teacher.path is not None
    folder = Path(teacher.path).expanduser()
    if folder.is_dir():
        if teacher.revision is not None:
            raise UserError(
                f"teacher.revision: {teacher.revision!r} is of a model of the hub, and teacher.path is the folder "
                f"{folder}; leave it out, or name the model as ORGANISATION/NAME"
            )
        return folder
    if folder.is_absolute() or teacher.path.startswith((".", "~")) or teacher.path.count("/") != 1:
        raise UserError(
            f"teacher.path: there is no folder {folder}; name a Hugging Face model folder, or a model of the hub as "
            "ORGANISATION/NAME"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + ["*.py"] * teacher.trust_remote_code
    try:
        # Some models have their weights once more in another format, which would be fetched for nothing.
        return Path(
            snapshot_download(
                teacher.path,
                revision=teacher.revision,
                allow_patterns=patterns,
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"teacher.path: {teacher.path!r} is no folder here, and cannot be fetched from the hub ({reason})"
        ) from None


def _digest_of_model(folder: Path, cache: Path) -> str:
    """Digest over config and weights. Hashes of large files are remembered by path, size and time of change: a path may
    be another file on each node.
    """
    names = sorted({"config.json", *_tensor_files(folder).values()})
    known: dict[str, Any] = {}
    if cache.is_file():
        with _ignoring_damage():
            known = json.loads(cache.read_text(encoding="utf-8"))
    digests, new = {}, {}
    for name in names:
        path = (folder / name).resolve()
        if not path.is_file():
            raise UserError(f"{folder / name}: {WEIGHTS_INDEX} names this file, but it is missing; fetch it again")
        status = path.stat()
        key = f"{path} {status.st_size} {status.st_mtime_ns}"
        digests[name] = known.get(key) or sha256_of_file(path)
        if key not in known:
            new[key] = digests[name]
    if new and cache.parent.is_dir():
        with _ignoring_damage():
            write_json(cache, known | new)
    return digest_of_json(digests)


@contextmanager
def _ignoring_damage() -> Iterator[None]:
    """The cache of hashes only saves time: one that cannot be read or written costs nothing but that."""
    try:
        yield
    except (OSError, ValueError):
        return
