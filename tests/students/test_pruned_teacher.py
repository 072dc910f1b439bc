"""The comparison of a cut student with its teacher without the other layers."""

import json
import sys

import pytest
from architectures import edit_config, save_architecture
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.students import pruned_teacher
from dskd.students.cutting import check_student
from dskd.students.student import build_student, find_student

# Each layer shifts its result by its number, which no setting of the layer shows.
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).roll(self.layer_idx, -1)

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for number in range(config.num_hidden_layers):
            self.model.layers[number] = OwnLayer(config, number)
"""


def _config(tmp_path, layers, **teacher):
    return Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": str(tmp_path / "teacher"), **teacher},
        student={"layers": layers, "train_layers": 1},
        corpus={"packing": "stream", "sequence_length": 16},
    )


@pytest.mark.parametrize(
    ("name", "layers", "last"), [("gemma3", (1, 3), 95), ("gpt2", (0, 2), 95), ("deepseek-v3", (0, 1, 3), 95)]
)
def test_healthy_students_agree_and_the_command_says_so(tmp_path, capsys, name, layers, last):
    save_architecture(tmp_path / "teacher", name)
    build_student(_config(tmp_path, layers))
    message = "compared with the teacher without its other layers: last hidden states of 32 tokens, up to position "
    assert f"{message}{last}\n" in capsys.readouterr().err


def _swap_layers(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first, second = (f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [_swap_layers, lambda folder: edit_config(folder, rope_theta=9000.0)])
def test_a_wrong_cut_is_refused(tmp_path, spoil):
    save_model(tmp_path / "teacher")
    config = _config(tmp_path, (0, 2))
    build_student(config)
    student = find_student(config)
    spoil(student.path)
    with pytest.raises(UserError, match=r"LlamaForCausalLM with the teacher's layers 0, 2 alone(.|\n)* keep others"):
        check_student(student, find_teacher(config), [0, 2])


def test_a_teacher_that_computes_nothing_finite_is_named(tmp_path):
    save_model(tmp_path / "teacher")
    edit_config(tmp_path / "teacher", rope_theta=float("nan"))
    with pytest.raises(UserError, match=rf"{tmp_path / 'teacher'}: LlamaForCausalLM computes states .* not finite"):
        build_student(_config(tmp_path, (0, 2)))


def test_a_teacher_whose_weights_do_not_fit_is_named_and_not_its_student(tmp_path):
    save_model(tmp_path / "teacher")
    edit_config(tmp_path / "teacher", num_key_value_heads=4)
    with pytest.raises(UserError, match=rf"{tmp_path / 'teacher'}: the weights do not fit .*"):
        build_student(_config(tmp_path, (0, 2)))


def test_layers_that_depend_on_their_place_in_a_models_own_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "teacher"
    save_model(folder)
    (folder / "modeling_own.py").write_text(OWN_CODE)
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=own)
    with pytest.raises(
        UserError, match=r"OwnForCausalLM with the teacher's layers 0, 2 alone computes something different"
    ):
        build_student(_config(tmp_path, (0, 2), trust_remote_code=True))
    assert not (tmp_path / "work" / "student").exists()
    build_student(_config(tmp_path, (0, 1), trust_remote_code=True))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "student", trust_remote_code=True)
    assert type(student).__name__ == "OwnForCausalLM"


def test_a_large_teacher_is_not_loaded_for_the_comparison(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "teacher")
    monkeypatch.setattr(pruned_teacher, "SMALL_BYTES", 1000)
    build_student(_config(tmp_path, (0, 2)))
    assert "the teacher is too large to run next to the student here," in capsys.readouterr().err
    assert json.loads((tmp_path / "work" / "student" / "config.json").read_text())["num_hidden_layers"] == 2
