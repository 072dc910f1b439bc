"""What runs were evaluated on, and that it is the same: on other text a perplexity is another number."""

from collections.abc import Iterable, Mapping, Sequence

from dskd import evaluate
from dskd.compare.choosing import Selection
from dskd.compare.metrics import EVALUATED
from dskd.config import Config
from dskd.errors import UserError, listed
from dskd.examples import Examples, read_examples
from dskd.lexical import results as lexical
from dskd.manifest import read_manifest
from dskd.tracking import EVALUATION_DATA_TAG, EVALUATION_FOLDER, TrackedRun, data_tag, read_artifact


class DifferentDataError(UserError):
    """What was chosen was evaluated on different data."""


def read_tables(config: Config, runs: Sequence[TrackedRun], kind: str = EVALUATION_FOLDER) -> dict[str, Examples]:
    """{run id: what each example scored}, of the runs that have it; `kind` is the folder of the run's artifacts."""
    tables = {}
    for run in runs:
        if data_tag(kind) not in run.tags:
            continue
        path = f"{kind}/{evaluate.EXAMPLES_FILE}"
        content = read_artifact(config, run.run_id, path)
        if content is not None:
            try:
                tables[run.run_id] = read_examples(content)
            except ValueError as error:
                raise UserError(
                    f"artifact {path} of run {run.name} ({run.run_id}): {error}; evaluate it again with "
                    f"`{evaluate.MADE_BY}`"
                ) from None
    return tables


def require_same_data(runs: Sequence[TrackedRun], tables: Mapping[str, Examples]) -> str | None:
    """The digest of what all of these runs were evaluated on; None where none was.

    Raises:
        DifferentDataError: naming the digests, and what was evaluated on each.
    """
    by_digest: dict[str, list[str]] = {}
    for run in runs:
        digests = {run.tags.get(EVALUATION_DATA_TAG)}
        if run.run_id in tables:
            digests.add(tables[run.run_id].data)
        for digest in digests - {None}:
            by_digest.setdefault(str(digest), []).append(f"{run.name} ({run.run_id[:8]})")
    return _only_one(by_digest)


def read_lexical_tables(config: Config, runs: Sequence[TrackedRun]) -> tuple[dict[str, Examples], list[str]]:
    """The same of lexical measures, and what a reader should know.

    None where they are of different items, and then the note names the digests: what was measured on the shards can be
    compared all the same.
    """
    tables = read_tables(config, runs, lexical.FOLDER)
    names = {run.run_id: run.name for run in runs}
    by_digest: dict[str, list[str]] = {}
    for run_id, found in tables.items():
        by_digest.setdefault(found.data, []).append(f"{names[run_id]} ({run_id[:8]})")
    if len(by_digest) > 1:
        sides = "; ".join(f"{digest}: {', '.join(of_them)}" for digest, of_them in by_digest.items())
        return {}, [
            f"lexical measures are of different items, and left out ({sides}); choose runs with "
            f"--tag {data_tag(lexical.FOLDER)}=HASH, or measure anew with `{lexical.MADE_BY}`"
        ]
    missing = sorted({names[run_id] for run_id in names if run_id not in tables})
    if not tables or not missing:
        return tables, []
    return tables, [f"without lexical measures: {', '.join(missing)}; `{lexical.MADE_BY}` adds them"]


def lexical_references(
    config: Config, names: Iterable[str], tables: Mapping[str, Examples]
) -> dict[str, dict[str, float]]:
    """{model: its lexical measures}, of models of the work directory that were measured on the same items."""
    data = {table.data for table in tables.values()}
    found = {}
    for name in names:
        path = config.path(lexical.FOLDER, name, lexical.EXAMPLES_FILE)
        if path.is_file():
            table = read_examples(path.read_bytes())
            if not data or table.data in data:
                found[name] = table.values()
    return found


def read_local_measures(config: Config) -> dict[str, tuple[str, dict[str, float]]]:
    """{model: (digest of the data, its measures)} of what was evaluated in the work directory."""
    found = {}
    for name, values in evaluate.load_measures(config).items():
        manifest = read_manifest(config.path(evaluate.FOLDER, name), "evaluation", made_by=evaluate.MADE_BY)
        found[name] = (manifest.inputs["shards"], values)
    return found


def find_references(
    local: Mapping[str, tuple[str, dict[str, float]]],
    runs: Sequence[TrackedRun],
    data: str | None,
    selection: Selection,
) -> dict[str, dict[str, float]]:
    """Models that are no tracked runs, evaluated on the same data: the teacher, the student as it was cut, and without
    a selection the runs that the tracking server knows no measures of.
    """
    measured = {run.name for run in runs if any(metric.startswith(EVALUATED) for metric in run.metrics)}
    wanted = {
        name: digest
        for name, (digest, _) in local.items()
        if name in (evaluate.TEACHER, evaluate.CUT_STUDENT) or not (selection or name in measured)
    }
    if data is None:
        by_digest: dict[str, list[str]] = {}
        for name, digest in wanted.items():
            by_digest.setdefault(digest, []).append(name)
        data = _only_one(by_digest)
    return {name: local[name][1] for name, digest in wanted.items() if digest == data}


def _only_one(by_digest: Mapping[str, Sequence[str]]) -> str | None:
    """The digest, from {digest: names of what was evaluated on it}."""
    if len(by_digest) > 1:
        raise DifferentDataError(
            listed(
                "these were evaluated on different data, so their measures cannot be compared",
                [f"{digest}: {', '.join(names)}" for digest, names in by_digest.items()],
            )
            + f"\nchoose those of one kind with --run or --tag {EVALUATION_DATA_TAG}=HASH; or evaluate the others on "
            f"the same shards with `{evaluate.MADE_BY}`; or compare settings, speed and cost only, with "
            "--without-measures"
        )
    return next(iter(by_digest), None)
