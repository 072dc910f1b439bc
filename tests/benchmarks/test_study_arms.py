"""The study of good students compares fairly, and repeats no training."""

import dataclasses
import json
import sys

import pytest
from study_results import MEASURES, SOURCE, all_tuned, chosen_result, result_of

from benchmarks.quality.__main__ import main, split_places
from benchmarks.quality.arms import ARMS, BY_NAME, TEST_SEEDS, TUNING_SEED, time_of_sequence
from benchmarks.quality.report import render
from benchmarks.quality.results import (
    append_result,
    choose,
    chosen_values,
    read_results,
    require_same_judges,
    require_same_source,
    results_by_arm,
)
from benchmarks.quality.settings import Settings
from benchmarks.quality.trainings import (
    DIVERGED,
    planned_lengths,
    planned_looks,
    planned_trainings,
    require_arms,
    require_values,
)
from dskd.errors import UserError


def test_no_seed_of_the_test_is_tuned_on_and_arms_with_weights_try_equally_many():
    assert TUNING_SEED not in TEST_SEEDS
    tried = {arm.name: len(arm.trials) for arm in ARMS if arm.tested and not arm.keeps}
    assert set(tried.values()) == {3}


def test_arms_are_tried_in_order_and_tested_seed_by_seed_once_they_are_chosen():
    first = list(planned_trainings([], "toy", ()))
    assert {training.arm.name for training in first} == {"batch", "batch, equal tokens"}
    results = all_tuned()
    planned = list(planned_trainings(results, "toy", ()))
    tested = [training for training in planned if training.stage == "test"]
    assert [training.seed for training in tested] == sorted(training.seed for training in tested)
    assert {training.arm.name for training in tested} == {arm.name for arm in ARMS if arm.tested}
    assert {training.seed for training in planned if training.stage == "tune"} == {TUNING_SEED}


def test_every_arm_differs_from_what_it_is_compared_with_in_its_own_settings_alone():
    results, chosen = all_tuned(), {}
    for arm in ARMS:
        chosen[arm.name] = choose(results, "toy", arm, chosen)
    for arm in ARMS:
        for other in map(BY_NAME.get, arm.against):
            one, two = (each.settings(chosen, chosen[each.name]) for each in (arm, other))
            differing = {key for key in dataclasses.asdict(one) if getattr(one, key) != getattr(two, key)}
            own = {*arm.changes, arm.tuned, *other.changes, other.tuned, *(["epochs"] if arm.as_long else [])} - {None}
            if arm.name not in ("ce", "kd paper"):  # which are of the chain before kd
                assert differing <= own, arm.name


def test_the_lowest_divergence_is_chosen_when_all_trials_are_done():
    batch = dataclasses.replace(BY_NAME["batch, equal tokens"], changes={}, trials=(4, 8))
    results = [result_of(Settings(batch_size=16), 3.0), result_of(Settings(batch_size=4), 1.0)]
    assert choose(results, "toy", batch, {}) is None
    results.append(result_of(Settings(batch_size=8), 2.0))
    assert choose(results, "toy", batch, {}) == 4
    assert choose([*results, result_of(Settings(batch_size=8), 0.5, stage="test")], "toy", batch, {}) == 4
    assert choose(results, "another text", batch, {}) is None


def test_an_unknown_arm_is_refused_with_the_names_of_all():
    with pytest.raises(UserError, match="there is no 'sense'; the arms are batch, batch, equal tokens, rate"):
        require_arms(["sense"])


def test_looks_need_no_results_and_differ_from_their_controls_in_their_own_settings_alone():
    looks = list(planned_looks(()))
    assert {look.seed for look in looks}.isdisjoint(TEST_SEEDS)
    of_arm = {look.arm.name: look.settings for look in looks}
    for arm in map(BY_NAME.get, of_arm):
        for other in arm.against:
            differing = {
                key
                for key in dataclasses.asdict(of_arm[arm.name])
                if getattr(of_arm[arm.name], key) != getattr(of_arm[other], key)
            }
            own = {*arm.changes, arm.tuned, *BY_NAME[other].changes, BY_NAME[other].tuned} - {None}
            own |= {"epochs"} if arm.as_long else set()
            assert differing <= own, arm.name


def test_arms_at_equal_time_take_as_long_as_what_they_build_on():
    results, chosen = all_tuned(), {}
    for arm in ARMS:
        chosen[arm.name] = choose(results, "toy", arm, chosen)
    long = [arm for arm in ARMS if arm.as_long and arm.tuned != "batch_size"]
    assert {"all layers, as long", "head, as long"} <= {arm.name for arm in long}
    for arm in long:
        one, base = (each.settings(chosen, chosen[each.name]) for each in (arm, BY_NAME[arm.based_on]))
        assert (one.epochs < base.epochs) == (arm.name != "few positions")
        if arm.name.endswith(", as long"):
            same_steps = BY_NAME[arm.name.removesuffix(", as long")].settings(chosen, chosen[arm.name])
            assert dataclasses.replace(one, epochs=base.epochs) == same_steps


def test_times_of_trainings_are_those_that_were_recorded():
    """CPU seconds of an epoch of 257 sequences in steps of one, and in steps of 16, on 2026-11-30."""
    recorded = {2: 73.5, 3: 83.0 * 257 / 216, 4: 79.9 * 257 / 185, 15: 95.3 * 257 / 75}
    for layers, seconds in recorded.items():
        settings = Settings(batch_size=1, position_share=0.35, train_layers=layers)
        assert time_of_sequence(settings) * 257 == pytest.approx(seconds, rel=0.1), layers
    assert time_of_sequence(Settings(position_share=0.35)) * 257 == pytest.approx(60.7, rel=0.1)


def test_batches_are_tried_in_equal_time_and_what_builds_on_them_reads_as_much():
    batch, tokens = BY_NAME["batch"], BY_NAME["batch, equal tokens"]
    assert batch.settings({}, 1).epochs == 1
    assert batch.settings({}, 16).epochs > batch.settings({}, 2).epochs > 1
    # By the seconds of 2026-11-30: 74 for an epoch in steps of one sequence, 61 in steps of 16.
    assert batch.settings({}, 16).epochs == pytest.approx(74 / 61, rel=0.05)
    assert {tokens.settings({}, value).epochs for value in tokens.values({})} == {1.0}
    chosen = {"batch": 8, "rate": 1e-3, "batch again": 4, "beta2": 0.95}
    assert BY_NAME["rate"].settings(chosen, 1e-3).epochs == batch.settings({}, 8).epochs
    again = BY_NAME["batch again"].settings(chosen, 4)
    assert again.epochs == batch.settings({}, 4).epochs
    assert BY_NAME["decay"].settings(chosen, "linear").epochs == again.epochs
    assert BY_NAME["kd"].look_settings().epochs == 1


def test_longer_trainings_have_the_chosen_values_and_read_the_text_as_often_as_it_takes():
    results = all_tuned()
    chosen = chosen_values(results, "toy")
    planned = list(planned_lengths(results, "toy", ["kd", "all layers, as long"], (0, 1), (2000, 500), 1000))
    assert [training.length for training in planned] == [500] * 4 + [2000] * 4
    kd, long = planned[:2]
    whole = BY_NAME["kd"].settings(chosen, chosen["kd"])
    assert kd.settings == dataclasses.replace(whole, epochs=round(whole.epochs / 2, 4))
    once = BY_NAME[long.arm.name].settings(chosen, chosen[long.arm.name])
    assert long.settings.epochs == pytest.approx(once.epochs / 2, abs=1e-4)
    with pytest.raises(UserError, match="the value of 'kd' is not chosen yet"):
        list(planned_lengths([], "toy", ["kd"], (0,), (500,), 1000))


def test_values_of_another_text_are_tested_and_nothing_is_tuned():
    results = all_tuned()
    planned = list(planned_trainings(results, "handbook", ["kd", "senses"], (0, 1), values_of="toy"))
    chosen = chosen_values(results, "toy")
    assert [(each.stage, each.arm.name, each.seed, each.settings) for each in planned] == [
        ("test", name, seed, BY_NAME[name].settings(chosen, chosen[name]))
        for seed in (0, 1)
        for name in ("kd", "senses")
    ]
    tested = [
        dataclasses.replace(
            result_of(each.settings, seed=each.seed, stage="test", arm=each.arm.name, text="handbook"),
            values_of=each.values_of,
        )
        for each in planned
    ]
    shown = results_by_arm([*results, *tested], "handbook")
    assert [(result.arm, result.seed) for result in shown] == [("kd", 0), ("senses", 0), ("kd", 1), ("senses", 1)]
    # Without that name they would be results of this text's own tuning, which has none.
    assert not results_by_arm([*results, *(dataclasses.replace(each, values_of="") for each in tested)], "handbook")
    page = render([*results, *tested]).partition("## Text: handbook")[2]
    assert "tuned on the text `toy` have the value that was chosen there" in page
    assert "| senses |" in page


def test_arms_without_a_value_on_the_other_text_are_tuned_on_this_one_with_its_values():
    synonyms, kd = BY_NAME["synonyms"], BY_NAME["kd"]
    results = [
        result for result in all_tuned() if result.settings.antonym_weight or result.settings.sense_words == "random"
    ]
    chosen = chosen_values(results, "toy", {"synonyms", *_chain(synonyms)})
    assert "synonyms" not in chosen
    assert "kd" in chosen
    planned = list(planned_trainings(results, "handbook", ["kd", "synonyms"], (0,), values_of="toy"))
    trials = [each for each in planned if each.stage == "tune"]
    assert [each.settings for each in trials] == [synonyms.settings(chosen, value) for value in synonyms.trials]
    assert [each.arm.name for each in planned if each.stage == "test"] == ["kd"]
    tuned = [
        dataclasses.replace(
            result_of(each.settings, stage="tune", arm=each.arm.name, text="handbook"),
            measures={**results[0].measures, "kl": 1.0 if each.value == 0.3 else 2.0},
        )
        for each in trials
    ]
    now = list(planned_trainings([*results, *tuned], "handbook", ["kd", "synonyms"], (0,), values_of="toy"))
    tests = {each.arm.name: each for each in now if each.stage == "test"}
    assert tests["kd"].settings == kd.settings(chosen, chosen["kd"])
    assert tests["synonyms"].settings == synonyms.settings(chosen, 0.3)
    longer = list(planned_lengths([*results, *tuned], "handbook", ["synonyms"], (0,), (500,), 1000, "toy"))
    assert [each.settings.epochs for each in longer] == [synonyms.settings(chosen, 0.3).epochs / 2]
    tested = [
        dataclasses.replace(
            result_of(each.settings, stage="test", arm=each.arm.name, text="handbook"), values_of=each.values_of
        )
        for each in tests.values()
    ]
    page = render([*results, *tuned, *tested]).partition("## Text: handbook")[2]
    assert "| synonyms | sense_weight 0.1 |" in page
    assert "sense_weight 0.3 (chosen)" in page
    assert "kd_weight" not in page


def test_values_that_another_text_has_not_chosen_are_refused():
    for names in ([], ["senses"]):
        with pytest.raises(UserError, match=r"--values-of other: .* is not chosen on this text yet .*: toy"):
            require_values(all_tuned(), "other", names)
    require_values(all_tuned(), "toy", ["senses"])


def test_results_of_an_arm_with_settings_that_were_chosen_before_do_not_count():
    now = [chosen_result("kd"), chosen_result("kd", stage="length", length=500)]
    before = [
        dataclasses.replace(result, settings=dataclasses.replace(result.settings, learning_rate=0.123), seed=7)
        for result in now
    ]
    look = result_of(BY_NAME["kd"].look_settings(), seed=100, stage="look")
    results = [*all_tuned(), *now, *before, look, dataclasses.replace(look, settings=Settings(), seed=101)]
    assert results_by_arm(results, "toy") == [*all_tuned(), *now, look]
    assert not results_by_arm(results, "another")


def test_arms_with_equal_settings_share_a_training_and_each_has_its_result():
    temperature, kd = BY_NAME["temperature"], BY_NAME["kd"]
    settings_of_kd = kd.settings(*_chosen(kd))
    tried = [
        dataclasses.replace(result, measures=result.measures | {"kl": 0.5})
        if result.settings == settings_of_kd and result.stage == "tune"
        else result
        for result in all_tuned()
    ]
    chosen = chosen_values(tried, "toy", {"temperature", *_chain(temperature)})
    assert chosen["temperature"] == 2.0  # as kd has it
    shared = result_of(kd.settings(chosen, chosen["kd"]), 1.25, 0, "test")
    named = [result.arm for result in results_by_arm([*tried, shared], "toy") if result.stage == "test"]
    assert {"kd", "temperature"} <= set(named)
    assert "warmup" not in named  # is not tested
    table = render([*tried, shared]).partition("### Test")[2]
    assert "| temperature |" in table
    look = result_of(kd.look_settings(), 1.25, 100, "look", "kd")
    assert "batch" not in [result.arm for result in results_by_arm([look], "toy")]
    assert {"batch", "kd"} <= {result.arm for result in results_by_arm([look], "toy", ["batch"])}


def _chain(arm):
    while arm.based_on is not None:
        arm = BY_NAME[arm.based_on]
        yield arm.name


def _chosen(arm):
    chosen = chosen_values(all_tuned(), "toy")
    return chosen, chosen[arm.name]


def test_results_of_another_text_teacher_or_judge_are_refused(tmp_path):
    path, now = tmp_path / "results.jsonl", SOURCE | {"digest": "2"}
    results = [result_of(), dataclasses.replace(result_of(text="handbook"), source=now, judges={"pairs": "a.test"})]
    require_same_source(results, path, "toy", SOURCE)
    with pytest.raises(UserError, match=r"results.jsonl: its results of the text 'toy' are of another text, teacher"):
        require_same_source(results, path, "toy", now)
    require_same_judges(results, path, "handbook", {"pairs": "a.test", "piqa": "piqa"})
    require_same_judges(results, path, "toy", {"pairs": "b.test"})
    with pytest.raises(UserError, match=r"pairs are from a.test, now from b.test"):
        require_same_judges(results, path, "handbook", {"pairs": "b.test"})


def test_a_result_names_all_settings_so_that_other_defaults_are_other_settings(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append_result(path, result_of(Settings(kd_weight=5.0)))
    assert json.loads(path.read_text())["settings"] == dataclasses.asdict(Settings(kd_weight=5.0))
    line = json.loads(path.read_text())
    del line["settings"]["decay"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="its settings lack decay"):
        read_results(path)


def test_a_training_that_diverges_has_a_result_that_is_json_and_is_not_chosen(tmp_path):
    path = tmp_path / "results.jsonl"
    batch = dataclasses.replace(BY_NAME["batch, equal tokens"], changes={}, trials=(4,))
    append_result(path, dataclasses.replace(result_of(Settings(batch_size=16)), measures=DIVERGED))
    append_result(path, result_of(Settings(batch_size=4), 9.0))

    def refuse(constant):
        raise AssertionError(constant)

    first = json.loads(path.read_text().splitlines()[0], parse_constant=refuse)
    assert first["measures"]["kl"] is None
    results = read_results(path)
    assert results[0].measures["kl"] == float("inf")
    assert choose(results, "toy", batch, {}) == 4


def test_a_reference_that_is_measured_by_more_judges_later_has_the_measures_of_both(tmp_path):
    path = tmp_path / "results.jsonl"
    first = dataclasses.replace(result_of(arm="teacher", seed=0), judges={"pairs": "a"})
    first = dataclasses.replace(first, measures=first.measures | {"opposites": 0.7})
    append_result(path, first)
    append_result(path, dataclasses.replace(first, judges={"piqa": "b"}, measures=MEASURES | {"piqa": 0.5}))
    append_result(path, result_of(arm="untrained", seed=0))
    append_result(path, result_of())
    append_result(path, result_of())
    teacher, untrained, training = read_results(path)
    assert (teacher.measures["opposites"], teacher.measures["piqa"]) == (0.7, 0.5)
    assert teacher.judges == {"pairs": "a", "piqa": "b"}
    assert (untrained.arm, training.arm) == ("untrained", "kd")


def test_a_setting_that_fits_no_other_is_refused():
    with pytest.raises(ValueError, match="sense_at"):
        Settings(sense_at="reading", hidden_weight=1.0)


def test_an_interrupted_line_costs_no_other_result(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, result_of(seed=1))
    with path.open("a") as stream:
        stream.write('{"arm": "k')
    assert read_results(path) == [result_of(seed=1)]
    append_result(path, result_of(seed=2))
    assert [result.seed for result in read_results(path)] == [1, 2]


def test_a_last_line_that_lacks_its_line_break_alone_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, result_of(seed=1))
    append_result(path, result_of(seed=2))
    path.write_bytes(path.read_bytes()[:-1])
    assert [result.seed for result in read_results(path)] == [1, 2]
    append_result(path, result_of(seed=3))
    assert [result.seed for result in read_results(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "kl: 3", "", '{"measures": {}}', '{"measures": null}', '{"measures": {"kl": "low"}}']
)
def test_a_line_that_is_not_a_result_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    append_result(path, result_of())
    if "measures" in line:
        line = json.dumps(json.loads(path.read_text()) | json.loads(line))
    with path.open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(UserError, match=r"results.jsonl:2: this is not a result of the study \("):
        read_results(path)


def test_places_of_benchmarks_and_overrides_may_follow_each_other():
    words = ["piqa=/data/piqa", "workdir=work/x", "corpus.source=files", "pica=/data"]
    assert split_places(words) == (["piqa=/data/piqa", "pica=/data"], ["workdir=work/x", "corpus.source=files"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "kdd"], "there is no 'kdd'"),
        (["--pairs", "missing.test"], "--pairs missing.test: this is not a file of pairs"),
        (["--questions", "piqa=missing"], "--questions piqa=missing: expected BENCHMARK=FOLDER"),
        (["--arms", "kd", "student.layer=3"], "student.layer"),
        (["--questions", "corpus.sourc=files"], "corpus.sourc"),
    ],
)
def test_wrong_arguments_are_refused_before_the_pipeline_starts(monkeypatch, capsys, arguments, message):
    def refuse(*given, **named):
        raise AssertionError("the pipeline started")

    monkeypatch.setattr("dskd.pipeline.run_pipeline", refuse)
    monkeypatch.setattr(sys, "argv", ["benchmarks.quality", *arguments])
    assert main() == 2
    assert message in capsys.readouterr().err
