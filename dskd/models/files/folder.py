"""Hugging Face model folders on disk: finding them, checking them, and computing the digests that identify them.

Nothing here builds a model. A folder is the exchange format between stages: the teacher, the student and every export
are such folders, and `AutoModelForCausalLM` loads all of them without this package.
"""

import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.hashing import MANIFEST_NAME, digest_of_json
from dskd.artifacts.manifest import read_manifest
from dskd.artifacts.pointers import refuse_pointer
from dskd.config import Config
from dskd.errors import UserError, first_line, listed, reason_of
from dskd.models.files.digests import (
    digest_cache,
    digest_of_model,
    gguf_digest,
    gguf_path,
    hashes_of,
    require_made_files,
)
from dskd.models.files.gguf_file import require_gguf_file
from dskd.models.files.model_config import condition_of_code, read_model_config
from dskd.models.files.weights import WEIGHTS_FILE, WEIGHTS_INDEX
from dskd.models.limits import check_limits

# The errors that transformers raises for a wrong value in config.json; it checks few values itself.
BAD_CONFIG = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
)
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *_SENTENCEPIECE_FILES)
_WITHOUT_TOKENIZER = f"there is no tokenizer: neither {' nor '.join(_TOKENIZER_FILES)}"
# The config of an adapter, which the folder of a merged model may still have. It is never copied: the adapter's weights
# are not in the folder, and transformers would load the model that the adapter was made for instead of this one.
ADAPTER_CONFIG = "adapter_config.json"
CONFIG_AND_TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja")
MODEL_CARD_NAME = "README.md"
# Patterns of the files that copies of a model have to come with, in capital and small letters.
LICENCE_FILES = tuple(
    "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in name) + "*"
    for name in ("license", "licence", "notice", "copying", "use_policy")
)
# The files that a tokenizer is loaded from, with its special tokens and its chat template.
_FILES_OF_TOKENIZERS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
)
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
# A cap on the scores of attention, which Gemma 2 has. The fused attention that transformers chooses by default leaves
# it out without a warning.
_ATTENTION_CAP = "attn_logit_softcapping"
_WITHOUT_CAP = (None, "sdpa")


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder with safetensors weights, and the digests that identify it."""

    path: Path
    digest: str
    trust_remote_code: bool = False
    source: str = ""  # the file that its config.json is a copy of, for messages
    named_by: str = ""  # the config's key that names the folder, for messages

    def config_values(self) -> dict[str, Any]:
        """Returns its config.json, as :func:`dskd.models.files.model_config.read_model_config` translates it."""
        return read_model_config(self.path, source=self.source, trust_remote_code=self.trust_remote_code)

    def load_config(self) -> Any:
        """Loads the model's `PretrainedConfig`.

        Raises:
            UserError: when the installed transformers cannot read it.
        """
        from transformers import CONFIG_MAPPING, AutoConfig

        values = self.config_values()
        try:
            if "auto_map" in values and self.trust_remote_code:
                return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
            model_config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        except BAD_CONFIG as error:
            raise UserError(f"{self.path / 'config.json'}: transformers cannot read it ({reason_of(error)})") from None
        for key in _SIZES:
            size = getattr(model_config, key, 1)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise UserError(f"{self.path / 'config.json'}: {key} is {size!r}; it must be a whole number, 1 or more")
        if has_capped_attention(model_config) and model_config._attn_implementation in _WITHOUT_CAP:
            model_config._attn_implementation = "eager"
        return model_config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when it is first needed.

        Raises:
            UserError: when transformers cannot load it.
        """
        return load_tokenizer(self.path, named_by=self.named_by, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """A digest that identifies the tokenizer by its behaviour: copies in different folders have the same one.

        Raises:
            UserError: when transformers cannot load the tokenizer.
        """
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
        return digest_of_json([type(tokenizer).__name__, vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id])


def has_capped_attention(model_config: Any) -> bool:
    """Returns True if a model caps the scores of its attention."""
    return getattr(model_config, _ATTENTION_CAP, None) is not None


def attention_key(model_config: Any) -> dict[str, str]:
    """Returns the key that config.json needs so that transformers computes the same attention; {} if it needs none.

    `model_config` comes from :meth:`ModelFolder.load_config`.
    """
    return {"_attn_implementation": model_config._attn_implementation} if has_capped_attention(model_config) else {}


# A function that finds the teacher, for stages that may run before there is one: they call it when they need it.
FindTeacher = Callable[[], ModelFolder]


def find_teacher(config: Config) -> ModelFolder:
    """Returns the teacher's folder: made by the pipeline, named by `teacher.path`, or fetched from the Hub.

    Raises:
        UserError: when it is missing, is not a model folder with safetensors weights, or does not fit the config.
    """
    teacher = config.teacher
    if teacher.is_made:
        return _find_made_teacher(config)
    assert teacher.path is not None
    return _find_model("teacher", config, teacher.path, teacher.revision, trust_remote_code=teacher.trust_remote_code)


def find_pretrained_student(config: Config) -> ModelFolder:
    """Returns the folder of the model that `student.path` names, on this machine or fetched from the Hub.

    Raises:
        UserError: when it is missing, is not a model folder with safetensors weights, or does not fit the config.
    """
    student = config.student
    assert student.path is not None, "called only if student.path is set"
    return _find_model("student", config, student.path, student.revision)


def _find_model(
    section: str, config: Config, path: str, revision: str | None, *, trust_remote_code: bool = False
) -> ModelFolder:
    """Returns the folder of the model that the section's `path` names; the same errors as :func:`find_teacher`."""
    key = f"{section}.path"
    patterns = (
        *CONFIG_AND_TOKENIZER,
        MODEL_CARD_NAME,
        *LICENCE_FILES,
        "*.safetensors",
        *(["*.py"] * trust_remote_code),
    )
    folder = _local_or_hub(key, path, revision, patterns)
    check_model_folder(folder, named_by=key, trust_remote_code=trust_remote_code)
    unhashed = ModelFolder(folder, "", trust_remote_code, named_by=key)
    # Check everything that is quick before the files are hashed, which takes minutes for a large model.
    check_limits(config, folder, unhashed.load_config(), unhashed.tokenizer)
    hashed = replace(unhashed, digest=digest_of_model(folder, cache=digest_cache(config, section)))
    vars(hashed)["tokenizer"] = unhashed.tokenizer  # it is not loaded again
    return hashed


def _find_made_teacher(config: Config) -> ModelFolder:
    """Returns the teacher in the work directory: trained from scratch, or made from the GGUF file of `teacher.path`.

    Raises:
        UserError: when it is missing, or was not made from what the config names.
    """
    folder, is_gguf = config.path(kinds.TEACHER.folder), config.teacher.is_gguf
    if is_gguf and not (folder / MANIFEST_NAME).exists():  # making it would meet a wrong path
        require_gguf_file(gguf_path(config))
    manifest = read_manifest(folder, kinds.TEACHER.name)
    digest = manifest.inputs.get("gguf")
    if digest != (gguf_digest(config) if is_gguf else None):
        made_from = "another model" if digest is None else f"the GGUF file {manifest.facts.get('file')}"
        if is_gguf and manifest.facts.get("file") == Path(config.teacher.path or "").name:
            made_from = "a file of the same name with different content"
        raise UserError(
            f"{folder}: this teacher was made from {made_from}, and the config names "
            f"{f'teacher.path: {config.teacher.path}' if is_gguf else 'teacher.train_from_scratch'}; make it again "
            f"with `{kinds.TEACHER.made_by}`, or set workdir to another folder"
        )
    if is_gguf and manifest.config.get("tokenizer") != config.teacher.tokenizer:
        raise UserError(
            f"{folder}: this teacher was made with teacher.tokenizer: {manifest.config.get('tokenizer')}, and the "
            f"config says {config.teacher.tokenizer}; make it again with `{kinds.TEACHER.made_by}`"
        )
    if config.teacher.tokenizer is not None and manifest.inputs.get("tokenizer") != tokenizer_files_digest(config):
        raise UserError(
            f"{folder}: this teacher was made with other files of teacher.tokenizer: {config.teacher.tokenizer} (its "
            f"tokenizer, special tokens or chat template); make it again with `{kinds.TEACHER.made_by}`"
        )
    require_made_files(config, folder, manifest)
    model = ModelFolder(folder, manifest.digest, config.teacher.trust_remote_code)
    if is_gguf:
        check_limits(config, folder, model.load_config(), model.tokenizer)
    return model


def tokenizer_files_digest(config: Config) -> str:
    """Returns the digest of the files of the tokenizer that `teacher.tokenizer` names, with its chat template.

    If it is not a folder on this machine, returns that of the tokenizer of this name that the teacher in the work
    directory was made with: a node needs only the work directory, and a tokenizer of the Hub is fetched once.

    Raises:
        UserError: when it is not there, and cannot be fetched from the Hub.
    """
    named = config.teacher.tokenizer
    assert named is not None, "called only if teacher.tokenizer is set"
    folder = config.path(kinds.TEACHER.folder)
    if not Path(named).expanduser().is_dir() and (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder, kinds.TEACHER.name)
        if manifest.config.get("tokenizer") == named and "tokenizer" in manifest.inputs:
            return manifest.inputs["tokenizer"]
    source = find_tokenizer_folder(named)
    files = {file.name: file for pattern in _FILES_OF_TOKENIZERS for file in source.glob(pattern)}
    hashes = hashes_of(files.values(), cache=digest_cache(config, "teacher"))
    return digest_of_json({name: hashes[path] for name, path in files.items()})


def check_model_folder(folder: Path, *, named_by: str, trust_remote_code: bool = False) -> None:
    """Refuses a folder that lacks files a model needs, or that holds a model of an unsupported kind.

    Raises:
        UserError: with everything that is missing, or with what the model is.
    """
    problems = []
    if not (folder / "config.json").is_file():
        problems.append("there is no config.json")
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / WEIGHTS_INDEX).is_file():
        others = sorted(file.name for file in folder.glob("*.bin")) + sorted(file.name for file in folder.glob("*.pt"))
        hint = f" (there is {others[0]}: convert it, dskd does not read pickles)" if others else ""
        hint = gguf_hint(folder, named_by) or hint
        if (folder / ADAPTER_CONFIG).is_file():
            hint = f" (there is {ADAPTER_CONFIG}: this is a LoRA adapter; merge it into its base model, and save that)"
        problems.append(f"there are no weights: neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}{hint}")
    if not has_tokenizer(folder):
        problems.append(_WITHOUT_TOKENIZER)
    weights = sorted(file.name for file in folder.glob("model*.safetensors*"))
    for name in ("config.json", *_TOKENIZER_FILES, *weights):
        if (folder / name).is_file():
            try:
                refuse_pointer(folder / name)
            except UserError as problem:
                problems.append(str(problem))
    if problems:
        raise UserError(listed(f"{named_by}: {folder} is not a Hugging Face model folder", problems))
    read_model_config(folder, named_by=named_by, trust_remote_code=trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    """Returns True if a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path, *, named_by: str = "", trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of a folder; `named_by` is the key that names the folder, for messages.

    Raises:
        UserError: when transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with _without_false_alarm():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # tokenizers raises nothing narrower for a damaged file
            raise UserError(
                f"{folder}: the tokenizer cannot be loaded; {_tokenizer_reason(folder, named_by, error)}"
            ) from None


def _tokenizer_reason(folder: Path, named_by: str, error: Exception) -> str:
    """Returns what to do about a tokenizer that cannot be loaded, or otherwise what transformers says."""
    if "trust_remote_code" in str(error):
        return f"it brings its own code, which runs {condition_of_code(named_by)}"
    if type(error) is Exception or isinstance(error, json.JSONDecodeError):
        return f"{folder / 'tokenizer.json'} may be damaged ({reason_of(error)}); was its download or copy truncated?"
    model = next((name for name in _SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if model is not None and missing and not (folder / "tokenizer.json").is_file():
        return f"its {model} needs two packages: pip install sentencepiece protobuf"
    return reason_of(error)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing too
        return False


@contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Suppresses one false warning of transformers 4.57 about a Mistral tokenizer with a wrong regular expression.

    It appears for every local folder whose config.json has no `transformers_version`, or one up to 4.57.2. The option
    it recommends would not help: this package uses a tokenizer exactly as the teacher was trained with it.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "fix_mistral_regex" not in record.getMessage()

    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def find_tokenizer_folder(name: str) -> Path:
    """Returns the folder of the tokenizer that `teacher.tokenizer` names: a folder, or a model of the Hub.

    Raises:
        UserError: when there is no such folder, no such model can be fetched, or it has no tokenizer.
    """
    folder = _local_or_hub("teacher.tokenizer", name, None, CONFIG_AND_TOKENIZER)
    if not has_tokenizer(folder):
        raise UserError(f"teacher.tokenizer: {folder}: {_WITHOUT_TOKENIZER}; name a folder or model that has one")
    return folder


def gguf_hint(folder: Path, named_by: str) -> str:
    """Returns, in brackets, which GGUF file in a folder `teacher.path` should name; "" if it has none, or the key is
    another.
    """
    files = sorted(folder.glob("*.gguf")) if named_by == "teacher.path" else []
    return f" (there is {files[0].name}: name that file, teacher.path: {files[0]})" if files else ""


def refuse_file(key: str, path: str) -> None:
    """Refuses a path that `key` names if it is a file instead of the folder of a model.

    Raises:
        UserError: if it is.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        return
    if path.lower().endswith(".gguf"):
        raise UserError(
            f"{key}: {file} is a GGUF file, which only teacher.path can name; name a Hugging Face model folder"
        )
    gguf = ", or a GGUF file, whose name ends with .gguf" if key == "teacher.path" else ""
    raise UserError(f"{key}: {file} is a file; name a Hugging Face model folder{gguf}")


@functools.cache  # a process asks the Hub once
def _local_or_hub(key: str, path: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"{key.partition('.')[0]}.revision: {revision!r} is a revision of a model on the Hub, but {key} is the "
                f"folder {folder}; remove it, or name the model as ORGANISATION/NAME"
            )
        return folder
    refuse_file(key, path)
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise UserError(
            f"{key}: there is no folder {folder}; name a Hugging Face model folder, or a model of the Hub as "
            "ORGANISATION/NAME"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Some models also store their weights in another format, which there is no need to download.
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        named = "" if revision is None else f" ({key.partition('.')[0]}.revision: {revision})"
        raise UserError(
            f"{key}: {path!r}{named} is not a folder here, and cannot be fetched from the Hub ({first_line(error)})"
        ) from None
