"""A file is read by position, in threads, and what cannot be read of it is an error that names it."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.positioned_file import PositionedFile
from runtime.errors import CorruptDataError


@pytest.fixture
def file(tmp_path: Path) -> PositionedFile:
    np.arange(1000, dtype="<i4").tofile(tmp_path / "x")
    return PositionedFile(tmp_path / "x")


def test_values_are_read_in_their_type_from_any_byte(file: PositionedFile) -> None:
    assert file.size == 4000
    assert file.read(400, 3, "<i4").tolist() == [100, 101, 102]
    assert file.read(401, 2, "u1").tolist() == [0, 0]
    assert file.read(4000, 0, "<i8").shape == (0,)


def test_threads_read_at_the_same_time(file: PositionedFile) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at: file.read(4 * at, 10, "<i4").tolist(), list(range(990)) * 5))
    assert found == [list(range(at, at + 10)) for at in range(990)] * 5


def test_what_comes_in_pieces_is_put_together(file: PositionedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, at: whole(descriptor, min(length, 7), at))
    assert file.read(0, 1000, "<i4").tolist() == list(range(1000))


def test_a_file_that_was_cut_while_in_use_is_named_with_the_place(file: PositionedFile) -> None:
    os.truncate(file.path, 2002)
    assert file.read(1996, 1, "<i4").tolist() == [499]
    with pytest.raises(CorruptDataError, match=rf"{file.path} ends at byte 2002, but had 4000 bytes .* start again"):
        file.read(1996, 10, "<i4")
    with pytest.raises(CorruptDataError, match=f"{file.path} ends at byte 3000"):
        file.read(3000, 10, "<i4")


def test_a_disk_that_fails_is_an_error_of_the_file(file: PositionedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=rf"Input/output error at byte 8: '{file.path}'") as caught:
        file.read(8, 1, "<i4")
    assert caught.value.errno == errno.EIO


def test_its_descriptor_is_closed_with_it(file: PositionedFile) -> None:
    descriptor = file._descriptor
    os.fstat(descriptor)
    path = file.path
    for other in [PositionedFile(path) for _ in range(3)]:
        number = other._descriptor
    del other
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
