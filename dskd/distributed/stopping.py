"""Being asked to stop by TERM or USR1, as schedulers and launchers do: at once, or at a place that the work chooses.

Signals reach the ranks of a job at different times, one a step ahead of another. So a rank only remembers that it was
asked; the ranks agree on the step with the counts that they sum up anyway (:func:`dskd.training.step.train_step`).
"""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: the same command, given again, goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """The work stops on request, with everything on disk from which it goes on."""


@dataclass
class StopRequest:
    """Whether this rank has been asked to stop."""

    is_pending: bool = False


def listen() -> None:
    """From now on a request raises :class:`Stopped` in the main thread, at once and only once.

    A launcher that ends its ranks asks more than once; a second request must not cut off what the first one set going.
    """

    def stop(*_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    for number in SIGNALS:
        signal.signal(number, stop)


@contextlib.contextmanager
def deferred() -> Iterator[StopRequest]:
    """While it lasts a request is only remembered, for work that stops at places of its own choosing.

    Who was asked in here is not asked again: requests are repeated, and would cut off what comes after.
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
    """For processes that end when the one that started them does, and are needed until then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
