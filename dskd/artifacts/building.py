"""Builds an artifact under a hidden name, and publishes it under its own name when it is complete."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.files import (
    flush_folder,
    make_folder,
    real_place,
    remove_tree,
    replace_folder,
    require_replaceable,
    share_files,
)
from dskd.artifacts.hashing import MANIFEST_NAME, as_json, digest_of_json, hash_files
from dskd.artifacts.kinds import KINDS
from dskd.artifacts.lock import hold_lock, lock_if_free, release_lock
from dskd.artifacts.manifest import Manifest, Recipe, is_current, package_versions, write_json
from dskd.console import say

# How long to wait for a lock. An NFS server keeps the locks of a dead node for its lease time, usually 90 s. After a
# restart, the previous process may still be ending.
LOCK_PATIENCE_S = 150.0
_RECIPE_NAME = ".recipe"  # digest of the recipe, in the folder of a build that can be resumed


@contextmanager
def build_artifact(path: Path, recipe: Recipe) -> Iterator["Building"]:
    """Yields a :class:`Building` whose folder becomes `path` if the block succeeds; otherwise nothing is published.

    First removes what an interrupted build left in the temporary folder. Single-process stages use this function;
    stages of several ranks call :meth:`Building.publish` on rank 0 themselves.
    """
    building = Building(path, recipe)
    building.clear()
    try:
        with report_full_disk(building.folder):
            yield building
    except BaseException:  # interruptions too must not leave an incomplete folder
        remove_tree(building.folder)
        building.release()
        raise
    building.publish()


@dataclass
class Building:
    """An artifact under construction. Its files go into `folder`, and `facts` into the manifest."""

    path: Path
    recipe: Recipe
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The temporary folder, next to the artifact so that renaming stays within one file system.

        If the artifact's path is a symbolic link, it is next to the real folder.
        """
        return _partial_folder(self.path)

    def clear(self) -> None:
        """Creates `folder` empty, removing what an interrupted build left there.

        This process then holds the artifact's lock until the artifact is published.

        Raises:
            OutageError: if another process is still building the same artifact after `LOCK_PATIENCE_S`.
        """
        _hold(self.path)
        remove_tree(self.folder)
        make_folder(self.folder)

    def resume_or_clear(self) -> None:
        """Keeps what an interrupted build of exactly the same recipe left in `folder`; otherwise creates it empty.

        For stages that know which of their files are complete. Files and folders whose names begin with a dot are
        notes of the stage and do not become part of the artifact.

        Raises:
            OutageError: if another process is still building the same artifact after `LOCK_PATIENCE_S`.
        """
        _hold(self.path)
        if not self.can_resume():
            self.clear()
            (self.folder / _RECIPE_NAME).write_text(self._recipe_digest, encoding="utf-8")

    def can_resume(self) -> bool:
        """Returns True if `folder` has what an interrupted build of exactly the same recipe left."""
        recipe_file = self.folder / _RECIPE_NAME
        return recipe_file.is_file() and recipe_file.read_text(encoding="utf-8") == self._recipe_digest

    @property
    def _recipe_digest(self) -> str:
        return digest_of_json([asdict(self.recipe), KINDS[self.recipe.kind].schema_version, package_versions()])

    def publish(self, hashes: Mapping[str, str] = MappingProxyType({})) -> Manifest:
        """Writes the manifest and puts the folder in its place, replacing an older artifact.

        Files whose sha256 is in `hashes`, taken when they were written, are not read again.
        """
        manifest = Manifest(
            kind=self.recipe.kind,
            schema_version=KINDS[self.recipe.kind].schema_version,
            inputs=dict(self.recipe.inputs),
            config=as_json(self.recipe.config),
            teacher=self.recipe.teacher,
            tokenizer=self.recipe.tokenizer,
            files=hash_files(self.folder, known=hashes, not_hashed=KINDS[self.recipe.kind].not_hashed),
            facts=as_json(self.facts),
            packages=package_versions(),
        )
        write_json(self.folder / MANIFEST_NAME, asdict(manifest))
        # Removed last, so that a build that is killed while its files are hashed can still be resumed.
        for note in self.folder.glob(".*"):
            remove_tree(note)
        share_files(self.folder)
        flush_folder(self.folder)  # before the rename: otherwise, after a power cut, it would wrongly look complete
        replace_folder(self.folder, self.path)
        self.release()
        return manifest

    def release(self) -> None:
        """Releases the lock, so that other processes can build the artifact."""
        release_lock(artifact_lock(self.path))


def was_made_meanwhile(path: Path, recipe: Recipe) -> bool:
    """Returns True if another process built exactly this artifact while this one prepared its content.

    Waits for a process that is building it. If the result is False, this process holds the artifact's lock until the
    artifact is published.
    """
    _hold(path)
    if not is_current(path, recipe):
        return False
    release_lock(artifact_lock(path))
    say(f"  kept: {path}, which another process has made in the meantime")
    return True


def remove_partial(path: Path) -> None:
    """Removes what an interrupted build of the artifact left, unless another process is building it."""
    if _partial_folder(path).exists():
        with lock_if_free(artifact_lock(path)) as is_free:
            if is_free:
                remove_tree(_partial_folder(path))


def _partial_folder(path: Path) -> Path:
    real = real_place(path)
    return real.with_name(f".{real.name}.partial")


def artifact_lock(path: Path) -> Path:
    """Returns the path of the lock that a process holds while it makes the artifact at `path`."""
    real = real_place(path)  # two work directories may have links to one folder
    return real.with_name(f".{real.name}.lock")


def _hold(path: Path) -> None:
    require_replaceable(path)
    hold_lock(artifact_lock(path), f"makes {path}", wait_s=LOCK_PATIENCE_S)
