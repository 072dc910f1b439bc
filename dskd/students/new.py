"""A student with random weights (`student.from_config`): a Llama of given sizes with the teacher's tokenizer."""

from typing import Any

import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.manifest import Recipe
from dskd.config import Config, NewStudentConfig
from dskd.console import say, stage
from dskd.models.checks.room import require_room
from dskd.models.files.folder import ModelFolder
from dskd.models.limits import position_limit, vocabulary_size
from dskd.random_numbers import derived_seed
from dskd.students.cutting import copy_other_files

_POSITIONS = 2048  # of a student whose teacher has no limit, unless sequences are longer


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the student: what determines its files."""
    settings = {"origin": "from_config", "seed": config.seed, **_values_for(config, teacher)}
    return Recipe(kinds.STUDENT.name, {}, settings, teacher.digest, teacher.tokenizer_digest)


def build_new_student(config: Config, teacher: ModelFolder) -> None:
    """Writes a student with random weights to `WORKDIR/student`.

    Raises:
        UserError: when it does not fit into memory or onto the disk.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    target = config.path(kinds.STUDENT.folder)
    with stage("student: random weights", reads=[teacher.path], writes=target):
        values = _values_for(config, teacher)
        values.pop("model_type")
        numel = num_parameters(values)
        require_room(
            numel,
            target,
            f"the {numel:,} parameters of the student",
            key="student.from_config",
            remedy=f"choose smaller sizes, or run this stage on a machine with more (`{kinds.STUDENT.made_by}`)",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, "student", "weights"))
            model = LlamaForCausalLM(LlamaConfig(**values))
        with build_artifact(target, recipe(config, teacher)) as building:
            with report_full_disk(building.folder):
                model.save_pretrained(building.folder, safe_serialization=True)
            copy_other_files(teacher, building.folder)
            building.facts.update(origin="from_config", size_bytes=numel * torch.float32.itemsize)
        say(f"  a Llama of {numel:,} parameters, in float32")


def _values_for(config: Config, teacher: ModelFolder) -> dict[str, Any]:
    assert config.student.from_config is not None, "called only if student.from_config is set"
    model_config = teacher.load_config()
    vocab_size = vocabulary_size(model_config)
    assert vocab_size is not None, "a decoder with an output matrix has one"
    positions = position_limit(model_config) or max(_POSITIONS, config.corpus.sequence_length)
    tokens = {key: getattr(model_config, key, None) for key in ("bos_token_id", "eos_token_id")}
    return config_values(config.student.from_config, vocab_size, positions) | tokens


def config_values(sizes: NewStudentConfig, vocab_size: int, positions: int) -> dict[str, Any]:
    """Returns the config.json of a Llama of these sizes.

    It has no padding token: transformers would set that token's embedding to zero and never train it, and padding is
    often the token that ends a text.
    """
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size or intermediate_size(sizes.hidden_size),
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads or sizes.heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": sizes.tie_embeddings,
    }


def num_parameters(values: dict[str, Any]) -> int:
    """Returns the number of parameters of a Llama with the config.json `values` of :func:`config_values`."""
    width = values["hidden_size"]
    keys_and_values = 2 * width // values["num_attention_heads"] * values["num_key_value_heads"]
    attention = width * (2 * width + keys_and_values)
    mlp = 3 * width * values["intermediate_size"]
    layers = values["num_hidden_layers"] * (attention + mlp + 2 * width)  # with two norms each
    matrices = 1 if values["tie_word_embeddings"] else 2
    return layers + width + matrices * values["vocab_size"] * width


def intermediate_size(hidden_size: int) -> int:
    """Returns Llama's inner width of the MLPs: 8/3 of `hidden_size`, rounded down to a multiple of 8, at least 8."""
    return max(8, hidden_size * 8 // 3 // 8 * 8)
