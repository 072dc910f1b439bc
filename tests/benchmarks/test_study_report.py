"""The report of the study of good students."""

import dataclasses
import sys

import pytest
from scipy import stats
from study_results import MEASURES, all_tuned, chosen_result, result_of

from benchmarks.quality.__main__ import REPORT, RESULTS, main
from benchmarks.quality.arms import BY_NAME
from benchmarks.quality.measures import is_at_chance
from benchmarks.quality.report import _with_shared_seeds, render
from benchmarks.quality.results import (
    read_results,
)
from benchmarks.quality.settings import Settings
from benchmarks.quality.trainings import (
    DIVERGED,
)


def test_the_report_has_arms_by_length():
    results = list(all_tuned())
    for seed in range(3):
        for arm, shift in (("kd", 0.0), ("hidden", 0.25 * (1 + 0.1 * seed))):
            results.append(chosen_result(arm, 2.0 + 0.01 * seed + shift, seed, "length", 1000))
            results.append(chosen_result(arm, 1.0 + shift, seed, "length", 2000))
    results.append(
        dataclasses.replace(chosen_result("kd", 9.0, 3, "length", 1000), settings=Settings(epochs=0.9))
    )  # outdated
    report = render(results)
    assert "kl, 1,000 tokens (1 × the text) | against kd | kl, 2,000 tokens (2 × the text)" in report
    row = "| hidden | 2.2850 ± 0.0869 | **+0.2750 ± 0.0621** | 1.2750 ± 0.0621 | **+0.2750 ± 0.0621** |"
    assert row in report


@pytest.mark.parametrize("content", [None, "", '{"arm": "k'])
def test_without_results_the_report_stays_as_it_is(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "typo.jsonl"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("benchmarks.quality.__main__.REPORT", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks.quality", "--report", "--results", str(path)])
    assert main() == 2
    assert f"--results {path}: this file has no results" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()


def test_the_committed_report_is_that_of_the_committed_results():
    assert REPORT.read_text(encoding="utf-8") == render(read_results(RESULTS))


def test_the_intervals_of_the_report_are_those_of_scipy():
    values = {"kd": [2.0, 2.3, 1.8, 2.1, 2.4], "hidden": [1.9, 2.1, 1.8, 2.2, 2.0]}
    results = [chosen_result(name, kl, seed) for name, of_seeds in values.items() for seed, kl in enumerate(of_seeds)]
    results += all_tuned()
    report = render(results)
    for of_seeds in values.values():
        mean = sum(of_seeds) / 5
        low, _ = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(of_seeds))
        assert f"{mean:.4f} ± {mean - low:.4f}" in report
    differences = [one - other for one, other in zip(values["hidden"], values["kd"], strict=True)]
    mean = sum(differences) / 5
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(differences))
    assert f"{mean:+.4f} ± {(high - low) / 2:.4f}" in report


def test_differences_are_bold_if_they_are_sure_and_left_out_where_the_teacher_is_at_chance():
    counted = {"piqa": 0.52, "piqa_n": 150, "piqa_chance": 0.5, "opposites": 0.7, "opposites_n": 500}
    teacher = dataclasses.replace(result_of(stage="test", arm="teacher"), measures=MEASURES | counted)
    results = [*all_tuned(), teacher]
    for seed in range(5):
        results.append(chosen_result("kd", 2 + 0.001 * seed**2, seed, piqa=0.5, opposites=0.5))
        results.append(chosen_result("hidden", 1.9, seed, piqa=0.6, opposites=0.5))
    report = render(results)
    assert "**-0.1060 ± 0.0082**" in report
    assert "piqa †" in report
    differences = next(line for line in report.splitlines() if line.startswith("| arm | against"))
    assert "opposites" in differences
    assert "piqa" not in differences


def test_a_measure_is_at_chance_below_two_standard_errors_above_it():
    counted = {"piqa_n": 150, "piqa_chance": 0.5, "opposites_n": 500}
    assert is_at_chance(counted | {"piqa": 0.57}, "piqa")  # the standard error is .041
    assert not is_at_chance(counted | {"piqa_norm": 0.59}, "piqa_norm")
    assert is_at_chance(counted | {"opposites": 0.55}, "opposites")  # .026
    assert not is_at_chance(counted | {"opposites_states": 0.56}, "opposites_states")
    assert not is_at_chance({"kl": 0.0, "preference": 0.5}, "preference")
    assert not is_at_chance({"preference": float("nan"), "preference_n": 0}, "preference")
    # Chance at preference is what the untrained student scores.
    teacher = {"preference": 0.63, "preference_n": 230, "choice": 0.88, "choice_n": 1000}
    assert not is_at_chance(teacher, "preference", {"preference": 0.5, "choice": 0.29})
    assert is_at_chance(teacher, "preference", {"preference": 0.6456, "choice": 0.29})
    assert not is_at_chance(teacher, "choice", {"preference": 0.6456, "choice": 0.29})
    assert is_at_chance({"opposites_new": 0.55, "opposites_new_n": 100}, "opposites_new")


def test_looks_show_the_seeds_that_all_arms_have_and_nothing_in_bold():
    looks = [
        result_of(BY_NAME[arm].look_settings(), kl, seed, "look", arm)
        for arm, of_seeds in {"kd": (2.0, 2.1, 5.0), "rarity": (1.0, 1.1), "lexical weight": (1.5, 1.6)}.items()
        for seed, kl in enumerate(of_seeds, start=100)
    ]
    report = render([*all_tuned(), *looks])
    group = report.partition("#### Weights of positions")[2]
    assert "| rarity |" in group and "**" not in group
    mixed = [*looks, result_of(BY_NAME["rarity"].look_settings(), 9.0, 102, "look", "rarity")]
    assert "| 3.7000 |" not in render(mixed) and "9.0000" not in render(mixed)
    assert _with_shared_seeds(looks) == [look for look in looks if look.seed < 102]


def test_a_report_of_values_that_are_not_defined_or_diverged_says_so():
    results = [*all_tuned(), chosen_result("kd"), chosen_result("kd", seed=1)]
    undefined = {"preference": float("nan"), "preference_n": 0}
    results += [
        dataclasses.replace(result_of(arm=name, seed=0), measures=MEASURES | undefined) for name in ("teacher",)
    ]
    results += [dataclasses.replace(chosen_result("hidden", seed=seed), measures=DIVERGED) for seed in range(2)]
    report = render(results)
    assert "nan" not in report and "inf" not in report
    assert "| diverged | – |" in report
    assert "Teacher: llama." in report and "30 in the test part" in report


def test_every_arm_that_was_tried_is_named_even_if_its_first_value_is_missing():
    report = render([result_of(BY_NAME["batch"].settings({}, 4))])
    assert "| batch | batch_size 4 |" in report
