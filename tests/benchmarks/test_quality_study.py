"""The study of what makes a good student: its comparison is fair, and no training is repeated."""

import dataclasses
import functools
import json
import sys

import pytest
import torch
from scipy import stats
from task_files import DATA
from tiny_work import BEFORE_TRAINING, TINY, copy_work

from benchmarks.quality.__main__ import REPORT, RESULTS, main, split_places
from benchmarks.quality.arms import ARMS, BY_NAME, TEST_SEEDS, TUNING_SEED, time_of_sequence
from benchmarks.quality.measures import BY_TEXT, is_at_chance, measure
from benchmarks.quality.pairs import Pairs, area_under_curve
from benchmarks.quality.questions import Questions
from benchmarks.quality.report import _with_shared_seeds, render
from benchmarks.quality.results import (
    Result,
    append_result,
    choose,
    chosen_values,
    read_results,
    require_same_judges,
    require_same_source,
    results_by_arm,
    settings_of_length,
)
from benchmarks.quality.senses import SenseInputs, nearer_to_antonyms, nearest_rows, sense_rows, with_random_words
from benchmarks.quality.settings import Settings
from benchmarks.quality.teacher import Student, Teacher, lower_states, run_layers
from benchmarks.quality.terms import entropies, lexical_divergence, synonym_targets
from benchmarks.quality.text import Words, load_text, parts_of, similar_words
from benchmarks.quality.training import Material, _optimizers, build_head, train
from benchmarks.quality.trainings import (
    DIVERGED,
    Runner,
    Training,
    planned_lengths,
    planned_looks,
    planned_trainings,
    require_arms,
)
from dskd.config import LossConfig
from dskd.config.reading import load_config
from dskd.corpus.tasks.benchmarks import BENCHMARKS
from dskd.corpus.tasks.reading import read_examples
from dskd.errors import UserError
from dskd.lexicon.wordnet import open_wordnet
from dskd.senses.dictionary import load_dictionary, map_vectors
from dskd.shards.annotate import annotate
from dskd.shards.schema import ANTONYM_ROWS, OWN_ROWS, SYNONYM_ROWS
from dskd.students.student import build_student
from dskd.training.positions import SensePositions

MEASURES = dict.fromkeys(BY_TEXT, 50.0)
SOURCE = {"digest": "1", "teacher": "llama", "tokens": 1000, "sequence": 10, "validation": 20, "test": 30}


def _result(settings=None, kl=2.0, seed=TUNING_SEED, stage="tune", arm="kd", text="toy"):
    measures = MEASURES | {"kl": kl}
    place = "2026-11-30", "here", "cpu", SOURCE, {}
    return Result(text, stage, arm, seed, settings or Settings(), None, measures, 10, 100, 50, 3.0, *place)


@functools.cache
def _all_tuned(text="toy"):
    """Results of all trials, of which the last of each arm has the lowest KL."""
    results, kl = [], 9.0
    while True:
        done = {result.identity for result in results}
        planned = (t for t in planned_trainings(results, text, (), ()))
        new = [_result(t.settings, text=text, arm=t.arm.name) for t in planned]
        new = [result for result in new if result.identity not in done]
        if not new:
            return results
        for result in new:
            kl -= 0.01
            results.append(dataclasses.replace(result, measures=MEASURES | {"kl": kl}))


def _tested(arm, kl=2.0, seed=0, stage="test", length=0, **measures):
    """A result of an arm with its chosen value."""
    chosen = chosen_values(_all_tuned(), "toy")
    settings = BY_NAME[arm].settings(chosen, chosen[arm])
    if length:
        settings = settings_of_length(settings, length, SOURCE["tokens"])
    result = _result(settings, kl, seed, stage, arm)
    return dataclasses.replace(result, measures=result.measures | measures, length=length)


def test_no_seed_of_the_test_is_tuned_on_and_arms_with_weights_try_equally_many():
    assert TUNING_SEED not in TEST_SEEDS
    tried = {arm.name: len(arm.trials) for arm in ARMS if arm.tested and not arm.keeps}
    assert set(tried.values()) == {3}


def test_arms_are_tried_in_order_and_tested_seed_by_seed_once_they_are_chosen():
    first = list(planned_trainings([], "toy", ()))
    assert {training.arm.name for training in first} == {"batch", "batch, equal tokens"}
    results = _all_tuned()
    planned = list(planned_trainings(results, "toy", ()))
    tested = [training for training in planned if training.stage == "test"]
    assert [training.seed for training in tested] == sorted(training.seed for training in tested)
    assert {training.arm.name for training in tested} == {arm.name for arm in ARMS if arm.tested}
    assert {training.seed for training in planned if training.stage == "tune"} == {TUNING_SEED}


def test_every_arm_differs_from_what_it_is_compared_with_in_its_own_settings_alone():
    results, chosen = _all_tuned(), {}
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
    results = [_result(Settings(batch_size=16), 3.0), _result(Settings(batch_size=4), 1.0)]
    assert choose(results, "toy", batch, {}) is None
    results.append(_result(Settings(batch_size=8), 2.0))
    assert choose(results, "toy", batch, {}) == 4
    assert choose([*results, _result(Settings(batch_size=8), 0.5, stage="test")], "toy", batch, {}) == 4
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
    results, chosen = _all_tuned(), {}
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
    results = _all_tuned()
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


def test_the_report_has_arms_by_length():
    results = list(_all_tuned())
    for seed in range(3):
        for arm, shift in (("kd", 0.0), ("hidden", 0.25 * (1 + 0.1 * seed))):
            results.append(_tested(arm, 2.0 + 0.01 * seed + shift, seed, "length", 1000))
            results.append(_tested(arm, 1.0 + shift, seed, "length", 2000))
    results.append(
        dataclasses.replace(_tested("kd", 9.0, 3, "length", 1000), settings=Settings(epochs=0.9))
    )  # outdated
    report = render(results)
    assert "kl, 1,000 tokens (1 × the text) | against kd | kl, 2,000 tokens (2 × the text)" in report
    row = "| hidden | 2.2850 ± 0.0869 | **+0.2750 ± 0.0621** | 1.2750 ± 0.0621 | **+0.2750 ± 0.0621** |"
    assert row in report


def test_results_of_an_arm_with_settings_that_were_chosen_before_do_not_count():
    now = [_tested("kd"), _tested("kd", stage="length", length=500)]
    before = [
        dataclasses.replace(result, settings=dataclasses.replace(result.settings, learning_rate=0.123), seed=7)
        for result in now
    ]
    look = _result(BY_NAME["kd"].look_settings(), seed=100, stage="look")
    results = [*_all_tuned(), *now, *before, look, dataclasses.replace(look, settings=Settings(), seed=101)]
    assert results_by_arm(results, "toy") == [*_all_tuned(), *now, look]
    assert not results_by_arm(results, "another")


def test_arms_with_equal_settings_share_a_training_and_each_has_its_result():
    temperature, kd = BY_NAME["temperature"], BY_NAME["kd"]
    tried = [
        dataclasses.replace(result, measures=result.measures | {"kl": 0.5})
        if result.settings == kd.settings(*_chosen(kd)) and result.stage == "tune"
        else result
        for result in _all_tuned()
    ]
    chosen = chosen_values(tried, "toy", {"temperature", *_chain(temperature)})
    assert chosen["temperature"] == 2.0  # as kd has it
    shared = _result(kd.settings(chosen, chosen["kd"]), 1.25, 0, "test")
    named = [result.arm for result in results_by_arm([*tried, shared], "toy") if result.stage == "test"]
    assert {"kd", "temperature"} <= set(named)
    assert "warmup" not in named  # is not tested
    table = render([*tried, shared]).partition("### Test")[2]
    assert "| temperature |" in table
    look = _result(kd.look_settings(), 1.25, 100, "look", "kd")
    assert "batch" not in [result.arm for result in results_by_arm([look], "toy")]
    assert {"batch", "kd"} <= {result.arm for result in results_by_arm([look], "toy", ["batch"])}


def _chain(arm):
    while arm.based_on is not None:
        arm = BY_NAME[arm.based_on]
        yield arm.name


def _chosen(arm):
    chosen = chosen_values(_all_tuned(), "toy")
    return chosen, chosen[arm.name]


def test_results_of_another_text_teacher_or_judge_are_refused(tmp_path):
    path, now = tmp_path / "results.jsonl", SOURCE | {"digest": "2"}
    results = [_result(), dataclasses.replace(_result(text="handbook"), source=now, judges={"pairs": "a.test"})]
    require_same_source(results, path, "toy", SOURCE)
    with pytest.raises(UserError, match=r"results.jsonl: its results of the text 'toy' are of another text, teacher"):
        require_same_source(results, path, "toy", now)
    require_same_judges(results, path, "handbook", {"pairs": "a.test", "piqa": "piqa"})
    require_same_judges(results, path, "toy", {"pairs": "b.test"})
    with pytest.raises(UserError, match=r"pairs are from a.test, now from b.test"):
        require_same_judges(results, path, "handbook", {"pairs": "b.test"})


def test_a_result_names_all_settings_so_that_other_defaults_are_other_settings(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    append_result(path, _result(Settings(kd_weight=5.0)))
    assert json.loads(path.read_text())["settings"] == dataclasses.asdict(Settings(kd_weight=5.0))
    line = json.loads(path.read_text())
    del line["settings"]["decay"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="its settings lack decay"):
        read_results(path)


def test_a_training_that_diverges_has_a_result_that_is_json_and_is_not_chosen(tmp_path):
    path = tmp_path / "results.jsonl"
    batch = dataclasses.replace(BY_NAME["batch, equal tokens"], changes={}, trials=(4,))
    append_result(path, dataclasses.replace(_result(Settings(batch_size=16)), measures=DIVERGED))
    append_result(path, _result(Settings(batch_size=4), 9.0))

    def refuse(constant):
        raise AssertionError(constant)

    first = json.loads(path.read_text().splitlines()[0], parse_constant=refuse)
    assert first["measures"]["kl"] is None
    results = read_results(path)
    assert results[0].measures["kl"] == float("inf")
    assert choose(results, "toy", batch, {}) == 4


def test_a_reference_that_is_measured_by_more_judges_later_has_the_measures_of_both(tmp_path):
    path = tmp_path / "results.jsonl"
    first = dataclasses.replace(_result(arm="teacher", seed=0), judges={"pairs": "a"})
    first = dataclasses.replace(first, measures=first.measures | {"opposites": 0.7})
    append_result(path, first)
    append_result(path, dataclasses.replace(first, judges={"piqa": "b"}, measures=MEASURES | {"piqa": 0.5}))
    append_result(path, _result(arm="untrained", seed=0))
    append_result(path, _result())
    append_result(path, _result())
    teacher, untrained, training = read_results(path)
    assert (teacher.measures["opposites"], teacher.measures["piqa"]) == (0.7, 0.5)
    assert teacher.judges == {"pairs": "a", "piqa": "b"}
    assert (untrained.arm, training.arm) == ("untrained", "kd")


def test_a_setting_that_fits_no_other_is_refused():
    with pytest.raises(ValueError, match="sense_at"):
        Settings(sense_at="reading", hidden_weight=1.0)


def test_an_interrupted_line_costs_no_other_result(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, _result(seed=1))
    with path.open("a") as stream:
        stream.write('{"arm": "k')
    assert read_results(path) == [_result(seed=1)]
    append_result(path, _result(seed=2))
    assert [result.seed for result in read_results(path)] == [1, 2]


def test_a_last_line_that_lacks_its_line_break_alone_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, _result(seed=1))
    append_result(path, _result(seed=2))
    path.write_bytes(path.read_bytes()[:-1])
    assert [result.seed for result in read_results(path)] == [1, 2]
    append_result(path, _result(seed=3))
    assert [result.seed for result in read_results(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "kl: 3", "", '{"measures": {}}', '{"measures": null}', '{"measures": {"kl": "low"}}']
)
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
    monkeypatch.setattr(sys, "argv", ["benchmarks.quality", "--report", "--results", str(path)])
    assert main() == 2
    assert f"--results {path}: this file has no results" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()


def test_the_committed_report_is_that_of_the_committed_results():
    assert REPORT.read_text(encoding="utf-8") == render(read_results(RESULTS))


def test_the_intervals_of_the_report_are_those_of_scipy():
    values = {"kd": [2.0, 2.3, 1.8, 2.1, 2.4], "hidden": [1.9, 2.1, 1.8, 2.2, 2.0]}
    results = [_tested(name, kl, seed) for name, of_seeds in values.items() for seed, kl in enumerate(of_seeds)]
    results += _all_tuned()
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
    teacher = dataclasses.replace(_result(stage="test", arm="teacher"), measures=MEASURES | counted)
    results = [*_all_tuned(), teacher]
    for seed in range(5):
        results.append(_tested("kd", 2 + 0.001 * seed**2, seed, piqa=0.5, opposites=0.5))
        results.append(_tested("hidden", 1.9, seed, piqa=0.6, opposites=0.5))
    report = render(results)
    assert "**-0.1060 ± 0.0082**" in report
    assert "piqa †" in report
    differences = next(line for line in report.splitlines() if line.startswith("| arm | against"))
    assert "opposites" in differences
    assert "piqa" not in differences


def test_a_divergence_over_few_words_is_that_of_their_renormalised_probabilities():
    torch.manual_seed(0)
    matrix, own, other = torch.randn(9, 4), torch.randn(3, 4), torch.randn(3, 4)
    targets, related = torch.tensor([0, 1, 2]), torch.tensor([[3, 4, -1], [-1, -1, -1], [5, -1, -1]])
    expected = []
    for position, words in ((0, [0, 3, 4]), (2, [2, 5])):
        student, teacher = (((each @ matrix.T)[position, words] / 2).softmax(-1) for each in (own, other))
        expected.append(4 * (teacher * (teacher / student).log()).sum())
    found = lexical_divergence(own, other, matrix, targets, related, 2.0)
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert lexical_divergence(own, other, matrix, targets, torch.full((3, 2), -1), 2.0) == 0


def test_synonym_targets_are_a_cross_entropy_with_a_divided_target():
    torch.manual_seed(0)
    matrix, own, other = torch.randn(9, 4), torch.randn(2, 4), torch.randn(2, 4)
    targets, synonyms, share = torch.tensor([0, 1]), torch.tensor([[3, 4], [-1, -1]]), 0.2
    log_chances = (own @ matrix.T).log_softmax(-1)
    divided = torch.zeros(2, 9)
    divided[[0, 1], targets] = 1.0
    divided[0, 0] -= share
    divided[0, [0, 3, 4]] += share * (other @ matrix.T)[0, [0, 3, 4]].softmax(-1)
    plain = -log_chances[[0, 1], targets].mean()
    added = synonym_targets(own, other, matrix, targets, synonyms, share)
    assert plain + added == pytest.approx(float(-(divided * log_chances).sum(-1).mean()), rel=1e-5)


def test_similar_words_have_similar_counts_and_are_others():
    counts = torch.arange(200.0).square()
    is_word = torch.arange(200) % 2 == 0
    others = similar_words(counts, is_word)
    assert sorted(others.tolist()) == list(range(200))
    assert not (others == torch.arange(200)).any()
    assert (is_word[others] == is_word).all()
    assert ((others - torch.arange(200)).abs() < 128).all()


def test_the_area_under_the_curve_counts_pairs():
    scores, positive = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    assert area_under_curve(scores, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


@pytest.fixture(scope="module")
def stored(tiny, world, tmp_path_factory):
    """The config of a work directory whose shards have the teacher's states."""
    annotation = {**TINY["annotation"], "teacher_top_n": 0, "store": ["teacher_states", "trunk_states"]}
    student = {"layers": 3, "train_layers": 1}
    settings = {**TINY["train"], "global_batch_size": 4, "micro_batch_size": 4, "num_workers": 0, "steps": 3}
    path = copy_work(
        tiny, tmp_path_factory.mktemp("study"), *BEFORE_TRAINING, annotation=annotation, student=student, train=settings
    )
    build_student(load_config(path))
    annotate(load_config(path), world)
    return load_config(path)


@pytest.fixture(scope="module")
def teacher(stored):
    return Teacher.load(stored)


@pytest.fixture(scope="module")
def material(stored, teacher):
    text = load_text(stored, "train", teacher)
    dictionary, _ = load_dictionary(stored)
    vectors = torch.from_numpy(map_vectors(dictionary.path).copy()).view(torch.bfloat16)
    entropy = torch.zeros(text.input_ids.shape)
    entropy[text.loss_mask] = entropies(text.teacher_states[text.loss_mask], teacher.output_matrix)
    return Material(text, text.trunk_states, Words.of(dictionary, teacher, text), entropy, dictionary, vectors)


@pytest.mark.slow
def test_states_computed_here_are_those_that_annotation_stored(stored, teacher, material):
    text = material.text
    trunk = run_layers(teacher, tuple(range(text.trunk_depth)), text)
    last = run_layers(teacher, tuple(range(text.trunk_depth, teacher.num_layers)), text, trunk, with_norm=True)
    at = text.loss_mask
    torch.testing.assert_close(trunk[at], text.trunk_states[at], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last[at], text.teacher_states[at], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(3, 6, 13, 18, 22), (6, 17, 20, 21), (4, 9, 14, 18), (1, 14, 15)])
def test_documents_are_in_one_part_only(material, ends):
    documents = torch.bucketize(torch.arange(24), torch.tensor(ends), right=True).view(6, 4)
    starts = torch.ones(6, 4, dtype=torch.bool)  # also where a sequence begins with the rest of a document
    starts[:, 1:] = documents.diff(dim=-1) != 0
    parts = parts_of(dataclasses.replace(material.text, document_starts=starts))
    found = [set(documents[parts[name]].flatten().tolist()) for name in ("validation", "test")]
    assert all(found)
    assert not found[0] & found[1]


_SETTINGS = Settings(layers=3, train_layers=1, batch_size=4, learning_rate=3e-4, epochs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sense_weight": 1.0, "position_share": 0.5},
        {"sense_weight": 1.0, "sense_form": "distribution", "hidden_weight": 1.0},
        {"sense_weight": 1.0, "sense_at": "reading", "sense_words": "random"},
        {"sense_weight": 0.1, "sense_at": "middle", "train_layers": 2, "keep": "first"},
        {"sense_weight": 0.1, "synonym_weight": 0.0, "sense_own": False, "relative_margin": 1.0, "antonyms": "nearer"},
        {"lexical_divergence": 1.0, "synonym_targets": 0.2, "weights": "entropy"},
        {"optimizer": "muon", "weights": "senses", "decay": "linear", "train_norm": True},
        {"keep": "first", "train_head": True, "train_layers": 2},
    ],
)
def test_a_student_comes_nearer_to_its_teacher(stored, teacher, material, tmp_path, changes):
    settings = dataclasses.replace(_SETTINGS, **changes)
    held_out = load_text(stored, "validation", teacher)
    at = parts_of(held_out)["test"]
    student = Student(teacher, settings)
    lower = lower_states(teacher, student.frozen, held_out, tmp_path)

    def measured():
        with torch.no_grad():
            states = student(lower[at], held_out.position_ids[at], held_out.attention_mask(at))
        matrices = student.output_matrix.detach(), teacher.output_matrix
        return measure(states, *matrices, held_out, at, material.words)

    before = measured()
    states = lower_states(teacher, student.frozen, material.text, tmp_path)
    cost = train(student, dataclasses.replace(material, states=states), settings, seed=0)
    assert cost.steps == round(len(material.text) * 0.5 / 4)
    assert measured()["kl"] < before["kl"]
    frozen = [parameter for name, parameter in student.named_parameters() if name not in student.trained()]
    assert all(parameter.grad is None for parameter in frozen)


@pytest.mark.slow
def test_places_of_sense_terms_are_those_that_the_product_draws_for_a_sequence(material):
    text, settings, seed = material.text, Settings(sense_weight=1.0, batch_size=1), 3
    inputs = SenseInputs(text, material.dictionary, material.vectors, settings, seed)
    rule = SensePositions.of(LossConfig(), seed)
    found = []
    for row in (2, 5):
        order, _, (senses,) = inputs.of_step(torch.tensor([row]), text.loss_mask[[row]], step=row, epoch=1)
        assert order.tolist() == [row]
        sample = {name: rows[row].numpy() for name, rows in text.rows.items()}
        relation, own = rule.draw(sample | {"loss_mask": text.loss_mask[row].numpy()}, row, 1)
        assert senses["own_positions"].tolist() == own.tolist()
        assert senses["relation_positions"].tolist() == relation.tolist()
        of_first = rule.draw(sample | {"loss_mask": text.loss_mask[row].numpy()}, 0, 1)[1]
        found.append(own.tolist() != of_first.tolist())
    assert any(found)
    # Several in a step, one of them twice: each keeps its mask.
    chosen = torch.tensor([7, 2, 5, 2])
    mask = text.loss_mask[chosen] & (torch.arange(text.input_ids.shape[1]) % 2 == 0)
    order, masks, _ = inputs.of_step(chosen, mask, 0, 0)
    assert sorted(order.tolist()) == [2, 2, 5, 7]
    assert all(masks[place].equal(mask[chosen.tolist().index(row)]) for place, row in enumerate(order.tolist()))


@pytest.mark.slow
def test_a_push_alone_is_drawn_at_positions_with_antonyms(material):
    text = material.text
    has_antonyms = text.rows[ANTONYM_ROWS][..., 0] >= 0
    assert not has_antonyms.equal(text.lexical)
    rows = sense_rows(text, material.dictionary, BY_NAME["push"].look_settings())
    lexical = (rows[SYNONYM_ROWS][..., 0] >= 0) | (rows[ANTONYM_ROWS][..., 0] >= 0)
    assert lexical.equal(has_antonyms)
    rows = sense_rows(text, material.dictionary, BY_NAME["antonyms"].look_settings())
    assert rows[SYNONYM_ROWS].equal(text.rows[SYNONYM_ROWS])


@pytest.mark.slow
def test_numbers_of_senses_are_exchanged_among_words_with_senses(stored, teacher, material):
    words, tokenizer, reader = material.words, teacher.tokenizer, open_wordnet().reader
    has_senses = torch.zeros(len(words.senses), dtype=torch.bool)
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token])
        has_senses[token] = word.startswith(" ") and word[1:].isalpha() and bool(reader.synsets(word[1:].lower()))
    assert has_senses.any() and not has_senses.all()
    assert (words.senses_of_others[~has_senses] == 1).all()
    one, other = (each[has_senses].sort().values for each in (words.senses, words.senses_of_others))
    assert one.equal(other)


@pytest.mark.slow
def test_muon_leaves_norms_to_adamw_at_its_own_rate(teacher, material):
    settings = dataclasses.replace(_SETTINGS, optimizer="muon", muon_rate=0.01, train_norm=True, warmup=0.0)
    student = Student(teacher, settings)
    muon, adamw = _optimizers(student.trained(), settings)
    assert [group["lr"] for group in muon.param_groups] == [0.01]
    assert [group["lr"] for group in adamw.param_groups] == [settings.learning_rate]
    assert all(each.ndim == 1 for each in adamw.param_groups[0]["params"])
    before = {name: value.detach().clone() for name, value in student.trained().items()}
    still = dataclasses.replace(settings, muon_rate=0.0)
    states = lower_states(teacher, student.frozen, material.text, None)
    train(student, dataclasses.replace(material, states=states), still, seed=0)
    moved = {name: not value.equal(before[name]) for name, value in student.trained().items()}
    assert all(is_moved == (before[name].ndim == 1) for name, is_moved in moved.items())


@pytest.mark.slow
def test_a_training_that_diverges_is_recorded_and_not_tried_again(stored, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    runner = Runner(stored, "toy", path)
    name = "batch, equal tokens"
    arm = dataclasses.replace(BY_NAME[name], changes={"layers": 3, "train_layers": 1, "learning_rate": 1e30})
    training = Training("tune", arm, TUNING_SEED, 4, arm.settings({}, 4))
    runner._train(training)
    (result,) = read_results(path)
    assert result.measures["kl"] == float("inf")
    assert result.settings == training.settings and result.steps
    assert "it diverged (the loss of step" in capsys.readouterr().err
    assert result.source == Runner(stored, "toy", path)._source
    assert result.source["tokens"] == load_text(stored, "train", runner._teacher).input_ids.numel()
    other = dataclasses.replace(result, source=result.source | {"digest": "another"})
    path.write_text(other.to_json() + "\n")
    with pytest.raises(UserError, match="of another text, teacher or sense dictionary"):
        Runner(stored, "toy", path)


@pytest.mark.slow
def test_what_is_kept_of_a_text_has_the_teacher_in_its_name(teacher, material, tmp_path):
    for digest in ("a" * 64, "b" * 64):
        text = dataclasses.replace(material.text, teacher=digest)
        lower_states(teacher, (1,), text, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_the_teacher_has_no_divergence_from_itself(stored, teacher, material):
    held_out = load_text(stored, "validation", teacher)
    at = parts_of(held_out)["test"]
    matrix = teacher.output_matrix
    found = measure(held_out.teacher_states[at], matrix, matrix, held_out, at, material.words)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1


@pytest.mark.slow
def test_rows_found_here_are_those_that_annotation_stored(material):
    text, at = material.text, material.text.lexical
    found = nearest_rows(text, material.dictionary, at, text.rows[OWN_ROWS].shape[-1])
    for name, values in (
        (OWN_ROWS, found.own_rows),
        (SYNONYM_ROWS, found.synonym_rows),
        (ANTONYM_ROWS, found.antonym_rows),
    ):
        assert (values == text.rows[name][at]).float().mean() > 0.99, name  # states differ in their last bits


@pytest.mark.slow
def test_random_words_replace_synonyms_and_antonyms_and_nothing_else(material):
    text, dictionary = material.text, material.dictionary
    rows = sense_rows(text, dictionary, Settings(sense_words="random"))
    assert rows[OWN_ROWS].equal(text.rows[OWN_ROWS])
    entry_of_row = torch.arange(dictionary.entries.num_entries).repeat_interleave(dictionary.senses_per_entry)
    exchanged = with_random_words(dictionary)
    for name, relation in ((SYNONYM_ROWS, "synonym"), (ANTONYM_ROWS, "antonym")):
        assert (rows[name][..., 0] >= 0).equal(text.rows[name][..., 0] >= 0)
        before, after = (each.entries.neighbours(relation) for each in (dictionary, exchanged))
        with_rows = dictionary.senses_per_entry[before.values] > 0
        assert (before.values != after.values).equal(with_rows)
        assert with_rows.equal(dictionary.senses_per_entry[after.values] > 0)
        for sequence, position in (rows[name][..., 0] >= 0).nonzero().tolist():
            target = int(text.labels[sequence, position])
            found = [int(entry_of_row[row]) for row in rows[name][sequence, position].tolist() if row >= 0]
            own = {target} if name == SYNONYM_ROWS else set()  # a word's own rows compete with its synonyms'
            assert set(found) <= set(after.of(target)) | own


@pytest.mark.slow
def test_antonyms_are_nearer_where_plain_distances_say_so(material):
    text, dictionary = material.text, material.dictionary
    vectors = material.vectors.float()
    found = nearer_to_antonyms(text, dictionary)

    def nearest(entries, state):
        rows = [row for entry in entries for row in dictionary.rows_of(entry)]
        return min((float((state - vectors[row]).square().sum()) for row in rows), default=None)

    relations = [dictionary.entries.neighbours(relation) for relation in ("synonym", "antonym")]
    kinds = set()
    for sequence, position in (text.rows[ANTONYM_ROWS][..., 0] >= 0).nonzero().tolist():
        target, state = int(text.labels[sequence, position]), text.teacher_states[sequence, position]
        synonym, antonym = (nearest(relation.of(target), state) for relation in relations)
        is_nearer = synonym is not None and antonym < synonym
        assert bool(found[sequence, position]) == is_nearer
        kinds.add(is_nearer)
    assert kinds == {True, False}
    assert not found[text.rows[ANTONYM_ROWS][..., 0] < 0].any()
    rows = sense_rows(text, dictionary, Settings(antonyms="nearer", sense_own=False))
    assert (rows[ANTONYM_ROWS][..., 0] >= 0).equal(found)
    assert (rows[OWN_ROWS] == -1).all()


@pytest.mark.slow
def test_after_a_word_is_read_its_rows_are_at_the_next_position_with_a_state(material):
    """The rows are those of the token that is read at the position; no position is in another sequence."""
    text, settings = material.text, Settings(sense_weight=1.0, sense_at="reading")
    dictionary = material.dictionary
    inputs = SenseInputs(text, dictionary, material.vectors, settings, seed=0)
    chosen = torch.arange(6)
    order, _, senses = inputs.of_step(chosen, text.loss_mask[chosen], 0, 0)
    owners = torch.arange(dictionary.entries.num_entries).repeat_interleave(dictionary.senses_per_entry)
    assert len(senses) == 1
    at, rows = senses[0]["own_positions"], senses[0]["own_rows"][:, 0]
    assert len(at)
    assert text.input_ids[order].flatten()[at].equal(owners[rows])
    has_state = text.trunk_states[order].abs().sum(-1).flatten() > 0
    assert has_state[at].all()
    assert has_state[senses[0]["relation_positions"]].all()


@pytest.mark.slow
def test_a_relative_margin_is_in_the_teachers_mean_distance_to_antonyms(teacher, material):
    text, student = material.text, Student(teacher, _SETTINGS)
    searched = nearest_rows(text, material.dictionary, text.rows[ANTONYM_ROWS][..., 0] >= 0, 2).antonym_distance
    assert text.antonym_distance == pytest.approx(float(searched.mean()), rel=1e-3)
    pushed = dataclasses.replace(_SETTINGS, relative_margin=2.0)
    assert build_head(student, pushed, text).margin == pytest.approx(2 * text.antonym_distance)
    assert build_head(student, _SETTINGS, text).margin == 1


@pytest.mark.slow
def test_states_from_the_middle_are_those_of_a_student_without_the_layers_above(teacher, material):
    student = Student(teacher, dataclasses.replace(_SETTINGS, train_layers=2))
    text, at = material.text, torch.arange(2)
    states = text.trunk_states[at], text.position_ids[at], text.attention_mask(at)
    with torch.no_grad():
        last, middle = student.forward_from_middle(*states)
        expected = run_layers(teacher, student.upper[:1], _Rows(text, at), states[0], with_norm=True)
        torch.testing.assert_close(last, student(*states))
    torch.testing.assert_close(middle, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_challenge", "piqa", "commonsense_qa"])
def test_choices_are_as_likely_as_one_by_one_in_transformers(teacher, name):
    questions = Questions.read(name, str(DATA / name.removesuffix("_challenge")), teacher)
    student = Student(teacher, Settings(layers=teacher.num_layers, train_layers=1))
    states = run_layers(teacher, student.frozen, questions)
    found, expected, right, right_by_length = questions.log_likelihoods(student, states), [], [], []
    examples = read_examples(BENCHMARKS[name], str(DATA / name.removesuffix("_challenge")), "validation")
    by_row = {
        tuple(row[part == 0].tolist()): n
        for n, (row, part) in enumerate(zip(questions.input_ids, questions.parts, strict=True))
    }
    order = []
    for example in examples:
        context = teacher.tokenizer.encode(f"Question: {example.question}\nAnswer:")
        if tuple(context) not in by_row:
            continue
        order.append(by_row[tuple(context)])
        chances = []
        for choice in example.choices:
            ids = teacher.tokenizer.encode(f"Question: {example.question}\nAnswer: {choice}")
            with torch.no_grad():
                log_shares = teacher.causal_lm(torch.tensor([ids])).logits[0].log_softmax(-1)
            chances.append(sum(float(log_shares[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        expected.append(chances)
        gold = BENCHMARKS[name].labels.index(example.answers[0])
        right.append(max(range(len(chances)), key=chances.__getitem__) == gold)
        by_length = [chance / len(choice) for chance, choice in zip(chances, example.choices, strict=True)]
        right_by_length.append(max(range(len(chances)), key=by_length.__getitem__) == gold)
    assert sorted(order) == list(range(len(questions.input_ids)))
    for row, chances in zip(order, expected, strict=True):
        torch.testing.assert_close(found[questions.row_of_choice == row], torch.tensor(chances), rtol=1e-4, atol=1e-3)
    measured = questions.measure(student, states)
    assert measured[name] == pytest.approx(sum(right) / len(right))
    assert measured[f"{name}_norm"] == pytest.approx(sum(right_by_length) / len(right))
    assert measured[f"{name}_n"] == len(right)


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
        _result(BY_NAME[arm].look_settings(), kl, seed, "look", arm)
        for arm, of_seeds in {"kd": (2.0, 2.1, 5.0), "rarity": (1.0, 1.1), "lexical weight": (1.5, 1.6)}.items()
        for seed, kl in enumerate(of_seeds, start=100)
    ]
    report = render([*_all_tuned(), *looks])
    group = report.partition("#### Weights of positions")[2]
    assert "| rarity |" in group and "**" not in group
    mixed = [*looks, _result(BY_NAME["rarity"].look_settings(), 9.0, 102, "look", "rarity")]
    assert "| 3.7000 |" not in render(mixed) and "9.0000" not in render(mixed)
    assert _with_shared_seeds(looks) == [look for look in looks if look.seed < 102]


def test_a_report_of_values_that_are_not_defined_or_diverged_says_so():
    results = [*_all_tuned(), _tested("kd"), _tested("kd", seed=1)]
    undefined = {"preference": float("nan"), "preference_n": 0}
    results += [dataclasses.replace(_result(arm=name, seed=0), measures=MEASURES | undefined) for name in ("teacher",)]
    results += [dataclasses.replace(_tested("hidden", seed=seed), measures=DIVERGED) for seed in range(2)]
    report = render(results)
    assert "nan" not in report and "inf" not in report
    assert "| diverged | – |" in report
    assert "Teacher: llama." in report and "30 in the test part" in report


def test_places_of_benchmarks_and_overrides_may_follow_each_other():
    words = ["piqa=/data/piqa", "workdir=work/x", "corpus.source=files", "pica=/data"]
    assert split_places(words) == (["piqa=/data/piqa", "pica=/data"], ["workdir=work/x", "corpus.source=files"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "kdd"], "there is no 'kdd'"),
        (["--pairs", "missing.test"], "--pairs missing.test: this is no file of pairs"),
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


@pytest.mark.slow
def test_pairs_that_the_lexicon_has_are_measured_apart(teacher, tmp_path):
    words = [teacher.tokenizer.decode([token]) for token in range(len(teacher.tokenizer))]
    words = [word[1:] for word in words if word.startswith(" ") and word[1:].isalpha()][:9]
    path = tmp_path / "pairs.test"
    path.write_text("".join(f"{words[0]}\t{word}\t{number % 2}\n" for number, word in enumerate(words[1:])))
    known = {frozenset((words[0], words[1])), frozenset((words[2], words[0]))}
    pairs = Pairs.read([path], teacher, known)
    assert pairs.are_new.tolist() == [False, False, *[True] * 6]
    student = Student(teacher, Settings(layers=teacher.num_layers, train_layers=1))
    found = pairs.measure(student, run_layers(teacher, student.frozen, pairs))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[2:]))
    alone = Pairs.read([path], teacher, ())
    expected = alone.measure(student, run_layers(teacher, student.frozen, alone))
    assert found["opposites_new"] == pytest.approx(expected["opposites"])
    assert found["opposites_new_n"] == 6
    assert set(pairs.measures) <= found.keys()
    known = {frozenset((words[0], word)) for word in words[1:]}
    assert "opposites_new" not in Pairs.read([path], teacher, known).measures


class _Rows:
    """Some sequences of a text."""

    def __init__(self, text, at):
        self._text, self._at = text, at
        self.input_ids, self.position_ids = text.input_ids[at], text.position_ids[at]

    def attention_mask(self, at):
        return self._text.attention_mask(self._at[at])
