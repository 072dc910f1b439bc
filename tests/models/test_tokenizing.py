"""Long texts are tokenized in pieces, with the tokens of the whole."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dskd.corpus.packing import pack
from dskd.corpus.sequences import open_sequences
from dskd.errors import UserError
from dskd.models import tokenizing
from dskd.models.tokenizing import Tokenizing

LETTERS = "abcdefgh"


def _text(seed, words):
    """Words, numbers, punctuation, several spaces and lines, and long stretches without a space."""
    rng = random.Random(seed)
    parts = []
    for _ in range(words):
        kind = rng.random()
        if kind < 0.7:
            parts.append(
                "".join(rng.choices(LETTERS, k=rng.randint(1, 7))) + rng.choice([" ", " ", " ", ", ", ".\n", "\n\n"])
            )
        elif kind < 0.8:
            parts.append(rng.choice(["   ", "\t", " \n ", "12345 ", "é世界。", "don't "]))
        else:
            parts.append("".join(rng.choices(LETTERS + "世界", k=rng.randint(8, 40))))
    return "".join(parts)


def _byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_text(0, 3000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def _spaces_as_letters():
    """As Llama 2: a space is a letter of its own, one is put before every text, and merges run over the whole of it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_text(0, 3000).split(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.mark.parametrize("build", [_byte_level, _spaces_as_letters])
def test_the_tokens_of_a_long_text_are_those_of_the_whole(monkeypatch, build):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build(), bos_token="<s>", eos_token="</s>")
    texts = [_text(seed, 400) for seed in range(1, 5)] + ["short"]
    counted = []
    whole = Tokenizing(tokenizer).read(texts, counted.append, str, None)
    assert sum(counted) == sum(map(len, whole))
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 300)
    reader = Tokenizing(tokenizer)
    assert all(len(list(reader._pieces(text))) > 4 for text in texts[:-1])
    in_pieces = reader.read(texts, counted.append, str, None)
    for one, other in zip(whole, in_pieces, strict=True):
        np.testing.assert_array_equal(one, other)
    expected = tokenizer(texts[0])["input_ids"]
    assert whole[0].tolist() == expected + ([] if expected[-1] == 1 else [1])


def test_a_text_without_a_place_to_cut_stays_whole(monkeypatch):
    """Words of a letter repeated: the tokenizer takes each run as one word, so no cut within it is right."""
    words = {"<unk>": 0, "</s>": 1, "a" * 1000: 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 100)
    (tokens,) = Tokenizing(wrapped).read(["b " * 60 + "a" * 1000 + " b" * 60], lambda count: None, str, None)
    assert tokens.tolist() == [3] * 60 + [2] + [3] * 60 + [1]


@pytest.mark.parametrize("packing", ["documents", "stream", "none"])
def test_a_long_text_is_tokenized_only_as_far_as_needed(tmp_path, monkeypatch, packing):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(), bos_token="<s>", eos_token="</s>")
    text = _text(7, 2000)
    whole = pack(iter([text]), tokenizer, tmp_path / "a", sequence_length=16, packing=packing, max_sequences=9)
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 200)
    calls = []
    original = Tokenizing._ids
    monkeypatch.setattr(
        Tokenizing, "_ids", lambda self, *args, **keys: calls.append(args) or original(self, *args, **keys)
    )
    packed = pack(iter([text]), tokenizer, tmp_path / "b", sequence_length=16, packing=packing, max_sequences=9)
    assert packed[:2] == whole[:2] == (9, 144)
    one, other = (open_sequences(tmp_path / name).batch(0, 9) for name in "ab")
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert sum(len(piece) for (texts,) in calls for piece in texts) < len(text)


def test_a_token_that_the_model_lacks_is_named_with_its_document(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(), bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    size = len(tokenizer) - 1
    texts = ["abc", "abc <|im_end|> abc"]
    known = {"sequence_length": 8, "packing": "documents", "name_of": "document {}".format}
    pack(iter(texts[:1]), tokenizer, tmp_path / "a", vocab_size=size, **known)
    with pytest.raises(
        UserError, match=rf"document 1: it has the token '<\|im_end\|>', whose id is {size}, .* {size} tok"
    ):
        pack(iter(texts), tokenizer, tmp_path / "b", vocab_size=size, **known)
    assert not (tmp_path / "b").exists()
