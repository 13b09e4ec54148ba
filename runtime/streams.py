"""Standard input, output and error: open from the start of a process, and never the reason why it ends."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


class LenientStream(io.TextIOBase):
    """Writes to another stream and passes over what that one cannot take: its disk is full, its reader has left, it is
    closed, or it was never there (None). What is written once it can take more arrives again."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the other stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the other stream is a terminal."""
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        """Takes all of the text, wherever it goes."""
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what was written, if that can be."""
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, on standard error where no stream is given; if it cannot be printed, the caller goes on all the
    same."""
    print(text, file=LenientStream(stream or sys.stderr), flush=True)


def open_missing_streams() -> None:
    """Open each of descriptors 0, 1 and 2 that is closed (`>&-`) on the null device, also for Python.

    Otherwise the next file that is opened would get the number, and take in what libraries print. So this is to be
    called before the process opens any file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The system gives the lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def flush_streams() -> None:
    """Write out what standard output and error still hold, before the process ends. What cannot be written is dropped:
    the interpreter would try once more at its end, fail, and turn any exit code into 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
