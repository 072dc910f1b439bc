"""The small files of an export: configs, tokenizer, chat template, and the licences of what it was made from."""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.hashing import MANIFEST_NAME
from dskd.artifacts.manifest import read_manifest, write_json
from dskd.console import warn
from dskd.models.files.folder import ADAPTER_CONFIG, LICENCE_FILES, MODEL_CARD_NAME, ModelFolder, attention_key
from dskd.models.files.weights import WEIGHTS_INDEX
from dskd.models.running.generation import GENERATION_CONFIG, answer_ends, as_list, generation_values
from dskd.students.cutting import without_place
from dskd.students.student import origin_of
from dskd.training.exporting.licences import licence_text

_LARGEST_NOTICE = 2**20  # bytes
_TERMS_OF_APACHE = b"TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION"  # in its text, and no notice of it
# Keys of tokenizer_config.json with paths from which a tokenizer was loaded once.
_PLACES = ("name_or_path", "special_tokens_map_file")


def copy_files(student: ModelFolder, target: Path) -> None:
    """Copies the files of a model's folder except its weights; Python files only if `trust_remote_code` is set.

    Skips `ADAPTER_CONFIG`. Then completes the generation config.
    """
    left_out = (WEIGHTS_INDEX, MANIFEST_NAME, MODEL_CARD_NAME, ADAPTER_CONFIG)
    endings = (".safetensors", *(() if student.trust_remote_code else (".py",)))
    for file in student.path.iterdir():
        if file.is_file() and file.suffix not in endings and file.name not in left_out:
            shutil.copyfile(file, target / file.name)
    model_config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    complete = without_place(model_config) | attention_key(student.load_config())
    if complete != model_config:
        write_json(target / "config.json", complete)
    _remove_places(target / "tokenizer_config.json")
    _complete_generation_config(student, target / GENERATION_CONFIG)


def _remove_places(file: Path) -> None:
    """Removes the paths of a machine from a tokenizer's config; transformers reads none of them."""
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # damaged; transformers reports it
        return
    if isinstance(values, dict) and not values.keys().isdisjoint(_PLACES):
        write_json(file, {key: value for key, value in values.items() if key not in _PLACES})


def _complete_generation_config(student: ModelFolder, file: Path) -> None:
    """Adds to a generation config the tokens that end an answer, unless it has them; writes one if there is none.

    Models without a generation config, or whose config names only the end of a text, would continue after their turn.
    """
    values = generation_values(student.path)
    if file.is_file() and not values:  # damaged; transformers reports it
        return
    ends = answer_ends(student)
    if not ends or (values and as_list(values.get("eos_token_id")) == ends):
        return
    model_config = student.load_config()
    others = {key: getattr(model_config, key, None) for key in ("bos_token_id", "pad_token_id")}
    known = {key: token for key, token in others.items() if token is not None}
    values.pop("_from_model_config", None)  # with this mark, transformers may read config.json instead
    write_json(file, {**known, **values, "eos_token_id": ends[0] if len(ends) == 1 else ends})


def copy_licences(student: ModelFolder, teacher: ModelFolder | None, target: Path) -> None:
    """Copies the licences and notices of the models that an export was made from into its folder.

    They are those of the teacher, unless it is None, and of the model that a pretrained student began as.
    """
    manifest = read_manifest(student.path, kinds.STUDENT.name)
    if origin_of(manifest) == "path":
        source = Path(manifest.facts["folder"])
        if source.is_dir():
            copy_notices(source, target, of="student")
        else:
            warn(
                f"{source}: the model that the student was copied from is not here, so its licence files are not in "
                "the export; add them before you share the model"
            )
    if teacher is not None:
        copy_notices(teacher.path, target, of="teacher")


def add_licence_texts(facts: Mapping[str, Any], target: Path) -> None:
    """Writes the text of the licences that an export is under and that this package has, unless a copied file has it.

    `facts` are those of :func:`dskd.training.exporting.card_facts.collect_facts`. The file is `LICENSE`, or
    `LICENSE-of-teacher` or `LICENSE-of-student` if the other model has another licence of this name.
    """
    for name in ("teacher", "student"):
        text = licence_text(facts.get(name, {}))
        present = [file for file in target.iterdir() if _is_licence(file)]
        if text is None or any(_TERMS_OF_APACHE in file.read_bytes() for file in present):
            continue
        file = target / "LICENSE"
        (file if not file.exists() else file.with_name(f"LICENSE-of-{name}")).write_bytes(text)


def _is_licence(file: Path) -> bool:
    return any(fnmatchcase(file.name, pattern) for pattern in LICENCE_FILES) and file.is_file()


def copy_notices(source: Path, target: Path, *, of: str) -> None:
    """Copies the licences and notices of a model's folder; copies of the model have to come with them.

    If another file of the same name is there already, the copy's name says whose it is, such as `LICENSE-of-teacher`.
    """
    for file in sorted(source.iterdir()):
        if not _is_licence(file) or file.stat().st_size > _LARGEST_NOTICE:
            continue
        copy = target / file.name
        if copy.exists() and copy.read_bytes() != file.read_bytes():
            copy = copy.with_stem(f"{copy.stem}-of-{of}")
        shutil.copyfile(file, copy)
