"""The outbox of a run: ordered messages to MLflow, kept until they have arrived.

A message is a JSON object with `run_id` and `kind` (:mod:`dskd.tracking.delivery`). It leaves the outbox when MLflow
has accepted it. With every checkpoint, and before a process ends, the remaining messages are written to `unsent.jsonl`,
from which the next process that opens the outbox reads them. A message can thus be delivered twice, which is harmless.
"""

import json
import threading
from collections import deque
from pathlib import Path
from typing import Any

from dskd.artifacts.files import write_text

Message = dict[str, Any]

FILE = "unsent.jsonl"
_BATCH_METRICS = 500  # MLflow accepts up to 1000 per request


class Outbox:
    """The queue of messages in one run's folder; several threads may add messages, one takes them out."""

    def __init__(self, folder: Path) -> None:
        """Opens the outbox of `folder`, with the messages that an earlier process left there."""
        self.file = folder / FILE
        self._messages: deque[Message] = deque(_read(self.file))
        self._changed = threading.Condition()
        self._on_disk = self.file.exists()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, *messages: Message) -> None:
        """Adds messages at the end; returns at once."""
        with self._changed:
            self._messages.extend(messages)
            self._changed.notify_all()

    def next_batch(self) -> list[Message]:
        """Returns the first message and those after it that fit into the same request; all stay in the outbox."""
        with self._changed:
            batch = [self._messages[0]] if self._messages else []
            size = 0
            for number, message in enumerate(self._messages):
                size += len(message.get("metrics", ()))
                if not _is_like(message, batch[0]) or (number and size > _BATCH_METRICS):
                    break
                if number:
                    batch.append(message)
            return batch

    def wait_for_messages(self, timeout_s: float) -> None:
        """Waits until there is something to deliver or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages, timeout_s)

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits until all messages are delivered or the time is up; returns True in the first case."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._messages, timeout_s)

    def drop(self, count: int) -> None:
        """Removes the first `count` messages, which have been delivered."""
        with self._changed:
            for _ in range(count):
                self._messages.popleft()
            self._changed.notify_all()

    def save(self) -> None:
        """Writes the undelivered messages to the file; removes the file if there are none."""
        with self._changed:
            lines = [json.dumps(message) for message in self._messages]
        if lines:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, "\n".join(lines) + "\n")
        elif self._on_disk:
            self.file.unlink(missing_ok=True)
        self._on_disk = bool(lines)


def _is_like(one: Message, other: Message) -> bool:
    return (one["kind"] == other["kind"] == "metrics" and one["run_id"] == other["run_id"]) or one is other


def _read(file: Path) -> list[Message]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
