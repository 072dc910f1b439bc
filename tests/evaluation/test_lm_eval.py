"""EleutherAI's lm-evaluation-harness runs the exported student, gets the same answers, and scores them equally."""

import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from rank_jobs import run_harness
from rank_processes import finish, fork_ranks
from task_files import DATA
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.config.reading import load_config
from dskd.corpus.tasks.benchmarks import BENCHMARKS, Example
from dskd.corpus.tasks.prompts import Prompter
from dskd.evaluation.task_questions import load_task
from dskd.evaluation.task_scoring import measures_of
from dskd.evaluation.tasks import run_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def lm_eval():
    return pytest.importorskip("lm_eval", reason="the optional package `lm_eval` is not installed (extra `eval`)")


def test_the_harness_gets_and_scores_the_same_answers_from_the_export(copy_of_tiny, tmp_path, world):
    config = copy_of_tiny("teacher", "student", "export")
    overrides = [f"tasks.arc_challenge={DATA / 'arc'}", f"tasks.commonsense_qa={DATA / 'commonsense_qa'}"]
    loaded = load_config(config, overrides)
    tasks = ("arc_challenge", "commonsense_qa")
    run_tasks(loaded, world, tasks)
    export = loaded.path("export", "dskd")
    prompter = Prompter(AutoTokenizer.from_pretrained(export))
    rows = [
        row for t in tasks for row in pq.read_table(loaded.path("tasks", "dskd", t, "examples.parquet")).to_pylist()
    ]
    questions = [question for task in tasks for question in load_task(loaded, BENCHMARKS[task]).questions]
    # No student of this size knows an answer: what every other question is answered with is right.
    golds = [row["answer"] if number % 2 else "another answer" for number, row in enumerate(rows)]
    scores = [float(row["answer"] == gold) for row, gold in zip(rows, golds, strict=True)]
    assert 0 < sum(scores) < len(scores)
    lines = [
        json.dumps({"prompt": prompter.text(question), "gold": gold})
        for question, gold in zip(questions, golds, strict=True)
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    command = ["--model", "hf", "--model_args", f"pretrained={export},dtype=float32"]
    command += ["--include_path", str(DATA / "lm_eval"), "--tasks", "answers", "--device", "cpu", "--batch_size", "3"]
    command += ["--log_samples", "--output_path", str(tmp_path / "results")]
    finish(fork_ranks(run_harness, command, tmp_path), 400)
    (samples,) = (tmp_path / "results").rglob("samples_answers_*.jsonl")
    heard = {sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())}
    assert len(heard) == len(rows)
    for number, row in enumerate(rows):
        assert heard[number]["resps"][0][0] == row["generated"]
        assert heard[number]["exact_match"] == scores[number]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["answers"]
    examples = [Example(str(n), "?", ("A",), ("1", "2", "3", "4")) for n in range(len(scores))]
    measures = measures_of(BENCHMARKS["arc_challenge"], examples, scores)
    assert found["exact_match,none"] == pytest.approx(measures["score"])
    assert found["exact_match_stderr,none"] == pytest.approx(measures["standard_error"])


def test_the_harness_asks_the_export_through_its_chat_template(copy_of_tiny, tmp_path):
    """The template is one that a user puts into a copy of an export whose teacher has none."""
    export = load_config(copy_of_tiny("export")).path("export", "dskd")
    template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}answer:{% endif %}"
    )
    (export / "chat_template.jinja").write_text(template)
    questions = ["what is hot", "what is large", "name an animal"]
    lines = [json.dumps({"prompt": question, "gold": "cold"}) for question in questions]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    command = ["--model", "hf", "--model_args", f"pretrained={export},dtype=float32", "--apply_chat_template"]
    command += ["--include_path", str(DATA / "lm_eval"), "--tasks", "answers", "--device", "cpu", "--batch_size", "2"]
    command += ["--log_samples", "--output_path", str(tmp_path / "results")]
    finish(fork_ranks(run_harness, command, tmp_path), 400)
    (samples,) = (tmp_path / "results").rglob("samples_answers_*.jsonl")
    heard = {sample["doc_id"]: sample["resps"][0][0] for sample in map(json.loads, samples.read_text().splitlines())}
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    for number, question in enumerate(questions):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        said = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
        assert heard[number] == tokenizer.decode(said, skip_special_tokens=True)


def test_the_harness_has_the_same_means_and_standard_errors():
    from lm_eval.api import metrics

    unweighted_mean_stderr = getattr(metrics, "unweighted_mean_stderr", None)
    generator = random.Random(4)
    subjects = [subject for subject in "abcd" for _ in range(generator.randrange(3, 20))]
    scores = [float(generator.random() < 0.6) for _ in subjects]
    examples = [Example(str(n), "?", ("A",), ("1", "2"), subject=subject) for n, subject in enumerate(subjects)]
    measures = measures_of(BENCHMARKS["mmlu"], examples, scores)
    by_subject = [[s for s, subject in zip(scores, subjects, strict=True) if subject == name] for name in "abcd"]
    for name, each in zip("abcd", by_subject, strict=True):
        assert measures["subjects"][name]["score"] == pytest.approx(metrics.mean(each))
        assert measures["subjects"][name]["standard_error"] == pytest.approx(metrics.mean_stderr(each))
    assert measures["score"] == pytest.approx(np.mean([metrics.mean(each) for each in by_subject]))
    errors = [metrics.mean_stderr(each) for each in by_subject]
    # Not every version has it: then that of a mean of independent means.
    expected = unweighted_mean_stderr(errors) if unweighted_mean_stderr else np.linalg.norm(errors) / len(errors)
    assert measures["standard_error"] == pytest.approx(expected)
