"""Benchmarks on all ranks: each model's answers to each question and their scores, in `WORKDIR/tasks/NAME/TASK`.

Prompts are sorted by length and cut into batches, which the ranks take in turn (:mod:`dskd.evaluation.batching`).
Answers are generated greedily.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dskd.artifacts import kinds
from dskd.artifacts.manifest import Recipe
from dskd.config import Config
from dskd.console import progress_bar, say, table
from dskd.corpus.tasks.benchmarks import benchmarks_named
from dskd.corpus.tasks.prompts import Prompter, Question
from dskd.distributed.collectives import gather_json, main_first, on_main
from dskd.distributed.world import World
from dskd.evaluation import suite
from dskd.evaluation.batching import batches_by_length, padded
from dskd.evaluation.evaluations import BENCHMARKS
from dskd.evaluation.models import EvaluatedModel, candidates, choose, same_on_all_ranks
from dskd.evaluation.scores_by_example import Measure, metadata_of
from dskd.evaluation.suite import EXAMPLES_FILE, FILE, Measurement, Outcome
from dskd.evaluation.task_questions import Task, load_task, require_same_data
from dskd.evaluation.task_scoring import answer_of, measures_of, score_of, weights_of
from dskd.models.files.folder import ModelFolder
from dskd.models.limits import check_new_tokens, position_limit, vocabulary_size
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.generation import before_end, end_tokens, ends_of_answers_only, generate_greedily
from dskd.models.running.precision import resolve_precision
from dskd.models.tokenizing import has_more_tokens, require_known

_SCHEMA = pa.schema(
    [
        ("example", pa.string()),
        ("subject", pa.string()),
        ("prompt_sha256", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("shots", pa.int32()),
        ("is_cut", pa.bool_()),
        ("generated", pa.string()),
        ("answer", pa.string()),
        ("gold", pa.list_(pa.string())),
        ("score", pa.float64()),
        ("weight", pa.float64()),
        ("weighted_score", pa.float64()),
    ]
)


def recipe(config: Config, candidate: EvaluatedModel, task: Task, prompter: Prompter) -> Recipe:
    """Returns everything that a model's results depend on; the batch size is not part of it."""
    settings = {
        "task": task.name,
        "new_tokens": task.benchmark.new_tokens(config.tasks),
        "prompts": prompter.format,
        "precision": resolve_precision(config.precision),
    }
    if ends := ends_of_answers_only(candidate.folder):
        settings["answer_ends"] = ends
    inputs = {"model": candidate.folder.digest, "questions": task.digest}
    return Recipe(kinds.TASK.name, inputs, settings, tokenizer=candidate.folder.tokenizer_digest)


def _measurements(
    config: Config, models: Sequence[EvaluatedModel], tasks: Sequence[Task], prompters: Sequence[Prompter]
) -> list[Measurement]:
    return [
        Measurement(
            BENCHMARKS[task.name], model, recipe(config, model, task, prompter), [getattr(config.tasks, task.name)]
        )
        for model, prompter in zip(models, prompters, strict=True)
        for task in tasks
    ]


def are_current(config: Config, names: Sequence[str], teacher: ModelFolder | None = None) -> bool:
    """Returns True if every model has results on these benchmarks, and on their present questions.

    `teacher` is the config's, if it was found before.
    """
    tasks = [load_task(config, benchmark) for benchmark in benchmarks_named(names)]
    models = candidates(config, teacher)
    prompters = [Prompter(model.folder.tokenizer) for model in models]
    return all(measurement.is_current(config) for measurement in _measurements(config, models, tasks, prompters))


def run_tasks(
    config: Config,
    world: World,
    names: Sequence[str],
    model_names: Sequence[str] | None = None,
    *,
    force: bool = False,
) -> None:
    """Runs benchmarks for every model whose results are not up to date, or with `force` all; prints all models' scores.

    All ranks must call it. `names` are those of benchmarks, or `all`, and `model_names` those of models (teacher,
    student, runs); None means all models that exist.

    Raises:
        UserError: when a model, a task or its data does not exist, before any model is loaded.
    """
    if not names:
        say("nothing to evaluate: --tasks names no benchmark, and tasks.evaluate is empty")
        return
    benchmarks = benchmarks_named(names)
    models = same_on_all_ranks(lambda: choose(config, candidates(config), model_names))
    tasks = {benchmark.name: main_first(functools.partial(load_task, config, benchmark)) for benchmark in benchmarks}
    require_same_data(config, tasks)
    prompters = {model.name: Prompter(model.folder.tokenizer) for model in models}
    measurements = _measurements(config, models, list(tasks.values()), list(prompters.values()))
    stale = suite.find_stale(config, measurements, force=force)
    for model in models:
        todo = [tasks[each.evaluation.name] for each in stale if each.candidate is model]
        on_main(functools.partial(check_prompts, config, model, prompters[model.name], todo))
        if todo and not prompters[model.name].has_template:
            say(f"{model.folder.path}: the tokenizer has no chat template; prompts are plain text")

    def measure(model: FrozenModel, measurement: Measurement) -> Callable[[], Outcome]:
        task, name = tasks[measurement.evaluation.name], measurement.candidate.name
        return functools.partial(_outcome, task, _answer_all(model, prompters[name], task, config, world))

    suite.run(config, world, stale, measure, force=force)
    on_main(lambda: say(f"\n{summary(config, [model.name for model in models], list(tasks.values()))}"))


def check_prompts(config: Config, model: EvaluatedModel, prompter: Prompter, tasks: Sequence[Task]) -> None:
    """Checks that a model has all tokens of the tasks' prompts, and positions for the answers.

    Raises a UserError for a prompt with a token that the model lacks, such as one that the chat template adds, or a
    number of new tokens for which the model has no positions.
    """
    model_config = model.folder.load_config()
    vocab_size = vocabulary_size(model_config)
    for task in tasks:
        key = "tasks.choice_tokens" if task.benchmark.is_choice else "tasks.squad_tokens"
        check_new_tokens(key, task.benchmark.new_tokens(config.tasks), model.folder.path, model_config)
        if not has_more_tokens(prompter.tokenizer, vocab_size):  # the usual case, which needs no prompt
            continue
        for question in task.questions:
            tokens = prompter.tokens(prompter.text(question))
            text_name = f"tasks.{task.name}: the prompt of {question.example.name!r} for {model.folder.path}"
            require_known(tokens, vocab_size, prompter.tokenizer, text_name)


def summary(config: Config, models: Sequence[str], tasks: Sequence[Task]) -> str:
    """Returns a table of models × tasks: score ± standard error in percent; the last row is the score of chance."""
    rows, chances = [], {}
    for model in models:
        row = [model]
        for task in tasks:
            path = BENCHMARKS[task.name].folder_of(config, model) / FILE
            measures = json.loads(path.read_text(encoding="utf-8"))
            chances[task.name] = f"{100 * measures['chance']:.1f}"
            error = measures.get("standard_error")
            row.append(f"{100 * measures['score']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else ""))
        rows.append(row)
    header = ["%", *(f"{task.name} ({task.benchmark.metric})" for task in tasks)]
    return table(header, [*rows, ["chance", *chances.values()]])


def _answer_all(
    model: FrozenModel, prompter: Prompter, task: Task, config: Config, world: World
) -> list[dict[str, Any]]:
    """Returns a record of each question's prompt and answer, in the order of the questions, on every rank."""
    own_records: dict[int, dict[str, Any]] = {}
    started, tokens = time.perf_counter(), 0
    num_questions, new_tokens = len(task.questions), task.benchmark.new_tokens(config.tasks)
    limit, (_, ends) = position_limit(model.folder.load_config()), end_tokens(model.folder)
    with progress_bar(total=num_questions, label=task.name, unit="questions") as bar:
        # Batches are made by length in characters, so that a rank does not tokenize the other ranks' prompts.
        lengths = [len(question.plain(len(question.shots))) for question in task.questions]
        for batch in batches_by_length(lengths, config.tasks.batch_size, world):
            questions = [task.questions[number] for number in batch]
            records = _answer(model, prompter, questions, new_tokens, limit, ends)
            own_records.update(zip(batch, records, strict=True))
            tokens += sum(record["prompt_tokens"] + new_tokens for record in records)
            bar.update(min(len(batch) * world.world_size, bar.total - bar.n))
            rate = tokens * world.world_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
    all_records = dict(pair for part in gather_json(list(own_records.items())) for pair in part)
    records = [all_records[number] for number in range(num_questions)]
    tokens = sum(record["prompt_tokens"] + new_tokens for record in records)
    say(f"  {num_questions:,} questions, {tokens:,} tokens, {tokens / (time.perf_counter() - started):,.0f} tokens/s")
    return records


def _answer(
    model: FrozenModel,
    prompter: Prompter,
    questions: Sequence[Question],
    new_tokens: int,
    limit: int | None,
    ends: Sequence[int],
) -> list[dict[str, Any]]:
    """Answers questions at once; `limit` is the number of the model's positions, and `ends` are its end tokens."""
    room = None if limit is None else max(1, limit - new_tokens)
    prompts = [prompter.prompt(question, room) for question in questions]
    input_ids = padded([prompt.input_ids for prompt in prompts])
    lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts] or [1])
    last_position = input_ids.shape[1] + new_tokens if limit is None else limit - 1
    added = generate_greedily(model, input_ids, lengths, new_tokens, last_position)
    return [
        {
            "prompt_sha256": prompt.sha256,
            "prompt_tokens": len(prompt.input_ids),
            "shots": prompt.num_shots,
            "is_cut": prompt.is_cut,
            "generated": prompter.tokenizer.decode(before_end(row, ends), skip_special_tokens=True),
        }
        for prompt, row in zip(prompts, added.tolist(), strict=False)
    ]


def _outcome(task: Task, records: Sequence[dict[str, Any]]) -> Outcome:
    """Scores the answers; `records` are those of :func:`_answer_all`."""
    benchmark, examples = task.benchmark, [question.example for question in task.questions]
    answers = [answer_of(benchmark, record["generated"]) for record in records]
    scores = [score_of(benchmark, example, answer) for example, answer in zip(examples, answers, strict=True)]
    weights = weights_of(benchmark, [example.subject for example in examples])
    measures = measures_of(benchmark, examples, scores)
    # One row per question: what was generated, the answer taken from it, the right answers, and the score.
    rows = [
        {
            "example": example.name,
            "subject": example.subject,
            **record,
            "answer": answer,
            "gold": list(example.answers),
            "score": score,
            "weight": weight,
            "weighted_score": weight * score,
        }
        for example, record, answer, score, weight in zip(examples, records, answers, scores, weights, strict=True)
    ]
    schema = _SCHEMA.with_metadata(metadata_of(task.digest, [Measure(benchmark.metric, "weighted_score", "weight")]))

    def write_files(folder: Path) -> None:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / EXAMPLES_FILE, compression="zstd")

    fewer = sum(record["shots"] < len(q.shots) for record, q in zip(records, task.questions, strict=True))
    cut = sum(record["is_cut"] for record in records)
    metrics = {benchmark.metric: measures["score"], "chance": measures["chance"]}
    line = f"{benchmark.metric} {measures['score']:.4f}"
    if "standard_error" in measures:
        metrics["standard_error"] = measures["standard_error"]
        line += f" ± {measures['standard_error']:.4f}"
    lines = [f"{line} (chance {measures['chance']:.4f})"]
    if fewer:
        lines.append(
            f"{fewer:,} prompts show fewer examples than they should, because more do not fit into the model's "
            f"context; in {cut:,} of them even the question is cut"
        )
    facts = {"questions": len(rows), "fewer_shots": fewer, "cut": cut}
    return Outcome(measures, metrics, task.digest, write_files, lines, facts)
