"""Digests of files, folders and JSON values, for comparing artifacts."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

MANIFEST_NAME = "manifest.json"


def hash_files(
    folder: Path,
    only: Mapping[str, Any] | None = None,
    known: Mapping[str, str] = MappingProxyType({}),
    not_hashed: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Computes the sha256 and size of every file under `folder`, in the order of their names.

    Leaves out the manifest, the notes (names that begin with a dot) and `not_hashed`. With `only`, reads just
    the files it names. Reads no file whose sha256 is `known`.
    """
    names = sorted(only) if only is not None else sorted(_names(folder, not_hashed))
    with ThreadPoolExecutor(max_workers=8) as pool:  # threads suffice: hashlib releases the interpreter's lock
        digests = pool.map(lambda name: known.get(name) or sha256_of_file(folder / name), names)
    return {
        name: {"sha256": digest, "size_bytes": (folder / name).stat().st_size}
        for name, digest in zip(names, digests, strict=True)
    }


def _names(folder: Path, not_hashed: Collection[str]) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if (
            path.is_file()
            and str(name) not in (MANIFEST_NAME, *not_hashed)
            and not any(part.startswith(".") for part in name.parts)
        ):
            yield str(name)


def sha256_of_file(path: Path) -> str:
    """Returns the hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Returns a digest of a file's name, size and modification time.

    For files that are too large to be read just to detect changes.
    """
    status = path.stat()
    return digest_of_json([str(path), status.st_size, status.st_mtime_ns])


def digest_of_json(value: Any) -> str:
    """Returns the hex digest of a JSON-like value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(as_json(value), sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> Any:
    """Converts a value to what it is after JSON encoding and decoding, the form in which values are compared."""
    return json.loads(json.dumps(value))
