"""Scores of generated answers, and measures of a task made from them (docs/method.md, section 5).

A label is right or wrong: exact match. An answer to a SQuAD question scores the F1 of its tokens against the right
answer that it matches best, as in SQuAD's own script: in lower case, without punctuation, articles and extra white
space. If the passage does not answer the question, "No answer" scores 1 and anything else 0. An empty answer scores 0
too, whereas the official script takes it for an abstention.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dskd.corpus.tasks.benchmarks import NO_ANSWER, Benchmark, Example, normalize
from dskd.evaluation.scores_by_example import standard_error

_AROUND_A_LABEL = " \t()[].:*\"'"


def answer_of(benchmark: Benchmark, generated: str) -> str:
    """Returns the part of a generated text that is scored: its first line that is not empty.

    For a label, brackets, quotes and full stops around it are removed. The whole line has to be the label: "Because"
    does not answer B.
    """
    line = next((line.strip() for line in generated.splitlines() if line.strip()), "")
    return line.strip(_AROUND_A_LABEL) if benchmark.is_choice else line


def score_of(benchmark: Benchmark, example: Example, answer: str) -> float:
    """Returns an answer's score, from 0 to 1."""
    if benchmark.is_choice:
        return float(answer in example.answers)
    answers = [text for text in example.answers if normalize(text)]
    abstains = normalize(answer) == normalize(NO_ANSWER)
    if not answers or abstains:
        return float(abstains and not answers)
    return max(token_f1(answer, text) for text in answers)


def token_f1(answer: str, right: str) -> float:
    """Returns the harmonic mean of precision and recall of an answer's tokens, as bags, after :func:`normalize`."""
    answer_tokens, right_tokens = normalize(answer).split(), normalize(right).split()
    if not answer_tokens or not right_tokens:
        return float(answer_tokens == right_tokens)
    common = (Counter(answer_tokens) & Counter(right_tokens)).total()
    return 2 * common / (len(answer_tokens) + len(right_tokens))


def weights_of(benchmark: Benchmark, subjects: Sequence[str]) -> list[float]:
    """Returns the weight [N] of each example: 1, or one with which all subjects count equally.

    The weights add up to N. A task's score is the sum of weight times score, divided by the sum of weights.
    """
    if not benchmark.one_score_a_subject:
        return [1.0] * len(subjects)
    sizes = Counter(subjects)
    return [len(subjects) / (len(sizes) * sizes[subject]) for subject in subjects]


def measures_of(benchmark: Benchmark, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, Any]:
    """Computes the measures of a task from the score of each example.

    Standard errors take the examples as a sample: s / sqrt(n), with n - 1 in s. That of a mean over S subjects is
    sqrt(sum of the subjects' squared errors) / S. A single example has none.
    """
    measures: dict[str, Any] = {"metric": benchmark.metric, **_mean(scores)}
    if benchmark.one_score_a_subject:
        by_subject = dict(_by(examples, scores, lambda example: example.subject))
        measures = {"metric": benchmark.metric, **_mean_of_means(by_subject), "n": len(scores), "subjects": by_subject}
    if benchmark.is_choice:
        weights = weights_of(benchmark, [example.subject for example in examples])
        chances = [weight / len(example.choices) for weight, example in zip(weights, examples, strict=True)]
        measures["chance"] = math.fsum(chances) / math.fsum(weights)
    else:
        measures |= dict(_by(examples, scores, lambda e: "answerable" if e.answers else "unanswerable"))
        measures["chance"] = measures.get("unanswerable", {"n": 0})["n"] / len(scores)  # the score of always abstaining
    return measures


def _mean(scores: Sequence[float]) -> dict[str, float]:
    n = len(scores)
    error = standard_error(np.array(scores), np.ones(n))
    return {"score": math.fsum(scores) / n, **({} if error is None else {"standard_error": error}), "n": n}


def _mean_of_means(by_subject: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    means = [measures["score"] for measures in by_subject.values()]
    result = {"score": math.fsum(means) / len(means)}
    errors = [measures.get("standard_error") for measures in by_subject.values()]
    if None not in errors:
        result["standard_error"] = math.sqrt(math.fsum(error**2 for error in errors if error is not None)) / len(means)
    return result


def _by(examples: Sequence[Example], scores: Sequence[float], kind: Any) -> Iterator[tuple[str, dict[str, float]]]:
    grouped: dict[str, list[float]] = {}
    for example, score in zip(examples, scores, strict=True):
        grouped.setdefault(kind(example), []).append(score)
    for name in sorted(grouped):
        yield name, _mean(grouped[name])
