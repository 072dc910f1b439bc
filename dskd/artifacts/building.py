"""Building an artifact under another name, and giving it its name when it is whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dskd.artifacts.files import flush_folder, make_folder, real_place, remove_tree, replace_folder, require_replaceable
from dskd.artifacts.hashing import MANIFEST_NAME, as_json, digest_of_json, hash_files
from dskd.artifacts.kinds import KINDS
from dskd.artifacts.lock import hold_lock, lock_if_free, release_lock
from dskd.artifacts.manifest import Manifest, Recipe, is_current, package_versions, write_json
from dskd.console import say

# How long to wait for a lock. An NFS server keeps those of a dead node for its lease, usually 90 s, and what was there
# before a restart may still be ending.
LOCK_PATIENCE_S = 150.0
_RECIPE_NAME = ".recipe"  # of a build that can go on after an interruption


@contextmanager
def build_artifact(path: Path, recipe: Recipe) -> Iterator["Building"]:
    """Yields a :class:`Building` whose folder becomes `path` when the block ends well; otherwise nothing is published.

    What an earlier, interrupted build left in the temporary folder is removed first. Single-process stages use this;
    stages of several ranks call :meth:`Building.publish` on rank 0 themselves.
    """
    building = Building(path, recipe)
    building.clear()
    try:
        yield building
    except BaseException:  # an interruption too leaves nothing half behind; it is raised on
        remove_tree(building.folder)
        building.release()
        raise
    building.publish()


@dataclass
class Building:
    """An artifact that is not whole yet. Files go into `folder`; `facts` go into the manifest."""

    path: Path
    recipe: Recipe
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The temporary folder, next to the artifact so that renaming stays within one file system: next to the real
        folder if the artifact's place is a symbolic link.
        """
        return _partial_folder(self.path)

    def clear(self) -> None:
        """Makes `folder` again and empty, whatever an earlier, interrupted build left there.

        From here on until it is published the artifact belongs to this process.

        Raises:
            OutageError: when another process makes the same artifact, and goes on with it longer than is waited.
        """
        _hold(self.path)
        remove_tree(self.folder)
        make_folder(self.folder)

    def resume_or_clear(self) -> None:
        """Keeps what an interrupted build of the very same recipe left in `folder`; otherwise makes it again and empty.

        For stages that know which of their files there are whole. Files and folders whose names begin with a dot
        are notes of the stage: they do not get into the artifact.

        Raises:
            OutageError: when another process makes the same artifact, and goes on with it longer than is waited.
        """
        _hold(self.path)
        wanted = [asdict(self.recipe), KINDS[self.recipe.kind].schema_version, package_versions()]
        recipe_file = self.folder / _RECIPE_NAME
        if not recipe_file.is_file() or recipe_file.read_text(encoding="utf-8") != digest_of_json(wanted):
            self.clear()
            recipe_file.write_text(digest_of_json(wanted), encoding="utf-8")

    def publish(self) -> Manifest:
        """Writes the manifest and puts the folder in its place, replacing an older artifact."""
        manifest = Manifest(
            kind=self.recipe.kind,
            schema_version=KINDS[self.recipe.kind].schema_version,
            inputs=dict(self.recipe.inputs),
            config=as_json(self.recipe.config),
            teacher=self.recipe.teacher,
            tokenizer=self.recipe.tokenizer,
            files=hash_files(self.folder),
            facts=as_json(self.facts),
            packages=package_versions(),
        )
        write_json(self.folder / MANIFEST_NAME, asdict(manifest))
        # Last, so that a build that is killed while its files are hashed can still be gone on with.
        for note in self.folder.glob(".*"):
            remove_tree(note)
        flush_folder(self.folder)  # before it has its name: after a power cut it would look whole
        replace_folder(self.folder, self.path)
        self.release()
        return manifest

    def release(self) -> None:
        """Lets other processes make the artifact."""
        release_lock(_lock(self.path))


def was_made_meanwhile(path: Path, recipe: Recipe) -> bool:
    """Whether another process has made this very artifact while this one prepared what goes into it.

    A process that is at it is waited for. Where nobody has made it, it belongs to this process until it is published.
    """
    _hold(path)
    if not is_current(path, recipe):
        return False
    release_lock(_lock(path))
    say(f"  kept: {path}, which another process made meanwhile")
    return True


def remove_partial(path: Path) -> None:
    """Removes what an interrupted build of the artifact left, unless another process is at it."""
    if _partial_folder(path).exists():
        with lock_if_free(_lock(path)) as is_free:
            if is_free:
                remove_tree(_partial_folder(path))


def _partial_folder(path: Path) -> Path:
    real = real_place(path)
    return real.with_name(f".{real.name}.partial")


def _lock(path: Path) -> Path:
    real = real_place(path)  # two work directories may have links to one folder
    return real.with_name(f".{real.name}.lock")


def _hold(path: Path) -> None:
    require_replaceable(path)
    hold_lock(_lock(path), f"makes {path}", wait_s=LOCK_PATIENCE_S)
