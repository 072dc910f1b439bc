"""Checkpoints on disk: `WORKDIR/checkpoints/RUN/step-NNNNNNNN/`.

This module finds, checks and compares them; :mod:`dskd.training.checkpoints.writing` writes them, and
:mod:`dskd.training.checkpoints.loading` loads them into an engine.

A checkpoint holds
- DeepSpeed's own files, from which training resumes;
- `trained.safetensors`: the trained parameters in full precision under their Hugging Face names, from which
  :mod:`dskd.training.exporting.export` makes a model;
- `probe.safetensors`: the student's logits in training on a few tokens, against which the export is checked.
It does not hold parameters that are not trained: these are in the student's folder.

The data order, the drawn positions and the learning rate are functions of seed and step, so loader, generators and
schedule have no other state than the step.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.kinds import checkpoint_folder
from dskd.artifacts.manifest import Manifest, Recipe, is_current, read_manifest, verify_files
from dskd.config import Config
from dskd.config.reading import differences
from dskd.console import warn
from dskd.errors import UserError, listed

LATEST_FILE = "latest"
TRAINED_FILE, PROBE_FILE = "trained.safetensors", "probe.safetensors"
REHEARSAL = ".rehearsal"  # folder to which the untrained student is exported before the first step
_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    manifest: Manifest

    @property
    def is_final(self) -> bool:
        """True if the run has no steps left."""
        return self.step == self.manifest.facts["total_steps"]


def latest(config: Config, *, verify: bool = False) -> Checkpoint | None:
    """Returns the newest complete checkpoint of the run, or None; skips damaged ones with a warning.

    Args:
        config: the experiment, with the run's keys applied.
        verify: compare the content of every file with the manifest, not only its size.

    Raises:
        UserError: if there are checkpoints and all of them are damaged.
    """
    base = checkpoint_folder(config)
    while True:
        named = _read_latest(base)
        newest, problems, damaged = _newest_complete(base, named, verify=verify)
        # Training may have published a new checkpoint meanwhile and removed those inspected here: then try again.
        if (newest is not None and not problems) or _read_latest(base) == named:
            break
    for problem in problems:
        warn(problem)
    if newest is None and damaged:
        remedy = "restore one, or start from scratch with --overwrite"
        raise UserError(listed(f"{base}: no checkpoint is complete; {remedy}", damaged))
    return newest


def _newest_complete(base: Path, named: str | None, *, verify: bool) -> tuple[Checkpoint | None, list[str], list[str]]:
    """Finds the newest complete checkpoint that is not newer than the one named in `latest`.

    Returns:
        The checkpoint or None; the problems of the file `latest` and of skipped checkpoints; the latter alone.
    """
    problems, damaged = [], []
    name = _STEP_FOLDER.match(named) if named is not None else None
    step_named = int(name[1]) if name else None
    if named is not None and step_named is None:
        problems.append(f"{base / LATEST_FILE}: this file does not name a checkpoint; using the newest complete one")
    steps = sorted(steps_on_disk(base), reverse=True)
    if step_named is not None and step_named not in dict(steps):
        problems.append(
            f"{base / LATEST_FILE}: this file names step {step_named}, which is missing; using the one before"
        )
    for step, path in steps:
        # A later checkpoint is not published yet, or belongs to a run that is being overwritten.
        if step_named is not None and step > step_named:
            continue
        try:
            manifest = read_manifest(path, kinds.CHECKPOINT.name)
            _require_facts(path, manifest)
            if verify:
                verify_files(path, manifest)
        except (UserError, FileNotFoundError) as problem:  # FileNotFoundError: removed while it was being read
            damaged.append(str(problem))
            problems.append(f"{problem}; skipping this checkpoint")
            continue
        return Checkpoint(path, step, manifest), problems, damaged
    return None, problems, damaged


def _require_facts(path: Path, manifest: Manifest) -> None:
    missing = [name for name in ("total_steps", "world_size") if not isinstance(manifest.facts.get(name), int)]
    if missing:
        raise UserError(f'{path}: manifest.json has no {" and no ".join(missing)} under "facts"')


def at_step(config: Config, step: int) -> Checkpoint:
    """Returns the checkpoint of one step.

    Raises:
        UserError: if it is missing or damaged.
    """
    path = checkpoint_folder(config) / f"step-{step:08d}"
    return Checkpoint(path, step, read_manifest(path, kinds.CHECKPOINT.name))


def is_finished(config: Config, recipe: Recipe) -> bool:
    """Returns True if the run was trained to its end with exactly this recipe."""
    newest = latest(config)
    return newest is not None and newest.is_final and is_current(newest.path, recipe)


def changes_since(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Lists the differences between the run of a checkpoint and the one that `recipe` describes; empty if none."""
    before = checkpoint.manifest
    changes = [
        f"{key}: {_or_default(key, old)!r} then, {_or_default(key, new)!r} now"
        for key, old, new in differences(before.config, recipe.config)
    ]
    changes += [
        f"{name}: changed (digest {before.inputs.get(name, 'none')[:12]}… then, {digest[:12]}… now)"
        for name, digest in recipe.inputs.items()
        if before.inputs.get(name) != digest
    ]
    return changes


def _or_default(key: str, value: Any) -> Any:
    """Returns the value or, if a recipe lacks the key of a section, the key's default."""
    section, _, name = key.partition(".")
    field = Config.model_fields.get(section)
    return value if value is not None or field is None else getattr(field.default, name, None)


def require_same_run(checkpoint: Checkpoint, recipe: Recipe, config: Config) -> None:
    """Refuses to resume from a checkpoint of another configuration.

    Raises:
        UserError: listing every difference.
    """
    changes = changes_since(checkpoint, recipe)
    if changes:
        then, now = (settings.get("precision") for settings in (checkpoint.manifest.config, recipe.config))
        machine = ""
        if config.precision == "auto" and then != now:
            machine = f". precision: auto is {now} on this machine; set it to {then} to continue as before"
        raise UserError(
            listed(
                f"{checkpoint.path}: this checkpoint was trained with other settings or inputs than run "
                f"{config.run!r} has now; restore them, choose another name for the run, or start from scratch with "
                f"--overwrite{machine}",
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
    """Returns the content of the file `latest`: None if there is no such file, "" if it cannot be read."""
    try:
        return (base / LATEST_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""
