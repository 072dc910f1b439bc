"""Judges from outside: questions of benchmarks, answered with the choice that a model finds most likely.

As in lm-evaluation-harness's tasks for ARC and PIQA the prompt is "Question: …", a line break and "Answer:", and a
choice follows after a space. NAME is the accuracy of the most likely choice, NAME_norm that of the most likely one by
its number of characters (`acc` and `acc_norm`), NAME_n the number of questions, and NAME_chance the score of chance.
CommonsenseQA has the same prompt here.

The choices of a question share its tokens: they follow each other in one row, and none sees another. Shapes: n rows,
T tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.quality.teacher import Student, Teacher
from dskd.corpus.tasks.benchmarks import BENCHMARKS, Example
from dskd.corpus.tasks.reading import read_examples
from dskd.errors import UserError
from dskd.random_numbers import derived_seed, random_bits

_ARC = BENCHMARKS["arc_challenge"]
_FILES = {
    "arc_easy": dataclasses.replace(_ARC, files={"validation": ("ARC-Easy-Dev.jsonl",)}, hub_config="ARC-Easy"),
    **{name: BENCHMARKS[name] for name in ("arc_challenge", "piqa", "commonsense_qa")},
}
QUESTIONS = tuple(_FILES)
_PROMPT = "Question: {}\nAnswer:"
_MOST = 150  # questions of a benchmark: a standard error of .04, and seconds for a student
_LONGEST = 80  # tokens of a question with all its choices
_CHUNK = 128


class _Scored(NamedTuple):
    """The tokens of choices, each with the place that predicts it."""

    row: torch.Tensor  # [m]
    position: torch.Tensor  # [m]
    token: torch.Tensor  # [m]
    choice: torch.Tensor  # [m], counted over all rows


@dataclass
class Questions:
    """Questions of one benchmark with their choices."""

    name: str
    input_ids: torch.Tensor  # [n, T], padded with 0
    position_ids: torch.Tensor  # [n, T]: every choice follows its question
    parts: torch.Tensor  # [n, T]: 0 question, 1 and up choices, -1 padding
    scored: _Scored
    row_of_choice: torch.Tensor  # [c]
    characters: torch.Tensor  # [c]
    is_right: torch.Tensor  # [c] bool

    @classmethod
    def read(cls, name: str, folder: str, teacher: Teacher) -> "Questions":
        """Reads the validation split of a benchmark from a folder, and draws those that count.

        Raises:
            UserError: when its files are missing or damaged.
        """
        examples = read_examples(_FILES[name], folder, "validation")
        order = random_bits(derived_seed(0, name, "questions"), torch.arange(len(examples))).argsort(stable=True)
        found: list[tuple[Example, list[int], list[list[int]]]] = []
        for number in order.tolist():
            question, choices = _tokens(examples[number], teacher)
            if question and len(question) + sum(map(len, choices)) <= _LONGEST and len(found) < _MOST:
                found.append((examples[number], question, choices))
        if not found:
            raise UserError(f"--questions {name}={folder}: no question has {_LONGEST} tokens or fewer with its choices")
        return cls._packed(name, found)

    @classmethod
    def _packed(cls, name: str, found: Sequence[tuple[Example, list[int], list[list[int]]]]) -> "Questions":
        size = len(found), max(len(question) + sum(map(len, choices)) for _, question, choices in found)
        tokens, positions, parts = torch.zeros(size).long(), torch.zeros(size).long(), torch.full(size, -1)
        scored: list[tuple[int, int, int, int]] = []
        choices_found: list[tuple[int, int, bool]] = []
        for row, (example, question, choices) in enumerate(found):
            start = len(question)
            tokens[row, :start] = torch.tensor(question)
            positions[row, :start] = torch.arange(start)
            parts[row, :start] = 0
            right = _FILES[name].labels.index(example.answers[0])
            for number, (text, choice) in enumerate(zip(example.choices, choices, strict=True)):
                place = slice(start, start + len(choice))
                tokens[row, place] = torch.tensor(choice)
                positions[row, place] = torch.arange(len(question), len(question) + len(choice))
                parts[row, place] = number + 1
                predictors = [len(question) - 1, *range(start, start + len(choice) - 1)]
                scored += [(row, at, token, len(choices_found)) for at, token in zip(predictors, choice, strict=True)]
                choices_found.append((row, len(text), number == right))
                start += len(choice)
        rows, characters, is_right = (torch.tensor(column) for column in zip(*choices_found, strict=True))
        columns = (torch.tensor(column) for column in zip(*scored, strict=True))
        return cls(name, tokens, positions, parts, _Scored(*columns), rows, characters, is_right)

    def attention_mask(self, at: torch.Tensor) -> torch.Tensor:
        """Returns which positions each position of the rows `at` sees: its own part before it, and the question."""
        parts = self.parts[at]
        same = parts.unsqueeze(-1) == parts.unsqueeze(-2)
        visible = same | ((parts >= 0).unsqueeze(-1) & (parts == 0).unsqueeze(-2))
        return (visible & torch.ones(visible.shape[1:], dtype=torch.bool).tril()).unsqueeze(1)

    def measure(self, student: Student, states: torch.Tensor) -> dict[str, float]:
        """Returns {measure: value} of a student whose upper layers get these `states` [n, T, D]."""
        chances = self.log_likelihoods(student, states)
        scores = zip(self.measures, (chances, chances / self.characters), strict=True)
        shares = {name: sum(self._are_right(values)) / len(self.input_ids) for name, values in scores}
        return shares | {f"{self.name}_n": len(self.input_ids), f"{self.name}_chance": self.chance}

    @torch.no_grad()
    def log_likelihoods(self, student: Student, states: torch.Tensor) -> torch.Tensor:
        """Returns the log-likelihood [c] of every choice after its question."""
        parts = torch.arange(len(self.input_ids)).split(16)
        last = torch.cat([student(states[at], self.position_ids[at], self.attention_mask(at)) for at in parts])
        scored, matrix = self.scored, student.output_matrix
        # A place that predicts the first tokens of several choices has one normaliser.
        places, place = (scored.row * last.shape[1] + scored.position).unique(return_inverse=True)
        hidden = last.flatten(0, 1)[places]
        normalisers = torch.cat([F.linear(part, matrix).logsumexp(-1) for part in hidden.split(_CHUNK)])
        of_tokens = (hidden[place] * matrix[scored.token]).sum(-1) - normalisers[place]
        return torch.zeros(len(self.row_of_choice)).index_add_(0, scored.choice, of_tokens.cpu())

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its measures."""
        return self.name, f"{self.name}_norm"

    @property
    def chance(self) -> float:
        """The expected score of chance."""
        return float((1 / torch.bincount(self.row_of_choice).float()).mean())

    def _are_right(self, scores: torch.Tensor) -> Iterator[bool]:
        for row in range(len(self.input_ids)):
            choices = (self.row_of_choice == row).nonzero().squeeze(-1)
            yield bool(self.is_right[choices[scores[choices].argmax()]])


def _tokens(example: Example, teacher: Teacher) -> tuple[list[int], list[list[int]]]:
    """Returns the tokens of the prompt and of each choice; no prompt if its tokens depend on what follows."""
    prompt = _PROMPT.format(example.question)
    question = teacher.tokenizer.encode(prompt)
    whole = [teacher.tokenizer.encode(f"{prompt} {choice}") for choice in example.choices]
    if any(tokens[: len(question)] != question or len(tokens) == len(question) for tokens in whole):
        return [], []
    return question, [tokens[len(question) :] for tokens in whole]


def folder_of(place: str) -> tuple[str, Path]:
    """Returns the benchmark and the folder of a place such as `piqa=FOLDER`.

    Raises:
        UserError: when it is not in this form, or there is no such benchmark or folder.
    """
    name, is_named, folder = place.partition("=")
    path = Path(folder).expanduser()
    if not is_named or not path.is_dir():
        raise UserError(f"--questions {place}: expected BENCHMARK=FOLDER with a folder that exists")
    if name not in _FILES:
        raise UserError(f"--questions {name}=…: there is no such benchmark; expected {', '.join(_FILES)}")
    return name, path.resolve()
