"""Checkpoints: `WORKDIR/checkpoints/RUN/step-NNNNNNNN/`, written beside the older ones and renamed when whole; then the
file `latest`, as DeepSpeed calls it, is replaced by one that names the new one, and only then do older ones go.

A checkpoint holds DeepSpeed's own files, from which training goes on; `trained.safetensors`, the parameters that are
trained in full precision under their Hugging Face names, from which :mod:`dskd.training.export` makes a model; and
`probe.safetensors`, logits of the student in training on a few tokens, against which the export is checked. Parameters
that are not trained are in none of them: they are those of the student's folder.

The data order, the drawn positions and the learning rate are functions of seed and step, so the step is all the state
that loader, generators and schedule have.

Training waits until a checkpoint is written. DeepSpeed's decoupled engine (0.19.8) takes ZeRO-3, but waits for the
files before the optimizer's next step: it hides less than one step, and what needs them whole (hashes, the name, the
removal of older ones) would have to come after that. Besides, it makes `spawn` the start method of the loader's workers
too, moves what lies in host memory to /dev/shm, and returns as if it had saved when its writer is dead.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dskd.artifacts.kinds import folder
from dskd.artifacts.manifest import Manifest, Recipe, is_current, read_manifest, verify_files
from dskd.config import Config
from dskd.config.reading import differences
from dskd.console import warn
from dskd.errors import UserError, listed

LATEST_FILE = "latest"
TRAINED_FILE, PROBE_FILE = "trained.safetensors", "probe.safetensors"
REHEARSAL = ".rehearsal"  # where the untouched student is exported to before the first step
_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    manifest: Manifest

    @property
    def is_final(self) -> bool:
        """True when the run has no steps left."""
        return self.step == self.manifest.facts["total_steps"]


def latest(config: Config, *, verify: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint of the run, or None; damaged ones are passed over, saying so.

    Args:
        config: the experiment, with the run's keys laid over it.
        verify: read every file and compare it with the manifest, instead of its size alone.

    Raises:
        UserError: when there are checkpoints and all of them are damaged.
    """
    base = folder(config)
    while True:
        named = _read_latest(base)
        found, problems, damaged = _newest_whole(base, named, verify=verify)
        # Training may have published the next one meanwhile, and removed what was looked at here.
        if (found is not None and not problems) or _read_latest(base) == named:
            break
    for problem in problems:
        warn(problem)
    if found is None and damaged:
        remedy = "restore one, or start from scratch with --overwrite"
        raise UserError(listed(f"{base}: none of the checkpoints is whole; {remedy}", damaged))
    return found


def _newest_whole(base: Path, named: str | None, *, verify: bool) -> tuple[Checkpoint | None, list[str], list[str]]:
    """The newest whole checkpoint as far as the one that `latest` names; what is wrong with that file and with those
    that were passed over; and the latter alone.
    """
    problems, damaged = [], []
    step_named = _STEP_FOLDER.match(named) if named is not None else None
    newest = int(step_named[1]) if step_named else None
    if named is not None and newest is None:
        problems.append(f"{base / LATEST_FILE}: it names no checkpoint; looking for the newest whole one")
    steps = sorted(steps_on_disk(base), reverse=True)
    if newest is not None and newest not in dict(steps):
        problems.append(f"{base / LATEST_FILE}: it names step {newest}, which is not there; looking for the one before")
    for step, path in steps:
        # A later one was not published yet, or is of a run that is being overwritten.
        if newest is not None and step > newest:
            continue
        try:
            manifest = read_manifest(path, "checkpoint")
            _require_facts(path, manifest)
            if verify:
                verify_files(path, manifest)
        except (UserError, FileNotFoundError) as problem:  # a file that goes while it is read
            damaged.append(str(problem))
            problems.append(f"{problem}; passing over this checkpoint")
            continue
        return Checkpoint(path, step, manifest), problems, damaged
    return None, problems, damaged


def _require_facts(path: Path, manifest: Manifest) -> None:
    missing = [name for name in ("total_steps", "world_size") if not isinstance(manifest.facts.get(name), int)]
    if missing:
        raise UserError(f"{path}: its manifest does not say {' and '.join(missing)}")


def at_step(config: Config, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        UserError: when it is missing or damaged.
    """
    path = folder(config) / f"step-{step:08d}"
    return Checkpoint(path, step, read_manifest(path, "checkpoint"))


def is_finished(config: Config, recipe: Recipe) -> bool:
    """True when the run was trained to its end with this very recipe."""
    newest = latest(config)
    return newest is not None and newest.is_final and is_current(newest.path, recipe)


def changes_since(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """In what the run of a checkpoint was another one than `recipe` describes; empty when it is the same."""
    found = checkpoint.manifest
    changes = [f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(found.config, recipe.config)]
    changes += [
        f"{name}: another one then ({found.inputs.get(name, 'none')[:12]}…, now {digest[:12]}…)"
        for name, digest in recipe.inputs.items()
        if found.inputs.get(name) != digest
    ]
    return changes


def require_same_run(checkpoint: Checkpoint, recipe: Recipe, config: Config) -> None:
    """Refuses to go on from a checkpoint of another configuration.

    Raises:
        UserError: with every difference.
    """
    changes = changes_since(checkpoint, recipe)
    if changes:
        then, now = (found.get("precision") for found in (checkpoint.manifest.config, recipe.config))
        machine = ""
        if config.precision == "auto" and then != now:
            machine = f". precision: auto is {now} on this machine; set it to {then} to continue as before"
        raise UserError(
            listed(
                f"{checkpoint.path}: this checkpoint is of another run than {config.run!r} is now; put the "
                f"config back, name another run, or start from scratch with --overwrite{machine}",
                changes,
            )
        )


def steps_on_disk(base: Path) -> Iterator[tuple[int, Path]]:
    """Yields step and folder of each checkpoint of a run."""
    if base.is_dir():
        for path in base.iterdir():
            name = _STEP_FOLDER.match(path.name)
            if name:
                yield int(name.group(1)), path


def _read_latest(base: Path) -> str | None:
    """What stands in the file `latest`; None where there is none."""
    try:
        return (base / LATEST_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""
