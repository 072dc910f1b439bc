"""The small files of an export: configs, tokenizer, chat template, and the licences that came with the teacher."""

import json
import re
import shutil
from pathlib import Path

from dskd.artifacts.hashing import MANIFEST_NAME, MODEL_CARD_NAME
from dskd.artifacts.manifest import write_json
from dskd.models.folder import ModelFolder, attention_key
from dskd.models.generation import GENERATION_CONFIG, answer_ends, as_list, generation_values
from dskd.models.weights import WEIGHTS_INDEX

_NOTICE = re.compile(r"(licen[sc]e|notice|copying|use_policy)", re.IGNORECASE)  # begins the name of such a file
_LARGEST_NOTICE = 2**20  # bytes


def copy_files(student: ModelFolder, target: Path) -> None:
    """Copies the files of a model's folder except its weights; Python files only if `trust_remote_code` is set.

    Skips an adapter's configuration: the adapter's weights are not in the folder, and transformers would load the
    model that the adapter was made for instead of this one. Then completes the generation config.
    """
    left_out = (WEIGHTS_INDEX, MANIFEST_NAME, MODEL_CARD_NAME, "adapter_config.json")
    endings = (".safetensors", *(() if student.trust_remote_code else (".py",)))
    for file in student.path.iterdir():
        if file.is_file() and file.suffix not in endings and file.name not in left_out:
            shutil.copyfile(file, target / file.name)
    if key := attention_key(student.load_config()):
        model_config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        write_json(target / "config.json", model_config | key)
    _complete_generation_config(student, target / GENERATION_CONFIG)


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


def copy_notices(source: Path, target: Path) -> None:
    """Copies the licences and notices of a model's folder; copies of the model have to come with them."""
    for file in source.iterdir():
        if file.is_file() and _NOTICE.match(file.name) and file.stat().st_size <= _LARGEST_NOTICE:
            shutil.copyfile(file, target / file.name)
