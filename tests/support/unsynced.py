"""Once imported, lets this process and the ranks that it forks write without waiting for the disk.

Tests kill processes, whose writes the system keeps, and not the machine. The databases of MLflow alone would wait for
the disk dozens of times a run.
"""

import os
import sqlite3
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


def _return_at_once(file: Any) -> None:
    """Replaces `os.fsync`."""


@event.listens_for(Engine, "connect")
def _do_not_wait(connection: Any, _: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


os.fsync = _return_at_once
