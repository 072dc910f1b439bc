"""The small files of an export: where a generation ends, and the licences that come with the teacher."""

import json

import pytest
import torch
from chat_templates import LLAMA, SMOLLM, chat_tokenizer
from repository import REPOSITORY
from tiny_models import SHAPE
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe
from dskd.models.files.folder import ModelFolder
from dskd.training.exporting.export import write_export
from dskd.training.exporting.files import add_licence_texts, copy_licences, copy_notices

QUESTION = [{"role": "user", "content": "What is the opposite of hot?"}]


def _student(folder, template, *, end="</s>", generation=None):
    """Writes a model with a chat template, and the generation config given, or none."""
    tokenizer = chat_tokenizer(template, end=end)
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelFolder(folder, ""), tokenizer


def _export(student, tmp_path, trained=None):
    target = tmp_path / "export"
    target.mkdir()
    write_export(student, trained or {}, target)
    return target


@pytest.mark.parametrize(("template", "end_of_turn"), [(SMOLLM, "<|im_end|>"), (LLAMA, "<|eot_id|>")])
@pytest.mark.parametrize("generation", [None, {"do_sample": True, "temperature": 0.6, "eos_token_id": 1}])
def test_an_export_stops_at_the_end_of_its_turn(tmp_path, template, end_of_turn, generation):
    """The model's configs name only the end of a text, and the template ends a turn with another token."""
    student, tokenizer = _student(tmp_path / "student", template, generation=generation)
    turn = tokenizer.convert_tokens_to_ids(end_of_turn)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    # An output matrix with which the end of the turn is the most probable token after this prompt.
    model = AutoModelForCausalLM.from_pretrained(student.path)
    with torch.no_grad():
        (last,) = model.model(prompt).last_hidden_state[:, -1]
    matrix = torch.zeros(len(tokenizer), SHAPE["hidden_size"])
    matrix[turn] = last
    export = _export(student, tmp_path, {"lm_head.weight": matrix})
    exported = AutoModelForCausalLM.from_pretrained(export)
    assert exported.generation_config.eos_token_id == [1, turn]
    said = exported.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert said.tolist() == [turn]
    assert AutoTokenizer.from_pretrained(export).chat_template == tokenizer.chat_template
    if generation is not None:
        assert GenerationConfig.from_pretrained(export).temperature == 0.6


def test_a_generation_config_that_names_the_end_of_a_turn_is_copied(tmp_path):
    turn = chat_tokenizer(SMOLLM).convert_tokens_to_ids("<|im_end|>")
    given = {"eos_token_id": [turn, 1], "top_p": 0.9}
    student, _ = _student(tmp_path / "student", SMOLLM, generation=given)
    written = (_export(student, tmp_path) / "generation_config.json").read_bytes()
    assert written == (student.path / "generation_config.json").read_bytes()


def test_a_model_without_a_chat_template_ends_at_the_end_of_a_text(tmp_path):
    student, _ = _student(tmp_path / "student", None)
    assert GenerationConfig.from_pretrained(_export(student, tmp_path)).eos_token_id == 1


def test_an_export_has_no_path_from_which_its_models_were_loaded(tmp_path):
    student, tokenizer = _student(tmp_path / "student", SMOLLM)
    secret = "/home/me/secret/model"
    for name, more in (
        ("config.json", {"_name_or_path": secret, "_model_name_or_path": secret}),
        ("tokenizer_config.json", {"name_or_path": secret, "special_tokens_map_file": secret}),
    ):
        file = student.path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    export = _export(student, tmp_path)
    assert not [file.name for file in export.iterdir() if secret.encode() in file.read_bytes()]
    assert AutoTokenizer.from_pretrained(export).chat_template == tokenizer.chat_template
    AutoModelForCausalLM.from_pretrained(export)


def test_licences_and_notices_come_with_an_export(tmp_path):
    names = ["LICENSE", "LICENCE.txt", "NOTICE", "Notice.txt", "USE_POLICY.md", "license_agreement.pdf"]
    teacher, target = tmp_path / "teacher", tmp_path / "export"
    for folder in (teacher, target):
        folder.mkdir()
    for name in [*names, "README.md", "config.json"]:
        (teacher / name).write_text(name)
    copy_notices(teacher, target, of="teacher")
    assert {file.name for file in target.iterdir()} == set(names)


def test_an_export_of_a_pretrained_student_has_the_licences_of_both_models(tmp_path, capsys):
    """The student's folder has no licence file but `*.txt`, so they come from the model that it was copied from."""
    teacher, source, target = tmp_path / "teacher", tmp_path / "source", tmp_path / "export"
    for folder, files in (
        (teacher, {"LICENSE": "the teacher's", "Notice.txt": "the teacher's", "USE_POLICY.md": "of both"}),
        (source, {"LICENSE": "the student's", "COPYING": "the student's", "USE_POLICY.md": "of both", "code.py": ""}),
        (target, {}),
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with build_artifact(tmp_path / "student", Recipe("student", {}, {}, "t", "t")) as building:
        building.facts.update(origin="path", path=str(source), revision=None, folder=str(source))
    student = ModelFolder(tmp_path / "student", "")
    copy_licences(student, ModelFolder(teacher, ""), target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {
        "LICENSE": "the student's",
        "LICENSE-of-teacher": "the teacher's",
        "COPYING": "the student's",
        "Notice.txt": "the teacher's",
        "USE_POLICY.md": "of both",
    }
    assert capsys.readouterr().err == ""
    source.rename(tmp_path / "elsewhere")
    copy_licences(student, None, target)
    assert "its licence files are not in the export; add them before you share the model" in capsys.readouterr().err


def test_an_export_has_the_text_of_apache_2_unless_a_file_of_a_model_has_it(tmp_path):
    text = (REPOSITORY / "LICENSE").read_text()
    facts = {"teacher": {"license": "apache-2.0"}, "student": {"license": "mit"}}
    for number, (files, names) in enumerate(
        [
            ({}, {"LICENSE"}),
            ({"LICENSE": "MIT"}, {"LICENSE", "LICENSE-of-teacher"}),
            ({"Licence.txt": text}, {"Licence.txt"}),
            ({"NOTICE": "Licensed under the Apache License, Version 2.0"}, {"NOTICE", "LICENSE"}),
        ]
    ):
        target = tmp_path / str(number)
        target.mkdir()
        for name, content in files.items():
            (target / name).write_text(content)
        add_licence_texts(facts, target)
        assert {file.name for file in target.iterdir()} == names
        assert [file.read_text() for file in target.iterdir()].count(text) == 1
    (tmp_path / "other").mkdir()
    add_licence_texts({"teacher": {"license": "gemma"}, "student": {}}, tmp_path / "other")
    assert not [*(tmp_path / "other").iterdir()]
