"""Tests the tokenizer that is built from a GGUF file, and the comparison of another with it."""

import pytest
import torch
from gguf_files import SPECIAL, TEXTS, tokenizer_keys, train_tokenizer, write_gguf
from gguf_teachers import assert_refused, build_gguf, gguf_config, logits_of
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.artifacts.manifest import read_manifest
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.folder import find_teacher
from dskd.models.files.gguf_file import read_gguf
from dskd.models.gguf.tokenizer import build_tokenizer

MESSAGES = [{"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}]


def test_tokens_are_those_of_the_tokenizer_that_was_written(tmp_path):
    written = write_gguf(tmp_path / "model.gguf")
    _, folder = build_gguf(written.path)
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


def test_another_tokenizer_needs_the_same_tokens(tmp_path):
    written = write_gguf(tmp_path / "model.gguf", keys={"tokenizer.ggml.pre": "unheard-of"})
    message = assert_refused(written.path, "it splits text as 'unheard-of'", "teacher.tokenizer")
    assert "known are gpt-2, smollm" in message
    good, other, known = tmp_path / "good", tmp_path / "other", tmp_path / "known" / "model.gguf"
    known.parent.mkdir()
    build_tokenizer(read_gguf(write_gguf(known).path)).save_pretrained(good)
    _, folder = build_gguf(written.path, tokenizer=str(good))
    assert "not compared further" in read_manifest(folder, "teacher").facts["tokenizer"]
    with pytest.raises(UserError, match=r"made with teacher.tokenizer: .*good, and the config says None"):
        find_teacher(gguf_config(written.path))
    tokens = tokenizer_keys(written.tokenizer)["tokenizer.ggml.tokens"]
    tokens[10:12] = reversed(tokens[10:12])
    swapped = write_gguf(tmp_path / "swapped.gguf", keys={"tokenizer.ggml.tokens": tokens})
    build_tokenizer(read_gguf(swapped.path)).save_pretrained(other)
    message = assert_refused(known, "is not the tokenizer of", "2 of 335 tokens differ", tokenizer=str(other))
    assert f"10 is {tokens[10]!r} there and {tokens[11]!r} in the file" in message


def test_a_tokenizer_that_splits_text_otherwise_is_used_and_the_difference_noted(tmp_path):
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    as_gpt2 = write_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, keys={"tokenizer.ggml.pre": "gpt-2"})
    keys = {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eos_token_id": 0}
    one_digit_a_token = write_gguf(tmp_path / "other.gguf", tokenizer=tokenizer, keys=keys)
    build_tokenizer(read_gguf(one_digit_a_token.path)).save_pretrained(tmp_path / "other")
    _, folder = build_gguf(as_gpt2.path, tokenizer=str(tmp_path / "other"))
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
    assert_refused(written.path, "it has no tokenizer", "teacher.tokenizer")
    build_tokenizer(read_gguf(write_gguf(tmp_path / "known.gguf").path)).save_pretrained(tmp_path / "tokenizer")
    _, folder = build_gguf(written.path, tokenizer=str(tmp_path / "tokenizer"))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(written.model))


def test_a_tokenizer_is_only_for_gguf_files():
    with pytest.raises(ValueError, match=r"tokenizer needs path: FILE\.gguf"):
        Config(workdir="work", teacher={"path": "folder", "tokenizer": "other"})
    with pytest.raises(ValueError, match="revision names a version on the Hub"):
        Config(workdir="work", teacher={"path": "model.gguf", "revision": "main"})
