import json

import pytest
import torch
from tiny_models import ARCHITECTURES, save_model
from transformers import AutoModelForCausalLM

from dskd.config import Config, StudentConfig
from dskd.errors import UserError
from dskd.model_folder import TensorReader, find_teacher
from dskd.student import build_student, choose_layers, cut, cut_config, find_student, write_weights

IDS = torch.arange(10).unsqueeze(0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layers", [[0, 1], [0, 3], [2]])
def test_the_cut_student_is_the_teacher_without_the_other_layers(tmp_path, architecture, layers):
    teacher = save_model(tmp_path / "teacher", architecture)
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": str(tmp_path / "teacher")},
        student={"layers": tuple(layers), "train_layers": 1},
    )
    build_student(config)
    student = AutoModelForCausalLM.from_pretrained(find_student(config).path)
    assert student.config.num_hidden_layers == len(layers)

    # The same, made from the model and not from the files.
    kept = torch.nn.ModuleList([teacher.model.layers[layer] for layer in layers])
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    teacher.model.layers = kept
    teacher.config.num_hidden_layers = len(layers)
    teacher.model.config.num_hidden_layers = len(layers)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS, use_cache=False).logits)


def test_which_layers_are_chosen():
    assert choose_layers(StudentConfig(layers=16), 32) == list(range(16))
    assert choose_layers(StudentConfig(layers=4, spacing="even"), 10) == [0, 3, 6, 9]
    assert choose_layers(StudentConfig(layers=1, train_layers=1, spacing="even"), 10) == [0]
    assert choose_layers(StudentConfig(layers=(1, 5)), 10) == [1, 5]


@pytest.mark.parametrize("layers", [11, (0, 10)])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(UserError, match="student"):
        choose_layers(StudentConfig(layers=layers), 10)


def test_lists_with_an_item_a_layer_are_cut_too():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "max_window_layers": 3,
        "eos_token_id": [1] * 4,
    }
    assert cut_config(config, [0, 3]) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "d"],
        "max_window_layers": 1,
        "eos_token_id": [1] * 4,
    }


def test_weights_in_several_files_have_an_index(tmp_path, monkeypatch):
    from dskd import student

    save_model(tmp_path / "teacher")
    monkeypatch.setattr(student, "_FILE_BYTES", 20_000)
    (tmp_path / "student").mkdir()
    cut(tmp_path / "teacher", [0, 1], tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not list((tmp_path / "student").glob("part-*"))
    reader = TensorReader(tmp_path / "student")
    original = TensorReader(tmp_path / "teacher")
    assert torch.equal(
        reader.read("model.layers.1.mlp.up_proj.weight"), original.read("model.layers.1.mlp.up_proj.weight")
    )

    # The index of a teacher in several files is not copied as it is.
    (tmp_path / "again").mkdir()
    cut(tmp_path / "student", [1], tmp_path / "again")
    assert "model.layers.1.mlp.up_proj.weight" not in TensorReader(tmp_path / "again")


def test_replaced_tensors_take_the_place_of_those_read(tmp_path):
    save_model(tmp_path / "teacher")
    reader = TensorReader(tmp_path / "teacher")
    (tmp_path / "out").mkdir()
    write_weights(
        tmp_path / "out", reader, {name: name for name in reader.names}, {"model.norm.weight": torch.full((32,), 7.0)}
    )
    assert TensorReader(tmp_path / "out").read("model.norm.weight").eq(7).all()


def _teacher(tmp_path, **options):
    return Config(workdir=str(tmp_path / "work"), teacher={"path": str(tmp_path / "teacher"), **options})


def test_a_folder_that_is_no_model_says_all_it_lacks(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError) as error:
        find_teacher(_teacher(tmp_path))
    message = str(error.value)
    assert "there is no config.json" in message
    assert "no weights" in message
    assert "there is pytorch_model.bin: convert it" in message
    assert "no tokenizer" in message


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "not-a-hub-name"])
def test_a_folder_that_does_not_exist_is_refused_without_asking_the_hub(tmp_path, path):
    with pytest.raises(UserError, match=r"teacher\.path: there is no folder"):
        find_teacher(Config(workdir=str(tmp_path), teacher={"path": path}))


def test_cut_weights_are_refused(tmp_path):
    save_model(tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        find_teacher(_teacher(tmp_path))


def test_the_digest_of_a_teacher_follows_its_content(tmp_path):
    save_model(tmp_path / "teacher", seed=0)
    (tmp_path / "work").mkdir()
    first, again = find_teacher(_teacher(tmp_path)), find_teacher(_teacher(tmp_path))
    save_model(tmp_path / "teacher", seed=1)
    other = find_teacher(_teacher(tmp_path))
    assert first.digest == again.digest != other.digest
    assert first.tokenizer_digest == other.tokenizer_digest
