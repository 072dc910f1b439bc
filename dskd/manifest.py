"""Provenance of every artifact: what it is, what it was made from, and whether it is complete.

An artifact is a folder with a `manifest.json`. It is built under a temporary name beside its place and renamed when it
is whole, so a folder with the right name is always complete. A stage reads the manifests of its inputs and refuses what
does not fit, naming both sides; the pipeline compares manifests to skip what is up to date.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dskd.errors import UserError
from dskd.folders import (
    flush_folder,
    make_folder,
    old_folder,
    real_place,
    remove_tree,
    replace_folder,
    require_replaceable,
    write_text,
)
from dskd.lock import hold_lock, lock_if_free, release_lock

MANIFEST_NAME = "manifest.json"
# How long to wait for a lock. An NFS server keeps those of a dead node for its lease, usually 90 s, and what was there
# before a restart may still be ending.
LOCK_PATIENCE_S = 150.0
# A reader may come while a new artifact is put in the place of an old one, and looks again.
_LOOKS, _LOOK_AGAIN_S = 3, 0.2
_RECIPE_NAME = ".recipe"  # of a build that can go on after an interruption

# Raised by one when the format of a kind changes: artifacts of another version are rebuilt, or refused where they are
# only read.
SCHEMA_VERSIONS = {
    "teacher": 1,
    "corpus": 1,
    "sequences": 2,
    "lexicon": 2,
    "states": 1,
    "senses": 1,
    "shards": 2,
    "student": 1,
    "checkpoint": 1,
    "export": 1,
    "evaluation": 3,
    "task": 1,
    "lexical-items": 1,
    "lexical": 2,
}
_MISSING = {
    "senses": "is no sense dictionary here; make it",
    "shards": "are no shards here; make them",
    "sequences": "are no sequences here; make them",
    "states": "are no states here; make them",
}
_PACKAGES = ("dskd", "torch", "deepspeed", "transformers", "tokenizers", "mosaicml-streaming", "nltk", "numpy")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the content of an artifact. Two equal recipes make the same artifact."""

    kind: str
    inputs: Mapping[str, str] = field(default_factory=dict)  # name of an input -> its digest
    config: Mapping[str, Any] = field(default_factory=dict)  # the part of the configuration the stage reads
    teacher: str | None = None  # digest of the teacher whose states or weights are in it
    tokenizer: str | None = None  # digest of the tokenizer whose ids are in it


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds. `facts` are what the stage measured while building, for people and later stages."""

    kind: str
    schema_version: int
    inputs: dict[str, str]
    config: dict[str, Any]
    teacher: str | None
    tokenizer: str | None
    files: dict[str, dict[str, Any]]  # relative path -> {"sha256", "size_bytes"}
    facts: dict[str, Any]
    packages: dict[str, str]

    @property
    def digest(self) -> str:
        """Identity by content: equal for two artifacts of one kind with the same files."""
        content = {name: entry["sha256"] for name, entry in self.files.items()}
        return digest_of_json([self.kind, self.schema_version, content])


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
        wanted = [asdict(self.recipe), SCHEMA_VERSIONS[self.recipe.kind], package_versions()]
        recipe_file = self.folder / _RECIPE_NAME
        if not recipe_file.is_file() or recipe_file.read_text(encoding="utf-8") != digest_of_json(wanted):
            self.clear()
            recipe_file.write_text(digest_of_json(wanted), encoding="utf-8")

    def publish(self) -> Manifest:
        """Writes the manifest and puts the folder in its place, replacing an older artifact."""
        manifest = Manifest(
            kind=self.recipe.kind,
            schema_version=SCHEMA_VERSIONS[self.recipe.kind],
            inputs=dict(self.recipe.inputs),
            config=_as_json(self.recipe.config),
            teacher=self.recipe.teacher,
            tokenizer=self.recipe.tokenizer,
            files=hash_files(self.folder),
            facts=_as_json(self.facts),
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
    from dskd.console import say  # brings torch, which takes seconds to import

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


def read_manifest(path: Path, kind: str, *, made_by: str, files_are_here: bool = True) -> Manifest:
    """The manifest of the artifact at `path`.

    Args:
        path: the artifact's folder.
        kind: what it must be.
        made_by: the command that makes it, for the error message.
        files_are_here: False where its files may lie elsewhere; their sizes are not looked at then.

    Raises:
        UserError: when it is missing, not readable, of another kind or version, or its files' sizes do not fit.
    """
    manifest, misfits = _look_at(path, kind) if files_are_here else (_load_manifest(path), {})
    if manifest is None:
        raise UserError(f"{path}: there {_MISSING.get(kind, f'is no {kind} here; make it')} with `{made_by}`")
    if manifest.kind != kind:
        raise UserError(f"{path}: expected a {kind}, found a {manifest.kind}; name the right folder")
    if manifest.schema_version != SCHEMA_VERSIONS[kind]:
        raise UserError(
            f"{path}: this {kind} has format {manifest.schema_version}, this version of dskd reads "
            f"{SCHEMA_VERSIONS[kind]}; make it again with `{made_by}`"
        )
    for name, size in misfits.items():
        found = "it is missing" if size is None else f"it has {size} bytes"
        raise UserError(
            f"{path / name}: the manifest says {manifest.files[name]['size_bytes']} bytes, but {found}; it was damaged "
            f"after it was made. Remove {path} and make it again with `{made_by}`"
        )
    return manifest


def is_current(path: Path, recipe: Recipe) -> bool:
    """True when the artifact at `path` is whole and was made by this very recipe."""
    manifest, misfits = _look_at(path, recipe.kind)
    return (
        manifest is not None
        and not misfits
        and manifest.kind == recipe.kind
        and manifest.schema_version == SCHEMA_VERSIONS[recipe.kind]
        and manifest.inputs == dict(recipe.inputs)
        and manifest.config == _as_json(recipe.config)
        and manifest.teacher == recipe.teacher
        and manifest.tokenizer == recipe.tokenizer
    )


def read_file(path: Path, name: str) -> bytes | None:
    """A file of the artifact at `path`, or None where there is none, and not only for as long as it is replaced."""
    for _ in range(_LOOKS):
        try:
            return (path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if old_folder(path).exists():  # replace_folder is between its two renames
                time.sleep(_LOOK_AGAIN_S)
    return None


def verify_files(path: Path, manifest: Manifest, *, made_by: str) -> None:
    """Compares the content of every file with the manifest. Reads everything: for artifacts that fit that.

    Raises:
        UserError: naming the first file that was changed after the artifact was made.
    """
    found = hash_files(path, only=manifest.files)
    for name, entry in manifest.files.items():
        if found[name]["sha256"] != entry["sha256"]:
            raise UserError(
                f"{path / name}: the content is not what the manifest says (sha256 {found[name]['sha256'][:12]}…, "
                f"expected {entry['sha256'][:12]}…); remove {path} and make it again with `{made_by}`"
            )


def require_same(what: str, *, expected: str | None, found: str | None, between: str, remedy: str) -> None:
    """Refuses two artifacts that were not made from the same thing.

    Raises:
        UserError: naming both sides when `expected` and `found` differ.
    """
    if expected != found:
        raise UserError(f"{between}: made with different {what} ({_short(expected)} and {_short(found)}); {remedy}")


def hash_files(folder: Path, only: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file under `folder` but its manifest and notes, in the order of their names."""
    names = sorted(only) if only is not None else sorted(_names(folder))
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashlib releases the interpreter's lock
        digests = pool.map(lambda name: sha256_of_file(folder / name), names)
    return {
        name: {"sha256": digest, "size_bytes": (folder / name).stat().st_size}
        for name, digest in zip(names, digests, strict=True)
    }


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and str(name) != MANIFEST_NAME and not any(part.startswith(".") for part in name.parts):
            yield str(name)


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Identity of a file too large to be read only to find that nothing changed: its name, size and time of change."""
    status = path.stat()
    return digest_of_json([str(path), status.st_size, status.st_mtime_ns])


def digest_of_json(value: Any) -> str:
    """Hex digest of a JSON-like value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(_as_json(value), sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a stage computes."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _look_at(path: Path, kind: str) -> tuple[Manifest | None, dict[str, int | None]]:
    """The manifest at `path`, and where it is of this kind its files of another size: {name: size, None if missing}."""
    manifest, misfits = _load_manifest(path), {}
    for turn in range(_LOOKS):
        if manifest is None or (manifest.kind, manifest.schema_version) != (kind, SCHEMA_VERSIONS[kind]):
            return manifest, {}
        sizes = {name: _size_of(path / name) for name in manifest.files}
        misfits = {name: size for name, size in sizes.items() if size != manifest.files[name]["size_bytes"]}
        if not misfits:
            break
        if turn + 1 < _LOOKS:  # manifest and files may be of two artifacts, of which one has just replaced the other
            time.sleep(_LOOK_AGAIN_S)
            manifest = _load_manifest(path)
    return manifest, misfits


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _load_manifest(path: Path) -> Manifest | None:
    try:
        content = read_file(path, MANIFEST_NAME)
        return None if content is None else Manifest(**json.loads(content))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path / MANIFEST_NAME}: this is not a manifest ({error}); remove {path} and make it again"
        ) from None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "none"
