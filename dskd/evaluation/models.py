"""The models that every evaluation measures: teacher, cut student, and the exports of the config's runs."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dskd.artifacts import kinds
from dskd.artifacts.manifest import require_same
from dskd.config import Config
from dskd.console import say
from dskd.distributed.collectives import gather_json, main_first, on_main
from dskd.distributed.world import World
from dskd.errors import OutageError, UserError
from dskd.models.cutting import find_student
from dskd.models.folder import ModelFolder, find_teacher
from dskd.models.frozen import FrozenModel, load_frozen
from dskd.training import export

TEACHER, CUT_STUDENT = "teacher", "student"


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    name: str
    folder: ModelFolder
    mlflow_run_id: str | None = None
    step: int = 0  # the training step that was exported


def candidates(config: Config) -> list[Candidate]:
    """Returns the teacher, the cut student, and those of the config's runs that have an export."""
    teacher = find_teacher(config)
    found = [Candidate(TEACHER, teacher), Candidate(CUT_STUDENT, find_student(config))]
    for run in config.run_names:
        if config.path(kinds.EXPORT.folder, run).is_dir():
            folder, manifest = export.find_export(config, run)
            require_same(
                "teachers",
                expected=teacher.digest,
                found=manifest.teacher,
                between=f"{folder.path} and what is here now",
                remedy=f"train and export it again, or remove {folder.path}",
            )
            found.append(Candidate(run, folder, manifest.facts["mlflow_run_id"], manifest.facts["step"]))
    return found


def choose(config: Config, models: Sequence[Candidate], names: Sequence[str] | None) -> list[Candidate]:
    """Returns the models with these names, or all of them if `names` is None.

    Raises:
        UserError: when there is no model of a name.
    """
    existing = [candidate.name for candidate in models]
    missing = [name for name in names or () if name not in existing]
    if missing:
        remedy = f"; {_export_command(missing[0])} makes it" if missing[0] in config.run_names else ""
        raise UserError(f"--models {missing[0]}: there is no such model here; there are {', '.join(existing)}{remedy}")
    return [candidate for candidate in models if names is None or candidate.name in names]


def same_on_all_ranks(find: Callable[[], list[Candidate]]) -> list[Candidate]:
    """Returns the candidates that `find` returns, after checking that all ranks see the same; every rank must call it.

    Raises:
        OutageError: when a rank finds other models than rank 0; the message names its node.
    """
    found = main_first(find)
    seen = gather_json([socket.gethostname(), {candidate.name: candidate.folder.digest for candidate in found}])
    for host, models in seen:
        if models != seen[0][1]:
            raise OutageError(
                f"{host} finds the models {_with_digests(models)}, and rank 0 {_with_digests(seen[0][1])}; another "
                "job may have exported meanwhile, or that node sees an old state of the shared storage. Start all "
                "ranks again",
                known_to_all_ranks=True,
            )
    return found


def _with_digests(models: dict[str, str]) -> str:
    return ", ".join(f"{name} ({digest[:12]}…)" for name, digest in models.items())


def load_candidate(candidate: Candidate, config: Config, world: World) -> FrozenModel:
    """Loads the model of a candidate, which may have been found hours ago.

    Raises:
        OutageError: when the model was replaced since, so that its measures would pass for those of the candidate.
    """
    model = load_frozen(candidate.folder, config, world)
    on_main(lambda: _require_unchanged(candidate, config))
    return model


def _require_unchanged(candidate: Candidate, config: Config) -> None:
    if candidate.name == TEACHER:
        now = find_teacher(config)
    elif candidate.name == CUT_STUDENT:
        now = find_student(config)
    else:
        now, _ = export.find_export(config, candidate.name)
    if now.digest != candidate.folder.digest:
        raise OutageError(
            f"{now.path}: this is not the model that was here when this began ({now.digest[:12]}…, and not "
            f"{candidate.folder.digest[:12]}…), so it is not measured; start it again"
        )


def require_exports(config: Config, *, run_is_named: bool) -> None:
    """Prints which runs of the config have no export and are left out.

    Args:
        config: the experiment.
        run_is_named: the user asked for the config's run by its name, so it must not be left out.

    Raises:
        UserError: when the named run has no export.
    """
    missing = [run for run in config.run_names if not config.path(kinds.EXPORT.folder, run).is_dir()]
    if run_is_named and config.run in missing:
        folder = config.path(kinds.EXPORT.folder, config.run)
        raise UserError(f"run={config.run}: {folder} is not there; {_export_command(config.run)} makes it")
    if missing:
        them = "run has" if len(missing) == 1 else "runs have"
        say(f"left out: the {them} no export yet: {', '.join(missing)}; {_export_command(missing[0])} makes one")


def _export_command(run: str) -> str:
    return f"`{kinds.EXPORT.made_by} run={run}`, when it is trained,"
