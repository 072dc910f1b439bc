"""cluster/docker/entrypoint.sh: what it refuses, how long it waits, and what it passes to programs."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import REPOSITORY

ENTRYPOINT = REPOSITORY / "cluster" / "docker" / "entrypoint.sh"
CONFIG = ("--config", str(REPOSITORY / "configs" / "smoke.yaml"))
NODE = {
    "JOB_COMPLETION_INDEX": "0",
    "DSKD_JOB": "dskd",
    "DSKD_SERVICE": "nowhere.invalid",
    "DSKD_NODES": "2",
    "DSKD_RANKS_PER_NODE": "1",
    "DSKD_MASTER_PORT": "29500",
    "DSKD_PEERS_TIMEOUT_S": "0",
}


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*arguments, **changes):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), **NODE, **changes}
        environment = {key: value for key, value in environment.items() if value is not None}
        process = subprocess.Popen(
            [str(ENTRYPOINT), *arguments], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ((), {}, "no program: the first argument is one of launcher/"),
        (("fit.py", *CONFIG), {}, "'fit.py': expected train.py, build_senses.py"),
        (("train.py", *CONFIG, "--overwrite"), {}, "--overwrite: every restart of the pod would start from scratch"),
        (("train.py", *CONFIG), {"DSKD_NODES": "two"}, "DSKD_NODES: expected a whole number, found 'two'"),
        (("train.py", *CONFIG), {"DSKD_NODES": None}, "DSKD_NODES: expected a whole number, found ''"),
        (("train.py", *CONFIG), {"JOB_COMPLETION_INDEX": None}, "JOB_COMPLETION_INDEX: expected a whole number"),
        (("train.py", *CONFIG), {"JOB_COMPLETION_INDEX": "2"}, "DSKD_NODES: is 2, but this is node 2 (from 0)"),
        (("train.py", *CONFIG), {"DSKD_SERVICE": None}, "DSKD_SERVICE: is not set"),
        (("train.py", *CONFIG), {"HOME": "/proc/home"}, "HOME: cannot create /proc/home"),
        (("train.py", *CONFIG), {"HOME": None}, "HOME: is not set"),
        (("pipeline.py", *CONFIG), {}, "DSKD_NODES: is 2, but pipeline.py runs on one node"),
    ],
)
def test_a_mistake_in_a_manifest_is_reported_and_not_to_be_retried(start, arguments, changes, message):
    process = start(*arguments, **changes)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2, errors
    assert f"error: {message}" in errors


def test_verbs_run_on_pod_0_and_other_pods_end_at_once(start, tmp_path):
    """There are no other pods: none of their names has an address here."""
    config = (*CONFIG, f"workdir={tmp_path / 'work'}", "train.shard_cache=/scratch/shards")
    there = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = start("status", *config, PATH=there, PYTHONPATH=str(REPOSITORY))
    others = [start(verb, *config, JOB_COMPLETION_INDEX="1") for verb in ("export", "compare", "status")]
    assert [other.wait(30) for other in others] == [0, 0, 0]
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors  # although the run is not finished
    assert errors == ""


@pytest.mark.parametrize("verb", ["export", "compare"])
def test_verbs_get_their_arguments_and_the_facts_about_the_job_and_their_code_is_returned(start, tmp_path, verb):
    program = tmp_path / "dskd"
    program.write_text('#!/bin/sh\necho "$*" >&2\nenv | grep ^DSKD_JOB_ >&2\nexit 2\n')
    program.chmod(0o755)
    process = start(verb, *CONFIG, PATH=f"{tmp_path}:{os.environ['PATH']}")
    _, output = process.communicate(timeout=30)
    assert process.returncode == 2
    arguments, *facts = output.splitlines()
    assert arguments == " ".join((verb, *CONFIG))
    expected = {"DSKD_JOB_SCHEDULER=kubernetes", "DSKD_JOB_ID=dskd", f"DSKD_JOB_POD={socket.gethostname()}"}
    assert set(facts) == expected


def test_a_missing_node_is_reported_and_the_pod_may_be_retried(start):
    process = start("annotate.py", *CONFIG)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no address for dskd-0.nowhere.invalid dskd-1.nowhere.invalid after 0 s" in errors


def test_a_pod_that_waits_for_others_stops_at_once(start):
    process = start("annotate.py", *CONFIG, DSKD_PEERS_TIMEOUT_S="600")
    # The script is ready when TERM is among the signals that the shell catches.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        (caught,) = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
