"""Documents to sequences: by hand for three small documents, against a loop over tokens for random ones."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import word_tokenizer

from dskd.corpus import packing
from dskd.corpus.packing import pack
from dskd.corpus.sequences import open_sequences

WORDS = [f"w{index}" for index in range(20)]
END = 0  # the tokenizer's end of text; words begin at 2


def _pack(tmp_path, texts, sequence_length, mode, max_sequences=None):
    path = tmp_path / "sequences.safetensors"
    packed = pack(
        iter(texts),
        word_tokenizer(WORDS),
        path,
        sequence_length=sequence_length,
        packing=mode,
        max_sequences=max_sequences,
    )
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing temporary is left
    sequences = open_sequences(path)
    assert packed[:2] == (len(sequences), sequences.num_tokens)
    return sequences


@pytest.mark.parametrize(
    ("mode", "input_ids", "positions", "targets"),
    [
        (
            "documents",
            [[2, 3, 4, END], [5, END, 6, 7], [8, 9, 6, 7]],
            [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]],
            ["1110", "1010", "1110"],
        ),
        ("stream", [[2, 3, 4, END], [5, END, 6, 7], [8, 9, 6, 7]], None, ["1110", "1110", "1110"]),
        (
            "none",
            [[2, 3, 4, END], [5, END, END, END], [6, 7, 8, 9], [6, 7, END, END]],
            None,
            ["1110", "1000", "1110", "1100"],
        ),
    ],
)
def test_three_documents_by_hand(tmp_path, mode, input_ids, positions, targets):
    """A document that fills a sequence, a short one, and one that is cut. The rest, an end of text, fills none."""
    batch = _pack(tmp_path, ["w0 w1 w2", "w3", "w4 w5 w6 w7 w4 w5"], 4, mode).batch(0, 9)
    assert batch.input_ids.tolist() == input_ids
    assert batch.input_ids.dtype == torch.int64
    assert batch.position_ids is None if positions is None else batch.position_ids.tolist() == positions
    assert ["".join(map(str, row)) for row in batch.has_target.int().tolist()] == targets
    assert batch.num_tokens == (13 if mode == "none" else 12)


def test_the_file_holds_what_is_documented(tmp_path):
    _pack(tmp_path, ["w0", "w1 w2", "w3 w4 w5 w6"], 4, "documents")
    tensors = load_file(tmp_path / "sequences.safetensors")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()} == {
        "input_ids": (torch.int32, [[2, END, 3, 4], [END, 5, 6, 7]]),
        "starts": (torch.uint8, [[1, 0, 1, 0], [1, 1, 0, 0]]),
        "lengths": (torch.int32, [4, 4]),
    }


def _oracle(documents, sequence_length, mode):
    """Returns (token, position, has a target) of every position of every sequence, token by token."""
    if mode == "none":
        cuts = [d[i : i + sequence_length] for d in documents for i in range(0, len(d), sequence_length)]
        return [
            [(cut[i], i, i + 1 < len(cut)) if i < len(cut) else (END, i, False) for i in range(sequence_length)]
            for cut in cuts
        ]
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    sequences = []
    for first in range(0, len(stream) - sequence_length + 1, sequence_length):
        part = stream[first : first + sequence_length]
        row, position = [], 0
        for i, (token, number) in enumerate(part):
            same = i > 0 and (mode == "stream" or part[i - 1][1] == number)
            position = position + 1 if same else 0
            goes_on = i + 1 < sequence_length and (mode == "stream" or part[i + 1][1] == number)
            row.append((token, position, goes_on))
        sequences.append(row)
    return sequences


@pytest.mark.parametrize("mode", ["documents", "stream", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_random_documents_agree_with_a_loop_over_tokens(tmp_path, monkeypatch, mode, seed):
    """Several batches of the tokenizer, and copies in pieces that end anywhere."""
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 150)
    monkeypatch.setattr(packing, "_COPIED_TOKENS", 11)
    draw = random.Random(seed)
    documents = [[draw.randrange(2, 22) for _ in range(draw.choice((1, 1, 2, 5, 8, 23)))] for _ in range(90)]
    texts = [" ".join(WORDS[token - 2] for token in document) for document in documents]
    sequences = _pack(tmp_path, texts, 8, mode)
    expected = _oracle([[*document, END] for document in documents], 8, mode)
    batch = sequences.batch(0, len(sequences))
    assert len(sequences) == len(expected)
    position_ids = torch.arange(8).expand(len(expected), 8) if batch.position_ids is None else batch.position_ids
    assert (batch.position_ids is None) == (mode != "documents")
    actual = [
        list(zip(*row, strict=True))
        for row in zip(batch.input_ids.tolist(), position_ids.tolist(), batch.has_target.tolist(), strict=True)
    ]
    assert actual == expected
    # Any sequences, in any order, and a limit, give the same ones.
    rows = np.array([5, 0, 3])
    chosen = sequences.select(rows)
    assert chosen.input_ids.equal(batch.input_ids[rows])
    assert chosen.has_target.equal(batch.has_target[rows])
    limited = _pack(tmp_path, texts, 8, mode, max_sequences=4)
    assert len(limited) == 4
    assert limited.batch(0, 4).has_target.equal(batch.has_target[:4])
    assert limited.batch(0, 4).input_ids.equal(batch.input_ids[:4])


def test_positions_only_come_with_a_boundary(tmp_path):
    """Models take a faster path without them."""
    sequences = _pack(tmp_path, ["w0 w1 w2 w3 w4 w5 w6", "w0", "w1 w2 w3 w4 w5 w6"], 4, "documents")
    assert sequences.batch(0, 2).position_ids is None
    assert sequences.batch(1, 3).position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


@pytest.mark.parametrize("mode", ["documents", "stream", "none"])
def test_a_text_shorter_than_one_sequence_is_padded(tmp_path, mode):
    sequences = _pack(tmp_path, ["w0 w1"], 8, mode)
    assert (sequences.lengths.tolist(), sequences.num_tokens) == ([3], 3)
    batch = sequences.batch(0, 1)
    assert batch.input_ids.tolist() == [[2, 3, END, END, END, END, END, END]]
    assert batch.has_target.sum() == 2


def test_frequencies_count_targets(tmp_path):
    sequences = _pack(tmp_path, ["w0 w1", "w1"], 8, "none")
    assert sequences.frequencies(22)[:5].tolist() == [2, 0, 0, 1, 0]  # an end of text each; no first token, no padding


def test_no_text_gives_no_targets(tmp_path):
    assert _pack(tmp_path, [], 8, "documents").batch(0, 1).has_target.sum() == 0
