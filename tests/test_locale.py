"""A terminal whose encoding lacks characters that are printed."""

import io
import os
import runpy
import subprocess
import sys

import pytest
from config_files import write_config
from repository import REPOSITORY

from dskd.__main__ import main
from dskd.cli.program import run

HELP = [["--help"], ["config"], *([verb, "--help"] for verb in ("compare", "plan", "senses", "config", "status"))]


@pytest.fixture(params=["ascii", "latin-1"])
def terminal(request, monkeypatch):
    """Runs an action with standard output and error in an encoding that refuses what it lacks; returns its result, or
    what it exited with, and what it printed."""

    def show(action):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=request.param) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            try:
                code = action()
            except SystemExit as ended:
                code = ended.code
            for stream in streams:
                stream.flush()
        return code, *(stream.buffer.getvalue().decode(request.param) for stream in streams)

    return show


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_every_verb_prints_whatever_the_encoding(terminal, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["dskd", *arguments])
    code, printed, _ = terminal(main)
    assert not code
    assert printed


@pytest.mark.parametrize("program", sorted((REPOSITORY / "launcher").glob("*.py")), ids=lambda path: path.stem)
def test_every_program_prints_its_help_with_examples_whatever_the_encoding(terminal, monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program.name, "--help"])
    code, printed, _ = terminal(lambda: runpy.run_path(str(program), run_name="__main__"))
    assert not code
    for part in ("examples:", "--config FILE", "section.key=value"):
        assert part in printed


def test_a_message_keeps_its_characters_as_escapes(terminal, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dskd", "config", "--config", "→"])
    code, _, error = terminal(main)
    assert code == 2
    assert "\\u2192" in error


def test_a_path_that_the_locale_cannot_encode_is_refused_with_the_remedy(tmp_path):
    """Python chooses UTF-8 mode by itself in the locale C, so the test switches it off."""
    config = write_config(tmp_path / "c.yaml", {"workdir": f"{tmp_path}/→", "teacher": {"path": "t"}})
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "dskd", "status", "--config", str(config)]
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert "The locale's encoding is " in ended.stderr
    assert "set LC_ALL=C.UTF-8" in ended.stderr


def test_a_unicode_bug_keeps_its_traceback_in_a_utf8_locale():
    def fail():
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "ours")

    with pytest.raises(UnicodeDecodeError):
        run(fail)
