"""Chats in the stages after the corpus: senses, shards, and the prompts of samples."""

import json
import shutil

import pytest
import torch
import yaml
from artifact_folders import open_dataset
from transformers import AutoTokenizer

from dskd.config import Config
from dskd.config.reading import load_config
from dskd.corpus.build import build_corpus
from dskd.corpus.sequences import build_sequences
from dskd.evaluation.continued_texts import Prompts
from dskd.models.files.folder import find_teacher
from dskd.senses.build import build_senses
from dskd.senses.dictionary import read_dictionary
from dskd.shards import collate_tokens
from dskd.shards.annotate import annotate

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + ' ' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.slow
def test_the_loss_mask_of_shards_is_that_of_the_answers(copy_of_tiny, tiny, world, tmp_path):
    """And senses are gathered from these positions only."""
    work = yaml.safe_load(tiny.read_text())["workdir"]
    shutil.copytree(f"{work}/teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "teacher")
    said = [
        ("user", "Is it large?"),
        ("assistant", "It is a great, large house."),
        ("user", "Hot?"),
        ("assistant", "Cold."),
    ]
    lines = [
        {"messages": [{"role": role, "content": f"{content} {number}"} for role, content in said[: 2 + number % 2 * 2]]}
        for number in range(40)
    ]
    (tmp_path / "chats.json").write_text(json.dumps(lines))
    config = load_config(
        copy_of_tiny(
            "lexicon",
            teacher={"path": str(tmp_path / "teacher")},
            corpus={"source": "chat", "train": [str(tmp_path / "chats.json")], "sequence_length": 64}
            | {"validation_share": 0.2},
        )
    )
    build_corpus(config)
    teacher = find_teacher(config)
    build_sequences(config, tokenizer, teacher.tokenizer_digest)
    build_senses(config, world)
    annotate(config, world)
    end = tokenizer.eos_token
    found, targets = [], {}
    for split in ("train", "validation"):
        dataset = open_dataset(config.path("shards", split), tmp_path / split)
        for index in range(len(dataset)):
            sample = dataset[index]
            ids, mask = torch.tensor(sample["input_ids"]), torch.tensor(sample["loss_mask"]).bool()
            targets.setdefault(split, set()).update(ids.roll(-1)[mask].tolist())
            found += tokenizer.decode(ids.roll(-1)[mask]).split(end)[:-1]
            for column in ("sense_ids", "synonym_ids", "antonym_ids"):
                assert (sample[column][~mask.numpy()] == -1).all()
            assert split == "validation" or (sample["teacher_token_ids"][~mask.numpy()] == -1).all()
    answers = [turn["content"] for line in lines for turn in line["messages"][1::2]]
    assert sorted(found) == sorted(f" {answer}" for answer in answers)
    # Senses are stored under the target, and of tokens that are targets only.
    offsets = read_dictionary(config.path("senses", "senses.safetensors")).entry_offsets
    with_senses = set(offsets.diff()[: teacher.load_config().vocab_size].nonzero().flatten().tolist())
    assert with_senses
    assert with_senses <= targets["train"]


def _prompts(rows, starts=None, count=None):
    """The prompts of rows given by their masks; tokens count up from 0."""
    samples = [
        {
            "input_ids": torch.arange(len(row)).numpy(),
            "loss_mask": torch.tensor([int(mark) for mark in row]).numpy(),
            "document_starts": torch.tensor([int(mark) for mark in start]).numpy(),
            "sample_id": 0,
        }
        for row, start in zip(rows, starts or ["1" + "0" * (len(row) - 1) for row in rows], strict=True)
    ]
    config = Config(workdir="x", teacher={"path": "y"}, evaluation={"samples": count or len(rows), "sample_tokens": 3})
    return Prompts.of(config, collate_tokens(samples))


@pytest.mark.parametrize(
    ("row", "start", "prompt", "document"),
    [
        ("1111110000", "1000000000", 3, 7),  # a text: a half of it is the prompt
        ("1111110110", "1000000100", 3, 7),  # followed by another
        ("0001110000", "1000000000", 4, 7),  # a chat: the prompt ends where the answer begins
        ("0001100110", "1000000000", 4, 6),  # its first answer
        ("0110001110", "1000100000", 2, 4),
        ("0000000000", "1000000000", 1, 1),
        ("0000110110", "1001000000", 1, 1),  # the first document has no targets
    ],
)
def test_a_sample_continues_a_text_from_its_half_and_a_chat_from_its_first_answer(row, start, prompt, document):
    prompts = _prompts([row, "1111111110"], [start, "1000000000"])
    assert (int(prompts.prompt_lengths[0]), int(prompts.document_lengths[0])) == (prompt, document)
    assert (int(prompts.prompt_lengths[1]), int(prompts.document_lengths[1])) == (5, 10)


def test_a_text_whose_half_says_next_to_nothing_is_shown_only_if_there_is_no_other():
    short, long, empty, chat = "1111111100000", "1111111111110", "0000000000000", "0000000110000"
    for rows, count, chosen in (
        ([short, empty, long, short, long], 2, [6, 6]),
        ([short, long, empty], 2, [4, 6]),
        ([short, chat, long], 2, [8, 6]),
    ):
        prompts = _prompts(rows, count=count)
        assert prompts.prompt_lengths.tolist() == chosen
        assert len(prompts.input_ids) == len(prompts.document_lengths) == count
