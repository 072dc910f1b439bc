"""Requests to servers that answer wrongly, slowly or not at all: real sockets in this process."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from requests import Session

from dskd.corpus.written import connection
from dskd.corpus.written.answers import read_models, read_text
from dskd.corpus.written.connection import Connection
from dskd.errors import OutageError, UserError

KEY = "sk-/0123456789=abcdef"  # with signs that URLs escape
BODY = {"model": "teacher", "messages": []}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(connection, "_WAITS_S", (0.01,) * 8)
    monkeypatch.setattr(connection, "_STARTS_WITHIN_S", 0.3)
    monkeypatch.setenv("DSKD_SERVER_KEY", KEY)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.contextmanager
def _listening(answer: Callable[[socket.socket], Any]) -> Iterator[str]:
    """Yields the address of a socket whose connections `answer` gets, after the head of a request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

        def handle(client: socket.socket) -> None:
            with contextlib.suppress(OSError), client:
                client.recv(65536)
                answer(client)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _http(content: Any, status: str = "200 OK", kind: str = "application/json", headers: str = "") -> bytes:
    data = (content if isinstance(content, str) else json.dumps(content)).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
    return f"{head}{headers}\r\n".encode() + data


def _ask(url: str, method: str = "POST") -> Any:
    path, read = ("models", read_models) if method == "GET" else ("chat/completions", read_text)
    with Session() as session:
        return Connection(url).request(session, method, path, BODY, read, threading.Event())


def _answer_to(content: bytes) -> Any:
    with _listening(lambda client: client.sendall(content)) as address:
        return _ask(f"http://{address}")


def _refusal_of(content: bytes) -> str:
    with pytest.raises(UserError) as error:
        _answer_to(content)
    return str(error.value)


@pytest.mark.parametrize(
    "key", [KEY, "sk-%2F0123456789%3Dabcdef", "sk-\\/0123456789=abcdef", "sk\\u002D/0123456789=abcdef"]
)
@pytest.mark.parametrize("before", ["", "x" * 290, "x" * 279])
@pytest.mark.parametrize(
    "answer",
    [
        lambda text: _http({"error": {"message": text}}),
        lambda text: _http(f"data: {json.dumps({'error': text})}\n\n", kind="text/event-stream"),
        lambda text: _http({"error": {"message": text}}, "400 Bad Request"),
        lambda text: _http({"detail": [text]}, "503 Unavailable"),
        lambda text: _http(text, "401 Unauthorized", "text/plain"),
    ],
)
def test_the_key_is_in_no_message(monkeypatch, capsys, answer, before, key):
    """Also not a part of it, where a long message is cut."""
    monkeypatch.setattr(connection, "_STARTS_WITHIN_S", 0.05)
    message = _refusal_of(answer(f"{before}bad key {key} given")) + capsys.readouterr().err
    assert "bad key" in message or before
    assert "sk" not in message.replace("dskd", "")
    assert "0123" not in message


def test_a_path_with_a_key_is_in_no_message(capsys):
    with _listening(lambda client: client.sendall(_http("", "500 Oh"))) as address, pytest.raises(OutageError) as error:
        _ask(f"http://{address}/hidden-key/v1")
    assert "hidden-key" not in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("key", ["sk-€uro", "sk-a\nsk-b", "sk a", "sk-\x7f"])
def test_a_key_that_cannot_be_sent_is_named_without_its_value(monkeypatch, key):
    monkeypatch.setenv("DSKD_SERVER_KEY", key)
    with pytest.raises(UserError, match="variable DSKD_SERVER_KEY has a space, a line break or a character") as error:
        Connection("http://127.0.0.1:1")
    assert "sk" not in str(error.value).replace("dskd", "")


@pytest.mark.parametrize("event", [{"choices": [{"delta": "x"}]}, {"choices": ["x"]}, {"choices": 5}])
def test_a_malformed_stream_is_not_a_completion(event):
    message = _refusal_of(_http(f"data: {json.dumps(event)}\n\n", kind="text/event-stream"))
    assert "answers with something that is not a chat completion" in message


@pytest.mark.parametrize("answer", [5, [], {"choices": "x"}, {"choices": [{"message": "x"}]}])
def test_a_malformed_answer_is_not_a_completion(answer):
    assert "answers with something that is not a chat completion" in _refusal_of(_http(answer))


def test_a_text_may_come_in_parts():
    parts = [{"type": "text", "text": "It is "}, {"type": "image_url"}, {"type": "text", "text": "hot."}]
    assert _answer_to(_http({"choices": [{"message": {"content": parts}}]})) == "It is hot."


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_answer_has_to_be_complete_in_time(monkeypatch, method):
    """Also one of which a byte comes each moment, and one that never begins."""
    monkeypatch.setattr(connection, "_ANSWERS_WITHIN_S", {"GET": 0.4, "POST": 0.4})
    ended = threading.Event()

    def drip(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not ended.wait(0.05):
            client.sendall(b" ")

    for answer in (drip, lambda client: ended.wait(20)):
        with _listening(answer) as address, pytest.raises(OutageError, match="does not answer in time, once"):
            _ask(f"http://{address}", method)
    ended.set()


@pytest.mark.parametrize("status", ["503 Loading", "429 Too Many"])
def test_a_server_that_starts_is_waited_for(monkeypatch, capsys, status):
    monkeypatch.setattr(connection, "_STARTS_WITHIN_S", 60)
    answers = iter([*[_http("", status, headers="Retry-After: 0\r\n")] * 12])
    whole = _http({"choices": [{"message": {"content": "Here."}}]})
    with _listening(lambda client: client.sendall(next(answers, whole))) as address:
        assert _ask(f"http://{address}") == "Here."
    assert "trying again for up to 1 minutes, as it may be starting" in capsys.readouterr().err


def test_a_server_that_does_not_listen_yet_is_waited_for(monkeypatch):
    monkeypatch.setattr(connection, "_STARTS_WITHIN_S", 60)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    whole = _http({"data": [{"id": "teacher"}]})

    def start() -> None:
        time.sleep(0.3)  # more than three tries
        with socket.create_server(address) as listener, listener.accept()[0] as client:
            client.recv(65536)
            client.sendall(whole)

    threading.Thread(target=start, daemon=True).start()
    assert _ask(f"http://{address[0]}:{address[1]}", "GET") == ["teacher"]


@pytest.mark.parametrize("proxy", ["puser:pw@127.0.0.1:bad", "http://puser:pw@", "http://puser:pw@127.0.0.1:99999"])
def test_a_malformed_proxy_is_named_without_its_value(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(UserError, match="the environment variable http_proxy has no usable URL of a proxy") as error:
        _ask("http://example.invalid")
    assert "pw" not in str(error.value)
    assert "puser" not in str(error.value)


def test_https_to_a_server_without_tls_is_refused_at_once():
    asked = []

    def answer(client: socket.socket) -> None:
        asked.append(client)
        client.sendall(_http("", "400 Bad Request"))

    with _listening(answer) as address, pytest.raises(UserError, match=r"has no TLS.*use http://") as error:
        _ask(f"https://{address}")
    assert (error.value.exit_code, len(asked)) == (2, 1)


@pytest.mark.parametrize("content", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_an_answer_that_ends_early_is_called_so(content):
    assert "/v1 breaks off its answer, 4 times" in _refusal_of(content)


def test_a_server_of_something_else_is_called_so():
    assert "/v1 answers with something that is not HTTP, 4 times" in _refusal_of(b"SSH-2.0-OpenSSH_9.6\r\n")
