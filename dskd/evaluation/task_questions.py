"""The questions of a benchmark under a config, the same on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dskd.config import Config
from dskd.corpus.tasks.benchmarks import Benchmark, Example
from dskd.corpus.tasks.prompts import Question, digest_of, with_shots
from dskd.corpus.tasks.reading import read_examples
from dskd.distributed.collectives import gather_json
from dskd.errors import UserError
from dskd.random_numbers import derived_seed, random_bits


@dataclass(frozen=True)
class Task:
    """A benchmark under a config: its questions and their digest."""

    benchmark: Benchmark
    questions: Sequence[Question]
    digest: str

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return self.benchmark.name


def load_task(config: Config, benchmark: Benchmark) -> Task:
    """Loads the questions of the evaluated split, each with the few-shot examples of its prompt. Raises a UserError
    when the benchmark's data is missing or not in its format.
    """
    settings = config.tasks
    path = getattr(settings, benchmark.name)
    examples = _draw(read_examples(benchmark, path, benchmark.evaluated), benchmark, settings.limit, settings.seed)
    num_shots, own_passage = benchmark.shots(settings), benchmark.shows_own_passage(settings)
    pool_split = benchmark.evaluated if own_passage else benchmark.shots_from
    pool = read_examples(benchmark, path, pool_split) if num_shots else []
    questions = list(with_shots(benchmark, examples, pool, num_shots, settings.seed, own_passage=own_passage))
    return Task(benchmark, questions, digest_of(questions))


def _draw(examples: list[Example], benchmark: Benchmark, limit: int | None, seed: int) -> list[Example]:
    """Returns at most `limit` examples of each subject, drawn at random, in their original order."""
    if limit is None:
        return examples
    drawn = random_bits(derived_seed(seed, benchmark.name, "limit"), torch.arange(len(examples))).tolist()
    of_subject: dict[str, list[int]] = {}
    for number in sorted(range(len(examples)), key=drawn.__getitem__):
        of_subject.setdefault(examples[number].subject, []).append(number)
    return [examples[number] for number in sorted(n for numbers in of_subject.values() for n in numbers[:limit])]


def require_same_data(config: Config, tasks: dict[str, Task]) -> None:
    """Raises a UserError if a rank finds other data of a task than rank 0."""
    digests = gather_json({name: task.digest for name, task in tasks.items()})
    for name in tasks:
        others = [rank for rank, of_rank in enumerate(digests) if of_rank[name] != digests[0][name]]
        if others:
            raise UserError(
                f"tasks.{name}: rank {others[0]} and rank 0 find different data under {getattr(config.tasks, name)!r}; "
                "put the same files on all nodes",
                known_to_all_ranks=True,
            )
