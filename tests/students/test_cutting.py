import json

import pytest
import torch
from architectures import save_architecture
from tiny_models import ARCHITECTURES, save_model
from transformers import AutoModelForCausalLM

from dskd.config import Config, StudentConfig
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.models.files.weights import TensorReader, write_weights
from dskd.models.running.frozen import load_frozen
from dskd.students.cutting import cut
from dskd.students.spacing import choose_layers
from dskd.students.student import build_student, find_student
from dskd.training.exporting.export import write_export

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


@pytest.mark.parametrize("mode", ["zero3", "resident"])
def test_the_cap_of_attention_is_applied_and_the_students_config_says_so(tmp_path, world, mode):
    save_architecture(tmp_path / "teacher", "gemma2")
    capped, fused = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", attn_implementation=name)
        for name in ("eager", "sdpa")
    )
    with torch.no_grad():
        expected = capped(IDS).logits
        assert (fused(IDS).logits - expected).norm() > 0.05 * expected.norm()
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": str(tmp_path / "teacher"), "mode": mode},
        student={"layers": (0, 1, 2, 3), "train_layers": 1},
        precision="fp32",
        corpus={"sequence_length": 32},
    )
    teacher = load_frozen(find_teacher(config), config, world)
    torch.testing.assert_close(teacher.read(IDS, None, lambda hidden, head: head.logits(hidden)), expected)
    teacher.close()
    # Transformers' defaults then apply it too, to the student and to an export of a model whose config lacks the key.
    build_student(config)
    (tmp_path / "export").mkdir()
    write_export(find_teacher(config), {}, tmp_path / "export")
    for folder in (find_student(config).path, tmp_path / "export"):
        with torch.no_grad():
            torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, expected)


def test_which_layers_are_chosen():
    assert choose_layers(StudentConfig(layers=16, spacing="first"), 32) == list(range(16))
    assert choose_layers(StudentConfig(layers=4, spacing="even"), 10) == [0, 3, 6, 9]
    assert choose_layers(StudentConfig(layers=1, train_layers=1, spacing="even"), 10) == [0]
    assert choose_layers(StudentConfig(layers=(1, 5)), 10) == [1, 5]


@pytest.mark.parametrize("layers", [11, (0, 10)])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(UserError, match="student"):
        choose_layers(StudentConfig(layers=layers), 10)


def test_weights_in_several_files_have_an_index(tmp_path, monkeypatch):
    from dskd.models.files import weights

    save_model(tmp_path / "teacher")
    monkeypatch.setattr(weights, "_FILE_BYTES", 20_000)
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


def test_layers_that_would_be_of_another_kind_are_refused(tmp_path):
    torch.manual_seed(0)
    save_architecture(tmp_path / "teacher", "diffllama")  # a factor in its attention depends on a layer's number
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": str(tmp_path / "teacher")},
        student={"layers": (0, 2), "train_layers": 1},
        corpus={"sequence_length": 32},
    )
    with pytest.raises(UserError, match=r"layer 1, the teacher's 2: self_attn.lambda_init is") as error:
        build_student(config)
    assert "keep others, for example the lowest ones" in str(error.value)
    assert not (tmp_path / "work" / "student").exists()


def test_a_student_does_not_say_from_which_path_its_teacher_was_loaded(tmp_path):
    save_model(tmp_path / "teacher")
    values = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({**values, "_name_or_path": "/home/me/model"}))
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": str(tmp_path / "teacher")},
        student={"layers": 2, "train_layers": 1},
    )
    build_student(config)
    assert "/home/me" not in (tmp_path / "work" / "student" / "config.json").read_text()


def test_an_adapters_config_next_to_merged_weights_is_not_copied(tmp_path):
    save_model(tmp_path / "teacher")
    (tmp_path / "teacher" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": str(tmp_path / "teacher")},
        student={"layers": 2, "train_layers": 1},
    )
    build_student(config)
    assert not (tmp_path / "work" / "student" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "student")
