"""Hugging Face model folders on disk: found, checked, identified, and read tensor by tensor.

Nothing here builds a model. A folder is the exchange format between stages: the teacher, the cut student and every
export are such folders, and all of them load with `AutoModelForCausalLM` and nothing of this package.
"""

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dskd.config import Config, TeacherConfig
from dskd.errors import UserError, listed
from dskd.manifest import digest_of_json, read_manifest, sha256_of_file, write_json

# The number of the layer that a parameter belongs to, as all decoders of transformers name them.
LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
TEACHER_FOLDER = "teacher"
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TEACHER_MADE_BY = "python launcher/pipeline.py --config FILE"


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder with safetensors weights, and the digests that identify it."""

    path: Path
    digest: str
    tokenizer_digest: str
    trust_remote_code: bool = False

    def load_config(self) -> Any:
        """The model's `PretrainedConfig`."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

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
    check_model_folder(folder, named_by="teacher.path")
    tokenizer = load_tokenizer(folder, trust_remote_code=teacher.trust_remote_code)
    digest = _digest_of_model(folder, cache=config.path(".teacher_digests.json"))
    return ModelFolder(folder, digest, tokenizer_digest(tokenizer), teacher.trust_remote_code)


def check_model_folder(folder: Path, *, named_by: str) -> None:
    """Refuses a folder that lacks what a model needs.

    Raises:
        UserError: with everything that is missing.
    """
    problems = []
    if not (folder / "config.json").is_file():
        problems.append("there is no config.json")
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / WEIGHTS_INDEX).is_file():
        others = sorted(file.name for file in folder.glob("*.bin")) + sorted(file.name for file in folder.glob("*.pt"))
        hint = f" (there is {others[0]}: convert it, dskd does not read pickles)" if others else ""
        problems.append(f"there are no weights: neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}{hint}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append("there is no tokenizer: neither tokenizer.json nor tokenizer.model nor vocab.json")
    if problems:
        raise UserError(listed(f"{named_by}: {folder} is not a Hugging Face model folder", problems))


def renumber_layer(name: str, number: int) -> str:
    """The name of the same parameter in another layer."""
    return LAYER_NAME.sub(lambda layer: layer.group().replace(f".{layer.group(1)}.", f".{number}."), name, count=1)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: when transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({error})") from None


def tokenizer_digest(tokenizer: Any) -> str:
    """Identity of a tokenizer by what it does: equal for copies of it in different folders."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest_of_json([type(tokenizer).__name__, vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id])


class TensorReader:
    """The tensors of a folder's safetensors files by name, one at a time, through memory maps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = _tensor_files(folder)
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of their files."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor.

        Raises:
            UserError: when its file is damaged.
        """
        return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it.

        Raises:
            UserError: when its file is damaged.
        """
        return tuple(self._file(name).get_slice(name).get_shape())

    def stored_type(self, name: str) -> str:
        """The type a tensor has on disk, as safetensors names it, such as F32, BF16 or I8.

        Raises:
            UserError: when its file is damaged.
        """
        return str(self._file(name).get_slice(name).get_dtype())

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


def _tensor_files(folder: Path) -> dict[str, str]:
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: not an index of safetensors files ({error!r})") from None
    return dict.fromkeys(open_safetensors(folder / WEIGHTS_FILE).keys(), WEIGHTS_FILE)


@functools.cache  # one question to the hub a process
def _local_or_hub(teacher: TeacherConfig) -> Path:
    assert teacher.path is not None
    folder = Path(teacher.path).expanduser()
    if folder.is_dir():
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
        return Path(snapshot_download(teacher.path, revision=teacher.revision, allow_patterns=patterns))
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
