"""Requests to stop, by a signal, a file or the clock: a run finishes its step, saves, and ends as preempted."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
"""A file of this name in the run directory asks the run to stop."""
SECONDS_BETWEEN_LOOKS = 1.0


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self, file: Path, deadline: float = math.inf, *, says: bool = False) -> None:
        """`file` is the one that asks to stop by being there; `deadline` is in seconds of `time.monotonic`; `says` lets
        whoever sends a signal know on standard error that it arrived."""
        self.file = file
        self._says = says
        self.deadline = deadline
        self.reason: str | None = None
        """What asked first: the name of a signal, "STOP file", or the key of a setting."""
        self.graceful = False
        """Whether someone looks at `reason`; until then, and at the second signal, the process ends at once."""
        self._signalled = False
        self._said_no_file = False
        self._next_look = -math.inf

    def receive(self, number: int, _: FrameType | None) -> None:
        """Takes a signal. Raises SystemExit where nobody looks at the request, or it is not the first signal."""
        if not self.graceful or self._signalled:
            raise SystemExit(128 + number)
        self._signalled = True
        self._say("finishing this step, then saving; another signal ends at once")
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Asks to stop; of several reasons the first counts."""
        self.reason = self.reason or reason

    def look(self) -> None:
        """Looks for the file and at the clock, at most once a second. For one rank: the others spare the disk."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        with suppress(OSError):  # a network file system that does not answer now may do so in a second
            if self.file.is_file():
                self.ask("STOP file")
            elif self.file.is_dir() and not self._said_no_file:
                self._said_no_file = True
                self._say(f"{self.file} is a directory and stops nothing; a file of that name would")
        if now >= self.deadline:
            self.ask("train.max_minutes")

    def settle(self, *, completed: bool) -> None:
        """Removes the file where the run did what it asks for, so that the next start goes on."""
        if completed or self.reason == "STOP file":
            with suppress(OSError):
                self.file.unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        if self._says:
            with suppress(OSError):
                os.write(2, f"{text}\n".encode())


@contextmanager
def stoppable(file: Path, deadline: float = math.inf, *, says: bool = False) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGUSR1 and SIGHUP into a request for as long as the context lasts; SIGHUP not where it is
    ignored, as under nohup. For the main thread only."""
    request = StopRequest(file, deadline, says=says)
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, request.receive) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
