"""Whose a run directory is: one living process at a time, whatever host it runs on."""

import json
import math
import os
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from runtime.errors import RunDirectoryError
from runtime.heartbeat import process_start
from runtime.run_files import require_regular
from runtime.streams import tell

SECONDS_BETWEEN_BEATS = 10.0
LONGEST_BETWEEN_BEATS = 1.5 * SECONDS_BETWEEN_BEATS
"""Seconds without a beat after which a process must have stood still."""
SECONDS_UNTIL_DEAD = 60.0
"""So long without a beat an owner of which nothing else is known counts as dead."""
SECONDS_BETWEEN_LOOKS = 0.5
RELEASED = "{}"
"""What a lock file holds that nobody owns; an empty one is just being written."""


@dataclass(frozen=True)
class Owner:
    """A process that owns a run directory, as its lock file has it."""

    host: str
    pid: int
    job: str | None
    """Of SLURM or torchrun."""
    since: str
    started: str | None
    """When the process began: another may have its number by now."""
    kernel: str
    """Where `pid` means this process; hosts of one name and containers of one host differ."""

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


class Ownership:
    """The lock of a run directory: its file `.lock.N` of the largest N, which the owner touches every ten seconds.

    Whoever takes it makes the next file, which of several only one can, so that neither file locks nor hard links are
    needed, which some network file systems lack or keep to one host. The newest file is never removed, not even at
    release: no number comes twice.
    """

    def __init__(self, folder: Path) -> None:
        self.lost = False
        """Whether another process has the directory by now, or it is gone, as far as the last beat saw."""
        self._folder = folder
        self._last_beat = -math.inf
        self._number: int | None = None
        self._written = ""
        """What this process wrote into its lock file."""
        self._released = threading.Event()

    def take(self) -> None:
        """Owns the folder until `release` or the end of the process. What a dead owner left is taken over, and said.

        Raises RunDirectoryError where a living process owns it, OSError where it cannot be written, StorageError where
        its lock file is no file.
        """
        while self._number is None:
            newest = _newest(self._folder)
            gone = _last_owner(self._folder, newest) if newest else None
            path, self._written = _lock(self._folder, newest + 1), json.dumps(asdict(_this_process()))
            with suppress(FileExistsError):
                self._make(path)
                # Others may have come and gone since we looked, or a network file system have shown too little.
                if _newest(self._folder) == newest + 1:
                    self._number, self._last_beat = newest + 1, _clock()
                else:
                    path.unlink(missing_ok=True)
        for older in _numbers(self._folder):
            if older < self._number:
                _lock(self._folder, older).unlink(missing_ok=True)
        if gone is not None:
            tell(f"{self._folder} is taken over from {gone}, which is gone")
        threading.Thread(target=self._beat_until_released, name="owning", daemon=True).start()

    def _make(self, path: Path) -> None:
        """Makes a lock file of this process. Raises FileExistsError, and OSError where nothing can be written; it then
        leaves no file, which would be taken for one of a process that is just writing it."""
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(self._written)
                file.flush()
            except OSError:
                path.unlink(missing_ok=True)
                raise

    def check(self) -> None:
        """Raises RunDirectoryError where another process has taken over what this one owned, or the folder was removed
        or moved. One look at a file and a touch."""
        if self._number is None or self._released.is_set():
            return
        self._beat()
        if not self.lost:
            return
        if not self._folder.is_dir():
            raise RunDirectoryError(
                f"{self._folder} was removed or moved while this run went on, which ends it; a run that was moved goes "
                "on where out_dir and name say its new place"
            )
        newest = _newest(self._folder)
        owner = _parse(_look(_lock(self._folder, newest))[0]) or "another process"
        why = f"{owner} took it over, having seen no sign of life" if newest else "its lock file was removed"
        raise RunDirectoryError(
            f"{self._folder} is no longer this run's: {why}; this run ends, and its checkpoints are left to that one; "
            f"choose another name, such as name={self._folder.name}-2, to have both"
        )

    def check_after_a_pause(self) -> None:
        """What `check` does, where this process may have lost the folder since it last looked: it stood still for
        longer than it does between two looks. Else nothing, so that it can be asked at every line that is written."""
        if self.lost or _clock() - self._last_beat > LONGEST_BETWEEN_BEATS:
            self.check()

    def release(self) -> None:
        """Lets others have the folder."""
        if self._number is None or self._released.is_set():
            return
        self._released.set()
        # A folder that was put in place of one that was moved may have a lock of the same number.
        with suppress(OSError):
            if self._is_own():
                with _lock(self._folder, self._number).open("r+", encoding="utf-8") as file:
                    file.write(RELEASED)  # over what is there, for which a full disk has room
                    file.truncate()

    def clear(self) -> None:
        """Removes the lock file that this process has released."""
        if self._number is not None and self._released.is_set():
            _lock(self._folder, self._number).unlink(missing_ok=True)

    def _beat_until_released(self) -> None:
        while not self._released.wait(SECONDS_BETWEEN_BEATS):
            self._beat()

    def _beat(self) -> None:
        self._last_beat = _clock()
        try:
            self.lost = not self._is_own()
            if not self.lost and self._number is not None:
                os.utime(_lock(self._folder, self._number))
        except (FileNotFoundError, NotADirectoryError):
            self.lost = True
        except OSError:  # a file system that does not answer now may do so in ten seconds
            pass

    def _is_own(self) -> bool:
        """Whether the newest lock file is that of this process; not only of its number, as a folder that was moved away
        may have given its name to another. Raises FileNotFoundError or NotADirectoryError where the folder is gone."""
        number = _newest(self._folder)
        return number == self._number and _look(_lock(self._folder, number))[0] == self._written


def _last_owner(folder: Path, number: int) -> str | None:
    """Whose a lock file was, in words, None where it was released. Raises RunDirectoryError where the owner lives.

    A process of this kernel is looked for. Any other is watched for a beat: clocks of hosts and file servers differ,
    and a lock of the file system may mean nothing beyond its host, or outlive that.
    """
    before, deadline = None, time.monotonic() + SECONDS_UNTIL_DEAD
    while (now := _look(_lock(folder, number)))[0] != RELEASED:
        owner = _parse(now[0])
        who, lives = str(owner or "a process that left no name"), _lives_here(owner)
        if lives or (before is not None and now[0] == before[0] and now[1] != before[1]):
            raise RunDirectoryError(
                f"{folder} is in use by {who}; end that run or choose another name, such as name={folder.name}-2"
            )
        if lives is False or time.monotonic() > deadline:
            return who
        if before is None:
            tell(f"{folder}: up to {SECONDS_UNTIL_DEAD:.0f} s to see whether {who} lives")
        before = now
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return None


def _lives_here(owner: Owner | None) -> bool | None:
    """Whether a process of this kernel lives; None for one of another, of which its number says nothing."""
    if owner is None or owner.kernel != _kernel():
        return None
    found = process_start(owner.pid)
    return found is not None and (not found or not owner.started or found == owner.started)


def _look(path: Path) -> tuple[str, int]:
    """What a lock file holds and when it was touched; as RELEASED where it has gone. Opened, since that is when a
    network file system asks its server. Raises StorageError where it is no regular file."""
    require_regular(path)
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return RELEASED, 0


def _parse(text: str) -> Owner | None:
    with suppress(TypeError, ValueError):
        return Owner(**json.loads(text))
    return None


def _this_process() -> Owner:
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    return Owner(socket.gethostname(), os.getpid(), job, now, process_start(os.getpid()), _kernel())


def _kernel() -> str:
    """This start of this kernel, and the part of it in which numbers of processes are the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _clock() -> float:
    """Seconds that pass while the process is stopped, and where the system has such a clock while the machine is."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _lock(folder: Path, number: int) -> Path:
    return folder / f".lock.{number}"


def _numbers(folder: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.iterdir() if re.fullmatch(r"\.lock\.\d+", path.name)]


def _newest(folder: Path) -> int:
    """Number of the newest lock file, 0 where there is none."""
    return max(_numbers(folder), default=0)
