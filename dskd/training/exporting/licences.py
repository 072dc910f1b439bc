"""What is known of a teacher's name, origin and licence, and what that licence asks of models made from it.

Names and licences are read from the teacher's own files: a GGUF file's keys, or the head of the model card in a Hugging
Face folder. What they do not say is not guessed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskd.artifacts.hashing import MODEL_CARD_NAME
from dskd.artifacts.manifest import read_manifest
from dskd.config import Config
from dskd.models.folder import ModelFolder

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_URL = re.compile(rf"https?://(?:www\.)?huggingface\.co/({_HUB_NAME.pattern})/?")
_LICENCE_KEYS = ("license", "license_name", "license_link")

_LLAMA = (
    "with every copy, give a copy of that agreement and a file `Notice` with its attribution notice; show “{built}” "
    "where the model is made available; let the model's name begin with “{prefix}”; and follow the acceptable use "
    "policy"
)
# {licence's id on the hub: (its name, what it asks of copies of a changed model)}.
_OBLIGATIONS = {
    "apache-2.0": (
        "the Apache License 2.0",
        "with every copy, give a copy of the licence, keep the teacher's notices (also those of its file `NOTICE`, if "
        "it has one), and state that the model was changed, as this card does",
    ),
    "mit": ("the MIT License", "with every copy, keep the teacher's copyright notice and the text of the licence"),
    "llama2": (
        "the Llama 2 Community License",
        "with every copy, give a copy of that agreement and a file `Notice` with its attribution notice; follow the "
        "acceptable use policy; and do not use the model or its output to improve other large language models than "
        "Llama 2 and models derived from it",
    ),
    "llama3": (
        "the Meta Llama 3 Community License",
        _LLAMA.format(built="Built with Meta Llama 3", prefix="Llama 3"),
    ),
    **{
        f"llama{version}": (
            f"the Llama {version} Community License",
            _LLAMA.format(built="Built with Llama", prefix="Llama"),
        )
        for version in ("3.1", "3.2", "3.3", "4")
    },
    "gemma": (
        "the Gemma Terms of Use",
        "with every copy, give a copy of those terms and a file `Notice` that refers to them, state that the model was "
        "changed, as this card does, and bind everybody who gets it to the use restrictions of section 3.2",
    ),
}


def is_hub_name(path: str | None) -> bool:
    """Returns True if a config's path is the name of a model or dataset on the hub, and no folder of this machine."""
    return path is not None and bool(_HUB_NAME.fullmatch(path)) and not Path(path).expanduser().exists()


def describe_teacher(config: Config, teacher: ModelFolder) -> dict[str, Any]:
    """Returns what is known of the teacher: nothing that names a path of this machine.

    | key | meaning |
    |---|---|
    | `origin` | `scratch` (trained by the pipeline), `gguf`, `hub` or `folder` |
    | `name` | its name on the hub or in the GGUF file |
    | `base_model` | names on the hub that a model card may give: its own, or those that the GGUF file names |
    | `derived_from` | names, in the GGUF file, of the models that it was made from |
    | `revision`, `organization`, `url` | if they are known |
    | `license`, `license_name`, `license_link` | as model cards have them, if its files say so |
    | `architecture`, `layers` | its class in transformers, and its number of layers |
    """
    model_config = teacher.load_config()
    architecture = (getattr(model_config, "architectures", None) or [type(model_config).__name__])[0]
    facts: dict[str, Any] = {"architecture": architecture, "layers": model_config.num_hidden_layers}
    if config.teacher.path is None:
        facts |= {"origin": "scratch"}
    elif config.teacher.is_gguf:
        provenance = read_manifest(teacher.path, "teacher").facts.get("provenance", {})
        facts |= {"origin": "gguf", **_of_gguf(provenance)}
    elif is_hub_name(config.teacher.path):
        name = config.teacher.path
        facts |= {"origin": "hub", "name": name, "base_model": [name], "revision": config.teacher.revision}
        facts |= licence_in_card(teacher.path)
    else:
        facts |= {"origin": "folder", **licence_in_card(teacher.path)}
    return {key: value for key, value in facts.items() if value not in (None, [])}


def obligations(facts: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns the name of a teacher's licence, and what it asks of copies of this model; None if we do not know that.

    `facts` are those of :func:`describe_teacher`. The name is empty if its files name no licence.
    """
    # The hub's ids; Llama's and others are "other" with a name.
    ids = [str(facts[key]).lower() for key in ("license", "license_name") if key in facts]
    for licence in ids:
        if licence in _OBLIGATIONS:
            return _OBLIGATIONS[licence]
    return (ids[-1] if ids else ""), None


def _of_gguf(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that the keys of a GGUF file give."""
    bases = [key for key in provenance if key.startswith("base_model.")]
    own = [provenance.get(key) for key in ("source.url", "repo_url", "url")]
    of_bases = [provenance[key] for key in bases if key.endswith(".repo_url")]
    return {
        "name": _text(provenance.get("name")),
        "organization": _text(provenance.get("organization") or provenance.get("author")),
        "base_model": _hub_names(own)[:1] or _hub_names(of_bases),
        "derived_from": [_text(provenance[key]) for key in bases if key.endswith(".name")],
        "url": next((_text(url) for url in own if isinstance(url, str) and url.startswith("http")), None),
        "license": _text(provenance.get("license")),
        "license_link": _text(provenance.get("license.link")),
    }


def _hub_names(urls: list[Any]) -> list[str]:
    found = [_HUB_URL.fullmatch(url) for url in urls if isinstance(url, str)]
    return [match[1] for match in found if match]


def licence_in_card(folder: Path) -> dict[str, Any]:
    """Returns the licence that the model card in a teacher's folder names; {} if there is none, or none is named."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        head = metadata_load(folder / MODEL_CARD_NAME) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    values = {key: head.get(key) for key in _LICENCE_KEYS}
    if isinstance(values["license"], list) and len(values["license"]) == 1:
        (values["license"],) = values["license"]
    return {key: _text(value) for key, value in values.items() if isinstance(value, str)}


def _text(value: Any) -> str | None:
    """Returns a string of somebody else's file in one line; None if it is none or empty."""
    return " ".join(value.split()) or None if isinstance(value, str) else None
