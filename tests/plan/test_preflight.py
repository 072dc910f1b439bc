"""Preflight reports the faults of each node by its name."""

import copy
import shutil

import pytest
import yaml
from config_files import write_config
from rank_jobs import act_on_nodes
from rank_processes import ONE_RANK, finish, fork_ranks, start_ranks
from tiny_work import BEFORE_TRAINING, copy_work

from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.plan.preflight import find_problems, preflight
from dskd.training.train import train


def _report(rank, host, **changes):
    return {
        "rank": rank,
        "local_rank": 0,
        "host": host,
        "reduced": True,
        "rate": 1.0,
        "clock_s": 1000.0 + rank / 100,
        "versions": {"torch": "2.9", "dskd": "0.1"},
        "device": "cpu",
        "ranks_on_node": 1,
        "free_gb": 10.0,
        "shared_memory_gb": 8.0,
        "problems": [],
        **changes,
    }


NODES = [_report(number, f"node{number}") for number in range(3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clock_s": 1090.0}, "node1: its clock is 90 s ahead; set it"),
        ({"clock_s": 995.0}, "node1: its clock is 5 s behind; set it"),
        ({"versions": {"torch": "2.8", "dskd": "0.1"}}, "node1: torch 2.8, elsewhere 2.9; install the same"),
        ({"device": "T4"}, "node1: device T4, elsewhere cpu"),
        ({"ranks_on_node": 4}, "node1: ranks on node 4, elsewhere 1"),
        ({"reduced": False}, "rank 1 (node1): a sum over all ranks was wrong there"),
        ({"problems": ["there is no folder x"]}, "rank 1 (node1): there is no folder x"),
    ],
)
def test_the_node_that_differs_is_named(changes, message):
    reports = copy.deepcopy(NODES)
    reports[1].update(changes)
    (problem,) = find_problems(reports)
    assert problem.startswith(message)
    assert not find_problems(NODES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clock_s": 1003.8}, "the clocks of node0 and node1 are 4 s apart (node1's is ahead); set them"),
        ({"clock_s": 940.0}, "the clocks of node1 and node0 are 60 s apart (node0's is ahead); set them"),
        ({"versions": {"torch": "2.8", "dskd": "0.1"}}, "torch differs: 2.9 on node0; 2.8 on node1; install the same"),
    ],
)
def test_of_two_nodes_that_differ_neither_is_blamed(changes, message):
    reports = copy.deepcopy(NODES[:2])
    reports[1].update(changes)
    (problem,) = find_problems(reports)
    assert problem.startswith(message)
    assert not find_problems(NODES[:2])


def test_a_machine_by_itself_is_checked(tmp_path, capsys, world):
    config = load_config(write_config(tmp_path / "x.yaml", {"workdir": str(tmp_path / "w"), "teacher": {"path": "t"}}))
    preflight(config, ONE_RANK)
    printed = capsys.readouterr().err
    assert "all checks passed" in printed
    assert list((tmp_path / "w").iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"rank 0 .*file.*cannot write there"):
        preflight(config.model_copy(update={"workdir": str(file / "below")}), ONE_RANK)


def test_a_remote_copy_of_the_shards_is_checked(copy_of_tiny, tmp_path, capsys):
    remote = tmp_path / "far"
    config = load_config(copy_of_tiny("shards", train={"shard_remote": str(remote)}))
    with pytest.raises(UserError, match=rf"train.shard_remote: {remote}/train/index.json cannot be read"):
        preflight(config, ONE_RANK)
    shutil.copytree(config.path("shards"), remote)
    preflight(config, ONE_RANK)
    shutil.copy(remote / "validation" / "index.json", remote / "train" / "index.json")
    with pytest.raises(UserError, match=r"its index.json is not that of .*, so it has other shards"):
        preflight(config, ONE_RANK)
    assert "all checks passed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def waiting(tiny, tmp_path_factory):
    """A rank whose peer never starts. Other tests run while it waits for as long as its config says."""
    config = copy_work(tiny, tmp_path_factory.mktemp("waiting"))
    (rank,) = start_ranks("train.py", config, "train.collective_timeout_s=10", ranks=2, absent=[1])
    yield rank
    rank.kill()


@pytest.mark.usefixtures("waiting")
@pytest.mark.slow
def test_ranks_find_storage_that_is_not_shared_and_shards_that_are_damaged(copy_of_tiny, tmp_path):
    config = copy_of_tiny(*BEFORE_TRAINING)
    jobs = [fork_ranks(act_on_nodes, preflight, [config, config], ranks=2) for _ in range(2)]  # as of two runs
    for job in jobs:
        assert "all checks passed" in finish(job, 60).output
    assert not list(load_config(config).path().glob(".preflight*"))

    shutil.copytree(load_config(config).path(), tmp_path / "other")
    loaded = {"workdir": str(tmp_path / "other"), "teacher": {"path": "t"}}
    other = write_config(tmp_path / "other.yaml", loaded)
    next((tmp_path / "other" / "shards" / "train").glob("*.mds*")).unlink()
    ended = finish(fork_ranks(act_on_nodes, preflight, [config, other], ranks=2), 60, check=False)
    assert ended.exit_code == 2
    assert ended.output.count("error: preflight: the nodes are not ready for training") == 1
    for expected in ("other is not the folder that rank 0 writes to", "it is missing"):
        assert expected in ended.output, ended.output
    assert "rank 1 (" in ended.output
    assert "rank 0 (" not in ended.output  # for what rank 1 says itself
    assert "Traceback" not in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("action", [preflight, train])
def test_one_node_without_the_shared_storage_is_an_outage(copy_of_tiny, tmp_path, action):
    config = copy_of_tiny(*BEFORE_TRAINING)
    base = {"workdir": str(tmp_path / "other"), "teacher": {"path": "t"}}
    lacks_it = write_config(tmp_path / "other.yaml", yaml.safe_load(config.read_text()), **base)
    ranks = fork_ranks(act_on_nodes, action, [config, lacks_it], ranks=2, hosts=["node0", "node1"])
    ended = finish(ranks, 60, check=False)
    assert [rank.wait(0) for rank in ranks] == [1, 1], ended.output
    assert ("rank 1 (node1): " if action is preflight else "error: node1: ") in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_work_directory_that_no_node_can_write_to_is_a_user_error(tmp_path, everywhere):
    (tmp_path / "file").touch()
    good, bad = (
        write_config(tmp_path / f"{name}.yaml", {"workdir": str(tmp_path / folder), "teacher": {"path": "t"}})
        for name, folder in (("good", "work"), ("bad", "file/work"))
    )
    configs = [bad, bad if everywhere else good]
    ranks = fork_ranks(act_on_nodes, preflight, configs, ranks=2, hosts=["node0", "node1"])
    ended = finish(ranks, 60, check=False)
    assert [rank.wait(0) for rank in ranks] == [2 if everywhere else 1] * 2, ended.output
    assert "rank 0 (node0): " in ended.output
    assert ("rank 1 (node1): " in ended.output) == everywhere
    assert not (tmp_path / "work").exists()
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_ranks_that_do_not_arrive_are_named_with_their_node(waiting):
    assert waiting.wait(60) == 1, waiting.output
    assert "rank 1, of node 0 (from 0, as in the hostfile), did not join" in waiting.output
    assert "within 10 s; look at that node" in waiting.output
    assert "Traceback" not in waiting.output
