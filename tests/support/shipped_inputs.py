"""The inputs of the shipped configurations, at toy size and under the names in these configurations.

No key has to be changed to train on them: models and benchmarks are in folders named as on the Hub, next to `data/`.
"""

import csv
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from openpyxl import Workbook
from tiny_models import word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from dskd.config import Config
from dskd.plan.known_models import KNOWN_MODELS

SYNONYMS = [("large", "big"), ("glad", "happy"), ("quick", "fast"), ("unhappy", "gloomy"), ("house", "home")]
ANTONYMS = [("large", "small"), ("happy", "sad"), ("fast", "slow"), ("hot", "cold"), ("new", "old")]
_RELATED = list(dict.fromkeys(word for pair in SYNONYMS + ANTONYMS for word in pair))
WORDS = [*_RELATED, *(f"w{number}" for number in range(60))]
_MARKS = [
    "Question:",
    "Goal:",
    "Passage:",
    "Answer:",
    *(f"{label}." for label in "ABCDE01"),
    *"ABCDE01",
    "user:",
    "it:",
]
_TEMPLATE = "{% for m in messages %}{{ 'user: ' if m.role == 'user' else 'it: ' }}{{ m.content }} {% endfor %}it:"
# The values of a toy. All other values of a model's config.json stay, except its number of layers.
_TOY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
# Layers instead of 80, of which the student has 7, and of 32, of which it has 16: DeepSpeed takes time for each.
LAYERS_OF_LARGE, LAYERS_OF_OTHERS = 9, 18
# Of the training split and of the held-out one.
_EXAMPLES = 24, 4  # of each benchmark with choices: a quarter of 24 is one question with five examples
_PASSAGES = 8, 2  # with two questions each, so that each can be the other's example


def write_inputs(folder: Path, config: Config) -> None:
    """Writes the inputs that a config names into `folder`, the working directory in which the config is used."""
    assert config.teacher.path is not None
    _write_model(folder / config.teacher.path, config.teacher.path)
    _write_relations(folder, config)
    if config.corpus.source == "files":
        texts = [_sentence(number, 24) for number in range(60)]
        _write_text(folder / "data" / "text" / "part" / "text.parquet", pa.table({"text": texts}))
    else:
        tasks = config.tasks
        _write_choices(folder / tasks.arc_challenge, ("ARC-Challenge-Train.jsonl", "ARC-Challenge-Dev.jsonl"), 4)
        _write_choices(folder / tasks.commonsense_qa, ("train_rand_split.jsonl", "dev_rand_split.jsonl"), 5)
        _write_piqa(folder / tasks.piqa)
        _write_mmlu(folder / tasks.mmlu)
        _write_squad(folder / tasks.squad_v2)


def _sentence(number: int, length: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=length))


def _write_model(folder: Path, name: str) -> None:
    shapes: dict[str, Any] = {**KNOWN_MODELS.get(name.lower(), {}), **_TOY}
    shapes["num_hidden_layers"] = LAYERS_OF_LARGE if shapes["num_hidden_layers"] > 32 else LAYERS_OF_OTHERS
    words = [*WORDS, *_MARKS]
    shapes |= {"vocab_size": len(words) + 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes))
    with torch.no_grad():  # random weights of the usual size predict all tokens equally
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        # A random model predicts few of its words: those with relations must be among them, to get senses.
        model.lm_head.weight[2 : 2 + len(_RELATED)] *= 4
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = word_tokenizer(words)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)


def _write_relations(folder: Path, config: Config) -> None:
    for name in config.lexicon.dict2vec:
        _write(folder / name, "".join(f"{one} {other}\n" for one, other in SYNONYMS))
    for name in config.lexicon.wiktionary:
        entries = (
            {"word": one, "lang": "English", "senses": [{"antonyms": [{"word": other}]}]} for one, other in ANTONYMS
        )
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress("\n".join(map(json.dumps, entries)).encode()))
    if config.lexicon.morpholex is not None:
        workbook = Workbook()
        for row in (["Word", "POS", "MorphoLexSegm"], ["unhappy", "JJ", "<un<{(happy)}"], ["happy", "JJ", "{(happy)}"]):
            workbook.active.append(row)
        workbook.save(folder / config.lexicon.morpholex)


def _write_choices(folder: Path, files: tuple[str, str], num_choices: int) -> None:
    for split, name in enumerate(files):
        _write(folder / name, "\n".join(json.dumps(each) for each in _choice_questions(split, num_choices)))


def _choice_questions(split: int, num_choices: int) -> Iterator[dict[str, Any]]:
    for number in range(_EXAMPLES[split]):
        words = _sentence(number + 1000 * split, 6).split()
        choices = [{"text": words[place], "label": "ABCDE"[place]} for place in range(num_choices)]
        answer = "ABCDE"[number % num_choices]
        question = {"stem": _sentence(number + 1000 * split, 8), "choices": choices}
        yield {"id": f"{split}-{number}", "question": question, "answerKey": answer}


def _write_piqa(folder: Path) -> None:
    for split, name in enumerate(("train", "valid")):
        goals = [
            {"goal": _sentence(number + 1000 * split, 7), "sol1": WORDS[number], "sol2": WORDS[number + 1]}
            for number in range(_EXAMPLES[split])
        ]
        _write(folder / f"{name}.jsonl", "\n".join(map(json.dumps, goals)))
        _write(folder / f"{name}-labels.lst", "".join(f"{number % 2}\n" for number in range(_EXAMPLES[split])))


def _write_mmlu(folder: Path) -> None:
    files = {"auxiliary_train/more.csv": _EXAMPLES[0], "dev/old_towns_dev.csv": 5, "test/old_towns_test.csv": 8}
    for split, (name, count) in enumerate(files.items()):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            for number in range(count):
                shown = _sentence(number + 1000 * split, 4).split()
                writer.writerow([_sentence(number + 1000 * split, 9), *shown, "ABCD"[number % 4]])


def _write_squad(folder: Path) -> None:
    for split, name in enumerate(("train-v2.0.json", "dev-v2.0.json")):
        paragraphs = []
        for number in range(_PASSAGES[split]):
            passage = _sentence(number + 1000 * split, 14)
            answers = [{"text": passage.split()[3], "answer_start": 0}] if number % 2 else []
            asked = [
                {"id": f"{split}-{number}", "answers": answers, "is_impossible": not answers},
                {"id": f"{split}-{number}-other", "answers": [{"text": passage.split()[7], "answer_start": 0}]},
            ]
            for place, question in enumerate(asked):
                question["question"] = _sentence(number + 2000 + 4000 * place + 1000 * split, 5)
            paragraphs.append({"context": passage, "qas": asked})
        _write(folder / name, json.dumps({"version": "v2.0", "data": [{"title": "toys", "paragraphs": paragraphs}]}))


def _write_text(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
