"""Manifests: the provenance of every artifact, and the checks that it is complete and up to date.

An artifact is a folder with a `manifest.json`. It is built under a temporary name next to its final place and renamed
when it is complete, so a folder with the right name is always complete. A stage reads the manifests of its inputs and
refuses inputs that do not fit together, naming both sides; the pipeline compares manifests to skip what is up to date.
"""

import importlib.metadata
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dskd.artifacts.files import old_folder, write_text
from dskd.artifacts.hashing import MANIFEST_NAME, as_json, digest_of_json, hash_files
from dskd.artifacts.kinds import KINDS
from dskd.errors import UserError

# A reader tries again if a new artifact may be replacing the old one at that moment.
_LOOKS, _LOOK_AGAIN_S = 3, 0.2
NOT_AS_RECORDED = "the content is not what the manifest says"  # of a file, in messages

_PACKAGES = ("dskd", "torch", "deepspeed", "transformers", "tokenizers", "mosaicml-streaming", "nltk", "numpy")


@dataclass(frozen=True)
class Recipe:
    """The description of all that determines an artifact's content. Equal recipes make equal artifacts."""

    kind: str
    inputs: Mapping[str, str] = field(default_factory=dict)  # name of an input -> its digest
    config: Mapping[str, Any] = field(default_factory=dict)  # the part of the configuration the stage reads
    teacher: str | None = None  # digest of the teacher whose states or weights are in it
    tokenizer: str | None = None  # digest of the tokenizer whose ids are in it


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `facts` are measurements of the building stage, for people and later stages."""

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
        """Digest of the content: equal for two artifacts of the same kind with the same files."""
        return digest_of_content(
            self.kind, {name: entry["sha256"] for name, entry in self.files.items()}, self.schema_version
        )


def digest_of_content(kind: str, hashes: Mapping[str, str], schema_version: int | None = None) -> str:
    """Returns the digest of an artifact whose files have these sha256, in the current or another version."""
    return digest_of_json([kind, schema_version or KINDS[kind].schema_version, dict(hashes)])


def read_manifest(path: Path, kind: str, *, made_by: str | None = None, files_are_here: bool = True) -> Manifest:
    """Returns the manifest of the artifact at `path`.

    Args:
        path: the artifact's folder.
        kind: the kind that the artifact must have.
        made_by: the command that makes it, for the error message; None for that of its kind.
        files_are_here: False if its files may be elsewhere; their sizes are then not checked.

    Raises:
        UserError: if it is missing, unreadable, of another kind or version, or its files have other sizes.
    """
    made_by = made_by or KINDS[kind].made_by
    manifest, misfits = _look_at(path, kind) if files_are_here else (_load_manifest(path), {})
    if manifest is None:
        raise UserError(f"{path}: there {KINDS[kind].missing} with `{made_by}`")
    if manifest.kind != kind:
        raise UserError(
            f"{path}: expected an artifact of kind {kind!r}, found {manifest.kind!r}; name the right folder"
        )
    if manifest.schema_version != KINDS[kind].schema_version:
        raise UserError(
            f"{path}: this artifact ({kind!r}) has format {manifest.schema_version}, this version of dskd reads "
            f"{KINDS[kind].schema_version}; make it again with `{made_by}`"
        )
    for name, size in misfits.items():
        state = "it is missing" if size is None else f"it has {size} bytes"
        raise UserError(
            f"{path / name}: the manifest says {manifest.files[name]['size_bytes']} bytes, but {state}; it was damaged "
            f"after it was made. Remove {path} and make it again with `{made_by}`"
        )
    return manifest


def is_current(path: Path, recipe: Recipe) -> bool:
    """Returns True if the artifact at `path` is complete and was made by exactly this recipe."""
    manifest, misfits = _look_at(path, recipe.kind)
    return (
        manifest is not None
        and not misfits
        and manifest.kind == recipe.kind
        and manifest.schema_version == KINDS[recipe.kind].schema_version
        and manifest.inputs == dict(recipe.inputs)
        and manifest.config == as_json(recipe.config)
        and manifest.teacher == recipe.teacher
        and manifest.tokenizer == recipe.tokenizer
    )


def read_file(path: Path, name: str) -> bytes | None:
    """Returns the content of a file of the artifact at `path`, or None if there is no such file.

    Tries again if the artifact is being replaced.
    """
    for _ in range(_LOOKS):
        try:
            return (path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if old_folder(path).exists():  # replace_folder is between its two renames
                time.sleep(_LOOK_AGAIN_S)
    return None


def verify_files(
    path: Path, manifest: Manifest, *, made_by: str | None = None, except_for: Collection[str] = ()
) -> None:
    """Compares the content of every file with the manifest. Reads all files: only for artifacts of moderate size.

    `except_for` names files that are verified later.

    Raises:
        UserError: naming the first file that differs from the manifest.
    """
    made_by = made_by or KINDS[manifest.kind].made_by
    files = {name: entry for name, entry in manifest.files.items() if name not in except_for}
    actual = hash_files(path, only=files)
    for name, entry in files.items():
        if actual[name]["sha256"] != entry["sha256"]:
            raise UserError(
                f"{path / name}: {NOT_AS_RECORDED} (sha256 {actual[name]['sha256'][:12]}…, "
                f"expected {entry['sha256'][:12]}…); remove {path} and make it again with `{made_by}`"
            )


def require_same(what: str, *, expected: str | None, actual: str | None, between: str, remedy: str) -> None:
    """Checks that two artifacts were made from the same input.

    Raises:
        UserError: naming both sides, if `expected` and `actual` differ.
    """
    if expected != actual:
        raise UserError(f"{between}: made with different {what} ({_short(expected)} and {_short(actual)}); {remedy}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either the old one or the complete new one."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns what :func:`write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that influence what a stage computes."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _look_at(path: Path, kind: str) -> tuple[Manifest | None, dict[str, int | None]]:
    """Returns the manifest at `path`, and the files whose sizes differ from it: {name: size, None if missing}.

    Checks sizes only if the manifest has this kind and its current version.
    """
    manifest, misfits = _load_manifest(path), {}
    for turn in range(_LOOKS):
        if manifest is None or (manifest.kind, manifest.schema_version) != (kind, KINDS[kind].schema_version):
            return manifest, {}
        sizes = {name: _size_of(path / name) for name in manifest.files}
        misfits = {name: size for name, size in sizes.items() if size != manifest.files[name]["size_bytes"]}
        if not misfits:
            break
        if turn + 1 < _LOOKS:  # an artifact may have been replaced after its manifest was read
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


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "none"
