"""A server writes the texts: a real HTTP server in this process, which answers as vLLM and `transformers serve` do."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow.parquet as pq
import pytest
from rank_processes import ONE_RANK
from small_teachers import NUM_SENSES, write_job

from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config.reading import load_config
from dskd.corpus.build import build_corpus
from dskd.corpus.written import blocks, connection
from dskd.corpus.written import write as writing
from dskd.corpus.written.write import write_texts
from dskd.errors import OutageError, UserError
from dskd.models.files.folder import find_teacher


def _completion(text: Any) -> dict:
    """Returns a chat completion with the fields that vLLM sends."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1764500000,
        "model": "teacher",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": []},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 50, "total_tokens": 70, "completion_tokens": 20},
    }


def _stream(text: str, *, ends: bool = True) -> str:
    """Returns the events that `transformers serve` sends, whatever was asked for."""
    deltas: list[dict] = [{"delta": {"role": "assistant"}}]
    deltas += [{"delta": {"content": part}} for part in re.findall(r"\S+\s*", text)]
    deltas += [{"delta": {}, "finish_reason": "stop"}] if ends else []
    return "".join(
        f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [{'index': 0, **delta}]})}\n\n"
        for delta in deltas
    )


class _Server(ThreadingHTTPServer):
    """A server that writes a sentence with the word; `replies` may replace the answer to request number n, from 0."""

    daemon_threads = True
    request_queue_size = 64  # with more connections at a time, the system would let each wait for a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.prefix = ["teacher"], "/v1"
        self.replies: Callable[[int], Any] = lambda number: None
        self.asked: list[dict] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: the client would acknowledge the first of two only after a while
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.add(self.headers.get("Authorization"))
        if self.path != f"{self.server.prefix}/models":
            return self._send(404, {"detail": "Not Found"})
        return self._send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != f"{self.server.prefix}/chat/completions":
            return self._send(404, {"detail": "Not Found"})
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            reply = self.server.replies(number)
        finally:
            with self.server.lock:
                self.server.at_once -= 1
        if reply is None:
            word = re.search(r'"(.+?)"', body["messages"][0]["content"])[1]
            reply = 200, _completion(f"Here the {word} of number {body['seed']} is used. And then")
        if reply == "hang up":
            self.close_connection = True
            return self.connection.close()
        return self._send(*reply)

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            if name == "Content-Type":
                self._headers_buffer = [line for line in self._headers_buffer if b"Content-Type" not in line]
            if name == "Content-Length":
                self._headers_buffer = [line for line in self._headers_buffer if b"Content-Length" not in line]
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection |= bool(headers and "Content-Length" in headers)  # the rest never comes


@pytest.fixture
def running(monkeypatch):
    monkeypatch.setattr(connection, "_WAITS_S", (0.01,) * 10)
    monkeypatch.setattr(connection, "_ANSWERS_WITHIN_S", {"GET": 20, "POST": 20})
    monkeypatch.setattr(connection, "_STARTS_WITHIN_S", 0.3)
    monkeypatch.delenv("DSKD_SERVER_KEY", raising=False)
    running = _Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def _config(tmp_path, running, *overrides, **corpus):
    path = write_job(tmp_path, texts_per_sense=4, server=running.url, **corpus)
    return load_config(path, list(overrides))


def _texts(config):
    return pq.read_table(config.path("written", "texts.parquet")).to_pylist()


def _check_whole(config):
    rows = _texts(config)
    assert len(rows) == 4 * NUM_SENSES
    for row in rows:
        assert row["text"].startswith(f"Here the {row['word']} of number "), row
    assert len({row["text"] for row in rows}) == len(rows)


def test_many_requests_at_a_time_and_every_answer_in_its_place(tmp_path, running):
    config = _config(tmp_path, running, "corpus.server_requests=8", "corpus.temperature=0.6")
    barrier = threading.Barrier(8)

    def wait_for_others(number):
        if number < 8:
            barrier.wait(20)  # breaks unless eight requests are there together

    running.replies = wait_for_others
    write_texts(config, ONE_RANK)
    _check_whole(config)
    assert running.most_at_once == 8
    body = running.asked[0]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("teacher", 0.6, 0.95, 20)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert read_manifest(config.path("written"), "written").facts["server_model"] == "teacher"
    build_corpus(config)
    assert read_manifest(config.path("corpus"), "corpus").facts["senses"]["with_text"] == NUM_SENSES


def test_what_fails_for_a_moment_is_tried_again(tmp_path, running, capsys):
    failures = {
        1: (503, {"error": {"message": "loading"}}, {"Retry-After": "0"}),
        2: (429, {"error": "too many"}, {}),
        3: "hang up",
        4: (200, '{"choices": [{"mess', {}),
        5: (200, _completion("Cut off.") | {"choices": []}, {}),
        6: (200, '{"id": 1}', {"Content-Length": "500"}),
        7: (500, "<html>Bad gateway</html>", {}),
        8: (200, _stream("A stream that breaks off", ends=False), {"Content-Type": "text/event-stream"}),
        9: (200, 'data: {"error": "out of memory"}\n\n', {"Content-Type": "text/event-stream; charset=utf-8"}),
    }
    running.replies = failures.get
    config = _config(tmp_path, running, "corpus.server_requests=2")
    write_texts(config, ONE_RANK)
    _check_whole(config)
    assert len(running.asked) >= 4 * NUM_SENSES + len(failures)
    assert "trying again" in capsys.readouterr().err


def test_an_answer_may_be_a_stream_or_nothing(tmp_path, running):
    sent = {"Content-Type": "text/event-stream; charset=utf-8"}
    running.replies = {
        0: (200, _stream("Streamed, with “signs”."), sent),
        1: (200, _stream("Until done.", ends=False) + "data: [DONE]\n\n", sent),
        2: (200, _completion(None)),
    }.get
    config = _config(tmp_path, running, "corpus.server_requests=1")
    write_texts(config, ONE_RANK)
    assert [row["text"] for row in _texts(config)][:3] == ["Streamed, with “signs”.", "Until done.", ""]


def test_an_outage_keeps_the_blocks_that_are_written_and_the_next_run_continues(tmp_path, running, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "_SMALLEST", 8)
    config = _config(tmp_path, running, "corpus.server_requests=1")
    running.replies = lambda number: (503, {"error": {"message": "down for repair"}}) if number >= 20 else None
    with pytest.raises(OutageError, match=r"answers 503: down for repair, 11 times; start the server") as error:
        write_texts(config, ONE_RANK)
    assert error.value.exit_code == 1
    assert not config.path("written").exists()
    asked = len(running.asked)
    running.replies = lambda number: None
    write_texts(config, ONE_RANK)
    assert "resuming: 2 of 7 blocks were written" in capsys.readouterr().err
    assert len(running.asked) - asked == 4 * NUM_SENSES - 16
    _check_whole(config)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            (401, {"error": {"message": "bad key sekret"}}),
            r"refuses the request \(401: bad key \*\*\*\); it got the key",
        ),
        ((403, "no"), "403: no"),
        ((404, {"error": {"message": "The model `x` does not exist."}}), "is not there .*does not exist.*now teacher"),
        ((307, "", {"Location": "http://elsewhere"}), "307"),
    ],
)
def test_a_refusal_ends_the_run_at_once(tmp_path, running, monkeypatch, reply, message):
    monkeypatch.setenv("DSKD_SERVER_KEY", "sekret")
    running.replies = lambda number: reply
    with pytest.raises(UserError, match=message) as error:
        write_texts(_config(tmp_path, running, "corpus.server_requests=1"), ONE_RANK)
    assert error.value.exit_code == 2
    assert len(running.asked) == 1
    assert running.keys == {"Bearer sekret"}
    assert "sekret" not in str(error.value)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, {"error": {"message": "max_tokens is too large"}}), "refuses the request .400: max_tokens is too large"),
        ((422, {"detail": "Unexpected keys: {'seed'}"}), "422: Unexpected keys"),
    ],
)
def test_a_request_that_is_not_understood_is_sent_once_more_without_the_wish_for_no_thoughts(
    tmp_path, running, reply, message
):
    running.replies = lambda number: reply
    with pytest.raises(UserError, match=message):
        write_texts(_config(tmp_path, running, "corpus.server_requests=1"), ONE_RANK)
    assert ["chat_template_kwargs" in body for body in running.asked] == [True, False]


def test_a_server_that_refuses_the_wish_for_no_thoughts_gets_it_once(tmp_path, running):
    running.replies = lambda number: (422, {"detail": "Unexpected keys"}) if number == 0 else None
    config = _config(tmp_path, running, "corpus.server_requests=1")
    write_texts(config, ONE_RANK)
    _check_whole(config)
    assert ["chat_template_kwargs" in body for body in running.asked] == [True] + [False] * 4 * NUM_SENSES


def test_thoughts_of_a_server_become_no_document(tmp_path, running):
    cut, whole = _completion(None), _completion("The car of an owner is here.")
    cut["choices"][0]["message"]["reasoning_content"] = "A car. It is hot."
    whole["choices"][0]["message"]["reasoning"] = "A car. It is hot."
    running.replies = {
        0: (200, _completion("<think>A car. It is hot. The user wants a")),
        1: (200, cut),
        2: (200, whole),
        3: (200, _completion("<think>A car.</think> The car of an owner is here.")),
    }.get
    config = _config(tmp_path, running, "corpus.server_requests=1")
    write_texts(config, ONE_RANK)
    assert [row["text"] for row in _texts(config)][:4] == ["<think>"] * 2 + ["The car of an owner is here."] * 2
    build_corpus(config)
    outcomes = read_manifest(config.path("corpus"), "corpus").facts["senses"]["outcomes"]
    assert outcomes["only thoughts"] == 2


def test_a_server_with_another_model_does_not_continue_the_texts_of_the_first(tmp_path, running, monkeypatch):
    monkeypatch.setattr(blocks, "_SMALLEST", 8)
    config = _config(tmp_path, running, "corpus.server_requests=1")
    running.replies = lambda number: (404, {"error": "no such model"}) if number >= 20 else None
    with pytest.raises(UserError, match="no such model"):
        write_texts(config, ONE_RANK)
    running.models, running.replies = ["other"], lambda number: None
    asked = len(running.asked)
    with pytest.raises(UserError, match=r"now has the model other, and teacher has written the texts so far; start"):
        write_texts(config, ONE_RANK)
    assert len(running.asked) == asked
    running.models = ["teacher"]
    write_texts(config, ONE_RANK)
    _check_whole(config)


def test_the_manifest_names_the_model_if_no_block_was_left_to_write(tmp_path, running, monkeypatch):
    config = _config(tmp_path, running)
    with monkeypatch.context() as context:
        context.setattr(writing, "_publish", _stop)
        with pytest.raises(KeyboardInterrupt):
            write_texts(config, ONE_RANK)
    asked, running.models = len(running.asked), ["other"]
    write_texts(config, ONE_RANK)
    assert len(running.asked) == asked
    assert read_manifest(config.path("written"), "written").facts["server_model"] == "teacher"


def _stop(*_):
    raise KeyboardInterrupt


def test_a_missing_key_is_named(tmp_path, running):
    running.replies = lambda number: (401, {"error": {"message": "no key"}})
    with pytest.raises(UserError, match="it got no key, as there is none in the environment variable DSKD_SERVER_KEY"):
        write_texts(_config(tmp_path, running), ONE_RANK)
    assert running.keys == {None}


def test_one_of_several_models_has_to_be_named(tmp_path, running, monkeypatch):
    """And that is refused before WordNet is read, which takes much longer."""
    running.models = ["first", "second"]
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"has 2 models \(first, second\); set corpus"):
        patch.setattr(writing, "find_senses", None)
        write_texts(_config(tmp_path, running), ONE_RANK)
    assert not running.asked
    config = load_config(tmp_path / "config.yaml", ["corpus.server_model=second", "corpus.max_senses=1"])
    write_texts(config, ONE_RANK)
    assert {body["model"] for body in running.asked} == {"second"}


def test_a_server_that_is_not_there_is_an_outage(tmp_path, running):
    config = _config(tmp_path, running)
    running.shutdown()
    running.server_close()
    with pytest.raises(
        OutageError, match=r"corpus.server: http://127.0.0.1:\d+/v1 cannot be reached .*refused.*\d times"
    ):
        write_texts(config, ONE_RANK)


def test_a_wrong_path_is_a_mistake(tmp_path, running):
    config = _config(tmp_path, running)
    wrong = config.corpus.model_copy(update={"server": f"{running.url}/v2"})
    with pytest.raises(UserError, match=r"/v2/models is not there .404: Not Found.; correct the URL"):
        write_texts(config.model_copy(update={"corpus": wrong}), ONE_RANK)


def test_a_server_without_texts_ends_the_run_and_the_same_command_asks_again(tmp_path, running):
    running.replies = lambda number: (200, _completion(""))
    config = _config(tmp_path, running, "corpus.server_requests=1")
    with pytest.raises(UserError, match=r"the first 8 answers of teacher at .* have no text.*Raise corpus.max_new"):
        write_texts(config, ONE_RANK)
    assert len(running.asked) in (8, 9)  # one may be on its way
    running.replies = lambda number: None
    write_texts(config, ONE_RANK)
    _check_whole(config)


def test_texts_that_cannot_be_used_have_to_be_written_again_with_force(tmp_path, running):
    """More senses would not help, and the same command would not ask again."""
    running.replies = lambda number: (200, _completion("No."))
    config = _config(tmp_path, running)
    write_texts(config, ONE_RANK)
    with pytest.raises(UserError, match=r"no train documents .*none of the .*write_texts.py --config FILE --force"):
        build_corpus(config)
    running.replies = lambda number: None
    asked = len(running.asked)
    write_texts(config, ONE_RANK)
    assert len(running.asked) == asked
    write_texts(config, ONE_RANK, force=True)
    _check_whole(config)


def test_the_manifest_has_no_path_that_may_hold_a_key_and_earlier_texts_stay_up_to_date(tmp_path, running, capsys):
    config = _config(tmp_path, running)
    of_path = config.corpus.model_copy(update={"server": f"{running.url}/sekret/v1"})
    hidden = config.model_copy(update={"corpus": of_path})
    running.prefix = "/sekret/v1"
    write_texts(hidden, ONE_RANK)
    path = config.path("written", "manifest.json")
    assert "sekret" not in path.read_text() + capsys.readouterr().err
    assert is_current(config.path("written"), writing.recipe(hidden, find_teacher(hidden)))
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"config": manifest["config"] | {"server": of_path.server}}))
    assert is_current(config.path("written"), writing.recipe(hidden, find_teacher(hidden)))
    assert not is_current(config.path("written"), writing.recipe(config, find_teacher(config)))
