"""What another host has made is waited for, and not for ever."""

import threading
import time

import pytest

from runtime.files import wait_until_visible


@pytest.mark.parametrize("name", ["file", "folder/deep/file"])
def test_what_appears_late_is_waited_for(tmp_path, name):
    path = tmp_path / name

    def make():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    threading.Timer(0.5, make).start()
    wait_until_visible(path, 60.0)
    assert path.exists()


def test_what_never_appears_is_an_error_in_time(tmp_path):
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"folder/file was made by another process but is not visible on \S+ after 0.5 s"):
        wait_until_visible(tmp_path / "folder" / "file", 0.5)
    assert 0.5 <= time.monotonic() - begin < 20
