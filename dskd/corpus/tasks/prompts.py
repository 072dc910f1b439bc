"""Few-shot prompts: an instruction, examples with their answers, and a question (docs/method.md, section 5).

With the tokenizer's chat template, an example is a user turn and an assistant turn. The instruction is at the beginning
of the first user turn, because not every template has system turns. A tokenizer without a template gets plain text:
instruction, examples and question, separated by empty lines, with each answer after its `Answer:`.

The examples shown with a question are a function of seed, task and question, so all models get the same ones.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dskd.artifacts.hashing import digest_of_json
from dskd.corpus.tasks.benchmarks import Benchmark, Example, normalize
from dskd.corpus.template_options import NOT_THINKING, TEMPLATE_OPTIONS
from dskd.errors import UserError
from dskd.random_numbers import derived_seed


@dataclass(frozen=True)
class Question:
    """A question and the examples shown before it; the same for all models."""

    benchmark: Benchmark
    example: Example
    shots: tuple[Example, ...]

    @property
    def identity(self) -> list[Any]:
        """Returns the data that affects the prompt or the right answers, as JSON-like values."""
        *shown, (last, _) = self._turns(len(self.shots))
        turns = [list(turn) for turn in shown]
        return [self.example.name, self._instruction, turns, last, list(self.example.answers)]

    def messages(self, num_shots: int) -> list[dict[str, str]]:
        """Returns the prompt as chat messages, with the last `num_shots` examples."""
        messages = []
        *shown, (last, _) = self._turns(num_shots)
        for text, answer in shown:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": last})
        messages[0]["content"] = f"{self._instruction}\n\n{messages[0]['content']}"
        return messages

    def plain(self, num_shots: int) -> str:
        """Returns the prompt as plain text, for a model without a chat template, with the last `num_shots` examples."""
        *shown, (last, _) = self._turns(num_shots)
        return "\n\n".join([self._instruction, *(f"{text} {answer}" for text, answer in shown), last])

    def _turns(self, num_shots: int) -> list[tuple[str, str]]:
        """Returns the last `num_shots` examples and the question, each with its answer.

        A passage that examples share with the question appears only in the first of their turns.
        """
        shown = [*self.shots[len(self.shots) - num_shots :], self.example]
        turns = []
        for number, example in enumerate(shown):
            is_repeated = number > 0 and shown[number - 1].passage == example.passage == self.example.passage
            turns.append((_question_text(self.benchmark, example, has_passage=not is_repeated), example.gold))
        return turns

    @property
    def _instruction(self) -> str:
        subject = self.example.subject
        return self.benchmark.instruction.format(subject=f" about {subject}" if subject else "")


def _question_text(benchmark: Benchmark, example: Example, *, has_passage: bool) -> str:
    lines = [f"Passage: {example.passage}"] if example.passage and has_passage else []
    lines.append(f"{benchmark.question_label}: {example.question}")
    lines += [f"{label}. {choice}" for label, choice in zip(benchmark.labels, example.choices, strict=False)]
    return "\n".join([*lines, "Answer:"])


def digest_of(questions: Sequence[Question]) -> str:
    """Returns the identity of a task: a digest of all its prompts and right answers."""
    return digest_of_json([question.identity for question in questions])


def with_shots(
    benchmark: Benchmark,
    examples: Sequence[Example],
    pool: Sequence[Example],
    num_shots: int,
    seed: int,
    *,
    own_passage: bool = False,
) -> Iterator[Question]:
    """Yields each example as a question, preceded by `num_shots` examples of its subject from the pool.

    Examples of the question's own group are never shown, because they could give the answer away. If the pool has
    exactly `num_shots` examples, as MMLU's does, they keep its order.

    With `own_passage`, the examples shown are others about the question's passage that have an answer, as in the
    paper's program. They can be fewer than `num_shots`, or none, if the passage has no more. Examples whose answer
    contains the question's, or is contained in it, are not shown.

    Raises:
        UserError: when the pool has fewer than `num_shots` examples; not with `own_passage`.
    """
    if own_passage:
        yield from _with_shots_of_the_passage(benchmark, examples, pool, num_shots, seed)
        return
    pools: dict[str, list[Example]] = {}
    for candidate in pool:
        pools.setdefault(candidate.subject, []).append(candidate)
    groups = {subject: [candidate.group for candidate in members] for subject, members in pools.items()}
    for example in examples:
        candidates = pools.get(example.subject, [])
        chosen: list[int] = []
        if num_shots:
            order = _order(len(candidates), num_shots, seed, benchmark.name, "shots", example.name)
            others = (number for number in order if groups[example.subject][number] != example.group)
            chosen = list(itertools.islice(others, num_shots))
        if len(chosen) < num_shots:
            about = f" about {example.subject}" if example.subject else ""
            raise UserError(
                f"tasks.{benchmark.name}: a prompt shows {num_shots} examples{about}, but there are only {len(chosen)} "
                f"to choose from; lower tasks.{'choice_shots' if benchmark.is_choice else 'squad_shots'}, or add data"
            )
        yield Question(benchmark, example, tuple(candidates[number] for number in chosen))


def _with_shots_of_the_passage(
    benchmark: Benchmark, examples: Sequence[Example], pool: Sequence[Example], num_shots: int, seed: int
) -> Iterator[Question]:
    of_passage: dict[str, list[Example]] = {}
    for candidate in pool:
        if candidate.answers:
            of_passage.setdefault(candidate.passage, []).append(candidate)
    for example in examples:
        candidates = [
            candidate
            for candidate in of_passage.get(example.passage, [])
            if candidate.name != example.name and not _gives_away(candidate, example)
        ]
        order = _order(len(candidates), num_shots, seed, benchmark.name, "shots", example.name)
        yield Question(benchmark, example, tuple(candidates[number] for number in itertools.islice(order, num_shots)))


def _gives_away(shot: Example, example: Example) -> bool:
    """Returns True when the answer shown with `shot` contains a right answer of `example`, or is contained in one."""
    shown = f" {normalize(shot.gold)} "
    right = [f" {normalize(answer)} " for answer in example.answers]
    return shot.question == example.question or any(shown in answer or answer in shown for answer in right)


def _order(count: int, needed: int, seed: int, *parts: str) -> Iterator[int]:
    """Yields each number below `count` once, in an order that depends on `seed` and `parts`.

    The order is ascending if all numbers are needed, that is if `count` is at most `needed`.
    """
    if count <= needed:
        yield from range(count)
        return
    seen: set[int] = set()
    for turn in itertools.count():
        if len(seen) == count:
            return
        number = derived_seed(seed, *parts, turn) % count
        if number not in seen:
            seen.add(number)
            yield number


@dataclass(frozen=True)
class Prompt:
    """A question in the form that a model reads."""

    text: str
    input_ids: list[int]
    num_shots: int  # fewer than the question has, if not all fit
    is_cut: bool  # True if even the question alone does not fit; `input_ids` then lack its beginning

    @property
    def sha256(self) -> str:
        """Returns the identity of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Prompter:
    """A writer of prompts for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def has_template(self) -> bool:
        """Returns True if the tokenizer has a chat template, so that prompts are chats."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def format(self) -> str:
        """Returns the form of the prompts: `plain`, or the digest of the chat template, with the date if it asks for
        one in a format of its own.
        """
        if not self.has_template:
            return "plain"
        template = self.tokenizer.chat_template
        # Templates that do not ask keep the digest that results of earlier versions have: their prompts are the same.
        asks = "strftime_now" in str(template)
        return digest_of_json([template, TEMPLATE_OPTIONS["date_string"]] if asks else template)

    def text(self, question: Question, num_shots: int | None = None) -> str:
        """Returns the prompt as the text whose tokens the model reads. Raises a UserError when the chat template raises
        an error for these turns.
        """
        num_shots = len(question.shots) if num_shots is None else num_shots
        return self._chat(question.messages(num_shots)) if self.has_template else question.plain(num_shots)

    def request(self, text: str) -> str:
        """Returns a user's request as the text whose tokens the model reads: a chat, or `text` itself if there is no
        chat template. Raises a UserError when the chat template raises an error.
        """
        return self._chat([{"role": "user", "content": text}]) if self.has_template else text

    def _chat(self, messages: list[dict[str, str]]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS, **NOT_THINKING
            )
        except Exception as error:  # templates can raise any kind of error
            raise UserError(
                f"the tokenizer's chat template refuses turns of user and assistant ({type(error).__name__}: {error}); "
                "correct it, or remove it from the tokenizer's folder: prompts are plain then"
            ) from None
        # The tokenizer adds its start token to every text; with the template's own one there would be two.
        return text.removeprefix(self._own_start) if self._own_start else text

    def prompt(self, question: Question, max_tokens: int | None) -> Prompt:
        """Returns the prompt in at most `max_tokens` tokens.

        If it is longer, it loses its first examples, one by one, and then the beginning of the text.
        """
        for num_shots in range(len(question.shots), -1, -1):
            text = self.text(question, num_shots)
            ids = self.tokens(text)
            if max_tokens is None or len(ids) <= max_tokens:
                break
        is_cut = max_tokens is not None and len(ids) > max_tokens
        return Prompt(text, ids[-max_tokens:] if max_tokens is not None else ids, num_shots, is_cut)

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens of a prompt, without an end-of-text token if the tokenizer adds one."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids

    @cached_property
    def _own_start(self) -> str:
        """Returns the text of the token that the tokenizer puts before every text; empty if it puts none there."""
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        start = self.tokenizer.bos_token
        return start if start and ids[:1] == [self.tokenizer.bos_token_id] and len(ids) > 1 else ""
