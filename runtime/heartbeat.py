"""What every rank is doing, put down where the others find it once it no longer answers."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"
SIZE = 256
"""Bytes of a file, which is written over: a beat must cost nothing."""
NEARLY = 0.8
SECONDS_TO_DIE = 0.5
SECONDS_BETWEEN_PULSES = 1.0
LATE = 1.5
SECONDS_OF_SILENCE = 10.0
"""Without a pulse a process is stopped, or its host is gone."""


class Heartbeat:
    """This rank's file. A rank that waits for others does nothing; one that does something, or has no pulse, holds them
    up. The pulse is the file's time of change, which a thread renews.

    Args:
        logs: the folder of the run under which ranks put their files.
        patience: seconds after which who is waited for does not answer; may be set later.
    """

    def __init__(self, logs: Path, rank: int, patience: float) -> None:
        self.patience = patience
        self.waiting_since: float | None = None
        """When this rank began to wait for others, in seconds of `time.time`; None: it does not."""
        self.logs = logs
        folder = logs / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank_{rank:05d}.json"
        # A file of its own: one that is there may be open in a rank of an earlier start, which goes on writing to it.
        self._path.unlink(missing_ok=True)
        self._file = self._path.open("wb", buffering=0)
        self._who = {"host": socket.gethostname(), "pid": os.getpid()}
        self.step = 0

    @contextmanager
    def during(self, doing: str | None) -> Iterator[None]:
        """Says so for as long as the context lasts, and after an error; None: waiting for others."""
        self.beat(doing)
        yield
        self.beat(None)

    def __enter__(self) -> "Heartbeat":
        return self

    def beat(self, doing: str | None) -> None:
        """Says what begins; None: waiting for others."""
        now = time.time()
        self.waiting_since = now if doing is None else None
        text = json.dumps({"step": self.step, "doing": doing, "since": now, **self._who})
        with suppress(OSError):  # of no use to the run itself
            os.pwrite(self._file.fileno(), text[:SIZE].ljust(SIZE).encode(), 0)

    def pulse(self) -> None:
        """Says that this process runs; nothing once the file is taken away, as the thread may be late."""
        with suppress(OSError, ValueError):
            os.utime(self._file.fileno())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Takes the file away: who left it there has not come to its end. Not that of a later start, which a rank that
        was stopped may have outlived its own into."""
        with suppress(OSError):
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                self._path.unlink()
        self._file.close()


@contextmanager
def giving_up(heartbeat: Heartbeat, give_up: Callable[[dict[int, str]], None]) -> Iterator[None]:
    """Keeps up the pulse in a thread of its own, and calls `give_up` in it where this rank has waited longer than its
    patience for others that `culprits` can name.

    For backends that end the process rather than raise an error, such as NCCL: who is named was named before.
    """
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_PULSES):
            heartbeat.pulse()
            since = heartbeat.waiting_since
            if since is None or time.time() - since < heartbeat.patience + SECONDS_BETWEEN_PULSES:
                continue
            named = culprits(heartbeat.logs, heartbeat.patience)
            if named and heartbeat.waiting_since == since and not ended.is_set():
                give_up(named)
                return

    threading.Thread(target=look, name="giving up", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def culprits(logs: Path, timeout: float) -> dict[int, str]:
    """Which ranks hold the others up, and what they were doing, in words; empty where nobody knows.

    They are those of this host that are gone, or else those without a pulse, or else those that do what one of them has
    been doing for longer than the rest, and for nearly `timeout` seconds; unless that is all of them.
    """
    now, silence = time.time(), min(SECONDS_OF_SILENCE, NEARLY * timeout)
    while True:
        beats, present = _beats(logs), _time_of_files(logs)
        here = [rank for rank, beat in beats.items() if beat["host"] == socket.gethostname()]
        gone = [rank for rank in here if process_start(beats[rank]["pid"]) is None]
        ages = {rank: present - beat["pulse"] for rank, beat in beats.items()}
        stopped = [rank for rank, age in ages.items() if age > silence]
        # The connections of a process that is killed close a moment before it is gone, and who waited for one that
        # was stopped may have begun to before.
        late = max(ages.values(), default=0.0) > LATE * SECONDS_BETWEEN_PULSES
        passed = time.time() - now
        if gone or (passed > SECONDS_TO_DIE and (stopped or not late or passed > silence)):
            break
        time.sleep(SECONDS_TO_DIE / 10)
    busy = [rank for rank, beat in beats.items() if beat["doing"] and now - beat["since"] > NEARLY * timeout]
    slowest = min(busy, key=lambda rank: float(beats[rank]["since"]), default=None)
    alike = [rank for rank in busy if slowest is not None and _work(beats[rank]) == _work(beats[slowest])]
    named = gone or stopped or (alike if len(alike) < len(beats) or len(beats) == 1 else [])
    return {
        rank: f"rank {rank} {'is gone' if rank in gone else 'does not answer'}: step {beats[rank]['step']}, "
        f"{beats[rank]['doing'] or 'waiting for others'}, {now - beats[rank]['since']:.0f} s ago"
        for rank in sorted(named)
    }


def _beats(logs: Path) -> dict[int, dict[str, Any]]:
    beats = {}
    for path in (logs / FOLDER).glob("rank_*.json"):
        with suppress(OSError, ValueError):
            beat = json.loads(path.read_text(encoding="utf-8"))
            beats[int(path.stem[5:])] = beat | {"pulse": path.stat().st_mtime}
    return beats


def _time_of_files(logs: Path) -> float:
    """What a file that changes now would have as its time: of a clock that hosts share."""
    probe = logs / FOLDER / f"now_{secrets.token_hex(4)}"
    with suppress(OSError):
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now
    return time.time()


def _work(beat: dict[str, Any]) -> tuple[int, str]:
    return beat["step"], beat["doing"]


def process_start(pid: int) -> str | None:
    """When a process of this host began, in ticks of its kernel, None where it has ended; "" where nobody says."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    with suppress(OSError, IndexError):
        state, *counts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        # A process that has ended stays until its parent looks.
        return None if state == "Z" else counts[18]
    return ""
