"""A file that stays open and is read by position: every read is whole, or an error that names the file."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import CorruptDataError


class PositionedFile:
    """A file under `path`, of `size` bytes when it was opened; threads may read it at the same time.

    It is not mapped: where a mapped file has become shorter, or its disk fails, the process is killed by SIGBUS.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be opened."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Values `[count]` from byte `offset` on.

        Raises CorruptDataError where the file ends before them, and OSError where it cannot be read; both name it.
        """
        values = np.empty(count, dtype)
        content = values.view(np.uint8).data
        done = 0
        while done < len(content):
            try:
                found = os.pread(self._descriptor, len(content) - done, offset + done)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} at byte {offset + done}", str(self.path)) from error
            if not found:
                raise CorruptDataError(
                    f"{self.path} ends at byte {offset + done}, but had {self.size} bytes when it was opened: it was "
                    f"cut while in use; restore it, or prepare the data again, and start again"
                )
            content[done : done + len(found)] = found
            done += len(found)
        return values
