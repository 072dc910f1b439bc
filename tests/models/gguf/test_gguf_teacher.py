"""Tests the teacher from a GGUF file: its numbers, where its generations end, and its provenance."""

import json
import re

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import QUANTISED, TEXTS, write_gguf
from gguf_teachers import assert_refused, build_gguf, gguf_config, gguf_config_file, logits_of
from rank_processes import run_program
from real_model import find_real_model, needs_real_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.models.files.gguf_file import read_gguf
from dskd.models.files.smollm2 import SHA256
from dskd.models.gguf.config import read_config
from dskd.models.gguf.teacher import build_teacher, recipe
from dskd.models.gguf.tokenizer import build_tokenizer
from dskd.models.running.generation import end_tokens
from dskd.students.student import build_student


@pytest.mark.parametrize(
    ("architecture", "types", "stored_in"),
    [
        ("llama", QUANTISED, torch.float32),
        ("llama", Type.F32, torch.float32),
        ("qwen2", QUANTISED, torch.float32),
    ],
)
def test_the_folder_computes_what_the_numbers_of_the_file_say(tmp_path, architecture, types, stored_in):
    written = write_gguf(tmp_path / "model.gguf", architecture=architecture, types=types)
    config, folder = build_gguf(written.path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {stored_in}
    expected = written.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits_of(loaded), logits_of(written.model))
    assert find_teacher(config).path == folder


def test_numbers_that_fit_into_bf16_are_stored_in_it(tmp_path):
    written = write_gguf(tmp_path / "model.gguf", types=Type.BF16)
    path = tmp_path / "bf16.gguf"
    _write_with_norms_of_one(path)
    _, folder = build_gguf(path)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert stored.dtype == torch.bfloat16
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits_of(stored.float()), logits_of(read))
    _, folder = build_gguf(written.path)  # its norms are in float32, with all digits
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


def _write_with_norms_of_one(path):
    layers = range(3)
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in layers for name in ("attn", "ffn")]
    norms.append("output_norm.weight")
    ones = {name: np.ones(64, np.float32) for name in norms}
    write_gguf(path, types=Type.BF16, without=tuple(norms), tensors=ones)


def test_a_generation_ends_where_the_file_and_its_template_say(tmp_path):
    keys = {"tokenizer.ggml.eos_token_id": 0}  # the template ends turns with <|im_end|>
    _, folder = build_gguf(write_gguf(tmp_path / "model.gguf", keys=keys).path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [0, 2]
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
    _, folder = build_gguf(write_gguf(tmp_path / "model.gguf").path)
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2
    values = json.loads((folder / "config.json").read_text())
    assert values["eos_token_id"] == 2
    assert "_model_name_or_path" not in values  # the name in the file


def test_the_manifest_says_where_the_teacher_comes_from(tmp_path):
    written = write_gguf(tmp_path / "model.gguf", types=QUANTISED)
    config, folder = build_gguf(written.path)
    manifest = read_manifest(folder, "teacher")
    facts = manifest.facts
    assert facts["file"] == "model.gguf"
    assert facts["sha256"] == manifest.inputs["gguf"]
    assert facts["tensor_types"] == {"F16": 6, "F32": 15, "Q4_0": 6, "Q8_0": 3}
    assert facts["provenance"] == {"name": "Tiny", "license": "apache-2.0", "base_model.0.name": "Tiny Base"}
    assert facts["end_tokens"] == ["<|im_end|>"]
    assert set(facts["made_with"]) == {"gguf", "transformers", "tokenizers"}
    assert is_current(folder, recipe(config))


def test_a_teacher_of_another_file_is_refused_and_one_whose_file_is_gone_is_not(tmp_path):
    written = write_gguf(tmp_path / "model.gguf")
    config, folder = build_gguf(written.path)
    digest = find_teacher(config).digest
    written.path.unlink()
    assert find_teacher(config).digest == digest
    assert is_current(folder, recipe(config))
    write_gguf(written.path, types=Type.F16)
    assert not is_current(folder, recipe(config))
    with pytest.raises(
        UserError, match=r"made from a file of the same name with different content, .* make it again with"
    ):
        find_teacher(config)
    with pytest.raises(UserError, match=r"made from the GGUF file model.gguf, .*train_from_scratch"):
        find_teacher(Config(workdir=config.workdir, teacher={"train_from_scratch": {}}))
    with pytest.raises(UserError, match=r"there is no teacher here; make it with `python launcher/pipeline.py --confi"):
        find_teacher(Config(workdir=str(tmp_path / "new"), teacher={"path": str(written.path)}))


def test_a_teacher_whose_tokenizer_changed_is_refused(tmp_path):
    written = write_gguf(tmp_path / "model.gguf")
    own = tmp_path / "own"
    build_tokenizer(read_gguf(written.path)).save_pretrained(own)
    config, folder = build_gguf(written.path, tokenizer=str(own))
    assert set(read_manifest(folder, "teacher").inputs) == {"gguf", "tokenizer"}
    assert is_current(folder, recipe(config))
    (own / "chat_template.jinja").write_text("{{ messages }}")
    assert not is_current(folder, recipe(config))
    with pytest.raises(UserError, match=r"made with other files of teacher.tokenizer: .*own .* make it again with"):
        find_teacher(config)
    build_teacher(config)
    assert find_teacher(config).tokenizer.chat_template == "{{ messages }}"
    settings = own / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    assert not is_current(folder, recipe(config))
    build_teacher(config)
    assert find_teacher(config).tokenizer.eos_token == "<|endoftext|>"
    own.rename(tmp_path / "gone")  # another node has only the work directory
    assert is_current(folder, recipe(config))
    assert find_teacher(config).path == folder


def test_a_recipe_without_another_tokenizer_has_only_the_file(tmp_path):
    config = gguf_config(write_gguf(tmp_path / "model.gguf").path)
    assert set(recipe(config).inputs) == {"gguf"}
    assert recipe(config).config == {"tokenizer": None}


def test_a_student_says_what_is_wrong_with_the_path_of_its_teacher(tmp_path):
    with pytest.raises(UserError, match=r"teacher.path: .*/none.gguf: there is no such file"):
        build_student(gguf_config(tmp_path / "none.gguf"))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UserError, match=r"teacher.path: .*/folder.gguf: this is a folder; name the file in it"):
        build_student(gguf_config(tmp_path / "folder.gguf"))


def test_a_plan_reads_the_shape_from_the_file_and_needs_no_conversion(tmp_path, monkeypatch, capsys):
    from dskd.__main__ import main as run_main
    from dskd.plan.architecture import find_architecture
    from dskd.plan.shapes import teacher_shapes

    written = write_gguf(tmp_path / "model.gguf", architecture="qwen2", types=QUANTISED)
    architecture = find_architecture(gguf_config(written.path), None)
    assert teacher_shapes(architecture).numel == written.model.num_parameters()
    main = ["plan", "--config", gguf_config_file(written.path), "--nodes=1", "--gpus-per-node=1"]
    monkeypatch.setattr("sys.argv", ["dskd", *map(str, main), "--gpu-memory=8", "--host-memory=16", "--samples=100"])
    assert run_main() == 0
    assert re.search(r"^teacher, dequantised +0\.0", capsys.readouterr().out, re.MULTILINE)
    build_gguf(written.path)
    written.path.unlink()
    assert teacher_shapes(find_architecture(gguf_config(written.path), None)).numel == written.model.num_parameters()


@pytest.mark.slow
def test_the_pipeline_makes_the_teacher_first_and_once_and_refuses_a_cut_file(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", types=QUANTISED).path
    config = gguf_config_file(path)
    documents = [f"{number} {TEXTS[number % len(TEXTS)]}" for number in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    made = run_program("pipeline.py", config, "--until", "teacher")
    assert re.findall(r"^== (\w+)", made.output, re.MULTILINE) == ["teacher"]
    overrides = ["lexicon.wordnet=false", f"lexicon.tsv=[{tmp_path / 'own.tsv'}]"]
    (tmp_path / "own.tsv").write_text("hot\tantonym\tcold\n")
    more = run_program("pipeline.py", config, "--until", "student", *overrides)
    assert re.findall(r"^== (\w+)", more.output, re.MULTILINE) == ["lexicon", "corpus", "sequences", "student"]
    assert "up to date: teacher" in more.output
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "student")
    assert student.dtype == torch.float32
    path.write_bytes(path.read_bytes()[:-100])
    refused = run_program("pipeline.py", config, check=False)
    assert refused.exit_code == 2
    assert "error: teacher.path: " in refused.output
    assert "the file is cut short" in refused.output
    assert "Traceback" not in refused.output


def test_too_little_space_is_refused_before_the_tensors_are_read(tmp_path, monkeypatch):
    import shutil

    path = write_gguf(tmp_path / "model.gguf").path
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage._replace(free=1000))
    assert_refused(path, "MB are needed, but only 0.98 KB are free")


@pytest.mark.slow
@needs_real_model
def test_a_real_model_answers(tmp_path):
    path = tmp_path / "model.gguf"
    path.symlink_to(find_real_model())
    assert sha256_of_file(path) == SHA256
    config, folder = build_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("hot")["input_ids"] == tokenizer("hot", add_special_tokens=False)["input_ids"]
    assert end_tokens(find_teacher(config)) == (2, [2])
    own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits_of(model), logits_of(own))
    answers = {}
    for question in ("What is the opposite of hot?", "What is the capital of France?"):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        generated = model.generate(**prompt, max_new_tokens=15, do_sample=False)
        answers[question] = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])
    assert answers["What is the opposite of hot?"].startswith("The opposite of hot is cold.")
    assert answers["What is the capital of France?"] == "The capital of France is Paris.<|im_end|>"  # and no more
    facts = read_manifest(folder, "teacher").facts
    assert facts["tensor_types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert facts["provenance"]["license"] == "apache-2.0"
    assert facts["perplexity_of_plain_text"] < 40
    assert read_config(read_gguf(path)).eos_token_id == 2
