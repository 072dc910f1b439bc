"""A teacher from a GGUF file: its tensors dequantised once into an ordinary Hugging Face folder, `WORKDIR/teacher`.

No number is rounded: the folder's tensors are in bfloat16 or float16 if that holds every value of the file exactly, and
otherwise, as for every quantised file, in float32, which does. Transformers reads and names the tensors; what it would
leave out is refused before (:mod:`dskd.models.gguf.config`), and the tokenizer is built from the file's own keys
(:mod:`dskd.models.gguf.tokenizer`).
"""

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.console import say, stage, warn
from dskd.errors import UserError, reason_of
from dskd.models.checks.architecture import check_architecture
from dskd.models.checks.room import require_room
from dskd.models.files.digests import gguf_digest, gguf_path
from dskd.models.files.folder import ModelFolder, find_tokenizer_folder, load_tokenizer, tokenizer_files_digest
from dskd.models.files.gguf_file import GgufFile, read_gguf
from dskd.models.files.weights import TensorReader
from dskd.models.gguf.config import check_tensors, read_config
from dskd.models.gguf.tokenizer import PROBES, build_tokenizer, compare_tokenizers, turn_ends
from dskd.models.limits import check_limits
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.stored_names import check_stored_tensors

# The keys of a GGUF file that say where its model comes from, without general. at their beginning.
_PROVENANCE = ("name", "organization", "author", "license", "license.link", "url", "source.url", "repo_url", "finetune")
_BASE_MODELS = "general.base_model."
_TOKENIZER_KIND = ("tokenizer.ggml.model", "tokenizer.ggml.pre")  # keys that name the kind of the file's tokenizer
# A text that every model of English finds far more probable than chance.
_PLAIN_TEXT = (
    "The sun rises in the east and sets in the west. In the winter the days are short and the nights are long, and "
    "many people like to stay at home, drink a cup of tea and read a good book."
)


def recipe(config: Config) -> Recipe:
    """Returns the recipe of the teacher that is made from `teacher.path`, a GGUF file."""
    inputs = {"gguf": gguf_digest(config)}
    if config.teacher.tokenizer is not None:
        inputs["tokenizer"] = tokenizer_files_digest(config)
    return Recipe(kinds.TEACHER.name, inputs, {"tokenizer": config.teacher.tokenizer})


def check_file(config: Config) -> GgufFile:
    """Returns what the GGUF file says about its model, after the checks that take no more than a second.

    Raises:
        UserError: if the file cannot be read, is cut short, or is of an architecture that is not supported.
    """
    file = read_gguf(gguf_path(config))
    read_config(file)
    return file


def build_teacher(config: Config) -> None:
    """Writes `WORKDIR/teacher` from the GGUF file of `teacher.path`.

    Raises:
        UserError: if the file or its model is refused, or there is not enough memory or disk space.
    """
    path = gguf_path(config)
    target = config.path(kinds.TEACHER.folder)
    with stage("teacher: from a GGUF file", reads=[path], writes=target):
        file = read_gguf(path)
        model_config = read_config(file)
        tokenizer, source = _find_tokenizer(config, file)
        require_room(
            file.numel,
            target,
            f"dequantised to float32, the {file.numel:,} values of {file.path}",
            key="teacher.path",
            remedy=f"run this stage on a machine with more (`{kinds.TEACHER.made_by}`), or name a Hugging Face folder "
            "of the model",
        )
        with build_artifact(target, recipe(config)) as building:
            ends = turn_ends(file, tokenizer)
            tokenizer.model_max_length = getattr(model_config, "max_position_embeddings", tokenizer.model_max_length)
            tokenizer.save_pretrained(building.folder)
            for name, value in _special_tokens(tokenizer, ends).items():
                setattr(model_config, name, value)
            model_config.save_pretrained(building.folder)
            # Everything that needs no weights is checked before they are read.
            folder = ModelFolder(building.folder, "", source=str(path))
            check_tensors(file, check_architecture(folder, config.corpus))
            check_limits(config, path, folder.load_config(), tokenizer)
            model = _dequantise(file, model_config)
            expected = _logits(model, tokenizer)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            dtype = _exact_type(model)
            with report_full_disk(building.folder):
                model.to(dtype).save_pretrained(building.folder)
            del model  # before it is loaded again
            check_stored_tensors(empty_model(folder), TensorReader(building.folder), folder)
            perplexity = _check_stored(building.folder, expected, file)
            building.facts.update(
                file=path.name,
                sha256=building.recipe.inputs["gguf"],
                architecture=file.architecture,
                tensor_types=file.count_types(),
                stored_in=str(dtype).removeprefix("torch."),
                parameters=parameters,
                provenance=_provenance(file),
                tokenizer=source,
                end_tokens=tokenizer.convert_ids_to_tokens(ends),
                perplexity_of_plain_text=perplexity,
                made_with={name: importlib.metadata.version(name) for name in ("gguf", "transformers", "tokenizers")},
            )
        _report(file, tokenizer, source, ends, str(dtype).removeprefix("torch."), perplexity)


def _find_tokenizer(config: Config, file: GgufFile) -> tuple[Any, str]:
    """Returns the tokenizer that `teacher.tokenizer` names, or otherwise the file's, and a sentence on it."""
    named = config.teacher.tokenizer
    if named is None:
        kind = " ".join(str(file.values[key]) for key in _TOKENIZER_KIND if key in file.values)
        return build_tokenizer(file), f"built from the file ({kind})"
    tokenizer = load_tokenizer(
        find_tokenizer_folder(named), named_by="teacher.tokenizer", trust_remote_code=config.teacher.trust_remote_code
    )
    difference = compare_tokenizers(tokenizer, file, named)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = file.value("tokenizer.chat_template", str)
    return tokenizer, f"{named}: {difference}"


def _special_tokens(tokenizer: Any, ends: list[int]) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _dequantise(file: GgufFile, model_config: Any) -> Any:
    """Returns the model in float32, as transformers reads it from the GGUF file.

    Raises:
        UserError: if transformers cannot read it, or the file lacks tensors of the model.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    path = file.path.resolve()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing tensors are refused below
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=model_config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"teacher.path: {file.path}: transformers cannot read it ({reason_of(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"teacher.path: {file.path}: the file lacks {len(missing)} tensors of the model, among them {missing[0]}; "
            "it is not a whole language model"
        )
    model.generation_config = GenerationConfig.from_model_config(model_config)
    return model.eval()


def _exact_type(model: Any) -> torch.dtype:
    """Returns the smallest of bfloat16, float16 and float32 that holds every parameter exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in model.parameters()):
            return dtype
    return torch.float32


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Returns texts with their token ids [1, T] and logits [1, T, V]; the last one is plain English."""
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    results = []
    for text in (*PROBES, _PLAIN_TEXT):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :limit]
        results.append((text, ids, model(input_ids=ids).logits))
    return results


def _check_stored(folder: Path, expected: list[tuple[str, torch.Tensor, torch.Tensor]], file: GgufFile) -> float:
    """Checks that the folder, loaded as any other, computes the logits of the model that was read from the file.

    Returns:
        The perplexity of a plain English text.

    Raises:
        UserError: if token ids or logits differ, or are not finite.
    """
    from transformers import AutoModelForCausalLM

    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for (text, ids, logits), (_, ids_now, logits_now) in zip(
        expected, _logits(stored, load_tokenizer(folder)), strict=True
    ):
        if not logits.isfinite().all():
            raise UserError(
                f"teacher.path: {file.path}: the logits of {text[:30]!r} are not finite; the file is damaged, or "
                "transformers reads its architecture wrongly"
            )
        if not (torch.equal(ids, ids_now) and torch.equal(logits, logits_now)):
            raise UserError(
                f"teacher.path: {file.path}: {text[:30]!r} has other tokens or logits when tokenizer and model are "
                "stored and loaded again; report this with the name of the file"
            )
    _, ids, logits = expected[-1]
    return math.exp(F.cross_entropy(logits[0, :-1], ids[0, 1:]).item())


def _provenance(file: GgufFile) -> dict[str, Any]:
    """Returns where the file says its model comes from."""
    prefix = "general."
    provenance = {key: file.values[prefix + key] for key in _PROVENANCE if prefix + key in file.values}
    bases = {key.removeprefix(prefix): value for key, value in file.values.items() if key.startswith(_BASE_MODELS)}
    return provenance | bases


def _report(file: GgufFile, tokenizer: Any, source: str, ends: list[int], stored_in: str, perplexity: float) -> None:
    provenance = _provenance(file)
    described = [str(provenance[key]) for key in ("name", "organization", "license") if key in provenance]
    types = ", ".join(f"{count} {name}" for name, count in file.count_types().items())
    say(f"  {', '.join(described) or file.path.name}: {file.architecture}; tensors: {types}; stored in {stored_in}")
    begins = "put before every text" if _begins_texts(tokenizer) else "not put before texts"
    first = f"beginning {tokenizer.bos_token} ({begins}), " if tokenizer.bos_token else ""
    say(
        f"  tokenizer: {source}; {first}end of text {tokenizer.eos_token}; a generation ends at "
        f"{', '.join(tokenizer.convert_ids_to_tokens(ends)) or 'no token'}; "
        f"{'with' if tokenizer.chat_template else 'without'} a chat template"
    )
    size = len(tokenizer)
    say(f"  loaded again, it computes the same logits; perplexity of a plain English text: {perplexity:.1f}")
    if perplexity > size:
        warn(
            f"the teacher finds a plain English text less probable than chance would (perplexity {perplexity:,.0f}, "
            f"with {size:,} tokens): it does not know English, or transformers reads {file.path} wrongly"
        )


def _begins_texts(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
