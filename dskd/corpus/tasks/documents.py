"""`corpus.source: tasks`: turns the benchmarks' training splits into documents, one prompt each.

See docs/method.md, section 4. Training uses a share of each task's training split, or all of SQuAD's. The rest provides
the held-out documents, whose number is `corpus.validation_share` of the training documents. If the rest is too small,
training gets fewer. Splits that are used for evaluation are not read.

A hash orders the questions, and the two sides are parts of this order. Questions with the same text, or about the same
passage, are next to each other in it and on the same side. The examples in a prompt are from the prompt's own side.

The teacher may continue a prompt by the number of tokens that a model may answer with, or by
`annotation.continuation_tokens`, whichever is less.
"""

import hashlib
from collections.abc import Iterator

from dskd.artifacts.hashing import digest_of_json
from dskd.config import Config, TasksConfig
from dskd.corpus.files import Document
from dskd.corpus.tasks.benchmarks import Benchmark, Example, benchmarks_named
from dskd.corpus.tasks.prompts import Prompter, Question, digest_of, with_shots
from dskd.corpus.tasks.reading import read_examples
from dskd.models.files.folder import FindTeacher
from dskd.random_numbers import derived_seed


def inputs_of_tasks(config: Config, find: FindTeacher) -> dict[str, str]:
    """Returns {task: digest of its documents}, and under `prompts` the form of their prompts.

    `find` finds the teacher.
    """
    inputs = {"prompts": _prompter(config, find).format}
    for benchmark in benchmarks_named(config.corpus.tasks):
        sides = [digest_of(questions) for questions in _questions(config, benchmark)]
        inputs[benchmark.name] = digest_of_json([*sides, benchmark.new_tokens(config.tasks)])
    return inputs


def read_task_documents(config: Config, find: FindTeacher) -> tuple[Iterator[Document], Iterator[Document]]:
    """Returns the documents to train on and the held-out ones, task by task. Raises a UserError when a task's data is
    missing, or too small for its prompts.
    """
    sides: tuple[list[Question], list[Question]] = ([], [])
    for benchmark in benchmarks_named(config.corpus.tasks):
        for side, questions in zip(sides, _questions(config, benchmark), strict=True):
            side += questions
    prompter = _prompter(config, find)
    train, validation = (_documents(prompter, side, config.tasks) for side in sides)
    return train, validation


def split(
    benchmark: Benchmark, examples: list[Example], *, train_share: float, validation_share: float, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Splits examples, without splitting a group, into those to train on and those to hold out. Also returns those that
    held-out prompts may show: all not trained on.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    # Order the groups by a hash that does not depend on the order of the files.
    keyed = derived_seed(seed, benchmark.name, "split")
    order = [example for group in sorted(groups, key=lambda group: _hash(keyed, group)) for example in groups[group]]
    num_train = max(1, round(len(order) * train_share))
    num_held_out = max(1, round(num_train * validation_share))
    # Training ends at the first end of a group from `num_train` on that leaves enough to hold out; if there is none, at
    # the last end before that.
    ends = [number for number in range(1, len(order)) if order[number].group != order[number - 1].group]
    last = len(order) - num_held_out
    start = next(
        (end for end in ends if num_train <= end <= last), max((end for end in ends if end <= last), default=0)
    )
    stop = next((end for end in ends if end >= start + num_held_out), len(order))
    return order[:start], order[start:stop], order[start:]


def _questions(config: Config, benchmark: Benchmark) -> tuple[list[Question], list[Question]]:
    settings = config.tasks
    train, held_out, rest = split(
        benchmark,
        read_examples(benchmark, getattr(settings, benchmark.name), benchmark.trained),
        train_share=settings.train_share if benchmark.is_choice else 1.0,
        validation_share=config.corpus.validation_share,
        seed=settings.seed,
    )
    num_shots = benchmark.shots(settings)
    options = {"own_passage": benchmark.shows_own_passage(settings)}
    return (
        list(with_shots(benchmark, train, train, num_shots, settings.seed, **options)),
        list(with_shots(benchmark, held_out, rest, num_shots, settings.seed, **options)),
    )


def _documents(prompter: Prompter, questions: list[Question], settings: TasksConfig) -> Iterator[Document]:
    for question in questions:
        text = prompter.text(question)
        name = f"{question.benchmark.name}:{question.example.name}"
        yield Document(name, text, text, question.benchmark.new_tokens(settings))


def _prompter(config: Config, find: FindTeacher) -> Prompter:
    """Returns a prompter for the teacher's tokenizer.

    Without `teacher.path` the teacher will first be trained on these documents, and has no chat template.
    """
    if config.teacher.path is None:
        return Prompter(None)
    return Prompter(find().tokenizer)


def _hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()
