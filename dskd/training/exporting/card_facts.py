"""The facts of a model card: what an exported student was made from, collected from manifests when it is exported.

They are kept in the export's own manifest, so that the card can be written again after the other artifacts are gone.
Nothing here is a path of this machine, or comes from an artifact that was made again after the run was trained.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config
from dskd.console import warn
from dskd.errors import UserError, first_line
from dskd.models.files.digests import digest_cache, digest_of_model
from dskd.models.files.folder import ModelFolder, check_model_folder, find_teacher
from dskd.models.gguf.known_files import HUB_NAMES
from dskd.students.student import origin_of
from dskd.training.checkpoints.checkpoint import Checkpoint
from dskd.training.exporting.licences import is_link, licence_in_card, licence_link, one_line

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_URL = re.compile(rf"https?://(?:www\.)?huggingface\.co/({_HUB_NAME.pattern})/?")
_LEXICONS = ("wordnet", "wiktionary", "dict2vec")  # the beginnings of sources that are not the user's own lists
_TRAINING = ("learning_rate", "global_batch_size", "weight_decay", "gradient_clipping", "warmup_share")


def find_source_teacher(config: Config, source: Checkpoint) -> ModelFolder | None:
    """Returns the teacher that a checkpoint was trained with; None, with a warning, if it is not on
    this machine.

    An export needs no weights of the teacher, so nothing is fetched from the Hub for it.
    """
    try:
        teacher = _on_this_machine(config)
    except UserError as problem:
        reason = first_line(problem)
    else:
        if teacher.digest == source.manifest.teacher:
            return teacher
        reason = f"{teacher.path} is another model than the one that run {config.run!r} was trained with"
    warn(
        f"{config.path(kinds.EXPORT.folder, config.run)}: the model card will not name the teacher or its licence: "
        f"{reason}. To add them, put the teacher back, remove the folder and export again"
    )
    return None


def _on_this_machine(config: Config) -> ModelFolder:
    named = config.teacher
    if named.path is None or named.is_gguf or Path(named.path).expanduser().is_dir():
        return find_teacher(config)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(named.path, "config.json", revision=named.revision)
    if not isinstance(cached, str):
        raise UserError(f"teacher.path: {named.path} was not fetched from the Hub to this machine")
    folder = Path(cached).parent
    check_model_folder(folder, named_by="teacher.path", trust_remote_code=named.trust_remote_code)
    digest = digest_of_model(folder, cache=digest_cache(config, "teacher"))
    return ModelFolder(folder, digest, named.trust_remote_code)


def collect_facts(
    config: Config, source: Checkpoint, student: ModelFolder, teacher: ModelFolder | None
) -> dict[str, Any]:
    """Returns the facts about the model of a checkpoint, as JSON values; what is not known is left out.

    | key | meaning |
    |---|---|
    | `teacher` | see :func:`describe_teacher` |
    | `student` | `digest`, `origin`, `num_layers`, `has_chat_template`; `layers`, or `name` and licence of its model |
    | `text` | `source`, number of `documents`; `dataset`, if it is one of the Hub; `benchmarks` |
    | `lexicon` | {source: {relation: pairs}}, without the user's file names |
    | `loss` | the section `loss` of the config |
    | `training` | `steps`, `sequences`, `sequence_length`, `trained`, `precision`, `seed`, and keys of `train` |
    """
    facts: dict[str, Any] = {"teacher": describe_teacher(config, teacher)} if teacher is not None else {}
    settings = source.manifest.config
    train = _unchanged(
        lambda: shards.load_manifest(config, "train"), source.manifest.inputs["shards"], shards.digest_without_states
    )
    sequences = _unchanged(
        lambda: read_manifest(config.path(kinds.SEQUENCES.folder), kinds.SEQUENCES.name), _input(train, "sequences")
    )
    senses = _unchanged(
        lambda: read_manifest(config.path(kinds.SENSES.folder), kinds.SENSES.name), source.manifest.inputs["senses"]
    )
    corpus = _unchanged(
        lambda: read_manifest(config.path(kinds.CORPUS.folder), kinds.CORPUS.name), _input(sequences, "corpus")
    )
    lexicon = _unchanged(
        lambda: read_manifest(config.path(kinds.LEXICON.folder), kinds.LEXICON.name), _input(senses, "lexicon")
    )
    if corpus is not None:
        facts["text"] = _text(corpus)
    if lexicon is not None:
        facts["lexicon"] = _lexicon(lexicon)
    return facts | {
        "student": _student(student),
        "loss": settings["loss"],
        "training": {
            **{key: settings["train"][key] for key in _TRAINING if key in settings["train"]},
            "steps": source.step,
            "sequences": source.step * settings["train"]["global_batch_size"],
            **({"sequence_length": sequences.config["sequence_length"]} if sequences is not None else {}),
            "trained": settings["student"],
            "precision": settings["precision"],
            "seed": settings["seed"],
        },
    }


def _unchanged(
    read: Callable[[], Manifest], expected: str | None, digest_of: Callable[[Manifest], str] = lambda m: m.digest
) -> Manifest | None:
    """Returns the manifest that `read` reads, if it still has the digest `expected`; otherwise None."""
    if expected is None:
        return None
    try:
        manifest = read()
    except UserError:
        return None
    return manifest if digest_of(manifest) == expected else None


def _input(manifest: Manifest | None, name: str) -> str | None:
    return None if manifest is None else manifest.inputs.get(name)


def _text(corpus: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {"source": corpus.config["source"], "documents": corpus.facts["documents"]["train"]}
    dataset = corpus.config.get("dataset")
    # A corpus has the digest of its dataset among its inputs if that was a folder.
    if dataset is not None and str(Path(dataset).expanduser()) not in corpus.inputs and _HUB_NAME.fullmatch(dataset):
        facts["dataset"] = dataset
    if facts["source"] == "tasks":
        facts["benchmarks"] = sorted(corpus.inputs.keys() - {"prompts"})
    return facts


def _lexicon(lexicon: Manifest) -> dict[str, dict[str, int]]:
    """Returns {source: {relation: pairs}}; the lists of the user are counted together, since their names are paths."""
    by_source: dict[str, dict[str, int]] = {}
    for name, counts in lexicon.facts["pairs_by_source"].items():
        total = by_source.setdefault(name if name.startswith(_LEXICONS) else "own lists", {})
        for relation, count in counts.items():
            total[relation] = total.get(relation, 0) + count
    return by_source


def describe_teacher(config: Config, teacher: ModelFolder) -> dict[str, Any]:
    """Returns what is known of the teacher: nothing that names a path of this machine.

    | key | meaning |
    |---|---|
    | `origin` | `scratch` (trained by the pipeline), `gguf`, `hub` or `folder` |
    | `name` | its name on the Hub or in the GGUF file; that of a known GGUF file without the organisation |
    | `base_model` | names on the Hub that a card may give: its own, if it is known, or those that the GGUF file names |
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
        manifest = read_manifest(teacher.path, kinds.TEACHER.name)
        facts |= {"origin": "gguf", **_of_gguf(manifest.facts.get("provenance", {}))}
        if (known := HUB_NAMES.get(manifest.inputs["gguf"])) is not None:
            facts |= {"name": known.partition("/")[2], "base_model": [known]}
    elif (name := _name_on_hub(config.teacher.path, teacher.path)) is not None:
        facts |= {"origin": "hub", "name": name, "base_model": [name], "revision": config.teacher.revision}
        facts |= licence_in_card(teacher.path)
    else:
        facts |= {"origin": "folder", **licence_in_card(teacher.path)}
    return {key: value for key, value in facts.items() if value not in (None, [])}


def _of_gguf(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that the keys of a GGUF file give."""
    bases = [key for key in provenance if key.startswith("base_model.")]
    own = [provenance.get(key) for key in ("source.url", "repo_url", "url")]
    of_bases = [provenance[key] for key in bases if key.endswith(".repo_url")]
    return {
        "name": one_line(provenance.get("name")),
        "organization": one_line(provenance.get("organization") or provenance.get("author")),
        "base_model": _hub_names(own)[:1] or _hub_names(of_bases),
        "derived_from": [one_line(provenance[key]) for key in bases if key.endswith(".name")],
        "url": next((url for url in own if isinstance(url, str) and is_link(url)), None),
        "license": one_line(provenance.get("license")),
        "license_link": licence_link(provenance.get("license.link")),
    }


def _hub_names(urls: list[Any]) -> list[str]:
    matches = [_HUB_URL.fullmatch(url) for url in urls if isinstance(url, str)]
    return [match[1] for match in matches if match]


def _student(student: ModelFolder) -> dict[str, Any]:
    manifest, model_config = read_manifest(student.path, kinds.STUDENT.name), student.load_config()
    facts: dict[str, Any] = {
        "digest": student.digest,
        "origin": origin_of(manifest),
        "num_layers": model_config.num_hidden_layers,
        "has_chat_template": bool(student.tokenizer.chat_template),
    }
    if facts["origin"] == "cut":
        facts["layers"] = manifest.facts["layers"]
    elif facts["origin"] == "path":
        folder = Path(manifest.facts["folder"])
        if (name := _name_on_hub(manifest.facts["path"], folder)) is not None:
            facts["name"] = name
        facts |= licence_in_card(folder)
    return facts


def _name_on_hub(path: str, folder: Path) -> str | None:
    """Returns a config's path of a model if it is a name on the Hub; None if it is that of a folder.

    `folder` is where the model was found. That of a model of the Hub is in a cache, under another path. Whether the
    path exists now would prove nothing: folders are moved.
    """
    return path if folder != Path(path).expanduser() and _HUB_NAME.fullmatch(path) else None
