"""Writes blocks of texts with a server that has OpenAI's chat completions, many requests at once.

Such a server draws tokens in its own way, so the same requests can get other texts the next time.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from requests import Session

from dskd.config import Config, CorpusConfig
from dskd.console import progress_bar, say
from dskd.corpus.template_options import NOT_THINKING
from dskd.corpus.written.answers import read_models, read_text
from dskd.corpus.written.blocks import note_writer, read_writer, write_block
from dskd.corpus.written.connection import Connection, RefusedRequestError
from dskd.corpus.written.prompts import WritingPrompter
from dskd.corpus.written.requests import Request
from dskd.errors import UserError

T = TypeVar("T")
_EMPTY_ANSWERS = 8  # the run ends if none of its first answers, this many, has text


class Server:
    """A server with OpenAI's chat completions, and the model to use there."""

    def __init__(self, corpus: CorpusConfig) -> None:
        """Takes the section `corpus` of a config that names a server; raises the errors of :class:`Connection`."""
        assert corpus.server is not None, "called only if corpus.server is set"
        self._connection = Connection(corpus.server)
        self._model = corpus.server_model
        self._sampling = {
            "max_tokens": corpus.max_new_tokens,
            "temperature": corpus.temperature,
            "top_p": corpus.top_p,
        }
        self.shown, self.hidden = self._connection.shown, self._connection.hidden
        self.may_think = False  # True if the server refuses requests for answers without thoughts

    def find_model(self) -> str:
        """Returns the name of the model: the configured one or, if there is none, the only one of the server.

        Raises:
            UserError: when the server names none or several, or refuses to.
            OutageError: when it does not answer.
        """
        if self._model is None:
            with Session() as session:
                names = self._connection.request(session, "GET", "models", None, read_models, threading.Event())
            if len(names) != 1:
                listed = self.hidden(", ".join(names[:5]))
                has = f"has {len(names)} models ({listed}{', …' * (len(names) > 5)})" if names else "names no models"
                raise UserError(
                    f"corpus.server: {self.shown} {has}; set corpus.server_model to the teacher's name there"
                )
            self._model = names[0]
        return self._model

    def ask(self, session: Session, question: str, seed: int, stopping: threading.Event) -> str:
        """Returns the answer to a question, asking for one without thoughts unless the server refuses such requests.

        Raises:
            UserError: when the server refuses the request.
            OutageError: when it does not answer after several tries.
        """
        body = {
            "model": self.find_model(),
            "messages": [{"role": "user", "content": question}],
            "seed": seed % 2**31,  # some servers take no more bits
            "stream": False,
            **self._sampling,
        }
        if not self.may_think:
            with contextlib.suppress(RefusedRequestError):
                return self._complete(session, body | {"chat_template_kwargs": NOT_THINKING}, stopping)
        text = self._complete(session, body, stopping)
        self.may_think = True  # only now: the refusal can have had another reason
        return text

    def _complete(self, session: Session, body: dict[str, Any], stopping: threading.Event) -> str:
        text: str = self._connection.request(session, "POST", "chat/completions", body, read_text, stopping)
        return text


def write_with_server(
    config: Config, prompter: WritingPrompter, requests: Sequence[Request], left: Sequence[range], folder: Path
) -> str:
    """Writes the blocks `left` of the `requests` into `folder`, and returns the name of the server's model.

    Raises:
        UserError: when the server refuses a request, `corpus.server_model` does not tell which of its models to use,
            another model wrote the complete blocks, or the first answers have no text.
        OutageError: when it does not answer after several tries. Complete blocks are kept.
    """
    server = Server(config.corpus)
    model = server.find_model()
    if sum(map(len, left)) < len(requests):
        _require_writer(server, folder, model)
    note_writer(folder, model)
    say(f"  {server.shown} writes with {server.hidden(model)}")
    numbers = [number for block in left for number in block]
    block_of = {number: block for block in left for number in block}
    texts: dict[range, dict[int, str]] = {block: {} for block in left}
    first_answers = min(_EMPTY_ANSWERS, len(requests))
    is_empty: list[bool] = []  # of the first answers

    def ask(session: Session, number: int, stopping: threading.Event) -> tuple[str, bool]:
        request = requests[number]
        text = server.ask(session, prompter.question(request), request.seed(config.seed), stopping)
        return prompter.answer(text, request, may_think=server.may_think), not text.strip()

    with progress_bar(total=len(requests), initial=len(requests) - len(numbers), label="writing", unit="texts") as bar:
        for number, (text, has_none) in _in_parallel(ask, numbers, config.corpus.server_requests):
            if len(is_empty) < first_answers:
                is_empty.append(has_none)
                if len(is_empty) == first_answers and all(is_empty):
                    raise _no_text(server, model, first_answers)
            block = block_of[number]
            texts[block][number] = text
            bar.update()
            if len(texts[block]) == len(block):
                of_block = texts.pop(block)
                write_block(folder, block, [of_block[each] for each in block])
    return model


def _require_writer(server: Server, folder: Path, model: str) -> None:
    """Checks that the model that wrote the complete blocks in `folder` is this one.

    Raises:
        UserError: naming both.
    """
    before = read_writer(folder)
    if before not in (None, model):
        raise UserError(
            server.hidden(
                f"corpus.server: {server.shown} now has the model {model}, and {before} has written the texts so far; "
                f"start the server with {before} again, or remove {folder}, so that {model} writes all of them"
            )
        )


def _no_text(server: Server, model: str, count: int) -> UserError:
    return UserError(
        f"corpus.server: the first {count} answers of {server.hidden(model)} at {server.shown} have no text, so the "
        "others are likely to have none. Raise corpus.max_new_tokens if the model thinks before it answers; otherwise "
        "ask the server a question by hand, start it with the model's chat template, or name another model in "
        "corpus.server_model. These answers are not kept: the same command asks again"
    )


def _in_parallel(
    ask: Callable[[Session, int, threading.Event], T], numbers: Sequence[int], threads: int
) -> Iterator[tuple[int, T]]:
    """Yields (number, answer) as answers arrive, with `threads` questions at once. Raises the first error.

    The threads end with the process: an answer that may take minutes does not keep a stopped program alive.
    """
    todo, lock, stopping = iter(numbers), threading.Lock(), threading.Event()
    arrived: queue.SimpleQueue[tuple[int, Any, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        with Session() as session:
            while not stopping.is_set():
                with lock:
                    number = next(todo, None)
                if number is None:
                    return
                try:
                    arrived.put((number, ask(session, number, stopping), None))
                except Exception as error:  # raised again by the reader
                    arrived.put((number, None, error))
                    return

    for _ in range(min(threads, len(numbers))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in numbers:
            number, answer, error = arrived.get()
            if error is not None:
                raise error
            yield number, answer
    finally:
        stopping.set()
