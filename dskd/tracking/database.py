"""The sqlite database in a work directory: its address, and how it adapts to the directory's path and permissions.

MLflow stores the absolute address of the artifacts with every experiment and run. In a work directory that was moved or
copied these addresses are wrong, so they are corrected when the database is opened. A database without write permission
is read from a copy, since MLflow writes to whatever it opens.
"""

import atexit
import contextlib
import functools
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

from dskd.artifacts.lock import hold_lock, release_lock
from dskd.config import Config
from dskd.errors import UserError

FILE, ARTIFACTS = "mlflow.db", "mlartifacts"
_PATIENCE_S = 300.0  # wait this long while another process creates the database
_BUSY_S = 20.0  # wait this long while another process writes to it; the same as MLflow
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def database_file(config: Config) -> Path:
    """Returns the path of the work directory's database, without symbolic links."""
    return config.path(FILE).resolve()


def artifacts_folder(config: Config) -> Path:
    """Returns the folder of the artifacts of the runs in that database."""
    return config.path().resolve() / ARTIFACTS


def database_uri(file: Path) -> str:
    """Returns the URI by which MLflow opens an sqlite file, whatever characters its path contains.

    SQLAlchemy decodes percent signs and takes `?` for the start of options. MLflow creates the parent folder of the
    path after `sqlite:///` without decoding it. So a path that must be encoded gets the longer scheme, whose paths
    MLflow leaves to SQLAlchemy.

    Raises:
        UserError: if the path is not valid UTF-8, which no URI of SQLAlchemy can express.
    """
    try:
        quoted = quote(str(file))
    except UnicodeEncodeError:
        raise UserError(
            f"workdir: {os.fsencode(file)!r} is not UTF-8, and MLflow cannot open a database there; rename the folder, "
            "or set tracking.uri to a server or tracking.enabled=false"
        ) from None
    return f"sqlite:///{file}" if quoted == str(file) else f"sqlite+pysqlite:///{quoted}"


def make_database(file: Path) -> None:
    """Creates the database if it does not exist. It exists completely or not at all, however many processes start.

    MLflow creates its tables in some fifty migrations, without a lock: two runs that start at once in a new work
    directory would corrupt each other's tables, and a run that is killed would leave its own incomplete.
    """
    from mlflow import MlflowClient

    if file.exists() or not file.parent.is_dir():
        return
    lock = file.with_name(f".{file.name}.lock")
    hold_lock(lock, f"makes {file}", wait_s=_PATIENCE_S)
    try:
        if not file.exists():
            new = file.with_name(f".{file.name}.new")
            new.unlink(missing_ok=True)
            MlflowClient(database_uri(new))
            new.rename(file)
    finally:
        release_lock(lock)


def correct_addresses(file: Path, artifacts: Path) -> None:
    """Corrects the addresses of experiments and runs that still name the former place of this work directory.

    They then name `artifacts`. An address stays if its folder is the same one under another path, such as another
    mount; or if it exists and there is none at `artifacts`, since then only the database was copied.

    Args:
        file: the database.
        artifacts: the folder of artifacts next to it.
    """
    here = artifacts.as_uri()
    with contextlib.closing(sqlite3.connect(file, timeout=_BUSY_S)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:  # not MLflow's tables: MLflow reports what is wrong with such a file
            return
        known = [location for (location,) in database.execute("SELECT DISTINCT artifact_location FROM experiments")]
        outdated = [
            location for location in known if location and location != here and _was_elsewhere(location, artifacts)
        ]
        if not outdated:
            return
        with database:  # one transaction
            for old in outdated:
                for table, column in _ADDRESSES:
                    if table in tables:
                        database.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                            f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                            (here, len(old) + 1, old, len(old) + 1, f"{old}/"),
                        )


def _was_elsewhere(location: str, artifacts: Path) -> bool:
    """Returns True if an experiment's address names the former place of the folder that is `artifacts` now."""
    parsed = urlparse(location)
    old = Path(unquote(parsed.path))
    if parsed.scheme != "file" or old.name != artifacts.name:
        return False  # somebody created this experiment with another location
    if not old.exists():
        return True
    return artifacts.exists() and not artifacts.samefile(old)


@functools.cache
def readable_file(file: Path) -> Path:
    """Returns the database itself if this process may write to it, otherwise a copy that is removed at exit.

    Raises:
        sqlite3.Error: if it cannot be read.
    """
    if os.access(file, os.W_OK) and os.access(file.parent, os.W_OK):
        return file
    folder = Path(tempfile.mkdtemp(prefix="dskd-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / FILE
    # Unlike a copy of the file, the backup takes locks, so nobody writes meanwhile.
    with (
        contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy
