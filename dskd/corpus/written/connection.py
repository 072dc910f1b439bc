"""Requests to a server: time limits, repeated attempts, and errors that never show the server's key.

A request is repeated after a failure that may pass: no connection, a time-out, 408, 409, 425, 429, 5xx, or an answer
that breaks off.
"""

import http.client
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import requests
from requests import Response, Session
from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

from dskd.config.server_url import SERVER_KEY_VARIABLE, shown_url
from dskd.console import say
from dskd.corpus.written.answers import UnreadableAnswerError
from dskd.errors import OutageError, UserError, first_line

_WAITS_S = (1, 2, 4, 8, 16, 32, 60, 60)  # before each further try
_FIRST_TRIES = 3  # of these waits, while the server has not answered once
_STARTS_WITHIN_S = 600  # for a server that loads its model: it refuses connections, or answers 503 or 429
_LONGEST_WAIT_S = 120  # that a server may ask for
_CONNECTS_WITHIN_S = 10
_ANSWERS_WITHIN_S = {"GET": 30, "POST": 600}  # in all, even if a byte comes each second
_MAY_PASS = (408, 409, 425, 429)
_MAY_BE_STARTING = (429, 503)
_NOT_UNDERSTOOD = (400, 422)
_SHOWN_CHARACTERS = 300
_WRONG_URLS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidHeader,
    UnicodeError,
)
_BROKEN_OFF = (
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    http.client.RemoteDisconnected,
    http.client.IncompleteRead,
    ConnectionResetError,
    ConnectionAbortedError,
    BrokenPipeError,
)
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL")


class _TransientError(Exception):
    """A failure that may pass, so the request is worth another try."""

    def __init__(self, reason: str, *, wait_s: float | None = None, may_be_starting: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # as long as the server asks to wait, if it does
        self.may_be_starting = may_be_starting


class RefusedRequestError(UserError):
    """The refusal of a request that the server does not understand."""


class Connection:
    """A connection to the API below a URL, with the key of the environment; many threads may use it."""

    def __init__(self, url: str) -> None:
        """Takes the value of `corpus.server`.

        Raises:
            UserError: when the key cannot be sent, or a proxy of the environment has no address.
        """
        self._url = url if urlsplit(url).path else f"{url}/v1"
        self._key = os.environ.get(SERVER_KEY_VARIABLE, "").strip()
        if any(not "!" <= character <= "~" for character in self._key):
            raise UserError(
                f"the environment variable {SERVER_KEY_VARIABLE} has a space, a line break or a character that is not "
                "ASCII, so no server can get it as a key; set it again, to the key alone"
            )
        # Each character of the key as it is, after backslashes as JSON may write it, or as URLs and JSON can escape it.
        self._spellings = re.compile(
            "".join(rf"\\*(?:{re.escape(each)}|(?i:(?:%|u00){ord(each):02x}))" for each in self._key)
        )
        self._proxy_variable = _proxy_variable(self._url)
        self._is_down = False
        self._answered: set[str] = set()  # the methods: a server can list its models and still not write
        self._started: dict[str, float] = {}
        self.shown = self.hidden(shown_url(self._url))

    def hidden(self, text: str) -> str:
        """Returns a text for a message: with *** in place of the key, even if JSON or a URL escapes it."""
        return self._spellings.sub("***", text) if self._key else text

    def request(
        self,
        session: Session,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Response], Any],
        stopping: threading.Event,
    ) -> Any:
        """Sends a request, more than once if necessary, and returns what `read` makes of the answer.

        Raises:
            UserError: when the server refuses the request (a RefusedRequestError if it does not understand it).
            OutageError: when it does not answer after several tries.
        """
        self._started.setdefault(method, time.monotonic())
        for tries in itertools.count(1):
            try:
                answer = self._once(session, method, path, body, read)
            except _TransientError as error:
                wait_s = self._wait_s(error, method, tries)
                if wait_s is None or stopping.is_set():
                    times = f"{tries} times" if tries > 1 else "once"
                    raise OutageError(
                        f"corpus.server: {self.shown} {error}, {times}; start the server, or correct the URL. "
                        "The same command continues after the texts that are written"
                    ) from None
                if not self._is_down:
                    self._is_down = True
                    is_patient = error.may_be_starting and method not in self._answered
                    how = f" for up to {_STARTS_WITHIN_S / 60:.0f} minutes, as it may be starting" if is_patient else ""
                    say(f"  {self.shown} {error}; trying again{how}")
                stopping.wait(wait_s)
            else:
                self._answered.add(method)
                self._is_down = False
                return answer
        raise AssertionError("there is no last try")

    def _wait_s(self, error: _TransientError, method: str, tries: int) -> float | None:
        """Returns the seconds to wait before the next try, None if there is to be none."""
        wait_s = min(error.wait_s or _WAITS_S[min(tries, len(_WAITS_S)) - 1], _LONGEST_WAIT_S)
        if method in self._answered:
            return wait_s if tries <= len(_WAITS_S) else None
        # A user who named a wrong server should not wait for minutes, but a server may take minutes to load its model.
        left = self._started[method] + _STARTS_WITHIN_S - time.monotonic()
        if left <= 0 or (tries > _FIRST_TRIES and not error.may_be_starting):
            return None
        return min(wait_s, left)

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

        limit_s = _ANSWERS_WITHIN_S[method]

        def send() -> Response:
            return session.request(
                method,
                f"{self._url}/{path}",
                json=body,
                auth=authorize,
                timeout=(min(_CONNECTS_WITHIN_S, limit_s), limit_s),
                allow_redirects=False,
            )

        try:
            response = _within(limit_s, send)
            if response.status_code == 200:
                return read(response)
        except (requests.Timeout, TimeoutError) as error:
            what = "accepts no connection" if isinstance(error, requests.ConnectTimeout) else "does not answer"
            raise _TransientError(f"{what} in time") from None
        except UnreadableAnswerError as error:
            raise _TransientError(self._cut(str(error))) from None
        except _WRONG_URLS as error:
            if self._proxy_variable is not None:
                raise _wrong_proxy(self._proxy_variable) from None
            raise UserError(f"corpus.server: {self.shown}: {self._cut(first_line(error))}; correct the URL") from None
        except requests.RequestException as error:
            raise self._failure(error) from None
        raise self._refusal(response, path, (body or {}).get("model"))

    def _failure(self, error: requests.RequestException) -> Exception:
        """Returns the error for a connection that cannot be made, or that breaks off."""
        causes, reason = _causes(error), _reason(error)
        if any(mark in str(cause).upper().replace(" ", "_") for cause in causes for mark in _NOT_TLS):
            return UserError(
                f"corpus.server: {self.shown}: what answers there has no TLS, so https:// is wrong; use http://"
            )
        if "CERTIFICATE" in reason:
            return UserError(
                f"corpus.server: {self.shown}: its certificate is not trusted ({self._cut(reason)}); set "
                "REQUESTS_CA_BUNDLE to a file with the certificates of your authority"
            )
        if any(isinstance(cause, _BROKEN_OFF) for cause in causes):
            return _TransientError("breaks off its answer")
        if any(isinstance(cause, http.client.HTTPException) for cause in causes):
            return _TransientError("answers with something that is not HTTP")
        through = f" through the proxy of {self._proxy_variable}" if self._proxy_variable else ""
        is_refused = any(isinstance(cause, ConnectionRefusedError) for cause in causes)
        return _TransientError(f"cannot be reached{through} ({self._cut(reason)})", may_be_starting=is_refused)

    def _refusal(self, response: Response, path: str, model: str | None) -> Exception:
        """Returns the error for a status that is not 200."""
        status, where = response.status_code, f"corpus.server: {self.shown}/{path}"
        reason = f"{status}: {self._cut(_reason_of_refusal(response))}"
        if status in _MAY_PASS or status >= 500:
            retry_after = response.headers.get("Retry-After", "")
            wait_s = float(retry_after) if retry_after.isdecimal() else None
            return _TransientError(f"answers {reason}", wait_s=wait_s, may_be_starting=status in _MAY_BE_STARTING)
        if status in (401, 403):
            key = "the key in" if self._key else "no key, as there is none in"
            return UserError(
                f"{where} refuses the request ({reason}); it got {key} the environment variable "
                f"{SERVER_KEY_VARIABLE}; set it to one that the server accepts"
            )
        if status == 404:
            return UserError(
                f"{where} is not there ({reason}); correct the URL, whose usual end is /v1, or corpus.server_model"
                + (f", now {self.hidden(model)}" if model else "")
            )
        kind = RefusedRequestError if status in _NOT_UNDERSTOOD else UserError
        return kind(f"{where} refuses the request ({reason}); change what it names, or use another server")

    def _cut(self, text: str) -> str:
        """Returns the beginning of a text as one line, without the key: part of a key would not be found any more."""
        return " ".join(self.hidden(text).split())[:_SHOWN_CHARACTERS]


def _within(limit_s: float, send: Callable[[], Response]) -> Response:
    """Returns what `send` returns; raises its error or, after `limit_s` seconds, a TimeoutError.

    `requests` only limits the time between two bytes. After a time-out the thread of the request runs on by itself.
    """
    answer: Future[Response] = Future()

    def work() -> None:
        try:
            answer.set_result(send())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer.result(limit_s)


def _proxy_variable(url: str) -> str | None:
    """Returns the environment variable with the proxy for a URL, None if there is none.

    Raises:
        UserError: when its value is not an address. It may hold a password, so the message does not show it.
    """
    proxy = select_proxy(url, get_environ_proxies(url))
    if proxy is None:
        return None
    names = [f"{urlsplit(url).scheme}_proxy", "all_proxy"]
    variable = next((each for name in names for each in (name, name.upper()) if os.environ.get(each)), names[0])
    try:
        parts = urlsplit(prepend_scheme_if_needed(proxy, "http"))
        is_address = bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, requests.RequestException):
        is_address = False
    if not is_address:
        raise _wrong_proxy(variable)
    return variable


def _wrong_proxy(variable: str) -> UserError:
    return UserError(
        f"the environment variable {variable} has no usable URL of a proxy; set it to http://HOST:PORT, unset it, or "
        "name the host of corpus.server in no_proxy"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """Returns an error and its causes, including those that a library keeps only as arguments."""
    causes: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        at = todo.pop(0)
        if isinstance(at, BaseException) and at not in causes:
            causes.append(at)
            todo += [at.__cause__, at.__context__, *at.args, getattr(at, "reason", None)]
    return causes


def _reason(error: Exception) -> str:
    """Returns the operating system's reason why there is no connection or, without one, the first line of the error."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return first_line(error)


def _reason_of_refusal(response: Response) -> str:
    """Returns what the server says in a refusal."""
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        return response.text if response.text.strip() else str(response.reason)
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    error = error.get("message", error) if isinstance(error, dict) else error
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
