"""Scores against SQuAD's own script, in transformers' copy of it, and measures against values computed by hand."""

import math
import random
import statistics

import pytest

from dskd.corpus.tasks.benchmarks import BENCHMARKS, Example, normalize
from dskd.evaluation.task_scoring import answer_of, measures_of, score_of, token_f1, weights_of

ARC, PIQA, MMLU, SQUAD = (BENCHMARKS[name] for name in ("arc_challenge", "piqa", "mmlu", "squad_v2"))
WORDS = [
    "The",
    "a",
    "seven",
    "Seven",
    "arches",
    "an",
    "arch.",
    "Weavers'",
    "guild",
    "(1710)",
    "1710",
    "--",
    "été",
    "\n",
]


@pytest.fixture(scope="module")
def official():
    return pytest.importorskip(
        "transformers.data.metrics.squad_metrics", reason="this transformers has no copy of SQuAD's script"
    )


def _texts(count):
    generator = random.Random(1)
    return [" ".join(generator.choices(WORDS, k=generator.randrange(6))) for _ in range(count)]


def test_token_f1_is_that_of_squads_script(official):
    texts = _texts(300)
    seen = set()
    for answer, right in zip(texts, reversed(texts), strict=True):
        assert normalize(answer) == official.normalize_answer(answer)
        expected = official.compute_f1(right, answer)
        assert token_f1(answer, right) == pytest.approx(expected, abs=1e-12)
        seen.add(round(expected, 3))
    assert {0.0, 1.0} < seen
    assert len(seen) > 6


@pytest.mark.parametrize(
    ("right_answers", "answer"),
    [
        (("seven", "seven arches"), "the seven arches."),
        (("seven", "seven arches"), "seven stone arches"),
        (("Weavers' Guild",), "weavers guild"),
        (("the lake",), "No answer"),
        (("no answer at all",), "No answer"),
        ((), "No answer"),
        ((), "no answer."),
        ((), "the lake"),
        (("", "the"), "No answer"),
        (("", "the", "lake"), "a lake"),
    ],
)
def test_a_score_is_what_squads_script_gives_an_abstention_or_an_answer(official, right_answers, answer):
    class QuestionOfScript:
        qas_id = "x"

    QuestionOfScript.answers = [{"text": text} for text in right_answers]
    prediction = "" if normalize(answer) == "no answer" else answer  # how an abstention is written there
    _, expected = official.get_raw_scores([QuestionOfScript], {"x": prediction})
    assert score_of(SQUAD, Example("x", "?", right_answers, passage="-"), answer) == pytest.approx(
        expected["x"], abs=1e-12
    )


def test_an_empty_answer_is_not_an_abstention():
    assert score_of(SQUAD, Example("x", "?", (), passage="-"), "") == 0
    assert score_of(SQUAD, Example("x", "?", ("lake",), passage="-"), "") == 0


@pytest.mark.parametrize(
    ("benchmark", "generated", "answer"),
    [
        (ARC, "B", "B"),
        (ARC, " B\n", "B"),
        (ARC, "\n\nB", "B"),
        (ARC, "(B)", "B"),
        (ARC, "B.", "B"),
        (ARC, "**B", "B"),
        (ARC, "Because", "Because"),
        (ARC, "b", "b"),
        (ARC, "A B", "A B"),
        (ARC, "", ""),
        (PIQA, " 1", "1"),
        (PIQA, "10", "10"),
        (SQUAD, " the lake.\n\nPassage: The", "the lake."),
        (SQUAD, "(1710)", "(1710)"),
    ],
)
def test_the_answer_is_the_first_line_that_is_not_empty(benchmark, generated, answer):
    assert answer_of(benchmark, generated) == answer


def test_a_label_is_an_exact_match():
    example = Example("x", "?", ("B",), ("one", "two", "three"))
    assert [score_of(ARC, example, answer) for answer in ("B", "A", "b", "Because", "")] == [1, 0, 0, 0, 0]


def test_the_measure_of_independent_examples_is_their_mean_with_its_standard_error():
    examples = [Example(str(n), "?", ("A",), ("one",) * n) for n in (2, 3, 4, 4)]
    measures = measures_of(ARC, examples, [1.0, 0.0, 1.0, 1.0])
    assert measures["score"] == 0.75
    assert measures["standard_error"] == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert measures["n"] == 4
    assert measures["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 4) / 4)
    assert "standard_error" not in measures_of(ARC, examples[:1], [1.0])


def test_mmlu_is_the_mean_over_subjects_with_its_standard_error():
    subjects = ["x"] * 2 + ["y"] * 6
    scores = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    examples = [Example(str(n), "?", ("A",), ("1", "2", "3", "4"), subject=s) for n, s in enumerate(subjects)]
    measures = measures_of(MMLU, examples, scores)
    assert measures["score"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    # By hand: variances 1/2 and 1/6 with n - 1, of the means 1/4 and 1/36.
    assert measures["standard_error"] == pytest.approx(math.sqrt(1 / 4 + 1 / 36) / 2)
    assert measures["subjects"]["y"] == {"score": 5 / 6, "standard_error": pytest.approx(1 / 6), "n": 6}
    assert (measures["n"], measures["chance"]) == (8, pytest.approx(0.25))
    weights = weights_of(MMLU, subjects)
    assert sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights) == pytest.approx(measures["score"])
    assert sum(weights) == pytest.approx(8)


def test_squad_measures_answers_abstentions_and_always_abstaining():
    examples = [Example(str(n), "?", answers, passage="-") for n, answers in enumerate([("a",), ("b",), ("c",), ()])]
    measures = measures_of(SQUAD, examples, [1.0, 0.5, 0.0, 1.0])
    assert measures["answerable"]["score"] == 0.5
    assert measures["unanswerable"] == {"score": 1.0, "n": 1}
    assert measures["chance"] == 0.25
    assert measures["metric"] == "f1"
