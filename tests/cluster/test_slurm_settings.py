"""cluster/slurm/submit.sh: what it refuses before anything is submitted, and the options it gives to sbatch."""

import os
import subprocess
import sys

import pytest
from repository import REPOSITORY

SLURM = REPOSITORY / "cluster" / "slurm"


@pytest.fixture
def submit(tmp_path):
    """Runs submit.sh with cluster.env and further lines; `sbatch` is a script that records its arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$DSKD_ENV $*" >>"{tmp_path}/submitted"\necho 17\n')
    sbatch.chmod(0o755)

    def run(*arguments, env=""):
        file = tmp_path / "my,own.env"
        own = (SLURM / "cluster.env").read_text(encoding="utf-8")
        config = REPOSITORY / "configs" / "smoke.yaml"
        file.write_text(f"{own}\nDSKD_VENV={sys.prefix}\nDSKD_LOGS={tmp_path}\nDSKD_CONFIG={config}\n{env}\n")
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "DSKD_ENV": str(file)}
        return subprocess.run(
            [str(SLURM / "submit.sh"), *arguments],
            env={**environment, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    submitted = tmp_path / "submitted"
    run.submitted = lambda: submitted.read_text().splitlines() if submitted.exists() else []
    return run


def test_all_problems_of_the_settings_are_reported_at_once(submit):
    wrong = {
        "DSKD_NODES=": "DSKD_NODES: expected a whole number from 1, found ''",
        "DSKD_GPUS_PER_NODE=eight": "DSKD_GPUS_PER_NODE: expected a whole number from 0, found 'eight'",
        "DSKD_RANKS_PER_NODE=0": "DSKD_RANKS_PER_NODE: expected a whole number from 1 or nothing, found '0'",
        "DSKD_PARTITON=gpu": "DSKD_PARTITON: there is no such setting",
        "unset DSKD_RETRIES": "DSKD_RETRIES: is missing",
        "unset DSKD_OVERRIDES; DSKD_OVERRIDES='a=1 b=2'": "DSKD_OVERRIDES: expected a list in brackets, "
        "such as (train.steps=1000 run=kd), found 'a=1 b=2'",
        "DSKD_PREFLIGHT=yes": "DSKD_PREFLIGHT: expected 1 or nothing, found 'yes'",
        "DSKD_LOGS=": "DSKD_LOGS: is empty",
        "DSKD_CONFIG=nowhere.yaml": "DSKD_CONFIG: there is no file 'nowhere.yaml'",
        "DSKD_VENV=/nowhere": "DSKD_VENV: '/nowhere' is not a virtual environment",
    }
    finished = submit("train", env="\n".join(wrong))
    assert finished.returncode == 2
    for message in wrong.values():
        assert message in finished.stderr
    assert len(finished.stderr.splitlines()) == 1 + len(wrong) + 1  # a missing number is not a number either
    assert submit.submitted() == []


def test_a_mistake_in_the_config_is_reported_before_anything_is_submitted(submit):
    for arguments in (("train", "trian.steps=5"), ("pipeline", "trian.steps=5")):
        finished = submit(*arguments)
        assert finished.returncode == 2
        assert "trian.steps" in finished.stderr
    assert submit.submitted() == []


def test_runs_of_the_pipeline_are_checked_before_anything_is_submitted(submit):
    finished = submit("pipeline", env="DSKD_RUNS=(b/c)")
    assert finished.returncode == 2
    assert "override 'run=b/c'" in finished.stderr
    assert submit.submitted() == []


def test_a_settings_file_that_is_not_bash_is_refused_with_its_line(submit, tmp_path):
    for line, blanks in (("DSKD_NODES = 2", True), ("modul load cuda", False), ("DSKD_RUNS=(one", False)):
        finished = submit("train", env=line)
        assert finished.returncode == 2
        assert ("no blanks around the =" in finished.stderr) == blanks
        assert "error: DSKD_ENV: bash cannot read the settings file" in finished.stderr
        assert f"{tmp_path / 'my,own.env'}: line " in finished.stderr
    assert submit.submitted() == []


def test_a_settings_file_can_load_modules_that_read_unset_variables(submit):
    module = """module() { [ "$1-$NEVER_SET" = load- ] || echo "no such module: $2" >&2; [ "$2" = cuda ]; }\n"""
    finished = submit("train", env=f"{module}module load cuda")
    assert finished.returncode == 0, finished.stderr
    finished = submit("train", env=f"{module}module load cudo")
    assert finished.returncode == 2
    assert "or a command in it fails" in finished.stderr
    assert len(submit.submitted()) == 1


def test_jobs_other_than_train_and_pipeline_are_refused(submit):
    finished = submit("eval")
    assert finished.returncode == 2
    assert "error: 'eval' is neither train nor pipeline" in finished.stderr


@pytest.mark.parametrize(("arguments", "exit_code"), [(("--help",), 0), (("foo",), 2), ((), 2)])
def test_usage_needs_no_settings(tmp_path, arguments, exit_code):
    environment = {**os.environ, "DSKD_ENV": str(tmp_path / "no.env")}
    finished = subprocess.run(
        [str(SLURM / "submit.sh"), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == exit_code
    assert "submit.sh train|pipeline [section.key=value …]" in finished.stdout + finished.stderr
    assert "no.env" not in finished.stderr


def _trained(submit):
    return [line.split("train.sbatch")[1].split() for line in submit.submitted() if "train.sbatch" in line]


def test_the_pipeline_trains_all_runs_of_the_config_or_those_that_are_named(submit):
    runs = "'runs={one: {}, two: {}}'"
    finished = submit("pipeline", "train.steps=5", "run=two", env=f"DSKD_OVERRIDES=({runs})")
    assert finished.returncode == 0, finished.stderr
    # The run follows the overrides, which may choose another run.
    assert _trained(submit) == [["train.steps=5", "run=two", "run=one"], ["train.steps=5", "run=two", "run=two"]]
    assert "17 train-one\n17 train-two\n17 evaluate\n" in finished.stdout
    finished = submit("pipeline", env=f"DSKD_OVERRIDES=({runs} run=one)\nDSKD_RUNS=(two)")
    assert finished.returncode == 0, finished.stderr
    assert _trained(submit)[2:] == [["run=two"]]


def test_without_a_readable_config_only_its_run_is_trained_with_a_warning(submit):
    finished = submit("pipeline", env="DSKD_VENV=")
    assert finished.returncode == 0, finished.stderr
    assert _trained(submit) == [[]]
    assert "name others in DSKD_RUNS" in finished.stderr
    assert "DSKD_RUNS" not in submit("train", env="DSKD_VENV=").stderr


def test_a_missing_settings_file_is_reported(tmp_path):
    environment = {**os.environ, "DSKD_ENV": str(tmp_path / "no.env")}
    finished = subprocess.run(
        [str(SLURM / "submit.sh"), "train"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 2
    assert f"error: DSKD_ENV: there is no settings file {tmp_path / 'no.env'}" in finished.stderr


def test_settings_become_options_of_sbatch(submit, tmp_path):
    finished = submit(
        "train", "run=kd", env="DSKD_NODES=3\nDSKD_PARTITION=gpu\nDSKD_TIME=\nDSKD_SBATCH_OPTIONS=(--qos=long)"
    )
    assert finished.returncode == 0, finished.stderr
    (submitted,) = submit.submitted()
    for option in ("--nodes=3", "--partition=gpu", "--gpus-per-node=1", "--qos=long", "train.sbatch run=kd"):
        assert option in submitted
    assert submitted.startswith(f"{tmp_path / 'my,own.env'} ") and "--export=ALL " in submitted
    assert "--time" not in submitted
    assert finished.stdout == "17 train\n"
