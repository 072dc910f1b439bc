"""Definitions of the benchmarks: their splits, the labels of their choices, their instructions and their files.

An example is either a question with choices, whose answer is the label of the right choice, or a question about a
passage, with one or several texts that count as right answers, or without an answer.
"""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from dskd.config import TASKS, TasksConfig

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

LETTERS = "ABCDEFGHIJ"
NO_ANSWER = "No answer"
ALL = "all"


@dataclass(frozen=True)
class Example:
    """A question of a benchmark."""

    name: str  # its id in the benchmark, or its place in the files
    question: str
    answers: tuple[str, ...]  # the right label; without choices all right texts, or () if there is no answer
    choices: tuple[str, ...] = ()
    passage: str = ""
    subject: str = ""  # MMLU's

    @property
    def group(self) -> str:
        """Returns the passage or question that related examples share; a group is always on one side of a split."""
        return self.passage or self.question

    @property
    def gold(self) -> str:
        """Returns the answer shown when this example is part of a prompt."""
        return self.answers[0] if self.answers else NO_ANSWER


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: everything that its examples have in common."""

    name: str
    instruction: str  # with the placeholder `{subject}` if examples have one
    files: dict[str, tuple[str, ...]]  # {split: patterns of its published files; the first pattern with a match counts}
    evaluated: str = "validation"  # the split that scores are computed on
    shots_from: str = "train"  # the split that provides the examples in its prompts
    trained: str = "train"  # the split to train on
    hub_config: str | None = None
    labels: str = LETTERS  # labels of the choices, in order
    question_label: str = "Question"
    one_score_a_subject: bool = False  # the score is the mean over subjects of the mean over each one's examples

    @property
    def is_choice(self) -> bool:
        """Returns True if the answer is a label; the score is then an accuracy, otherwise a token F1."""
        return self.name != "squad_v2"

    @property
    def metric(self) -> str:
        """Returns the name of the metric whose mean is the score."""
        return "accuracy" if self.is_choice else "f1"

    def shots(self, settings: TasksConfig) -> int:
        """Returns the number of examples in a prompt."""
        return settings.choice_shots if self.is_choice else settings.squad_shots

    def new_tokens(self, settings: TasksConfig) -> int:
        """Returns the maximum number of tokens in a model's answer."""
        if self.name == "piqa" and settings.piqa_tokens is not None:
            return settings.piqa_tokens
        return settings.choice_tokens if self.is_choice else settings.squad_tokens

    def shows_own_passage(self, settings: TasksConfig) -> bool:
        """Returns True when a prompt's examples are about the passage of its question."""
        return not self.is_choice and settings.squad_shots_from == "same_passage"


_LETTER = "Answer the question with the letter of the right choice and nothing else."

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "arc_challenge",
            _LETTER,
            files={"train": ("ARC-Challenge-Train.jsonl",), "validation": ("ARC-Challenge-Dev.jsonl",)},
            hub_config="ARC-Challenge",
        ),
        Benchmark(
            "commonsense_qa",
            _LETTER,
            files={"train": ("train_rand_split.jsonl",), "validation": ("dev_rand_split.jsonl",)},
        ),
        Benchmark(
            "piqa",
            "Answer with the number of the solution that reaches the goal and nothing else.",
            files={"train": ("train.jsonl",), "validation": ("valid.jsonl", "dev.jsonl")},
            labels="01",
            question_label="Goal",
        ),
        Benchmark(
            "mmlu",
            "Answer the question{subject} with the letter of the right choice and nothing else.",
            evaluated="test",
            shots_from="dev",
            trained="auxiliary_train",
            files={
                "test": ("test/*_test.csv",),
                "dev": ("dev/*_dev.csv",),
                "auxiliary_train": ("auxiliary_train/*.csv",),
            },
            hub_config="all",
            one_score_a_subject=True,
        ),
        Benchmark(
            "squad_v2",
            "Answer the question with a few words of the passage and nothing else; if it does not answer the question, "
            f"with: {NO_ANSWER}",
            files={"train": ("train-v2.0.json",), "validation": ("dev-v2.0.json",)},
            hub_config="squad_v2",
            labels="",
        ),
    )
}
assert tuple(BENCHMARKS) == TASKS


def benchmarks_named(names: Sequence[str]) -> list[Benchmark]:
    """Returns the benchmarks with these names, or all if `all` is among the names, in the paper's order."""
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in names or ALL in names]


def normalize(text: str) -> str:
    """Normalizes a text as SQuAD's evaluation script does before it compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())
