"""Writes blocks of texts with a server that has OpenAI's chat completions, many requests at a time.

Such a server draws tokens in its own way, so the same requests can get other texts the next time. What may be better a
moment later (no connection, a time-out, 408, 409, 425, 429, 5xx, an answer that breaks off) is tried again.
"""

import contextlib
import itertools
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests import Response, Session

from dskd.config import Config, CorpusConfig
from dskd.config.data import SERVER_KEY_VARIABLE
from dskd.console import progress_bar, say
from dskd.corpus.template_options import NOT_THINKING
from dskd.corpus.written.blocks import note_writer, read_writer, write_block
from dskd.corpus.written.prompts import END_OF_THOUGHTS, THOUGHTS, Prompter
from dskd.corpus.written.requests import Request
from dskd.errors import OutageError, UserError, first_line

T = TypeVar("T")
_WAITS_S = (1, 2, 4, 8, 16, 32, 60, 60)  # before each further try
_FIRST_TRIES = 3  # of these waits, until the server has answered once
_LONGEST_WAIT_S = 120  # that a server may ask for
_CONNECTS_WITHIN_S, _ANSWERS_WITHIN_S = 10, 600
_MAY_PASS = (408, 409, 425, 429)
_NOT_UNDERSTOOD = (400, 422)
_SHOWN_CHARACTERS = 300
_WRONG_URLS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidHeader,
)


class _TransientError(Exception):
    """A failure that another try may not meet; `wait_s` is how long the server asks to wait, if it does."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _RefusedRequestError(UserError):
    """The refusal of a request that the server does not understand."""


class Server:
    """A server with OpenAI's chat completions, and the model to use there."""

    def __init__(self, corpus: CorpusConfig) -> None:
        """Takes the section `corpus` of a config that names a server."""
        assert corpus.server is not None, "called only if corpus.server is set"
        path = urlsplit(corpus.server).path
        self._url = corpus.server if path else f"{corpus.server}/v1"
        self._model = corpus.server_model
        self._sampling = {
            "max_tokens": corpus.max_new_tokens,
            "temperature": corpus.temperature,
            "top_p": corpus.top_p,
        }
        self._key = os.environ.get(SERVER_KEY_VARIABLE, "").strip()
        self._has_answered = self._is_down = False
        self.may_think = False  # True if the server refuses the wish for answers without thoughts

    def find_model(self) -> str:
        """Returns the name of the model: the configured one or, if there is none, the only one of the server.

        Raises:
            UserError: when the server names none or several, or refuses to.
            OutageError: when it does not answer.
        """
        if self._model is None:
            with Session() as session:
                found = self._retried(session, "GET", "models", None, threading.Event())
            try:
                names = [str(model["id"]) for model in found["data"]]
            except (KeyError, TypeError):
                names = []
            if len(names) != 1:
                has = f"has {len(names)} models ({', '.join(names[:5])}{', …' * (len(names) > 5)})" if names else ""
                raise UserError(
                    f"corpus.server: {self._url} {has or 'names no models'}; set corpus.server_model to the teacher's "
                    "name there"
                )
            self._model = names[0]
        return self._model

    def ask(self, session: Session, question: str, seed: int, stopping: threading.Event) -> str:
        """Returns the answer to a question, asking for one without thoughts unless the server refuses that wish.

        Raises:
            UserError: when the server refuses the request.
            OutageError: when it does not answer, also after several tries.
        """
        body = {
            "model": self.find_model(),
            "messages": [{"role": "user", "content": question}],
            "seed": seed % 2**31,  # some servers take no more bits
            "stream": False,
            **self._sampling,
        }
        if not self.may_think:
            with contextlib.suppress(_RefusedRequestError):
                return self._complete(session, body | {"chat_template_kwargs": NOT_THINKING}, stopping)
        text = self._complete(session, body, stopping)
        self.may_think = True  # only now: the refusal can have had another reason
        return text

    def _complete(self, session: Session, body: dict[str, Any], stopping: threading.Event) -> str:
        text: str = self._retried(session, "POST", "chat/completions", body, stopping, _content_of)
        return text

    def _retried(
        self,
        session: Session,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        stopping: threading.Event,
        read: Callable[[Response], Any] = Response.json,
    ) -> Any:
        for tries in itertools.count(1):
            try:
                answer = self._once(session, method, path, body, read)
            except _TransientError as error:
                # Fail at once if the server's address is wrong.
                waits = _WAITS_S if self._has_answered else _WAITS_S[:_FIRST_TRIES]
                if tries > len(waits) or stopping.is_set():
                    raise OutageError(
                        f"corpus.server: {self._url} {error}, {tries} times; start the server, or correct the URL. "
                        "The same command continues after the texts that are written"
                    ) from None
                if not self._is_down:
                    self._is_down = True
                    say(f"  {self._url} {error}; trying again")
                stopping.wait(min(error.wait_s or waits[tries - 1], _LONGEST_WAIT_S))
            else:
                self._has_answered, self._is_down = True, False
                return answer
        raise AssertionError("there is no last try")

    def _once(
        self,
        session: Session,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Response], Any],
    ) -> Any:
        def authorize(prepared: Any) -> Any:
            if self._key:  # otherwise `requests` may take another one, from ~/.netrc
                prepared.headers["Authorization"] = f"Bearer {self._key}"
            return prepared

        try:
            response = session.request(
                method,
                f"{self._url}/{path}",
                json=body,
                auth=authorize,
                timeout=(_CONNECTS_WITHIN_S, _ANSWERS_WITHIN_S),
                allow_redirects=False,
            )
            if response.status_code == 200:
                return read(response)
        except requests.Timeout:
            raise _TransientError("does not answer in time") from None
        except (*_WRONG_URLS, UnicodeError) as error:
            raise UserError(f"corpus.server: {self._url}: {self._hidden(first_line(error))}; correct the URL") from None
        except ValueError:  # the JSON breaks off, or is none
            raise _TransientError("answers with something that is not JSON") from None
        except requests.RequestException as error:
            reason = self._hidden(_reason(error))
            if "CERTIFICATE" in reason:
                raise UserError(
                    f"corpus.server: {self._url}: its certificate is not trusted ({reason}); set REQUESTS_CA_BUNDLE to "
                    "a file with the certificates of your authority"
                ) from None
            raise _TransientError(f"cannot be reached ({reason})") from None
        raise self._refusal(response, path)

    def _refusal(self, response: Response, path: str) -> Exception:
        """Returns the error for a status that is not 200."""
        status, where = response.status_code, f"corpus.server: {self._url}/{path}"
        reason = f"{status}: {self._hidden(_reason_of_refusal(response))}"
        if status in _MAY_PASS or status >= 500:
            asked = response.headers.get("Retry-After", "")
            return _TransientError(f"answers {reason}", float(asked) if asked.isdecimal() else None)
        if status in (401, 403):
            key = "the key in" if self._key else "no key, as there is none in"
            return UserError(
                f"{where} refuses the request ({reason}); it got {key} the environment variable "
                f"{SERVER_KEY_VARIABLE}; set it to one that the server accepts"
            )
        if status == 404:
            return UserError(
                f"{where} is not there ({reason}); correct the URL, whose usual end is /v1, or corpus.server_model"
                + (f", now {self._model}" if self._model else "")
            )
        kind = _RefusedRequestError if status in _NOT_UNDERSTOOD else UserError
        return kind(f"{where} refuses the request ({reason}); change what it names, or use another server")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def write_with_server(
    config: Config, prompter: Prompter, asked: Sequence[Request], left: Sequence[range], folder: Path
) -> str:
    """Writes the blocks `left` of the requests `asked` into `folder`, and returns the name of the server's model.

    Raises:
        UserError: when the server refuses a request, `corpus.server_model` does not tell which of its models to use, or
            another model wrote the complete blocks.
        OutageError: when it does not answer, also after several tries. Complete blocks are kept.
    """
    server = Server(config.corpus)
    model = server.find_model()
    if sum(map(len, left)) < len(asked):
        _require_writer(config, folder, model)
    note_writer(folder, model)
    say(f"  {config.corpus.server} writes with {model}")
    numbers = [number for block in left for number in block]
    block_of = {number: block for block in left for number in block}
    texts: dict[range, dict[int, str]] = {block: {} for block in left}

    def ask(session: Session, number: int, stopping: threading.Event) -> str:
        request = asked[number]
        text = server.ask(session, prompter.question(request), request.seed(config.seed), stopping)
        return prompter.answer(text, request, may_think=server.may_think)

    with progress_bar(total=len(asked), initial=len(asked) - len(numbers), label="writing", unit="texts") as bar:
        for number, text in _in_parallel(ask, numbers, config.corpus.server_requests):
            block = block_of[number]
            texts[block][number] = text
            bar.update()
            if len(texts[block]) == len(block):
                of_block = texts.pop(block)
                write_block(folder, block, [of_block[each] for each in block])
    return model


def _require_writer(config: Config, folder: Path, model: str) -> None:
    """Checks that the model that wrote the complete blocks in `folder` is this one.

    Raises:
        UserError: naming both.
    """
    before = read_writer(folder)
    if before not in (None, model):
        raise UserError(
            f"corpus.server: {config.corpus.server} now has the model {model}, and {before} has written the texts so "
            f"far; start the server with {before} again, or remove {folder}, so that {model} writes all of them"
        )


def _in_parallel(
    ask: Callable[[Session, int, threading.Event], T], numbers: Sequence[int], threads: int
) -> Iterator[tuple[int, T]]:
    """Yields (number, answer) as answers arrive, with `threads` questions at a time. Raises the first error.

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


def _content_of(response: Response) -> str:
    """Returns the text of a chat completion, also of one that a server sends as a stream although it need not.

    Raises a _TransientError if the answer breaks off, or is something else.
    """
    if response.headers.get("Content-Type", "").startswith("text/event-stream"):
        return _content_of_stream(response.content.decode("utf-8", "replace"))
    answer = response.json()
    try:
        message = answer["choices"][0]["message"]
        content = message["content"]
    except (KeyError, IndexError, TypeError):
        raise _TransientError(f"answers with something that is not a chat completion ({_shown(answer)})") from None
    return _with_thoughts(_thoughts_of(message), content if isinstance(content, str) else "")


def _content_of_stream(stream: str) -> str:
    thoughts: list[str] = []
    parts: list[str] = []
    for line in stream.splitlines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return _with_thoughts("".join(thoughts), "".join(parts))
        event = json.loads(data)
        if not isinstance(event, dict) or event.get("error"):
            raise _TransientError(f"fails while it answers ({_shown(event)})")
        for choice in itertools.islice(event.get("choices") or (), 1):
            delta = choice.get("delta") or {}
            thoughts.append(_thoughts_of(delta))
            parts.append(delta.get("content") or "")
            if choice.get("finish_reason"):
                return _with_thoughts("".join(thoughts), "".join(parts))
    raise _TransientError("breaks off its answer")


def _thoughts_of(message: dict[str, Any]) -> str:
    """Returns the thoughts that the server has separated from an answer, if it has."""
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return thoughts if isinstance(thoughts, str) else ""


def _with_thoughts(thoughts: str, content: str) -> str:
    """Returns an answer with its thoughts as the model itself writes them, of which :class:`Prompter` knows the end."""
    if not thoughts:
        return content
    return f"{THOUGHTS}{thoughts}{END_OF_THOUGHTS}{content}" if content else f"{THOUGHTS}{thoughts}"


def _reason(error: Exception) -> str:
    """Returns the operating system's reason why there is no connection or, without one, the first line of the error."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError) and at.strerror:
            return at.strerror
        at = at.__cause__ or at.__context__
    return first_line(error)[:_SHOWN_CHARACTERS]


def _reason_of_refusal(response: Response) -> str:
    try:
        answer = response.json()
    except ValueError:
        return " ".join(response.text.split())[:_SHOWN_CHARACTERS] or str(response.reason)
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    return _shown(error.get("message", error) if isinstance(error, dict) else error)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split())[:_SHOWN_CHARACTERS]
