"""`corpus.source: tasks`: the benchmarks' training splits as documents, a prompt each (docs/method.md, section 4).

Of each task but SQuAD a share of the training split is trained on, and as many documents as `corpus.validation_share`
says are held out, from what is left of it; where nothing is left, training gives way. Nothing that is evaluated on is
read. Both sides are parts of one order, which a hash decides; questions with the same text, or about the same passage,
stand together in it and go to one side. The examples in a prompt are from its own side.

The teacher goes on with a prompt by as many tokens as a model may answer with, or as `annotation.continuation_tokens`
says, whichever is less.
"""

import hashlib
from collections.abc import Iterator

from dskd.artifacts.hashing import digest_of_json
from dskd.config import Config, TasksConfig
from dskd.corpus.files import Document
from dskd.corpus.tasks.benchmarks import Benchmark, Example, benchmarks_named
from dskd.corpus.tasks.prompts import Prompter, Question, digest_of, with_shots
from dskd.corpus.tasks.reading import read_examples
from dskd.models.folder import find_teacher
from dskd.random_numbers import derived_seed


def fingerprint(config: Config) -> dict[str, str]:
    """{task: digest of its documents}, and the form of their prompts."""
    inputs = {"prompts": _prompter(config).format}
    for benchmark in benchmarks_named(config.corpus.tasks):
        sides = [digest_of(questions) for questions in _questions(config, benchmark)]
        inputs[benchmark.name] = digest_of_json([*sides, benchmark.new_tokens(config.tasks)])
    return inputs


def read_task_documents(config: Config) -> tuple[Iterator[Document], Iterator[Document]]:
    """The documents to train on and those held out, task by task.

    Raises:
        UserError: when a task's data is missing, or too little for its prompts.
    """
    sides: tuple[list[Question], list[Question]] = ([], [])
    for benchmark in benchmarks_named(config.corpus.tasks):
        for side, questions in zip(sides, _questions(config, benchmark), strict=True):
            side += questions
    prompter = _prompter(config)
    train, validation = (_documents(prompter, side, config.tasks) for side in sides)
    return train, validation


def split(
    benchmark: Benchmark, examples: list[Example], *, train_share: float, validation_share: float, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Examples to train on, to hold out, and what held-out prompts may show: all that is not trained on."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    keyed = derived_seed(seed, benchmark.name, "split")
    order = [example for group in sorted(groups, key=lambda group: _hash(keyed, group)) for example in groups[group]]
    num_train = max(1, round(len(order) * train_share))
    num_held_out = max(1, round(num_train * validation_share))
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


def _prompter(config: Config) -> Prompter:
    """For the teacher's tokenizer; a teacher that is yet to be trained on these documents will have no template."""
    if config.teacher.path is None:
        return Prompter(None)
    return Prompter(find_teacher(config).load_tokenizer())


def _hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()
