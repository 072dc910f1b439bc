"""Stopping on TERM or USR1, which schedulers and launchers send: at once, or at a point that the work chooses.

Signals reach the ranks of a job at different times, possibly at different steps. So in training a rank only records the
request, and the ranks agree on the step through the counts that they sum anyway
(:func:`dskd.training.step.train_step`).
"""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """The exception for work that stops on request, with everything on disk that it needs to continue."""


@dataclass
class StopRequest:
    """A flag that is set when this rank receives a request to stop."""

    is_pending: bool = False


def listen() -> None:
    """Installs handlers through which the first request raises :class:`Stopped` in the main thread at once.

    Later requests are ignored: a launcher that ends its ranks sends several, and a second one must not interrupt the
    cleanup that the first one started.
    """

    def stop(*_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    for number in SIGNALS:
        signal.signal(number, stop)


@contextlib.contextmanager
def deferred() -> Iterator[StopRequest]:
    """Records requests during the block instead of raising, for work that stops only at certain points.

    If a request arrived in the block, requests after the block are ignored: senders repeat them, and they would
    interrupt the code that follows.
    """
    request = StopRequest()

    def remember(*_: object) -> None:
        request.is_pending = True

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request.is_pending else handler)


def ignore() -> None:
    """Ignores requests to stop; for processes that end with their parent process and are needed until then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
