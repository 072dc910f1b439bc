"""Licences of models: which one a model's own files name, and what it asks of models made from it.

What the files do not say is not guessed.
"""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from dskd.models.files.folder import MODEL_CARD_NAME

_LICENCE_KEYS = ("license", "license_name", "license_link")
# Without characters that Markdown or HTML reads, and without a user, who may come with a password.
_LINK = re.compile(r"https://[^\s()<>\[\]\\`*|\"'@/]+(?:/[^\s()<>\[\]\\`*|\"']*)?")
_FILE_NAME = re.compile(r"[\w-][\w.-]*")  # as a model card names a licence in the same folder

_LLAMA = (
    "with every copy, give a copy of that agreement and a file `Notice` with its attribution notice; show “{built}” "
    "where the model is made available; let the model's name begin with “{prefix}”; and follow the acceptable use "
    "policy"
)
_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"
# {licence's id on the Hub: (its name, what it asks of copies of a changed model)}.
_OBLIGATIONS = {
    "apache-2.0": (
        "the Apache License 2.0",
        f"with every copy, give a copy of the licence ({_APACHE}), keep the teacher's notices (also those of its file "
        "`NOTICE`, if it has one), and state that the model was changed, as this card does",
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


def obligations(facts: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns the name of a model's licence, and what it asks of copies of this model; None if we do not know that.

    `facts` are those of a teacher or a student in :func:`dskd.training.exporting.card_facts.collect_facts`. The name is
    empty if its files name no licence.
    """
    # The Hub's ids; Llama's and others are "other" with a name.
    ids = [str(facts[key]).lower() for key in ("license", "license_name") if key in facts]
    for licence in ids:
        if licence in _OBLIGATIONS:
            return _OBLIGATIONS[licence]
    return (ids[-1] if ids else ""), None


def licence_text(facts: Mapping[str, Any]) -> bytes | None:
    """Returns the text of a model's licence if this package has it, which it does of Apache 2.0; otherwise None.

    `facts` are as in :func:`obligations`.
    """
    if str(facts.get("license")).lower() != "apache-2.0":
        return None
    return resources.files(__package__).joinpath("apache-2.0.txt").read_bytes()


def licence_in_card(folder: Path) -> dict[str, Any]:
    """Returns the licence that the model card in a model's folder names; {} if there is none, or none is named."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        head = metadata_load(folder / MODEL_CARD_NAME) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    values = {key: head.get(key) for key in _LICENCE_KEYS}
    if isinstance(values["license"], list) and len(values["license"]) == 1:
        (values["license"],) = values["license"]
    values["license_link"] = licence_link(values["license_link"])
    return {key: one_line(value) for key, value in values.items() if isinstance(value, str)}


def is_link(url: str) -> bool:
    """Returns True if a text of somebody else's file is an address that a card can show: https, and without a user."""
    return bool(_LINK.fullmatch(url))


def licence_link(value: Any) -> str | None:
    """Returns a link to a licence, which is an address or the name of a file; None if it is neither."""
    link = one_line(value)
    return link if link is not None and (is_link(link) or _FILE_NAME.fullmatch(link)) else None


def one_line(value: Any) -> str | None:
    """Returns a string of somebody else's file in one line; None if it is not a string, or is empty."""
    return " ".join(value.split()) or None if isinstance(value, str) else None
