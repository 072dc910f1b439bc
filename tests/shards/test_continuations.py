"""The teacher's continuations against transformers' own greedy generation, and the extended sequences."""

import json

import pytest
import torch
from rank_jobs import continuations_by_ranks
from rank_processes import finish, fork_ranks
from safetensors.torch import save_file
from tiny_models import ARCHITECTURES, save_model

from dskd.config import Config
from dskd.corpus.sequences import open_sequences
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import load_frozen
from dskd.models.running.generation import GENERATION_CONFIG, ends_of_answers_only
from dskd.shards.continuations import Continuer
from dskd.shards.text_reader import TextReader

T, N, END = 24, 6, 0
# A text and its end in each; the last three: a text without room, one that continues in the next row, and only an end.
SIZES = [3, 15, 22, 9, 23]


def _sequences(folder):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(2, 100, (8, T), generator=generator).int()
    lengths = torch.tensor([size + 1 for size in SIZES] + [T, T, 1])
    for row, size in enumerate(SIZES):
        rows[row, size:] = END
    rows[5, -1] = 1  # neither does a full row that does not end its text
    rows[7] = END
    starts = torch.zeros(8, T, dtype=torch.uint8)
    starts[:, 0] = 1
    path = folder / "sequences.safetensors"
    save_file({"input_ids": rows, "starts": starts, "lengths": lengths.int()}, path)
    return open_sequences(path)


def _config(tmp_path, mode="zero3"):
    teacher = {"path": str(tmp_path / "teacher"), "mode": mode}
    corpus = {"packing": "none", "sequence_length": T}
    return Config(workdir=str(tmp_path), teacher=teacher, corpus=corpus, precision="fp32")


def _generated(model, sequences, lengths):
    """{row: the tokens that transformers generates after its text}, one text at a time, without padding."""
    expected = {}
    for row, size in enumerate(SIZES):
        prompt = sequences.batch(row, row + 1).input_ids[:, :size]
        output = model.generate(prompt, max_new_tokens=N, do_sample=False, eos_token_id=END, pad_token_id=END)
        count = min(int(lengths[row]), T - size)
        expected[row] = output[0, size : size + count].tolist()
    return expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_continuation_is_what_transformers_generates(tmp_path, world, architecture):
    model = save_model(tmp_path / "teacher", architecture)
    sequences = _sequences(tmp_path)
    config = _config(tmp_path, "resident" if architecture == "qwen2" else "zero3")
    teacher = load_frozen(find_teacher(config), config, world)
    continuer = Continuer(teacher, N, seed=3)
    before = sequences.batch(0, 8)
    batch, added = continuer.extend(before, 0)
    expected = _generated(model, sequences, continuer.draw_lengths(0, 8))
    for row, tokens in expected.items():
        size, end = SIZES[row], SIZES[row] + len(tokens)
        assert batch.input_ids[row, :end].tolist() == [*before.input_ids[row, :size].tolist(), *tokens]
        assert batch.has_target[row].tolist() == [True] * (end - 1) + [False] * (T - end + 1)
    assert added == sum(len(tokens) for tokens in expected.values()) > 8
    assert torch.equal(batch.input_ids[5:], before.input_ids[5:])
    assert torch.equal(batch.has_target[5:], before.has_target[5:])
    assert batch.num_tokens == sum(SIZES) + added + T + T + 1
    teacher.close()


@pytest.mark.parametrize("name", ["config.json", GENERATION_CONFIG])
def test_an_end_of_text_is_kept_and_ends_the_continuation(tmp_path, world, name):
    model = save_model(tmp_path / "teacher")
    sequences = _sequences(tmp_path)
    config = _config(tmp_path, "resident")
    prompt = sequences.batch(0, 1).input_ids[:, : SIZES[0]]
    second = int(model.generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)[0, -1])
    # The model's own end of text, in addition to the tokenizer's.
    file = tmp_path / "teacher" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [END, second]}))
    teacher = load_frozen(find_teacher(config), config, world)
    # Only the digest of config.json tells that the continuations are now others.
    assert ends_of_answers_only(teacher.folder) == ([second] if name == GENERATION_CONFIG else [])
    continuer = Continuer(teacher, N, seed=next(seed for seed in range(99) if _wants(teacher, seed) > 3))
    batch, added = continuer.extend(sequences.batch(0, 1), 0)
    assert added == 2
    assert int(batch.input_ids[0, SIZES[0] + 1]) == second
    assert batch.has_target[0].sum() == SIZES[0] + 1
    teacher.close()


def _wants(teacher, seed):
    return int(Continuer(teacher, N, seed).draw_lengths(0, 1))


def test_the_length_of_a_continuation_is_a_function_of_seed_and_sequence(tmp_path, world):
    save_model(tmp_path / "teacher")
    config = _config(tmp_path, "resident")
    teacher = load_frozen(find_teacher(config), config, world)
    lengths = Continuer(teacher, N, seed=1).draw_lengths(0, 600)
    assert torch.equal(torch.bincount(lengths).clamp(max=1), torch.tensor([0] + [1] * N))
    assert torch.bincount(lengths)[1:].min() > 60  # 100 of each are expected
    assert torch.equal(Continuer(teacher, N, seed=1).draw_lengths(250, 9), lengths[250:259])
    assert not torch.equal(Continuer(teacher, N, seed=2).draw_lengths(0, 600), lengths)
    teacher.close()


@pytest.mark.slow
def test_two_ranks_continue_as_one_does(tmp_path, world):
    save_model(tmp_path / "teacher", "mistral")
    sequences = _sequences(tmp_path)
    config = _config(tmp_path, "resident")
    teacher = load_frozen(find_teacher(config), config, world)
    read = TextReader(teacher, Continuer(teacher, N, 3), 5, 16).read(sequences.batch(0, 8), 0)
    tops = read.top.token_ids.split(read.batch.has_target.sum(dim=1).tolist())
    teacher.close()
    finish(fork_ranks(continuations_by_ranks, tmp_path, _config(tmp_path), ranks=2), 120)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found) == 8
    for row, (input_ids, top) in found.items():
        assert input_ids == read.batch.input_ids[int(row)].tolist()
        assert top == tops[int(row)].tolist()
