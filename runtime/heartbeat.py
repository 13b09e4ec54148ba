"""What each rank is doing, in a file that the others read once the rank no longer answers."""

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
SECONDS_BETWEEN_REFRESHES = 1.0
SECONDS_UNTIL_STALE = 10.0
"""Age of a file from which on its process is stopped, or its host is gone."""
LATE = 1.5
"""A file of so many times the interval between refreshes may belong to a process that is stopped or gone."""
SECONDS_TO_DIE = 0.5
"""Between the moment in which the connections of a killed process close and that in which it is gone."""
NEARLY = 0.8
"""Share of a timeout after which an action takes too long."""


class Heartbeat:
    """Status file of this rank: step, current action, start time.

    A thread refreshes its time of modification every second (`watchdog`). A rank that waits for a collective reports no
    action; a rank with an old action or a stale file is the one that blocks the others.

    Args:
        logs: the folder of the run in which ranks have their files.
        timeout: seconds that this rank waits for others; may be set later.
    """

    def __init__(self, logs: Path, rank: int, timeout: float) -> None:
        self.timeout = timeout
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
        """Reports an action for as long as the context lasts, and after an error; None: waiting for others."""
        self.beat(doing)
        yield
        self.beat(None)

    def __enter__(self) -> "Heartbeat":
        return self

    def beat(self, doing: str | None) -> None:
        """Reports the action that begins; None: waiting for others."""
        now = time.time()
        self.waiting_since = now if doing is None else None
        text = json.dumps({"step": self.step, "doing": doing, "since": now, **self._who})
        with suppress(OSError):  # of no use to the run itself
            os.pwrite(self._file.fileno(), text[:SIZE].ljust(SIZE).encode(), 0)

    def refresh(self) -> None:
        """Shows that this process runs. Does nothing once the file is closed, as the thread may come late."""
        with suppress(OSError, ValueError):
            os.utime(self._file.fileno())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Removes the file: a file that stays belongs to a rank that did not reach its end. The file of a later start
        stays: a rank that was stopped and continued may still run when the next start has begun."""
        with suppress(OSError):
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                self._path.unlink()
        self._file.close()


@contextmanager
def watchdog(heartbeat: Heartbeat, give_up: Callable[[dict[int, str]], None]) -> Iterator[None]:
    """Refreshes this rank's file from a thread, which calls `give_up` once this rank has waited for longer than its
    timeout and `find_unresponsive_ranks` names the ranks that it waits for.

    Needed for backends that end the process rather than raise an error, such as NCCL: the ranks are named before that.
    """
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_REFRESHES):
            heartbeat.refresh()
            since = heartbeat.waiting_since
            if since is None or time.time() - since < heartbeat.timeout + SECONDS_BETWEEN_REFRESHES:
                continue
            named = find_unresponsive_ranks(heartbeat.logs, heartbeat.timeout)
            if named and heartbeat.waiting_since == since and not ended.is_set():
                give_up(named)
                return

    threading.Thread(target=look, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def find_unresponsive_ranks(logs: Path, timeout: float) -> dict[int, str]:
    """The ranks that block the others, with what they were doing, in words; empty where that is not known.

    These are the ranks of this host whose process is gone; else the ranks whose file is stale; else the ranks with the
    action that began first, where it began nearly `timeout` seconds ago and not all ranks are at it.
    """
    now, stale = time.time(), min(SECONDS_UNTIL_STALE, NEARLY * timeout)
    while True:
        beats, present = _beats(logs), _time_of_files(logs)
        here = [rank for rank, beat in beats.items() if beat["host"] == socket.gethostname()]
        gone = [rank for rank in here if process_start(beats[rank]["pid"]) is None]
        ages = {rank: present - beat["refreshed"] for rank, beat in beats.items()}
        stopped = [rank for rank, age in ages.items() if age > stale]
        # The connections of a killed process close a moment before it is gone, and a rank may have begun to wait for
        # a stopped process before its file became stale.
        late = max(ages.values(), default=0.0) > LATE * SECONDS_BETWEEN_REFRESHES
        passed = time.time() - now
        if gone or (passed > SECONDS_TO_DIE and (stopped or not late or passed > stale)):
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
            beats[int(path.stem[5:])] = beat | {"refreshed": path.stat().st_mtime}
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
