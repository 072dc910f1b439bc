"""EleutherAI's lm-evaluation-harness runs the exported student, gets the same answers, and scores them equally."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from rank_jobs import run_harness
from rank_processes import finish, fork_ranks
from task_files import DATA
from tiny_work import copy_work
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.config.reading import load_config
from dskd.corpus.tasks.benchmarks import BENCHMARKS, Example
from dskd.corpus.tasks.prompts import Prompter
from dskd.evaluation.task_questions import load_task
from dskd.evaluation.task_scoring import measures_of
from dskd.evaluation.tasks import run_tasks

pytestmark = pytest.mark.slow


# It is one that a user puts into a copy of an export whose teacher has none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)
QUESTIONS = ["what is hot", "what is large", "name an animal"]


class Asked(NamedTuple):
    """An export that answers the prompts of a file, and the folder for what the harness writes."""

    folder: Path
    export: Path

    def arguments(self, *more: str) -> list[str]:
        """Returns the arguments with which the harness asks it."""
        command = ["--model", "hf", "--model_args", f"pretrained={self.export},dtype=float32", *more]
        command += ["--include_path", str(DATA / "lm_eval"), "--tasks", "answers", "--device", "cpu"]
        return [*command, "--log_samples", "--output_path", str(self.folder / "results")]

    def write_prompts(self, prompts: Iterable[str], golds: Iterable[str]) -> None:
        """Writes the file of the harness's task: prompts, and what would be right."""
        lines = [json.dumps({"prompt": prompt, "gold": gold}) for prompt, gold in zip(prompts, golds, strict=True)]
        (self.folder / "answers.jsonl").write_text("\n".join(lines))

    def samples(self) -> dict[int, dict]:
        """Returns what the harness has got for each prompt."""
        (samples,) = (self.folder / "results").rglob("samples_answers_*.jsonl")
        return {sample["doc_id"]: sample for sample in map(json.loads, samples.read_text().splitlines())}


class Scored(NamedTuple):
    """The questions of benchmarks with the answers of `dskd`, and scores of them."""

    rows: list[dict]
    scores: list[float]


@pytest.fixture(scope="module", autouse=True)
def lm_eval():
    return pytest.importorskip("lm_eval", reason="the optional package `lm_eval` is not installed (extra `eval`)")


@pytest.fixture(scope="module")
def asked(lm_eval, tiny, world, tmp_path_factory):
    """An export asked as it is and one with a chat template, in one process, which takes long to import the harness."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "chat")]
    config = copy_work(tiny, folders[0], "teacher", "student", "export")
    overrides = [f"tasks.arc_challenge={DATA / 'arc'}", f"tasks.commonsense_qa={DATA / 'commonsense_qa'}"]
    loaded = load_config(config, overrides)
    tasks = ("arc_challenge", "commonsense_qa")
    run_tasks(loaded, world, tasks)
    plain = Asked(folders[0], loaded.path("export", "dskd"))
    prompter = Prompter(AutoTokenizer.from_pretrained(plain.export))
    rows = [
        row for t in tasks for row in pq.read_table(loaded.path("tasks", "dskd", t, "examples.parquet")).to_pylist()
    ]
    questions = [question for task in tasks for question in load_task(loaded, BENCHMARKS[task]).questions]
    # No student of this size knows an answer: what every other question is answered with is right.
    golds = [row["answer"] if number % 2 else "another answer" for number, row in enumerate(rows)]
    scores = [float(row["answer"] == gold) for row, gold in zip(rows, golds, strict=True)]
    plain.write_prompts(map(prompter.text, questions), golds)

    chat = Asked(folders[1], load_config(copy_work(tiny, folders[1], "export")).path("export", "dskd"))
    (chat.export / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    chat.write_prompts(QUESTIONS, ["cold"] * len(QUESTIONS))
    commands = [
        (plain.folder, plain.arguments("--batch_size", "3")),
        (chat.folder, chat.arguments("--batch_size", "2", "--apply_chat_template")),
    ]
    finish(fork_ranks(run_harness, commands), 400)
    return plain, chat, Scored(rows, scores)


def test_the_harness_gets_and_scores_the_same_answers_from_the_export(asked):
    plain, _, (rows, scores) = asked
    assert 0 < sum(scores) < len(scores)
    heard = plain.samples()
    assert len(heard) == len(rows)
    for number, row in enumerate(rows):
        assert heard[number]["resps"][0][0] == row["generated"]
        assert heard[number]["exact_match"] == scores[number]
    (results,) = (plain.folder / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["answers"]
    examples = [Example(str(n), "?", ("A",), ("1", "2", "3", "4")) for n in range(len(scores))]
    measures = measures_of(BENCHMARKS["arc_challenge"], examples, scores)
    assert found["exact_match,none"] == pytest.approx(measures["score"])
    assert found["exact_match_stderr,none"] == pytest.approx(measures["standard_error"])


def test_the_harness_asks_the_export_through_its_chat_template(asked):
    _, chat, _ = asked
    heard = chat.samples()
    tokenizer, model = AutoTokenizer.from_pretrained(chat.export), AutoModelForCausalLM.from_pretrained(chat.export)
    for number, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        said = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
        assert heard[number]["resps"][0][0] == tokenizer.decode(said, skip_special_tokens=True)


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
