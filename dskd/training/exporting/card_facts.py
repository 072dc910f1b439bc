"""The facts of a model card: what an exported student was made from, collected from manifests when it is exported.

They are kept in the export's own manifest, so that the card can be written again after the other artifacts are gone.
Nothing here is a path of this machine, or comes from an artifact that was made again after the run was trained.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, read_manifest
from dskd.config import Config
from dskd.console import warn
from dskd.errors import UserError, first_line
from dskd.models.digests import digest_cache, digest_of_model
from dskd.models.folder import ModelFolder, check_model_folder, find_teacher
from dskd.students.student import origin_of
from dskd.training.checkpoint import Checkpoint
from dskd.training.exporting.licences import describe_teacher, is_hub_name, licence_in_card

_LEXICONS = ("wordnet", "wiktionary", "dict2vec")  # the beginnings of sources that are not the user's own lists
_TRAINING = ("learning_rate", "global_batch_size", "weight_decay", "gradient_clipping", "warmup_share")


def find_source_teacher(config: Config, source: Checkpoint) -> ModelFolder | None:
    """Returns the teacher that a checkpoint was trained with; None, with a warning, if it is not on this machine.

    An export needs no weights of the teacher, so nothing is fetched from the hub for it.
    """
    try:
        teacher = _on_this_machine(config)
    except UserError as problem:
        reason = first_line(problem)
    else:
        if teacher.digest == source.manifest.teacher:
            return teacher
        reason = f"{teacher.path} is another model than the one that run {config.run!r} was trained with"
    warn(f"the model card does not name the teacher and its licence, because the teacher is not here: {reason}")
    return None


def _on_this_machine(config: Config) -> ModelFolder:
    named = config.teacher
    if named.path is None or named.is_gguf or Path(named.path).expanduser().is_dir():
        return find_teacher(config)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(named.path, "config.json", revision=named.revision)
    if not isinstance(found, str):
        raise UserError(f"teacher.path: {named.path} was not fetched from the hub to this machine")
    folder = Path(found).parent
    check_model_folder(folder, named_by="teacher.path", trust_remote_code=named.trust_remote_code)
    digest = digest_of_model(folder, cache=digest_cache(config, "teacher"))
    return ModelFolder(folder, digest, "", named.trust_remote_code)


def collect_facts(config: Config, source: Checkpoint, student: ModelFolder, teacher: ModelFolder | None) -> dict:
    """Returns the facts about the model of a checkpoint, as JSON values; what is not known is left out.

    | key | meaning |
    |---|---|
    | `teacher` | see :func:`dskd.training.exporting.licences.describe_teacher` |
    | `student` | `digest`, `origin`, its `layers`, `has_chat_template`; of a pretrained model its `name` and licence |
    | `text` | `source`, number of `documents`; `dataset`, if it is one of the hub; `benchmarks` |
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
        lambda: read_manifest(config.path(kinds.SEQUENCES.folder), "sequences"), _input(train, "sequences")
    )
    senses = _unchanged(
        lambda: read_manifest(config.path(kinds.SENSES.folder), "senses"), source.manifest.inputs["senses"]
    )
    corpus = _unchanged(lambda: read_manifest(config.path(kinds.CORPUS.folder), "corpus"), _input(sequences, "corpus"))
    lexicon = _unchanged(lambda: read_manifest(config.path(kinds.LEXICON.folder), "lexicon"), _input(senses, "lexicon"))
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
    if is_hub_name(corpus.config.get("dataset")):
        facts["dataset"] = corpus.config["dataset"]
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


def _student(student: ModelFolder) -> dict[str, Any]:
    manifest, model_config = read_manifest(student.path, "student"), student.load_config()
    facts: dict[str, Any] = {
        "digest": student.digest,
        "origin": origin_of(manifest),
        "num_layers": model_config.num_hidden_layers,
        "has_chat_template": bool(student.load_tokenizer().chat_template),
    }
    if facts["origin"] == "cut":
        facts["layers"] = manifest.facts["layers"]
    elif facts["origin"] == "path":
        if is_hub_name(manifest.facts.get("path")):
            facts["name"] = manifest.facts["path"]
        facts |= licence_in_card(Path(manifest.facts["folder"]))
    return facts
