"""The models that every evaluation measures: teacher, student before training, and the exports of the config's runs."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dskd.artifacts import kinds
from dskd.artifacts.manifest import read_manifest, require_same
from dskd.config import Config
from dskd.console import say
from dskd.distributed.collectives import gather_json, main_first, on_main
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError
from dskd.models.files.digests import digest_cache, digest_of_model
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.running.frozen import FrozenModel, load_frozen
from dskd.students.student import find_student
from dskd.training.exporting import export

TEACHER, UNTRAINED_STUDENT = "teacher", "student"
LABELS = {TEACHER: "teacher", UNTRAINED_STUDENT: "student before training"}  # in comparisons and model cards


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate."""

    name: str
    folder: ModelFolder
    mlflow_run_id: str | None = None
    step: int = 0  # the training step that was exported


def candidates(config: Config, teacher: ModelFolder | None = None) -> list[EvaluatedModel]:
    """Returns the teacher, the student before training, and those of the config's runs that have an export.

    `teacher` is the config's, if it was found before.
    """
    teacher = teacher or find_teacher(config)
    models = [EvaluatedModel(TEACHER, teacher), EvaluatedModel(UNTRAINED_STUDENT, find_student(config))]
    for run in config.run_names:
        if config.path(kinds.EXPORT.folder, run).is_dir():
            folder, manifest = export.find_export(config, run)
            require_same(
                "teachers",
                expected=teacher.digest,
                actual=manifest.teacher,
                between=f"{folder.path} and what is here now",
                remedy=f"train and export it again, or remove {folder.path}",
            )
            models.append(EvaluatedModel(run, folder, manifest.facts["mlflow_run_id"], manifest.facts["step"]))
    return models


def choose(config: Config, models: Sequence[EvaluatedModel], names: Sequence[str] | None) -> list[EvaluatedModel]:
    """Returns the models with these names, or all of them if `names` is None. Raises a UserError when a
    name has no model.
    """
    existing = [candidate.name for candidate in models]
    missing = [name for name in names or () if name not in existing]
    if missing:
        remedy = f"; {_remedy(missing[0])}" if missing[0] in config.run_names else ""
        raise UserError(f"--models {missing[0]}: there is no such model here, only {', '.join(existing)}{remedy}")
    return [candidate for candidate in models if names is None or candidate.name in names]


def same_on_all_ranks(find: Callable[[], list[EvaluatedModel]]) -> list[EvaluatedModel]:
    """Returns the candidates that `find` returns; every rank must call it. Raises an OutageError that names the node of
    a rank which finds other models than rank 0.
    """
    models = main_first(find)
    by_rank = gather_json([socket.gethostname(), {model.name: model.folder.digest for model in models}])
    for host, digests in by_rank:
        if digests != by_rank[0][1]:
            raise OutageError(
                f"{host} finds the models {_with_digests(digests)}, but rank 0 finds {_with_digests(by_rank[0][1])}; "
                "another job may have exported one meanwhile, or that node sees an old state of the shared storage. "
                "Start all ranks again",
                known_to_all_ranks=True,
            )
    return models


def _with_digests(digests: dict[str, str]) -> str:
    return ", ".join(f"{name} ({digest[:12]}…)" for name, digest in digests.items())


def load_candidate(candidate: EvaluatedModel, config: Config, world: World) -> FrozenModel:
    """Loads the model of a candidate, which may have been found hours ago. Raises an OutageError when the model was
    replaced since, so that its measures would pass for those of the candidate.
    """
    model = load_frozen(candidate.folder, config, world)
    on_main(lambda: _require_unchanged(candidate, config))
    return model


def _require_unchanged(candidate: EvaluatedModel, config: Config) -> None:
    folder = candidate.folder.path
    if candidate.name == TEACHER and not config.teacher.is_made:
        now = digest_of_model(folder, cache=digest_cache(config, "teacher"))
    else:
        kind = {TEACHER: kinds.TEACHER, UNTRAINED_STUDENT: kinds.STUDENT}.get(candidate.name, kinds.EXPORT)
        now = read_manifest(folder, kind.name).digest
    if now != candidate.folder.digest:
        raise OutageError(
            f"{folder}: the model was replaced after the evaluation began (its digest is {now[:12]}…, and was "
            f"{candidate.folder.digest[:12]}…), so it is not measured; start the evaluation again"
        )


def require_exports(config: Config, *, run_is_named: bool) -> None:
    """Prints which runs of the config are left out because they have no export. Raises a UserError if the config's run
    is among them and `run_is_named`, because the user chose it.
    """
    missing = [run for run in config.run_names if not config.path(kinds.EXPORT.folder, run).is_dir()]
    if run_is_named and config.run in missing:
        folder = config.path(kinds.EXPORT.folder, config.run)
        raise UserError(f"run={config.run}: there is no export {folder}; {_remedy(config.run)}")
    if missing:
        say(f"left out, because there is no export yet: {', '.join(missing)}; {_remedy(missing[0])}")


def _remedy(run: str) -> str:
    return f"when {run} is trained, export it with `{kinds.EXPORT.made_by} run={run}`"
