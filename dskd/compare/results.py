"""Results of runs, and the check that they are from the same data, without which perplexities cannot be compared."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dskd.artifacts.manifest import read_file
from dskd.compare.choosing import Selection
from dskd.compare.metrics import EVALUATED
from dskd.config import Config
from dskd.errors import UserError, listed
from dskd.evaluation import held_out_text
from dskd.evaluation.evaluations import BENCHMARKS, EVALUATIONS, HELD_OUT, Evaluation
from dskd.evaluation.models import TEACHER, UNTRAINED_STUDENT
from dskd.evaluation.scores_by_example import Examples, Measure, read_examples
from dskd.evaluation.suite import EXAMPLES_FILE
from dskd.tracking import TrackedRun, read_artifact


class DifferentDataError(UserError):
    """The error for chosen runs that were evaluated on different data."""


@dataclass(frozen=True)
class Results:
    """The results of runs in one evaluation."""

    evaluation: Evaluation
    data: str | None  # digest of the data; None if nothing was evaluated
    measures: Sequence[Measure]  # the measures that are comparable between all runs that have them
    tables: Mapping[str, Examples]  # by run id
    references: Mapping[str, Mapping[str, float]]  # {model: {measure: value}} of models that are not tracked runs
    notes: Sequence[str]


def read_results(
    config: Config, runs: Sequence[TrackedRun], selection: Selection, *, without: Sequence[str] = ()
) -> list[Results]:
    """Reads the results of the runs in all evaluations that `without` does not name, those on held-out text first.
    Raises a DifferentDataError when results of one evaluation are from different data.
    """
    all_results = []
    for evaluation in EVALUATIONS.values():
        if evaluation.name in without:
            continue
        tables = _read_tables(config, runs, evaluation)
        data = _only_one(_digests(runs, tables, evaluation.tag), evaluation)
        references = _references(_read_local(config, evaluation), runs, data, selection, evaluation)
        if evaluation is not HELD_OUT and not tables:
            references = references if not runs else {}
        if evaluation is not HELD_OUT and not (tables or references):
            continue
        measures, notes = _comparable(tables, evaluation, runs)
        missing = [run.name for run in runs if run.run_id not in tables]
        if evaluation is not HELD_OUT and tables and missing:
            notes.append(f"without {evaluation.name}: {', '.join(missing)}; `{evaluation.made_by}` adds it")
        all_results.append(Results(evaluation, data, measures, tables, references, notes))
    return all_results


def _read(content: bytes | None, evaluation: Evaluation, source: str) -> Examples | None:
    """Returns a file's examples with unique names of measures: the accuracy of a benchmark is named after it."""
    if content is None:
        return None
    try:
        examples = read_examples(content)
    except ValueError as error:
        raise UserError(f"{source}: {error}; evaluate it again with `{evaluation.made_by}`") from None
    if evaluation.name not in BENCHMARKS:
        return examples
    measures = [dataclasses.replace(measure, name=f"{evaluation.name}_{measure.name}") for measure in examples.measures]
    return dataclasses.replace(examples, measures=measures)


def _read_tables(config: Config, runs: Sequence[TrackedRun], evaluation: Evaluation) -> dict[str, Examples]:
    """Reads {run id: table of examples} of the runs that have results of this evaluation."""
    path = f"{evaluation.folder}/{EXAMPLES_FILE}"
    tables = {}
    for run in runs:
        if evaluation.tag in run.tags:
            content = read_artifact(config, run.run_id, path)
            tables[run.run_id] = _read(content, evaluation, f"artifact {path} of run {run.name} ({run.run_id})")
    return {run_id: table for run_id, table in tables.items() if table is not None}


def _read_local(config: Config, evaluation: Evaluation) -> dict[str, Examples]:
    """Reads {model: table of examples} of the models evaluated in the work directory."""
    tables = {}
    for model in (TEACHER, UNTRAINED_STUDENT, *config.run_names):
        folder = evaluation.folder_of(config, model)
        tables[model] = _read(read_file(folder, EXAMPLES_FILE), evaluation, str(folder / EXAMPLES_FILE))
    return {model: table for model, table in tables.items() if table is not None}


def _comparable(
    tables: Mapping[str, Examples], evaluation: Evaluation, runs: Sequence[TrackedRun]
) -> tuple[list[Measure], list[str]]:
    """Returns the measures that are comparable between all runs that have them, and notes about the others.

    A measure is comparable if all of its runs have the same digest of its further data (such as the sense embeddings),
    and the same counts on each example.
    """
    measures = {measure.name: measure for measure in held_out_text.MEASURES} if evaluation is HELD_OUT else {}
    names = {run.run_id: run.name for run in runs}
    notes = []
    for name in dict.fromkeys(measure.name for table in tables.values() for measure in table.measures):
        run_measures = {
            run_id: measure for run_id, table in tables.items() for measure in table.measures if measure.name == name
        }
        by_data: dict[str | None, list[str]] = {}
        for run_id, measure in run_measures.items():
            by_data.setdefault(measure.data, []).append(names[run_id])
        if len(by_data) > 1:
            sides = "; ".join(f"{str(digest)[:12]}: {', '.join(of)}" for digest, of in by_data.items())
            notes.append(f"{name} left out: the runs have different teachers or sense embeddings ({sides})")
            measures.pop(name, None)
        elif not _same_counts(tables, run_measures):
            notes.append(f"{name} left out: some runs count it at other positions, because their relations differ")
            measures.pop(name, None)
        else:
            measures[name] = next(iter(run_measures.values()))
    order = [measure.name for measure in held_out_text.MEASURES]
    return sorted(measures.values(), key=lambda m: order.index(m.name) if m.name in order else len(order)), notes


def _same_counts(tables: Mapping[str, Examples], run_measures: Mapping[str, Measure]) -> bool:
    """Returns True if a measure has the same count on each example in all tables.

    Tables with different examples are not compared here; the tests on examples report them.
    """
    first, *others = (
        dict(zip(tables[run_id].ids, tables[run_id].columns[measure.count].tolist(), strict=True))
        for run_id, measure in run_measures.items()
    )
    return all(counts == first for counts in others if counts.keys() == first.keys())


def _references(
    local: Mapping[str, Examples],
    runs: Sequence[TrackedRun],
    data: str | None,
    selection: Selection,
    evaluation: Evaluation,
) -> dict[str, dict[str, float]]:
    """Returns the measures of models that are not tracked runs and were evaluated on the same data.

    These are the teacher, the student before training, and, if there is no selection, the runs of the config for which
    the tracking server has no measures. `data` is the digest of the runs' data; if it is None, these models decide it.
    """
    measured = {run.name for run in runs if any(metric.startswith(EVALUATED) for metric in run.metrics)}
    shown = {
        name: table
        for name, table in local.items()
        if name in (TEACHER, UNTRAINED_STUDENT) or not (selection or name in measured)
    }
    if data is None:
        data = _only_one(((table.data, name) for name, table in shown.items()), evaluation)
    return {name: table.values() for name, table in shown.items() if table.data == data}


def _digests(runs: Sequence[TrackedRun], tables: Mapping[str, Examples], tag: str) -> Iterator[tuple[str, str]]:
    """Yields (digest of the data, name of the run) for each run that was evaluated."""
    for run in runs:
        digests = {run.tags.get(tag), tables[run.run_id].data if run.run_id in tables else None}
        yield from ((digest, run.label) for digest in digests if digest is not None)


def _only_one(evaluated: Iterable[tuple[str, str]], evaluation: Evaluation) -> str | None:
    """Returns the only digest among (digest of the data, name of a run or model evaluated on it); None without any.

    Raises a DifferentDataError if there are several.
    """
    by_digest: dict[str, list[str]] = {}
    for digest, name in evaluated:
        by_digest.setdefault(digest, []).append(name)
    if len(by_digest) > 1:
        raise DifferentDataError(
            listed(
                f"{evaluation.name}: these were evaluated on different data, so their measures cannot be compared",
                [f"{digest}: {', '.join(names)}" for digest, names in by_digest.items()],
            )
            + f"\nchoose those with the same data, with --run or --tag {evaluation.tag}=HASH; or evaluate the others "
            f"on that data with `{evaluation.made_by}`; or leave the evaluation out, with --without {evaluation.name}"
        )
    return next(iter(by_digest), None)
