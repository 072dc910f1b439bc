"""Groups of runs: which runs belong together, which one of several with equal settings is kept, and the notes."""

import pytest

from dskd.compare import choosing
from dskd.compare.choosing import Selection, choose_runs
from dskd.compare.groups import config_differences, group_runs
from dskd.config import Config
from dskd.errors import UserError
from dskd.tracking import TrackedRun

INPUTS = {"dataset": "d" * 64, "teacher": "7" * 64, "student": "8" * 64, "sense_dictionary": "9" * 64}


def _run(run_id, name, start, *, status="FINISHED", seed=0, weight=1.0, **tags):
    params = {"seed": str(seed), "run": name, "loss.sense_weight": str(weight)}
    return TrackedRun(run_id * 32, name, status, params, {}, INPUTS | tags, start, "senses", "1")


def _names(groups):
    return [(group.label, [run.run_id[0] for run in group.runs]) for group in groups]


def test_seeds_with_different_inputs_are_pooled_with_a_note():
    """As those of whole pipelines with a seed each; whether that was intended is unknown."""
    runs = [_run("a", "dskd-s0", 1), _run("b", "dskd-s1", 2, seed=1, dataset="e" * 64)]
    groups, (note,) = group_runs(runs)
    assert _names(groups) == [("dskd (2 seeds)", ["a", "b"])]
    assert "the seeds of dskd have different inputs (dataset)" in note
    assert config_differences(groups) == []


def test_the_same_seed_with_other_inputs_is_another_group():
    runs = [_run("a", "dskd-s0", 1), _run("b", "other", 2, teacher="0" * 64), _run("c", "dskd-s1", 3, seed=1)]
    groups, notes = group_runs(runs)
    assert _names(groups) == [("dskd (2 seeds)", ["a", "c"]), ("other", ["b"])]
    assert notes == []
    assert config_differences(groups) == [("teacher (digest)", ["7" * 12, "0" * 12])]


def test_each_seed_counts_once_by_the_run_that_finished_last():
    runs = [
        _run("a", "dskd", 1),
        _run("b", "again", 3),
        _run("c", "running", 9, status="RUNNING"),
        _run("d", "dskd-s1", 2, seed=1),
    ]
    groups, (note,) = group_runs(runs)
    assert [[run.run_id[0] for run in group.runs] for group in groups] == [["b", "d"]]
    assert (
        "other runs have the same settings and seed: dskd (aaaaaaaa), running (cccccccc); kept: again, dskd-s1" in note
    )


def test_a_failed_run_does_not_replace_a_finished_one_and_tags_are_matched_first(monkeypatch):
    failed, finished = _run("b", "kd", 3, status="FAILED"), _run("a", "kd", 1, evaluation_data="1" * 64)
    config = Config(workdir="work", teacher={"path": "a/b"})
    monkeypatch.setattr(choosing, "read_runs", lambda config, experiments: [failed, finished])
    assert choose_runs(config, Selection(runs=["kd"])).runs == [finished]
    again = _run("c", "kd", 4)
    monkeypatch.setattr(choosing, "read_runs", lambda config, experiments: [again, failed, finished])
    assert choose_runs(config, Selection(runs=["kd"])).runs == [again]
    assert choose_runs(config, Selection(tags={"evaluation_data": "1" * 64})).runs == [finished]


def test_the_beginning_of_an_id_chooses_a_run_if_it_is_unique(monkeypatch):
    runs = [_run("b", "kd", 3), _run("a", "kd", 1), _run("c", "dskd", 0)]
    monkeypatch.setattr(choosing, "read_runs", lambda config, experiments: runs)
    config = Config(workdir="work", teacher={"path": "a/b"})
    assert choose_runs(config, Selection(runs=["a" * 8])).runs == [runs[1]]
    assert choose_runs(config, Selection(runs=["a" * 8, "dskd"])).runs == [runs[1], runs[2]]
    with pytest.raises(UserError, match="has no run of this name"):
        choose_runs(config, Selection(runs=["d" * 8]))


def test_older_runs_of_a_name_are_mentioned(monkeypatch):
    runs = [_run("c", "dskd", 4), _run("b", "kd", 3, weight=0.5), _run("a", "kd", 1), _run("9", "kd", 0)]
    monkeypatch.setattr(choosing, "read_runs", lambda config, experiments: runs)
    config = Config(workdir="work", teacher={"path": "a/b"})
    chosen = choose_runs(config, Selection())
    assert [run.run_id[0] for run in chosen.runs] == ["c", "b"]
    assert chosen.notes == ["older runs of the same name are left out (2 of kd); --run ID names one of them"]
    chosen = choose_runs(config, Selection(runs=["kd"]))
    assert [run.run_id[0] for run in chosen.runs] == ["a", "b"]  # of other settings
    assert "1 of kd" in chosen.notes[0]
