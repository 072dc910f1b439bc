"""The `dskd` command: what it says to those who look for something in it."""

import importlib.metadata
import sys

import pytest
from conftest import REPOSITORY

from dskd.__main__ import main

CONFIG = str(REPOSITORY / "configs" / "quickstart.yaml")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command; returns its exit code, and what it printed to standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dskd", *arguments])
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.mark.parametrize("program", sorted(path.stem for path in (REPOSITORY / "launcher").glob("*.py")))
def test_a_program_that_is_looked_for_among_the_verbs_is_named(call, program):
    code, _, error = call(program, "--config", CONFIG)
    launcher = "python" if program == "pipeline" else "deepspeed"
    assert code == 2
    assert f"`{launcher} launcher/{program}.py --config FILE`" in error


def test_the_version_is_that_of_the_package(call):
    assert call("--version") == (0, f"dskd {importlib.metadata.version('dskd')}\n", "")


@pytest.mark.parametrize("verb", ["lexicon", "config", "student", "export", "status", "wordnet", "compare", "plan"])
def test_every_verb_teaches_its_use(call, verb):
    code, printed, _ = call(verb, "--help")
    assert code == 0
    assert f"\n  dskd {verb}" in printed.split("examples:")[1]


@pytest.mark.parametrize("argument", ["loss.margin=1", "--run-names"])
def test_what_needs_a_config_is_not_passed_over_without_one(call, argument):
    code, printed, error = call("config", argument)
    assert (code, printed) == (2, "")
    assert f"{argument} is of a config file, and there is none: add --config FILE" in error


def test_the_runs_of_a_config_are_listed_a_line_each(call):
    assert call("config", "--config", CONFIG, "--run-names") == (0, "kd\nkd-hidden\ndskd\n", "")
    _, printed, _ = call("config", "--config", CONFIG, "--run-names", "seeds=[0, 1]")
    assert printed.splitlines()[:2] == ["kd-s0", "kd-s1"]
    assert call("config", "--config", CONFIG, "--run-names", "seeds=[0, 0]")[:2] == (2, "")
