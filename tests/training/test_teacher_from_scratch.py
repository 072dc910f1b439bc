"""The small teacher is trained as it is used: on each document by itself."""

import copy
import random

import pytest
import torch
from plain_reading import run_apart
from tiny_models import word_tokenizer
from torch.nn import functional as F

from dskd.config import FromScratchConfig
from dskd.corpus.packing import pack
from dskd.corpus.sequences import open_sequences
from dskd.training.teacher_from_scratch import build_llama, train_model, train_tokenizer

WORDS = [f"w{index}" for index in range(30)]


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_the_first_loss_is_that_of_every_document_by_itself(tmp_path, packing):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(100)]
    tokenizer = word_tokenizer(WORDS)
    path = tmp_path / "sequences.safetensors"
    packed = pack(iter(texts), tokenizer, path, sequence_length=16, packing=packing)
    sequences = open_sequences(path)
    settings = FromScratchConfig(
        vocab_size=300,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        train_tokens=16 * packed.sequences,
        batch_size=packed.sequences,
    )
    model = build_llama(settings, len(tokenizer), 16, tokenizer, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that attention changes the loss
    untrained = copy.deepcopy(model)
    loss = train_model(model, sequences, settings, 0, "fp32")  # one step over all sequences

    ids = sequences.batch(0, len(sequences)).input_ids
    with torch.no_grad():
        logits, _, has_target = run_apart(untrained, ids, tokenizer.eos_token_id)
        expected = F.cross_entropy(logits[has_target], ids.roll(-1, dims=1).flatten()[has_target])
        crossing = untrained(ids).logits.flatten(0, 1)[has_target]
        other = F.cross_entropy(crossing, ids.roll(-1, dims=1).flatten()[has_target])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    if packing == "documents":
        assert abs(other - expected) > 1e-3


def test_the_model_generates_from_what_its_tokenizer_returns():
    tokenizer = train_tokenizer(iter(WORDS), 300)
    settings = FromScratchConfig(vocab_size=300, num_layers=2, hidden_size=32, num_heads=2)
    model = build_llama(settings, len(tokenizer), 16, tokenizer, seed=0)
    assert model.generate(**tokenizer("w1", return_tensors="pt"), max_new_tokens=1).shape[0] == 1
