"""The work directories of the study. The pipeline makes artifacts that variants share once; variants link to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.study import BASE, FACTORS
from dskd.artifacts.lock import hold_lock, release_lock
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.evaluation.lexical.items import build_items
from dskd.models.folder import find_teacher
from dskd.pipeline import LOCK, run_pipeline

MAIN = "main"
_PREPARATION_S = 7200
VARIANTS = {factor.name: factor for factor in FACTORS}


def overrides_of(work: Path, variant: str | None, keys: Mapping[str, Any]) -> list[str]:
    """Returns the `section.key=value` overrides of a training in a variant of the study."""
    factor = VARIANTS[variant] if variant else None
    changed = {"workdir": str(_folder(work, variant)), **(factor.keys if factor else {}), **keys}
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in changed.items()]


def load_variant(work: Path, variant: str | None, keys: Mapping[str, Any], base: Path = BASE) -> Config:
    """Loads the config of a training."""
    return load_config(base, overrides_of(work, variant, keys))


def prepare(work: Path, variant: str | None = None, base: Path = BASE) -> None:
    """Brings the artifacts up to the shards and the lexical items up to date, with one process at a time per folder."""
    for name in (None, variant) if variant is not None else (None,):
        folder = _folder(work, name)
        lock = work / f".{folder.name}.lock"
        hold_lock(lock, "prepares this part of the study", wait_s=_PREPARATION_S)
        try:
            _prepare(work, name, base)
        finally:
            release_lock(lock)


def _prepare(work: Path, variant: str | None, base: Path) -> None:
    folder = _folder(work, variant)
    folder.mkdir(parents=True, exist_ok=True)
    if variant is not None:
        _link(_folder(work, None), folder, VARIANTS[variant].shares)
    run_pipeline(base, overrides_of(work, variant, {}), until="shards")
    config = load_variant(work, variant, {}, base)
    build_items(config, find_teacher(config))
    release_lock(
        folder / LOCK
    )  # the pipeline holds it until this process ends, but other processes of the study need it


def _link(source: Path, folder: Path, artifacts: Sequence[str]) -> None:
    for artifact in artifacts:
        if not (folder / artifact).exists():
            (folder / artifact).symlink_to((source / artifact).resolve(), target_is_directory=True)


def _folder(work: Path, variant: str | None) -> Path:
    return work / (variant or MAIN).replace(" ", "-")
