"""Benchmarks on all ranks: each model's answers to each question and their scores, in `WORKDIR/tasks/NAME/TASK`.

Prompts are sorted by length and cut into batches, which the ranks take in turn (:mod:`dskd.evaluation.batching`).
Answers are generated greedily.
"""

import functools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact, was_made_meanwhile
from dskd.artifacts.manifest import Recipe, is_current, write_json
from dskd.config import Config
from dskd.console import progress_bar, say, stage, table
from dskd.corpus.tasks.benchmarks import Benchmark, benchmarks_named
from dskd.corpus.tasks.prompts import Prompter
from dskd.distributed.collectives import gather_json, main_first, on_main
from dskd.distributed.world import World
from dskd.evaluation.batching import batches_by_length, padded
from dskd.evaluation.models import Candidate, candidates, chosen, load_candidate, same_on_all_ranks
from dskd.evaluation.task_questions import Task, load_task, require_same_data
from dskd.evaluation.task_scoring import answer_of, measures_of, score_of, weights_of
from dskd.models.frozen import FrozenModel
from dskd.models.generation import end_tokens, generate_greedily
from dskd.models.limits import check_new_tokens, position_limit, vocabulary_size
from dskd.models.precision import resolve_precision
from dskd.models.tokenizing import has_more_tokens, require_known
from dskd.tracking import log_results

FILE, EXAMPLES_FILE = "measures.json", "examples.parquet"
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


def recipe(config: Config, candidate: Candidate, task: Task, prompter: Prompter) -> Recipe:
    """Returns everything that a model's results depend on; the batch size is not part of it."""
    settings = {
        "task": task.name,
        "new_tokens": task.benchmark.new_tokens(config.tasks),
        "prompts": prompter.format,
        "precision": resolve_precision(config.precision),
    }
    inputs = {"model": candidate.folder.digest, "questions": task.digest}
    return Recipe("task", inputs, settings, tokenizer=candidate.folder.tokenizer_digest)


def are_current(config: Config, names: Sequence[str]) -> bool:
    """Returns True when every model has results on these benchmarks, and on their present questions."""
    tasks = [load_task(config, benchmark) for benchmark in benchmarks_named(names)]
    wanted = _recipes(config, candidates(config), tasks)
    return all(is_current(_folder(config, *key), it) for key, it in wanted.items())


def run_tasks(
    config: Config,
    world: World,
    names: Sequence[str],
    model_names: Sequence[str] | None = None,
    *,
    force: bool = False,
) -> None:
    """Runs the benchmarks for every model whose results are not up to date, and prints the scores of all models.

    Args:
        config: the experiment.
        world: the ranks; all of them must call this.
        names: names of the benchmarks, or `all`.
        model_names: names of models (teacher, student, runs); None: all models that exist.
        force: run also benchmarks whose results are up to date.

    Raises:
        UserError: when a model, a task or its data does not exist, before any model is loaded.
    """
    benchmarks = benchmarks_named(names)
    models = same_on_all_ranks(lambda: chosen(config, model_names))
    tasks = {benchmark.name: main_first(functools.partial(load_task, config, benchmark)) for benchmark in benchmarks}
    require_same_data(config, tasks)
    wanted = main_first(lambda: _recipes(config, models, list(tasks.values())))
    # Rank 0 decides, because all ranks must run the same models.
    stale = on_main(lambda: [key for key, it in wanted.items() if force or not is_current(_folder(config, *key), it)])
    pairs = [(model, task) for model in models for task in tasks.values() if [model.name, task.name] in stale]
    on_main(lambda: check_prompts(pairs))
    for candidate in models:
        todo = [task for task in tasks.values() if [candidate.name, task.name] in stale]
        if not todo:
            say(f"up to date: {candidate.name}")
            continue
        model_config = candidate.folder.load_config()
        for task in todo:
            key = "tasks.choice_tokens" if task.benchmark.is_choice else "tasks.squad_tokens"
            check_new_tokens(key, task.benchmark.new_tokens(config.tasks), candidate.folder.path, model_config)
        prompter = Prompter(candidate.folder.load_tokenizer())
        if not prompter.has_template:
            say(f"{candidate.folder.path}: the tokenizer has no chat template; prompts are plain text")
        model = load_candidate(candidate, config, world)
        for task in todo:
            target = _folder(config, candidate.name, task.name)
            sources = [candidate.folder.path, getattr(config.tasks, task.name)]
            with stage(f"{task.name}: {candidate.name}", reads=sources, writes=target):
                runner = _Runner(model, prompter, task, config, world)
                answers = runner.run()
                recipe_of_it = wanted[candidate.name, task.name]
                publish = functools.partial(_publish, config, candidate, target, recipe_of_it, task, answers)
                on_main(functools.partial(publish, force=force))
        model.close()
    on_main(lambda: say(f"\n{summary(config, [model.name for model in models], benchmarks)}"))


def check_prompts(pairs: Iterable[tuple[Candidate, Task]]) -> None:
    """Checks that each model has all tokens of the task's prompts; its tokenizer can have more tokens than the model.

    Raises:
        UserError: for a prompt with a token that the model lacks, such as one that the chat template adds.
    """
    for candidate, task in pairs:
        vocab_size, tokenizer = vocabulary_size(candidate.folder.load_config()), candidate.folder.load_tokenizer()
        if not has_more_tokens(tokenizer, vocab_size):  # the usual case, which needs no prompt
            continue
        prompter = Prompter(tokenizer)
        for question in task.questions:
            tokens = prompter.tokens(prompter.text(question))
            place = f"tasks.{task.name}: the prompt of {question.example.name!r} for {candidate.folder.path}"
            require_known(tokens, vocab_size, tokenizer, place)


def summary(config: Config, models: Sequence[str], benchmarks: Sequence[Benchmark]) -> str:
    """Returns a table of models × tasks: score ± standard error in percent; the last row is the score of chance."""
    rows, chances = [], {}
    for model in models:
        row = [model]
        for benchmark in benchmarks:
            path = _folder(config, model, benchmark.name) / FILE
            measures = json.loads(path.read_text(encoding="utf-8"))
            chances[benchmark.name] = f"{100 * measures['chance']:.1f}"
            error = measures.get("standard_error")
            row.append(f"{100 * measures['score']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else ""))
        rows.append(row)
    header = ["%", *(f"{benchmark.name} ({benchmark.metric})" for benchmark in benchmarks)]
    return table(header, [*rows, ["chance", *(chances[benchmark.name] for benchmark in benchmarks)]])


def _recipes(config: Config, models: Sequence[Candidate], tasks: Sequence[Task]) -> dict[tuple[str, str], Recipe]:
    return {
        (model.name, task.name): recipe(config, model, task, Prompter(model.folder.load_tokenizer()))
        for model in models
        for task in tasks
    }


def _folder(config: Config, model: str, task: str) -> Path:
    return config.path(kinds.TASK.folder, model, task)


class _Runner:
    """A loaded model with all questions of a task."""

    def __init__(self, model: FrozenModel, prompter: Prompter, task: Task, config: Config, world: World) -> None:
        self._model = model
        self._prompter = prompter
        self._task = task
        self._batch_size = config.tasks.batch_size
        self._new_tokens = task.benchmark.new_tokens(config.tasks)
        self._world = world
        self._tokenizer = model.folder.load_tokenizer()
        self._ends = end_tokens(model.folder)[1]
        self._max_positions = position_limit(model.folder.load_config())

    def run(self) -> list[dict[str, Any]]:
        """Returns a record of each question's prompt and answer, in the order of the questions, on every rank."""
        mine: dict[int, dict[str, Any]] = {}
        started, tokens = time.perf_counter(), 0
        num_questions = len(self._task.questions)
        with progress_bar(total=num_questions, label=self._task.name, unit="questions") as bar:
            # Batches are made by length in characters, so that a rank does not tokenize the other ranks' prompts.
            lengths = [len(question.plain(len(question.shots))) for question in self._task.questions]
            for batch in batches_by_length(lengths, self._batch_size, self._world):
                answers = self._answer(batch)
                mine.update(zip(batch, answers, strict=True))
                tokens += sum(answer["prompt_tokens"] + self._new_tokens for answer in answers)
                bar.update(min(len(batch) * self._world.world_size, bar.total - bar.n))
                rate = tokens * self._world.world_size / (time.perf_counter() - started)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        everyone = dict(pair for part in gather_json(list(mine.items())) for pair in part)
        answers = [everyone[number] for number in range(num_questions)]
        tokens = sum(answer["prompt_tokens"] + self._new_tokens for answer in answers)
        seconds = time.perf_counter() - started
        say(f"  {num_questions:,} questions, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
        return answers

    def _answer(self, batch: list[int]) -> list[dict[str, Any]]:
        room = None if self._max_positions is None else max(1, self._max_positions - self._new_tokens)
        prompts = [self._prompter.prompt(self._task.questions[number], room) for number in batch]
        input_ids = padded([prompt.input_ids for prompt in prompts])
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts] or [1])
        last_position = (
            input_ids.shape[1] + self._new_tokens if self._max_positions is None else self._max_positions - 1
        )
        added = generate_greedily(self._model, input_ids, lengths, self._new_tokens, last_position)
        return [
            {
                "prompt_sha256": prompt.sha256,
                "prompt_tokens": len(prompt.input_ids),
                "shots": prompt.num_shots,
                "is_cut": prompt.is_cut,
                "generated": self._tokenizer.decode(self._up_to_end(row), skip_special_tokens=True),
            }
            for prompt, row in zip(prompts, added.tolist(), strict=False)
        ]

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[:end]


def _publish(
    config: Config,
    candidate: Candidate,
    target: Path,
    wanted: Recipe,
    task: Task,
    answers: Sequence[dict[str, Any]],
    *,
    force: bool,
) -> None:
    if not force and was_made_meanwhile(target, wanted):
        return
    benchmark, examples = task.benchmark, [question.example for question in task.questions]
    said = [answer_of(benchmark, answer["generated"]) for answer in answers]
    scores = [score_of(benchmark, example, text) for example, text in zip(examples, said, strict=True)]
    weights = weights_of(benchmark, [example.subject for example in examples])
    measures = measures_of(benchmark, examples, scores)
    fewer = sum(answer["shots"] < len(q.shots) for answer, q in zip(answers, task.questions, strict=True))
    cut = sum(answer["is_cut"] for answer in answers)
    # One row per question: what was generated, the answer taken from it, the right answers, and the score.
    rows = [
        {
            "example": example.name,
            "subject": example.subject,
            **answer,
            "answer": text,
            "gold": list(example.answers),
            "score": score,
            "weight": weight,
            "weighted_score": weight * score,
        }
        for example, answer, text, score, weight in zip(examples, answers, said, scores, weights, strict=True)
    ]
    # Says how to compute the measure from the columns, for tools that compare models example by example.
    measure: dict[str, Any] = {"name": benchmark.metric, "total": "weighted_score", "count": "weight"}
    about = {"data": task.digest, "measures": [measure | {"lower_is_better": False, "is_exponential": False}]}
    with build_artifact(target, wanted) as building:
        schema = _SCHEMA.with_metadata({b"dskd": json.dumps(about).encode()})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), building.folder / EXAMPLES_FILE, compression="zstd")
        write_json(building.folder / FILE, measures)
        building.facts.update(questions=len(rows), fewer_shots=fewer, cut=cut)
    _track(config, candidate, task, measures, target / EXAMPLES_FILE)
    error = measures.get("standard_error")
    spread = f" ± {error:.4f}" if error is not None else ""
    say(f"  {benchmark.metric} {measures['score']:.4f}{spread} (chance {measures['chance']:.4f})")
    if fewer:
        say(
            f"  {fewer:,} prompts show fewer examples than they should, for more do not fit into the model's context; "
            f"of {cut:,} even the question is cut"
        )


def _track(config: Config, candidate: Candidate, task: Task, measures: dict[str, Any], examples: Path) -> None:
    """Logs the results to MLflow if the model is from a tracked run."""
    if not candidate.mlflow_run_id or not config.tracking.enabled:
        return
    values = {measures["metric"]: measures["score"], "chance": measures["chance"]}
    if "standard_error" in measures:
        values["standard_error"] = measures["standard_error"]
    log_results(
        config,
        candidate.name,
        candidate.mlflow_run_id,
        f"{kinds.TASK.folder}/{task.name}",
        values,
        examples,
        data=task.digest,
        step=candidate.step,
    )
