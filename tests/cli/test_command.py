"""The `dskd` command: its verbs, their help, and overrides anywhere on the command line."""

import importlib.metadata
import re
import sys

import pytest
from repository import REPOSITORY

from dskd.__main__ import PROGRAMS
from dskd.cli.program import build_parser, parse

CONFIG = str(REPOSITORY / "configs" / "toy.yaml")


@pytest.mark.parametrize("program", sorted(path.stem for path in (REPOSITORY / "launcher").glob("*.py")))
def test_a_program_given_as_a_verb_is_refused_with_its_command(dskd, program):
    code, _, error = dskd(program, "--config", CONFIG)
    launcher = "python" if program == "pipeline" else "deepspeed"
    assert code == 2
    assert f"`{launcher} launcher/{program}.py --config FILE`" in error


def test_the_version_is_that_of_the_package(dskd):
    assert dskd("--version") == (0, f"dskd {importlib.metadata.version('dskd')}\n", "")


@pytest.mark.parametrize(
    "verb", ["lexicon", "config", "student", "export", "status", "wordnet", "smollm2", "compare", "plan", "senses"]
)
def test_the_help_of_a_verb_has_examples(dskd, verb):
    code, printed, _ = dskd(verb, "--help")
    assert code == 0
    assert f"\n  dskd {verb}" in printed.split("examples:")[1]


@pytest.mark.parametrize("argument", ["loss.margin=1", "--run-names"])
def test_overrides_and_run_names_need_a_config_file(dskd, argument):
    code, printed, error = dskd("config", argument)
    assert (code, printed) == (2, "")
    assert error == f"error: {argument} needs --config FILE\n"


def test_run_names_are_printed_one_a_line(dskd):
    assert dskd("config", "--config", CONFIG, "--run-names") == (0, "kd\nkd-hidden\ndskd\n", "")
    _, printed, _ = dskd("config", "--config", CONFIG, "--run-names", "seeds=[0, 1]")
    assert printed.splitlines()[:2] == ["kd-s0", "kd-s1"]
    assert dskd("config", "--config", CONFIG, "--run-names", "seeds=[0, 0]")[:2] == (2, "")


@pytest.mark.parametrize(
    "line",
    [
        "train.steps=7 loss.margin=2 --config FILE",
        "--config FILE train.steps=7 loss.margin=2",
        "train.steps=7 --config FILE loss.margin=2",
    ],
)
def test_overrides_may_be_anywhere_on_a_command_line(dskd, line):
    code, printed, error = dskd("config", *line.replace("FILE", CONFIG).split())
    assert (code, error) == (0, "")
    assert "steps: 7\n" in printed
    assert "margin: 2.0\n" in printed


@pytest.mark.parametrize("line", ["run=kd lexicon --config FILE", "--config FILE status", "--config=FILE status"])
def test_overrides_and_config_before_the_verb_are_refused_clearly(dskd, line):
    code, printed, error = dskd(*line.replace("FILE", CONFIG).split())
    assert (code, printed) == (2, "")
    assert "put --config and overrides after the verb: `dskd VERB --config FILE section.key=value`" in error


@pytest.mark.parametrize(
    ("line", "form"),
    [("inspect --config FILE word good", "inspect WHAT"), ("senses run=kd geometry --config FILE", "senses ACTION")],
)
def test_config_before_the_action_of_a_verb_is_refused_clearly(dskd, line, form):
    code, printed, error = dskd(*line.replace("FILE", CONFIG).split())
    assert (code, printed) == (2, "")
    assert f"put --config and overrides after the verb: `dskd {form} --config FILE section.key=value`" in error


def test_the_launchers_option_may_come_before_the_verb(dskd):
    assert dskd("--local_rank=0", "config", "--config", CONFIG, "--run-names")[0] == 0


def test_comparing_without_an_unknown_evaluation_names_those_that_exist(dskd):
    code, printed, error = dskd("compare", "--config", CONFIG, "--without", "picqa")
    assert (code, printed) == (2, "")
    assert re.search("argument --without: invalid choice: 'picqa' .choose from '?evaluation'?, '?lexical", error)


def test_overrides_of_a_program_may_follow_any_option(monkeypatch):
    parser = build_parser(None)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--models", nargs="+")
    line = "evaluate.py run=a --force seed=1 --tasks piqa tasks.limit=2 mmlu --config FILE seed=2"
    monkeypatch.setattr(sys, "argv", line.split())
    args = parse(parser, "tasks", "models")
    assert (args.tasks, args.models, args.force) == (["piqa", "mmlu"], None, True)
    assert args.overrides == ["run=a", "seed=1", "seed=2", "tasks.limit=2"]


def test_an_option_without_names_may_precede_overrides(monkeypatch):
    for overrides in ([], ["tasks.limit=2"]):
        parser = build_parser(None)
        parser.add_argument("--tasks", nargs="*")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", "FILE", "--tasks", *overrides])
        args = parse(parser, "tasks")
        assert (args.tasks, args.overrides) == ([], overrides)


@pytest.mark.parametrize("words", [["--nonsense"], ["seed=1", "--nonsense", "seed=2"]])
def test_unknown_options_are_refused(dskd, words):
    code, printed, error = dskd("config", "--config", CONFIG, *words)
    assert (code, printed) == (2, "")
    assert error.startswith("usage: dskd config ")
    assert "unrecognized arguments: --nonsense" in error


def test_a_verb_without_a_config_takes_no_overrides(dskd):
    code, printed, error = dskd("wordnet", "seed=1")
    assert (code, printed) == (2, "")
    assert "unrecognized arguments: seed=1" in error


def test_the_programs_of_launcher_are_known_to_the_command():
    assert set(PROGRAMS) == {path.stem for path in (REPOSITORY / "launcher").glob("*.py")}
