"""Requests to stop: a signal lets a training run finish its step, save, and end as preempted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process was sent SIGTERM or SIGINT (Ctrl-C)."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal."""
        self.heeded = False
        """Whether someone looks at `signal`; until then, and at the second signal, the process ends at once."""

    def receive(self, number: int, _: FrameType | None) -> None:
        """Takes a signal. Raises SystemExit where nobody would heed it, or it is not the first."""
        if not self.heeded or self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request for as long as the context lasts. For the main thread only."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, request.receive) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
