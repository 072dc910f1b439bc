"""`dskd compare` on runs that the project's own tracker wrote: its groups, values and tests."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from compared_runs import DATA, STEPS, N, add_results, examples_of, track_run
from config_files import write_config
from scipy import stats
from tiny_work import NO_RUNS

from dskd.compare.comparison import make_comparison
from dskd.compare.text import compare
from dskd.config.reading import load_config
from dskd.evaluation.held_out_text import EXAMPLES_FILE, MEASURES
from dskd.evaluation.scores_by_example import Examples, save_examples
from dskd.evaluation.table import EVALUATIONS
from dskd.tracking import log_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def comparison(tracked):
    return make_comparison(load_config(tracked[0]))


def _perplexity(better, seed, name):
    columns = examples_of(better, seed + 10 * len(name)).columns
    return math.exp(columns["nll"].sum() / columns["tokens"].sum())


def test_runs_that_differ_in_their_seed_are_one_group_with_an_interval(comparison):
    assert [(group.name, len(group.runs)) for group in comparison.groups] == [("kd", 2), ("dskd", 2), ("margin", 1)]
    assert comparison.baseline.name == "kd"
    perplexities = [_perplexity(0, seed, "kd-s0") for seed in (0, 1)]
    found = comparison.groups[0].estimate(comparison.final["eval/perplexity"])
    assert found.mean == pytest.approx(np.mean(perplexities))
    low, high = stats.ttest_1samp(perplexities, 0).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


def test_only_settings_that_differ_are_shown(comparison):
    assert dict(comparison.differences) == {
        "loss.sense_weight": ["0.0", "1.0", "1.0"],
        "loss.margin": ["1.0", "1.0", "0.5"],
    }


def test_final_and_best_values_speed_and_cost(comparison, tracked):
    _, ids = tracked
    losses = [3 + 4 / step + noise for step, noise in enumerate(np.random.default_rng(1).normal(0, 0.05, STEPS), 1)]
    assert comparison.final["train/loss"][ids["kd-s1"]] == pytest.approx(losses[-1])
    best = comparison.best["train/loss"][ids["kd-s1"]]
    assert (best.value, best.step) == (pytest.approx(min(losses)), int(np.argmin(losses)) + 1)
    assert "train/grad_norm" not in comparison.final  # no better, and nothing to read in its last value
    assert comparison.final["speed/tokens_per_s"][ids["kd-s1"]] == 1001  # whatever the first step took
    assert comparison.final["cost/device_hours"][ids["kd-s1"]] == pytest.approx(STEPS / 10)


def test_example_tests_compare_the_groups_means_over_seeds(comparison):
    tests = {test.measure.name: test for test in comparison.example_tests}
    assert set(tests) == {measure.name for measure in MEASURES}  # of dskd: the third group was not evaluated
    assert {test.group.name for test in tests.values()} == {"dskd"}
    for name, mean in (("perplexity", np.log), ("accuracy", np.asarray)):
        values = comparison.final[f"eval/{name}"]
        kd, dskd = (mean([values[run.run_id] for run in group.runs]).mean() for group in comparison.groups[:2])
        assert tests[name].difference.value == pytest.approx(dskd - kd)
        assert tests[name].difference.count == N
    kd, dskd = (
        np.mean([examples_of(better, seed + 10 * len(name)).columns["nll"] for seed in (0, 1)], axis=0)
        for better, name in ((0, "kd-s0"), (0.05, "dskd-s0"))
    )
    # A sign-flip permutation of the same sums, which knows no normal distribution.
    permuted = stats.permutation_test(
        (dskd, kd), lambda a, b, axis: (a - b).sum(axis), permutation_type="samples", n_resamples=2000, rng=1
    )
    assert permuted.pvalue < 0.001
    assert tests["perplexity"].difference.p_value < 0.001
    assert tests["perplexity"].is_better is True


@pytest.fixture
def empty(no_runs, tmp_path):
    """A config whose experiment has no runs yet."""
    path = tmp_path / "config.yaml"
    write_config(path, {"workdir": str(tmp_path / "work"), "teacher": {"path": "a/b"}})
    (tmp_path / "work").mkdir()
    shutil.copyfile(no_runs, tmp_path / "work" / NO_RUNS)
    return path


# {evaluation: (folder, measure, the measure's name in a comparison)}
ADDED = {
    "lexical": ("lexical", "sense_separation", "sense_separation"),
    "piqa": ("tasks/piqa", "accuracy", "piqa_accuracy"),
}


def test_benchmarks_and_words_are_compared_and_refused_like_the_text(empty, dskd):
    scores = {name: np.random.default_rng(seed).random(40) for seed, name in enumerate(("kd", "dskd", "other"))}
    ids = {}
    for name in ("dskd", "kd"):
        ids[name] = track_run(empty, name, f"loss.sense_weight={len(name)}")
        for evaluation, (folder, measure, _) in ADDED.items():
            config, table = add_results(empty, name, ids[name], folder, scores[name], measure=measure)
            if name == "kd":  # and the teacher's scores are the same
                teacher = EVALUATIONS[evaluation].folder_of(config, "teacher")
                teacher.mkdir(parents=True)
                save_examples(teacher / EXAMPLES_FILE, table)
    comparison = make_comparison(load_config(empty), baseline="kd")
    assert comparison.notes == []
    code, out, _ = dskd("compare", "--config", empty)
    assert code == 0
    for evaluation, (_, _, shown) in ADDED.items():
        assert comparison.final[f"eval/{shown}"] == {ids[name]: pytest.approx(scores[name].mean()) for name in ids}
        assert comparison.references["teacher"][shown] == pytest.approx(scores["kd"].mean())
        (test,) = [test for test in comparison.example_tests if test.measure.name == shown]
        expected = stats.ttest_rel(scores["dskd"], scores["kd"])
        assert test.difference.p_value == pytest.approx(expected.pvalue)
        assert test.difference.value == pytest.approx(scores["dskd"].mean() - scores["kd"].mean())
        assert re.search(rf"^{EVALUATIONS[evaluation].title}:\n.*{shown.replace('_', ' ')}", out, re.MULTILINE)

    ids["other"] = track_run(empty, "other", "loss.sense_weight=9")
    notes = make_comparison(load_config(empty)).notes
    left_out = []
    for evaluation, (folder, measure, shown) in ADDED.items():
        assert any(f"without {evaluation}: other" in note for note in notes)
        add_results(empty, "other", ids["other"], folder, scores["other"], data="b" * 64, measure=measure)
        code, out, err = dskd("compare", "--config", empty, *left_out)
        assert (code, out) == (2, "")
        assert f"{'b' * 64}: other ({ids['other'][:8]})" in err
        assert re.search(rf"{'a' * 64}: .*kd \({ids['kd'][:8]}\)", err)
        assert f"--without {evaluation}" in err
        left_out += ["--without", evaluation]
        code, out, _ = dskd("compare", "--config", empty, *left_out)
        assert code == 0
        assert "perplexity" in out
        assert shown.replace("_", " ") not in out


def test_measures_of_other_senses_are_left_out_and_the_rest_compared(empty):
    """As with another senses.k: the text is the same, but a measure that depends on sense embeddings is not."""
    ids = {name: track_run(empty, name, f"senses.k={k}") for name, k in (("five", 5), ("ten", 10))}
    for name, of in (("five", "1" * 64), ("ten", "2" * 64)):
        add_results(empty, name, ids[name], "lexical", [0.5, 1.0], measure="row_agreement", of=of)
    comparison = make_comparison(load_config(empty))
    assert set(comparison.final["eval/perplexity"]) == set(ids.values())
    assert "eval/row_agreement" not in comparison.final
    assert "row_agreement" not in comparison.measured()
    assert "row_agreement left out: the runs have different teachers or sense embeddings" in comparison.notes[-1]
    assert "111111111111: five" in comparison.notes[-1]


def test_a_measure_over_other_positions_is_left_out(empty):
    config = load_config(empty)
    for number, name in enumerate(("one", "two")):
        run_id = track_run(empty, name, f"senses.k={number + 3}")
        examples = examples_of(0, 3)
        columns = dict(examples.columns, lexical_tokens=examples.columns["lexical_tokens"] + number)
        save_examples(config.path(EXAMPLES_FILE), Examples(DATA, examples.ids, columns, MEASURES))
        log_results(
            config, name, run_id, "evaluation", {"perplexity": 5.0}, config.path(EXAMPLES_FILE), data=DATA, step=STEPS
        )
    comparison = make_comparison(config)
    assert "lexical_perplexity" not in comparison.measured()
    assert {"perplexity", "accuracy"} < set(comparison.measured())
    assert "lexical_perplexity left out: some runs count it at other positions" in comparison.notes[-1]


def test_texts_of_tracked_runs_are_shown_next_to_the_teachers(empty, dskd, tmp_path):
    config = load_config(empty)

    def write(folder, name, *said):
        rows = [["Is it <b>hot</b>?", "", "yes", said[0]], ["The sun is", "up.", "hot", said[1]]]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "samples.json"
        file.write_text(json.dumps({"columns": ["prompt", "the text itself", "teacher", name], "data": rows}))
        return file

    for name, said in (("kd", ("no\nno", "")), ("dskd", ("maybe " * 40, "down"))):
        run_id = track_run(empty, name, f"loss.sense_weight={len(name)}")
        file = write(config.path("written", name), name, *said)
        save_examples(config.path(EXAMPLES_FILE), examples_of(0, 1))
        arguments = (config, name, run_id, "evaluation", {}, config.path(EXAMPLES_FILE))
        log_results(*arguments, data=DATA, step=STEPS, tables=[file])
    teacher = write(config.path("evaluation", "teacher"), "teacher", "yes", "hot").parent
    save_examples(teacher / EXAMPLES_FILE, examples_of(0, 2))
    page = tmp_path / "report.html"
    code, out, _ = dskd("compare", "--config", empty, "--texts", "--html", page)
    assert code == 0
    lines = out.splitlines()
    at = lines.index("Is it <b>hot</b>?")
    assert lines[at + 1] == "  teacher  yes"
    assert {"  kd       no no", "  (the text itself)  up.", "  kd                 (nothing)"} <= set(lines)
    (first,) = [line for line in lines if line.startswith("  dskd     maybe")]
    assert lines[lines.index(first) + 1].startswith("           maybe")
    code, out, _ = dskd("compare", "--config", empty)
    assert "Is it" not in out
    shown = page.read_text()
    assert "<h3>Is it &lt;b&gt;hot&lt;/b&gt;?</h3>" in shown
    assert "<dt>kd</dt><dd>no no</dd>" in shown


def test_seed_tests_are_paired_by_seed(comparison):
    (test,) = [test for test in comparison.seed_tests if test.measure.name == "accuracy"]
    values = comparison.final["eval/accuracy"]
    kd, dskd = ([values[run.run_id] for run in group.runs] for group in comparison.groups[:2])
    assert test.difference.p_value == pytest.approx(stats.ttest_rel(dskd, kd).pvalue)
    assert (test.difference.test, test.difference.count) == ("paired t", 2)


def test_the_text_shows_the_tests_and_what_they_do_not_cover(tracked):
    path, _ = tracked
    printed = compare(load_config(path))
    assert re.search(r"^kd \(2 seeds\)  +1\d\d\.\d\d ± \d+\.\d\d  ", printed, re.MULTILINE)
    assert re.search(
        r"^dskd +ln perplexity \(nats\) +−0\.0[45]\d\d +\[.+\] +× 0\.9\d\d +< 0\.001 +better", printed, re.MULTILINE
    )
    assert re.search(r"^CPU rank hours a run +0\.8 ± 0 +0\.8 ± 0 +0\.8$", printed, re.MULTILINE)
    assert re.search(r"^targets with senses +62\.0 ± 0\.0 % ", printed, re.MULTILINE)
    assert f"evaluated on {DATA}" in printed
    assert "- 1 seed, so no interval: margin" in printed
    assert "- not evaluated: margin;" in printed
    assert "does not cover how much another seed would change" in printed
    assert "sweep" not in printed  # the parent of a sweep trained nothing
