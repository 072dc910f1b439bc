"""Digests of the large files that make a model: its weights, or a GGUF file. Each file is hashed once."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.hashing import MANIFEST_NAME, digest_of_json, sha256_of_file
from dskd.artifacts.manifest import Manifest, read_manifest, write_json
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.files.weights import WEIGHTS_INDEX, tensor_files


def gguf_path(config: Config) -> Path:
    """Returns the path of the GGUF file that `teacher.path` names."""
    assert config.teacher.path is not None, "called only if teacher.path is a GGUF file"
    return Path(config.teacher.path).expanduser()


def gguf_digest(config: Config) -> str:
    """Returns the sha256 of the GGUF file of `teacher.path`.

    If the file is not on this machine, that of the file of this name that the teacher in the work directory was made
    from: a node needs only the work directory.

    Raises:
        UserError: if neither is there.
    """
    path = gguf_path(config)
    if path.is_file():
        return hashes_of([path], cache=digest_cache(config, "teacher"))[path]
    folder = config.path(kinds.TEACHER.folder)
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder, kinds.TEACHER.name)
        if manifest.facts.get("file") == path.name:
            return manifest.inputs["gguf"]
    raise UserError(
        f"teacher.path: {path}: there is no such GGUF file, and {folder} was not made from a file of that name"
    )


def digest_cache(config: Config, section: str) -> Path:
    """Returns the file in the work directory that keeps the hashes of the files of a section's model."""
    return config.path(f".{section}_digests.json")


def digest_of_model(folder: Path, cache: Path) -> str:
    """Returns the digest of the model's config and weights.

    Raises:
        UserError: when a file that the index names is missing.
    """
    paths = {name: (folder / name).resolve() for name in sorted({"config.json", *tensor_files(folder).values()})}
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f"{folder / name}: {WEIGHTS_INDEX} names this file, but it is missing; fetch it again")
    hashes = hashes_of(paths.values(), cache)
    return digest_of_json({name: hashes[path] for name, path in paths.items()})


def require_made_files(config: Config, folder: Path, manifest: Manifest) -> None:
    """Checks that the files of a teacher in the work directory are those that were made; hashes each file once.

    What is made with it names it by the digest in the manifest, so a changed file would otherwise pass for it.

    Raises:
        UserError: naming the file that has changed.
    """
    hashes = hashes_of([folder / name for name in manifest.files], cache=digest_cache(config, "teacher"))
    for name, entry in manifest.files.items():
        if hashes[folder / name] != entry["sha256"]:
            raise UserError(
                f"{folder / name}: this teacher has changed since it was made (sha256 {hashes[folder / name][:12]}…, "
                f"expected {entry['sha256'][:12]}…); remove {folder} and make it again with "
                f"`{kinds.TEACHER.made_by}`"
            )


def hashes_of(paths: Iterable[Path], cache: Path) -> dict[Path, str]:
    """Returns the sha256 of files.

    `cache` keeps the hash of each file by path, size and modification time, since the same path may be a different file
    on each node.
    """
    known: dict[str, Any] = {}
    if cache.is_file():
        with _ignoring_damage():
            known = json.loads(cache.read_text(encoding="utf-8"))
    hashes, new = {}, {}
    for path in paths:
        status = path.stat()
        key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        hashes[path] = known.get(key) or sha256_of_file(path)
        if key not in known:
            new[key] = hashes[path]
    if new and cache.parent.is_dir():
        with _ignoring_damage():
            write_json(cache, known | new)
    return hashes


@contextmanager
def _ignoring_damage() -> Iterator[None]:
    """Ignores errors of reading or writing the cache of hashes: without the cache, hashing only takes longer."""
    try:
        yield
    except (OSError, ValueError):
        return
