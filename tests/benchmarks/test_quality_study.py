"""The study of what makes a good student: its comparison is fair, and no training is repeated."""

import dataclasses
import json
import sys

import pytest
import torch
from scipy import stats
from tiny_work import BEFORE_TRAINING, TINY, copy_work

from benchmarks.quality.__main__ import REPORT, RESULTS, main
from benchmarks.quality.arms import ARMS, BY_NAME, TEST_SEEDS, TUNING_SEED
from benchmarks.quality.measures import BY_TEXT, measure
from benchmarks.quality.pairs import area_under_curve
from benchmarks.quality.report import render
from benchmarks.quality.results import Result, append_result, choose, read_results
from benchmarks.quality.settings import Settings
from benchmarks.quality.teacher import Student, Teacher, lower_states, run_layers
from benchmarks.quality.terms import entropies, lexical_divergence, synonym_targets
from benchmarks.quality.text import Words, load_text, parts_of, similar_words
from benchmarks.quality.training import Material, train
from benchmarks.quality.trainings import planned_looks, planned_trainings, require_arms
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.senses.dictionary import load_dictionary, map_vectors
from dskd.shards.annotate import annotate
from dskd.students.student import build_student

MEASURES = dict.fromkeys(BY_TEXT, 50.0)


def _result(settings=None, kl=2.0, seed=TUNING_SEED, stage="tune", arm="kd", text="toy"):
    changes = (settings or Settings()).changes
    return Result(text, stage, arm, seed, changes, None, MEASURES | {"kl": kl}, 10, 100, 50, 3.0, "2026-11-30", "here")


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
        kl -= 0.01
        results.append(dataclasses.replace(new[0], measures=MEASURES | {"kl": kl}))


def test_no_seed_of_the_test_is_tuned_on_and_arms_with_weights_try_equally_many():
    assert TUNING_SEED not in TEST_SEEDS
    tried = {arm.name: len(arm.trials) for arm in ARMS if arm.tested and not arm.keeps}
    assert set(tried.values()) == {3}


def test_arms_are_tried_in_order_and_tested_seed_by_seed_once_they_are_chosen():
    first = list(planned_trainings([], "toy", ()))
    assert {training.arm.name for training in first} == {"batch"}
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
            own = {*arm.changes, arm.tuned, *other.changes, other.tuned} - {None}
            if arm.name not in ("ce", "kd paper"):  # which are of the chain before kd
                assert differing <= own, arm.name


def test_the_lowest_divergence_is_chosen_when_all_trials_are_done():
    batch = dataclasses.replace(BY_NAME["batch"], changes={}, trials=(4, 8))
    results = [_result(Settings(batch_size=16), 3.0), _result(Settings(batch_size=4), 1.0)]
    assert choose(results, "toy", batch, {}) is None
    results.append(_result(Settings(batch_size=8), 2.0))
    assert choose(results, "toy", batch, {}) == 4
    assert choose([*results, _result(Settings(batch_size=8), 0.5, stage="test")], "toy", batch, {}) == 4
    assert choose(results, "another text", batch, {}) is None


def test_an_unknown_arm_is_refused_with_the_names_of_all():
    with pytest.raises(UserError, match="there is no 'sense'; the arms are batch, rate"):
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
            assert differing <= own, arm.name


def test_an_interrupted_line_costs_no_other_result(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, _result(seed=1))
    with path.open("a") as stream:
        stream.write('{"arm": "k')
    assert read_results(path) == [_result(seed=1)]
    append_result(path, _result(seed=2))
    assert [result.seed for result in read_results(path)] == [1, 2]


@pytest.mark.parametrize("line", ["{}", "[1]", "kl: 3", "", '{"measures": {}}', '{"measures": null}'])
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
    results = [
        _result(kl=value, seed=seed, stage="test", arm=name)
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    report = render(results)
    for of_seeds in values.values():
        mean = sum(of_seeds) / 5
        low, _ = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(of_seeds))
        assert f"{mean:.4f} ± {mean - low:.4f}" in report
    differences = [one - other for one, other in zip(values["hidden"], values["kd"], strict=True)]
    mean = sum(differences) / 5
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(differences))
    assert f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" in report


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
def test_documents_are_in_one_part_only(stored, teacher):
    held_out = load_text(stored, "validation", teacher)
    parts = parts_of(held_out)
    documents = held_out.document_starts.flatten().cumsum(0).view_as(held_out.input_ids)
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
def test_the_teacher_has_no_divergence_from_itself(stored, teacher, material):
    held_out = load_text(stored, "validation", teacher)
    at = parts_of(held_out)["test"]
    matrix = teacher.output_matrix
    found = measure(held_out.teacher_states[at], matrix, matrix, held_out, at, material.words)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1
