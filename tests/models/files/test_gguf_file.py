"""Tests that a file that is not a whole GGUF model, or has damaged keys, is refused."""

import struct

import pytest
from gguf_files import write_gguf
from gguf_teachers import assert_refused

from dskd.models.files import smollm2


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999999])
def test_a_file_that_is_cut_short_is_refused_before_anything_is_loaded(tmp_path, share):
    path = write_gguf(tmp_path / "model.gguf").path
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert_refused(
        path, "the file is cut short", "download it again" if share < 0.1 else f"it has {int(len(content) * share):,}"
    )


def test_a_file_that_is_not_a_gguf_model_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    assert_refused(path, "there is no such file")
    path.mkdir()
    assert_refused(path, "this is a folder")
    path.rmdir()
    path.touch()
    assert_refused(path, "the file is empty; download it again")
    path.write_bytes(b"PK\x03\x04 some zip file")
    assert_refused(path, "this is not a GGUF file: it begins with b'PK\\x03\\x04'")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert_refused(path, "only a pointer", "git lfs pull")
    path.write_bytes(b"GGUF\x01\x00\x00\x00")
    assert_refused(path, "format version 1")
    write_gguf(path, keys={"split.count": 3, "split.no": 0})
    assert_refused(path, "part 1 of a model in 3 files", "llama-gguf-split --merge")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split.count", "many"),
        ("general.alignment", "many"),
        ("general.alignment", [32, 32]),
        ("tokenizer.ggml.tokens", 7),
        ("tokenizer.ggml.token_type", 7),
        ("tokenizer.ggml.token_type", ["a"]),
        ("tokenizer.ggml.merges", 7),
        ("tokenizer.ggml.merges", [1, 2]),
        ("tokenizer.ggml.bos_token_id", "1"),
        ("tokenizer.ggml.eos_token_id", "2"),
        ("tokenizer.ggml.unknown_token_id", "0"),
        ("tokenizer.ggml.padding_token_id", "2"),
        ("tokenizer.ggml.eot_token_id", "2"),
        ("tokenizer.ggml.add_bos_token", "false"),
        ("tokenizer.chat_template", 7),
        ("llama.vocab_size", "many"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_key(tmp_path, key, value):
    written = write_gguf(tmp_path / "model.gguf", keys={key: value})
    assert_refused(written.path, f"teacher.path: {written.path}: the key {key} ", ", and must be ")


def test_damage_in_the_list_of_keys_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    for length in (4, 5, 7):
        path.write_bytes(b"GGUF\x03\x00\x00\x00"[:length])
        assert_refused(path, f"the file is cut short: it has only {length} bytes")
    path.write_bytes(_keys_only(struct.pack("<I", 77)))
    assert_refused(path, "damaged (some.key: a value of type 77, which GGUF does not have)")
    path.write_bytes(_keys_only(struct.pack("<IIQ", 9, 8, 49_152) + bytes(5000 - 56)))
    assert_refused(
        path, "cut short or damaged: some.key: a list of 49,152 values in a file of 5,000 bytes; download it again"
    )
    path.write_bytes(_keys_only(struct.pack("<IQ", 8, 6000) + bytes(5000 - 52)))
    assert_refused(path, "cut short or damaged: some.key: a text of 6,000 bytes in a file of 5,000 bytes")
    path.write_bytes(_keys_only(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000))
    assert_refused(path, "damaged (some.key: lists in lists, more than")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5])
def test_the_quickstarts_teacher_is_fetched_again_if_it_is_cut_short(tmp_path, share):
    path = write_gguf(tmp_path / smollm2.NAME).path
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_refused(path, f"fetch it again: `dskd smollm2 --to {path}`")


def _keys_only(value):
    key = b"some.key"
    return b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, len(key)) + key + value


def test_embeddings_without_dimensions_are_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf").path
    name = b"token_embd.weight"
    before, _, after = path.read_bytes().partition(struct.pack("<Q", len(name)) + name + struct.pack("<I", 2))
    damaged = before + struct.pack("<Q", len(name)) + name + struct.pack("<I", 0) + after[16:]
    path.write_bytes(damaged + bytes(64))  # long enough for all tensors
    assert_refused(path, "the embeddings (token_embd.weight) have the shape []")


def test_a_file_that_does_not_say_its_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf").path
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectuse"))
    assert_refused(path, "does not say its architecture (the key general.architecture)")
