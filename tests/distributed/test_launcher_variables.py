"""The variables that launchers set, leave out or set wrongly."""

import json
import os
import socket
import sys

import pytest
import torch
from config_files import write_config
from rank_jobs import join_as_launched
from rank_processes import finish, fork_ranks
from repository import REPOSITORY

from dskd.__main__ import main
from dskd.distributed import rendezvous
from dskd.distributed.world import launcher_job
from dskd.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def read(monkeypatch):
    """Reads the launcher's variables with only these set, and returns all of them afterwards."""

    def read(**variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            if value is not None:
                monkeypatch.setenv(name, value)
        rendezvous._read_launcher()
        return {name: os.environ.get(name) for name in NAMES}

    return read


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE: is not set, although RANK=1, LOCAL_RANK=1"),
        ({"RANK": None}, "RANK: is not set, although WORLD_SIZE=4"),  # four processes would each train all of it
        ({"MASTER_ADDR": None}, "MASTER_ADDR: is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT: is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: expected a whole number, found 'http'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT: expected 1 to 65535, found 65536"),
        ({"RANK": "four"}, "RANK: expected a whole number, found 'four'"),
        ({"RANK": "-1"}, "RANK: expected a whole number, found '-1'"),
        ({"RANK": ""}, "RANK: expected a whole number, found ''"),
        ({"RANK": "4"}, "RANK: is 4 of WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "RANK: is 1 of WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK: is 2 of LOCAL_SIZE=2"),
        # mosaicml-streaming would compute 0 nodes and divide by that
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_SIZE: is 8, more than WORLD_SIZE=4"),
    ],
)
def test_missing_and_wrong_launcher_variables_are_reported(read, changes, problem):
    with pytest.raises(UserError) as refused:
        read(**TORCHRUN | changes)
    assert problem in str(refused.value)
    assert "unset RANK and WORLD_SIZE for a single process" in str(refused.value)


def test_all_wrong_variables_are_reported_at_once(read):
    with pytest.raises(
        UserError, match=r"RANK: is not set(.|\n)*MASTER_ADDR: is not set(.|\n)*MASTER_PORT: is not set"
    ):
        read(WORLD_SIZE="2")


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "3"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_single_process_needs_no_variables(read, variables):
    found = read(**variables)
    expected = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert expected.items() <= found.items()
    assert int(found["MASTER_PORT"]) > 0


def test_the_number_of_local_ranks_that_torchrun_sets_is_read(read):
    assert read(**TORCHRUN)["LOCAL_SIZE"] == "2"


def test_a_rank_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    rendezvous._require_device(1)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 2 \(from 0\), and this node has 2 GPUs; .*--num_gpus 2"):
        rendezvous._require_device(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hosts", "expected"), [(["a", "b"], [[0, 1], [0, 1]]), (["a", "a"], [[0, 2], [1, 2]])], ids=["two nodes", "one"]
)
def test_without_local_ranks_from_the_launcher_ranks_find_them_by_host(hosts, expected):
    """Kubernetes' PyTorchJob starts ranks like this, with one or several per pod."""
    without = ("LOCAL_RANK", "LOCAL_SIZE")
    printed = finish(fork_ranks(join_as_launched, without, ranks=2, hosts=hosts), 60).output.splitlines()
    found = sorted(json.loads(line) for line in printed if line.startswith("["))
    assert [numbers for _, *numbers in found] == expected


@pytest.mark.slow
def test_a_port_in_use_is_reported_with_what_to_do():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        ended = finish(fork_ranks(join_as_launched, (), ranks=1, port=port), 60, check=False)
    assert ended.exit_code == 1  # a retry may find it free
    assert f"rank 0 cannot listen on port {port} (Address already in use)" in ended.output
    assert "`deepspeed --master_port PORT`" in ended.output
    assert "Traceback" not in ended.output


def test_a_verb_prints_whatever_rank_a_job_gave_its_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    config = write_config(tmp_path / "c.yaml", {"workdir": str(tmp_path / "work"), "teacher": {"path": "t"}, "x": 1})
    monkeypatch.setattr(sys, "argv", ["dskd", "status", "--config", str(config)])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: ")  # not "[rank 1] error: ", after it has waited for rank 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["dskd", "config", "--config", str(REPOSITORY / "configs/quickstart.yaml")])
    assert main() == 0
    assert "RANK" not in os.environ


def test_the_facts_about_a_job_are_those_that_the_scripts_export(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DSKD_JOB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "41")  # of an interactive job, for example
    assert launcher_job() == {}
    for name, text in {"SCHEDULER": "slurm", "ID": "42", "NAME": "dskd-train", "RESTART": "", "OTHER": "x"}.items():
        monkeypatch.setenv(f"DSKD_JOB_{name}", text)
    assert launcher_job() == {"scheduler": "slurm", "id": "42", "name": "dskd-train"}
    monkeypatch.setenv("DSKD_JOB_RESTART", "3")
    assert launcher_job()["restart"] == "3"
