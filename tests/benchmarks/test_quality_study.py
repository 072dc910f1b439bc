"""The study of whether senses help: its comparison is fair, and no training is repeated."""

import dataclasses
import json
import sys

import pytest
from scipy import stats

from benchmarks.quality import study, work
from benchmarks.quality.__main__ import REPORT, RESULTS, SUMMARY, main
from benchmarks.quality.judge import Judge
from benchmarks.quality.measures import KNOWLEDGE, ON_TEXT
from benchmarks.quality.report import PICTURE, SUMMARY_MARKS, render, render_summary, write_report
from benchmarks.quality.results import TEACHER, Result, append_result, choose, read_results
from benchmarks.quality.splits import rows_of
from benchmarks.quality.trainings import planned_trainings
from dskd.config.reading import load_config
from dskd.errors import UserError

MEASURES = (*ON_TEXT, *KNOWLEDGE)


def _result(arm="kd", value=1.0, perplexity=50.0, seed=100, stage="tune"):
    return Result(
        stage, arm, seed, None, {"a": value}, value, dict.fromkeys(MEASURES, perplexity), "digest", 1.0, "day", "place"
    )


@pytest.mark.parametrize("cut", [[], [4], [4, 5], [0, 1, 2, 3]])
def test_no_document_is_in_both_parts(cut):
    begins = [row not in cut for row in range(9)]
    document, documents_of = 0, []
    for begin in begins:  # a sequence continues the last document, or ends it and begins another
        documents_of.append({document, document + begin})
        document += begin
    validation, test = (
        set().union(*(documents_of[row] for row in rows_of(split, begins))) for split in ("validation", "test")
    )
    assert validation
    assert test
    assert not validation & test


def test_text_without_a_place_to_cut_is_refused():
    with pytest.raises(ValueError, match="cannot be split"):
        rows_of("test", [True, True, False, False])


def test_every_arm_has_the_same_effort_and_no_seed_of_the_test_is_tuned_on():
    tuned = [arm for arm in study.ARMS if arm.is_tuned]
    assert {len(set(arm.trials)) for arm in tuned} == {study.NUM_TRIALS}
    assert [arm.name for arm in study.ARMS if not arm.is_tuned] == ["kd-paper", "dskd-paper"]
    assert all(not set(arm.trials) & set(arm.extra_values) for arm in study.ARMS)
    assert not set(study.TUNING_SEEDS) & set(study.TEST_SEEDS)
    assert not set(study.TUNING_SEEDS) & set(study.FACTOR_SEEDS)


def test_every_planned_training_has_a_valid_config(tmp_path):
    results = [_result(arm.name, value, 50 + value) for arm in study.ARMS for value in (*arm.trials, *arm.extra_values)]
    trainings = list(planned_trainings(results, ("tune", "test", "factor")))
    pairs = [(factor, arm) for factor in (None, *study.FACTORS) for arm in study.FACTOR_ARMS]
    of_factors = 3 * sum(study.is_needed(*pair) for pair in pairs)
    arms = [arm for arm in study.ARMS if arm.past_variant is None]
    tuned = [arm for arm in arms if arm.is_tuned]
    assert len(trainings) == len(tuned) * 4 + len(study.BY_NAME["kd"].extra_values) + len(arms) * 5 + of_factors
    rates = set()
    for training in trainings:
        config = work.load_variant(tmp_path, training.variant, dict(training.keys))
        rates.add(config.train.learning_rate)
        is_plain = training.arm.name in ("ce", "kd", "kd-paper", "kd-hidden", "hidden-lexical")
        assert (config.loss.sense_weight == 0) == is_plain
        assert (config.loss.hidden_weight > 0) == ("hidden" in training.arm.name)
        assert (config.loss.kd_weight > 0) == (training.arm.name != "ce")
    assert len(rates) == 1


def test_arms_that_build_on_a_choice_wait_for_it():
    planned = list(planned_trainings([], ("tune", "test")))
    assert {training.arm.based_on for training in planned} == {None}
    assert {training.arm.name for training in planned if training.stage == "test"} == {"kd-paper", "dskd-paper"}


def test_the_lowest_perplexity_is_chosen_when_all_trials_are_done():
    results = [_result(value=1.0, perplexity=50), _result(value=2.0, perplexity=40)]
    kd = study.BY_NAME["kd"]
    two, three = (dataclasses.replace(kd, trials=trials) for trials in ((1.0, 2.0), (1.0, 2.0, 3.0)))
    assert choose(results, two) == 2.0
    assert choose(results, three) is None
    assert choose([*results, _result(value=1.0, perplexity=10, stage="test")], two) == 2.0
    assert choose([*results, _result(value=4.0, perplexity=10)], two) == 2.0  # tried, but not one of the trials
    assert choose([], dataclasses.replace(kd, trials=(0.7,))) == 0.7


def test_an_interrupted_line_costs_no_other_result(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, _result(seed=1))
    with path.open("a") as stream:
        stream.write('{"arm": "k')
    assert read_results(path) == [_result(seed=1)]
    append_result(path, _result(seed=2))
    assert [result.seed for result in read_results(path)] == [1, 2]


@pytest.mark.parametrize("line", ["{}", "[1]", "perplexity: 3", "", '{"measures": {}}', '{"measures": null}'])
def test_a_line_that_is_not_a_result_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    append_result(path, _result())
    if "measures" in line:
        line = json.dumps(json.loads(path.read_text()) | json.loads(line))
    with path.open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(UserError, match=r"results.jsonl:2: this is no result of the study \("):
        read_results(path)


@pytest.mark.parametrize("content", [None, "", '{"arm": "k'])
def test_without_results_the_report_stays_as_it_is(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "typo.jsonl"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("benchmarks.quality.__main__.REPORT", tmp_path / "README.md")
    monkeypatch.setattr("benchmarks.quality.__main__.SUMMARY", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks.quality", "--report", "--results", str(path)])
    assert main() == 2
    assert f"--results {path}: this file has no results" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()


def test_another_value_seed_or_text_is_another_training():
    one = _result()
    others = [dataclasses.replace(one, **change) for change in ({"seed": 2}, {"keys": {"a": 2}}, {"shards": "other"})]
    assert len({result.name for result in [one, *others]}) == 4
    assert dataclasses.replace(one, seconds=9.0, date="later", measures={}).name == one.name


def test_arms_are_compared_at_the_same_positions():
    """The teacher's perplexity at lexical positions differs if these positions differ."""
    of_teacher = {r.variant: r.measures["lexical_perplexity"] for r in read_results(RESULTS) if r.arm == "teacher"}
    kept = [factor.name for factor in study.FACTORS if factor.keeps_baseline and factor.name in of_teacher]
    assert kept
    assert {of_teacher[name] for name in kept} == {of_teacher[None]}


def test_the_committed_report_is_that_of_the_committed_results():
    assert REPORT.read_text(encoding="utf-8") == render(read_results(RESULTS))


def test_the_documented_table_is_that_of_the_committed_results():
    begin, end = SUMMARY_MARKS
    text = SUMMARY.read_text(encoding="utf-8")
    assert text.split(begin)[1].split(end)[0] == render_summary(read_results(RESULTS))


def test_the_intervals_of_the_report_are_those_of_scipy(tmp_path):
    values = {"kd": [50.0, 50.3, 49.8, 50.1, 50.4], "dskd": [49.9, 50.1, 49.8, 50.2, 50.0]}
    results = [
        _result(name, perplexity=value, seed=seed, stage="test")
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    write_report(results, tmp_path / "README.md")
    report = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert report == render(results)
    drawn = (tmp_path / PICTURE).read_text(encoding="utf-8")
    assert drawn.count("against kd") == 2
    write_report(results, tmp_path / "README.md")
    assert (tmp_path / PICTURE).read_text(encoding="utf-8") == drawn
    for of_seeds in values.values():
        mean = sum(of_seeds) / 5
        low, _ = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(of_seeds))
        assert f"{mean:.3f} ± {mean - low:.3f}" in report
    differences = [one - other for one, other in zip(values["dskd"], values["kd"], strict=True)]
    mean = sum(differences) / 5
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(differences))
    assert f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" in report


@pytest.mark.slow
def test_the_teacher_agrees_with_itself_and_a_student_is_measured_in_the_same_way(tiny, world):
    config = load_config(tiny)
    judge = Judge(config, "validation", world)
    of_teacher, of_student = judge.references[TEACHER], judge.measure_run(config)
    assert of_teacher["agreement"] == 1 and of_teacher["hidden_distance"] == 0
    assert of_student.keys() <= of_teacher.keys()
    assert 0 < of_student["agreement"] < 1 and of_student["hidden_distance"] > 0
    assert of_student["perplexity"] > 1
