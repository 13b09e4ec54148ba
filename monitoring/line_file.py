"""Files of lines that a run appends to: what cannot be written waits in memory, so that a full disk ends no run."""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from runtime.errors import RunDirectoryError
from runtime.messages import counted

LARGEST_WAITING = 16 * 2**20
"""Bytes of lines that wait at most."""


class LineFile:
    """Appends whole lines to a file, each of them once. Those that cannot be written are tried again, in their order,
    before the next one; where a part of a line got into the file, the rest follows there.

    Where the file was removed or replaced meanwhile, lines go into the one that is there now, or a new one.
    """

    def __init__(
        self, path: Path, note: Callable[[str], None], require_owner: Callable[[], None] = lambda: None
    ) -> None:
        """Opens nothing yet. `note` prints a line: of failures in a row the first is said. `require_owner` is asked
        before another file is begun, and raises RunDirectoryError where the run may no longer write in this folder."""
        self.path = path
        self._note = note
        self._require_owner = require_owner
        self._file: FileIO | None = None
        self._is_torn = False
        self._waiting: deque[bytes] = deque()
        self._bytes_waiting = 0
        self._written = 0
        """Bytes of the first line that waits which the file has already."""
        self._error: OSError | None = None
        self.lost = 0
        """Lines for which there was no room in memory."""

    @property
    def waiting(self) -> int:
        """Lines that wait."""
        return len(self._waiting)

    def open(self) -> FileIO:
        """Opens the file, which is made where there is none. Raises OSError."""
        file = FileIO(self.path, "a+")
        size = os.fstat(file.fileno()).st_size
        # A killed writer left half a line: it is ended before the next one, which would be lost with it.
        self._is_torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        self._file, self._written = file, 0
        return file

    def append(self, line: bytes) -> None:
        """Writes a line, or keeps it until that can be done. Raises RunDirectoryError."""
        if self._bytes_waiting + len(line) > LARGEST_WAITING and not self.write():
            self.lost += 1
            return
        self._waiting.append(line)
        self._bytes_waiting += len(line)
        self.write()

    def write(self) -> bool:
        """Tries to write what waits; whether nothing does any more. Raises RunDirectoryError, and forgets the lines."""
        try:
            if self._waiting:
                self._write_all(self._file_in_place())
        except RunDirectoryError:
            self._waiting.clear()
            self._bytes_waiting = 0
            raise
        except OSError as error:
            if self._error is None:
                self._note(
                    f"{self.path} cannot be written: {error.strerror}; its lines wait in memory and training goes on"
                )
            self._error = error
            return False
        self._error = None
        return True

    def close(self) -> str | None:
        """Tries once more to write what waits, and closes the file; returns what to say of lines that are lost."""
        with suppress(RunDirectoryError):  # the folder is left to whoever has it now
            self.write()
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:  # a file server may say only now that it could not keep what it took
            return f"the end of {self.path} may be lost: {error.strerror}"
        lost = self.lost + self.waiting
        why = f": {self._error.strerror}" if self._error else ""
        return f"{self.path} lacks {counted(lost, 'line')} that could not be written{why}" if lost else None

    def _file_in_place(self) -> FileIO:
        """The file at the path, opened."""
        if self._file is not None and not self._is_at_path(self._file):
            self._require_owner()
            self._note(f"{self.path} was removed or replaced; the next lines go into the file of that name")
            replaced, self._file = self._file, None
            replaced.close()
        return self._file or self.open()

    def _is_at_path(self, file: FileIO) -> bool:
        try:
            there = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(os.fstat(file.fileno()), there)

    def _write_all(self, file: FileIO) -> None:
        if self._is_torn:
            os.write(file.fileno(), b"\n")
            self._is_torn = False
        while self._waiting:
            line = self._waiting[0]
            self._written += os.write(file.fileno(), line[self._written :])
            if self._written == len(line):
                self._waiting.popleft()
                self._bytes_waiting -= len(line)
                self._written = 0
