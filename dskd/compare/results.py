"""What runs were evaluated on, and that it is the same: on other text a perplexity is another number."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dskd.artifacts import kinds
from dskd.artifacts.manifest import read_file
from dskd.compare.choosing import Selection
from dskd.compare.metrics import EVALUATED
from dskd.config import TASKS, Config
from dskd.errors import UserError, listed
from dskd.evaluation import held_out_text, tasks
from dskd.evaluation.lexical import results as lexical
from dskd.evaluation.models import CUT_STUDENT, TEACHER
from dskd.evaluation.scores_by_example import Examples, Measure, read_examples
from dskd.tracking import EVALUATION_FOLDER, TrackedRun, data_tag, read_artifact


class DifferentDataError(UserError):
    """What was chosen was evaluated on different data."""


@dataclass(frozen=True)
class Kind:
    """Results that belong together: of the held-out text, of words and senses, or of a benchmark."""

    name: str
    title: str
    folder: str  # among a run's artifacts; and among the work directory's, with the model's name behind the first part
    file: str
    made_by: str

    @property
    def tag(self) -> str:
        """The tag of a run with the digest of what it was evaluated on."""
        return data_tag(self.folder)

    def path(self, config: Config, model: str) -> Path:
        """The results of a model in the work directory."""
        first, *rest = self.folder.split("/")
        return config.path(first, model, *rest, self.file)

    def measure_name(self, name: str) -> str:
        """What a measure is called among those of all kinds: each benchmark has an accuracy."""
        return f"{self.name}_{name}" if self.folder.startswith(kinds.TASK.folder) else name


HELD_OUT = Kind("evaluation", "Held-out text", EVALUATION_FOLDER, held_out_text.EXAMPLES_FILE, kinds.EVALUATION.made_by)
_LEXICAL = Kind("lexical", "Words and senses", kinds.LEXICAL.folder, lexical.EXAMPLES_FILE, kinds.LEXICAL.made_by)
KINDS = {
    kind.name: kind
    for kind in (
        HELD_OUT,
        _LEXICAL,
        *(
            Kind(
                task,
                "Benchmarks",
                f"{kinds.TASK.folder}/{task}",
                tasks.EXAMPLES_FILE,
                f"{kinds.EVALUATION.made_by} --tasks {task}",
            )
            for task in TASKS
        ),
    )
}


@dataclass(frozen=True)
class Results:
    """What runs scored on one kind of data."""

    kind: Kind
    data: str | None  # its digest; None where nothing was evaluated
    measures: Sequence[Measure]  # that are the same for all who have them
    tables: Mapping[str, Examples]  # by run id
    references: Mapping[str, Mapping[str, float]]  # of models that are no runs, by name: measures
    notes: Sequence[str]


def read_results(
    config: Config, runs: Sequence[TrackedRun], selection: Selection, *, without: Sequence[str] = ()
) -> list[Results]:
    """Everything that the runs were evaluated on, but for the kinds in `without`; first the held-out text.

    Raises:
        DifferentDataError: where results of one kind are of different data.
    """
    found = []
    for kind in KINDS.values():
        if kind.name in without:
            continue
        tables = _read_tables(config, runs, kind)
        data = _require_same_data(runs, tables, kind)
        local = _read_local(config, kind)
        references = _references(local, runs, data, selection, kind)
        if kind is not HELD_OUT and not tables:
            references = references if not runs else {}
        if kind is not HELD_OUT and not (tables or references):
            continue
        measures, notes = _comparable(tables, kind, runs)
        missing = [run.name for run in runs if run.run_id not in tables]
        if kind is not HELD_OUT and tables and missing:
            notes.append(f"without {kind.name}: {', '.join(missing)}; `{kind.made_by}` adds it")
        found.append(Results(kind, data, measures, tables, references, notes))
    return found


def _read_tables(config: Config, runs: Sequence[TrackedRun], kind: Kind) -> dict[str, Examples]:
    """{run id: what each example scored}, of the runs that have it."""
    tables = {}
    for run in runs:
        if kind.tag not in run.tags:
            continue
        path = f"{kind.folder}/{kind.file}"
        content = read_artifact(config, run.run_id, path)
        if content is not None:
            try:
                tables[run.run_id] = _named(read_examples(content), kind)
            except ValueError as error:
                raise UserError(
                    f"artifact {path} of run {run.name} ({run.run_id}): {error}; evaluate it again with "
                    f"`{kind.made_by}`"
                ) from None
    return tables


def _named(examples: Examples, kind: Kind) -> Examples:
    measures = [dataclasses.replace(one, name=kind.measure_name(one.name)) for one in examples.measures]
    return dataclasses.replace(examples, measures=measures)


def _require_same_data(runs: Sequence[TrackedRun], tables: Mapping[str, Examples], kind: Kind) -> str | None:
    """The digest of what all of these runs were evaluated on; None where none was.

    Raises:
        DifferentDataError: naming the digests, and what was evaluated on each.
    """
    by_digest: dict[str, list[str]] = {}
    for run in runs:
        digests = {run.tags.get(kind.tag)}
        if run.run_id in tables:
            digests.add(tables[run.run_id].data)
        for digest in digests - {None}:
            by_digest.setdefault(str(digest), []).append(f"{run.name} ({run.run_id[:8]})")
    return _only_one(by_digest, kind)


def _comparable(
    tables: Mapping[str, Examples], kind: Kind, runs: Sequence[TrackedRun]
) -> tuple[list[Measure], list[str]]:
    """The measures that are the same for all runs that have them, and what is to be said of the others."""
    measures: list[Measure] = list(held_out_text.MEASURES) if kind is HELD_OUT else []
    names = {run.run_id: run.name for run in runs}
    notes = []
    for name in dict.fromkeys(measure.name for table in tables.values() for measure in table.measures):
        of_runs = {
            run_id: next(one for one in table.measures if one.name == name)
            for run_id, table in tables.items()
            if any(one.name == name for one in table.measures)
        }
        by_data: dict[str | None, list[str]] = {}
        for run_id, measure in of_runs.items():
            by_data.setdefault(measure.data, []).append(names[run_id])
        known = next((one for one in measures if one.name == name), None)
        if len(by_data) > 1:
            sides = "; ".join(f"{str(digest)[:12]}: {', '.join(of)}" for digest, of in by_data.items())
            notes.append(f"{name} is of different teachers or sense embeddings, and left out ({sides})")
        elif not _same_counts(tables, of_runs):
            notes.append(f"{name} counts other positions in some of the runs, whose relations differ, and is left out")
        else:
            measures = [one for one in measures if one is not known] if known else measures
            measures.append(next(iter(of_runs.values())))
            continue
        measures = [one for one in measures if one is not known]
    order = [measure.name for measure in held_out_text.MEASURES]
    return sorted(measures, key=lambda one: order.index(one.name) if one.name in order else len(order)), notes


def _same_counts(tables: Mapping[str, Examples], of_runs: Mapping[str, Measure]) -> bool:
    """Whether a measure is over as much in each example of all tables; where examples differ, a test will say so."""
    first: dict[str, float] | None = None
    for run_id, measure in of_runs.items():
        counts = dict(zip(tables[run_id].ids, np.asarray(tables[run_id].columns[measure.count]).tolist(), strict=True))
        if first is None:
            first = counts
        elif counts.keys() == first.keys() and counts != first:
            return False
    return True


def _read_local(config: Config, kind: Kind) -> dict[str, tuple[str, dict[str, float]]]:
    """{model: (digest of the data, its measures)} of what was evaluated in the work directory."""
    found = {}
    for model in (TEACHER, CUT_STUDENT, *config.run_names):
        path = kind.path(config, model)
        content = read_file(path.parent, path.name)
        if content is not None:
            try:
                examples = _named(read_examples(content), kind)
            except ValueError as error:
                raise UserError(f"{path}: {error}; evaluate it again with `{kind.made_by}`") from None
            found[model] = (examples.data, examples.values())
    return found


def _references(
    local: Mapping[str, tuple[str, dict[str, float]]],
    runs: Sequence[TrackedRun],
    data: str | None,
    selection: Selection,
    kind: Kind,
) -> dict[str, dict[str, float]]:
    """Models that are no tracked runs, evaluated on the same data: the teacher, the student as it was cut, and without
    a selection the runs that the tracking server knows no measures of.
    """
    measured = {run.name for run in runs if any(metric.startswith(EVALUATED) for metric in run.metrics)}
    wanted = {
        name: digest
        for name, (digest, _) in local.items()
        if name in (TEACHER, CUT_STUDENT) or not (selection or name in measured)
    }
    if data is None:
        by_digest: dict[str, list[str]] = {}
        for name, digest in wanted.items():
            by_digest.setdefault(digest, []).append(name)
        data = _only_one(by_digest, kind)
    return {name: local[name][1] for name, digest in wanted.items() if digest == data}


def _only_one(by_digest: Mapping[str, Sequence[str]], kind: Kind) -> str | None:
    """The digest, from {digest: names of what was evaluated on it}."""
    if len(by_digest) > 1:
        raise DifferentDataError(
            listed(
                f"{kind.name}: these were evaluated on different data, so their measures cannot be compared",
                [f"{digest}: {', '.join(names)}" for digest, names in by_digest.items()],
            )
            + f"\nchoose those of one kind with --run or --tag {kind.tag}=HASH; or evaluate the others on the same "
            f"data with `{kind.made_by}`; or leave it out, with --without {kind.name}"
        )
    return next(iter(by_digest), None)
