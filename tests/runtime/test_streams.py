"""Standard streams that are closed, full or left: nothing ends for them, and no file takes their place."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain_gpt
from monitoring.console import Console
from runtime.streams import LenientStream, tell

ROOT = Path(pretrain_gpt.__file__).parent
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


class Disk(io.RawIOBase):
    """Takes bytes, unless it is full."""

    def __init__(self):
        self.is_full = False
        self.content = b""

    def writable(self):
        return True

    def write(self, content):
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.content += bytes(content)
        return len(content)


@pytest.mark.parametrize("interactive", [False, True])
def test_lines_arrive_again_once_the_disk_has_room(interactive):
    disk = Disk()
    console = Console(500, interactive, io.TextIOWrapper(io.BufferedWriter(disk)))
    console.note("before")
    disk.is_full = True
    for number in range(300):
        console.note(f"line {number} that is lost, or arrives late")
        console.progress(number)
    disk.is_full = False
    console.note("after")
    console.close()
    assert disk.content.startswith(b"before\n") or interactive
    assert b"after\n" in disk.content


def test_a_console_that_is_full_to_its_end_closes(monkeypatch):
    disk = Disk()
    disk.is_full = True
    console = Console(500, True, io.TextIOWrapper(io.BufferedWriter(disk)))
    console.note("lost")
    console.close()
    assert disk.content == b""


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed()])
def test_a_stream_that_is_closed_or_was_never_there_takes_everything(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    tell("nobody hears this")
    console = LenientStream(stream)
    assert console.write("word") == 4
    console.flush()
    assert not console.isatty()


def test_descriptors_that_are_closed_are_taken_by_the_null_device(tmp_path):
    program = (
        "import sys, runtime.streams as streams\n"
        "streams.open_missing_streams()\n"
        "file = open('next', 'w')\n"
        "print(file.fileno(), sys.stdin.read(), file=file)\n"
        "print('to nobody'); streams.tell('to nobody'); sys.exit(sys.stdin.fileno() + sys.stdout.fileno())"
    )
    done = shell(f'{{python}} -c "{program}" <&- >&- 2>&-', tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert (tmp_path / "next").read_text() == "3 \n"


def shell(command, folder):
    command = command.format(python=sys.executable, entry=ROOT / "pretrain_gpt.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["{entry} check=true <&- >&- 2>&-", "-m tools.cli describe model=tiny >&-"])
def test_a_process_whose_streams_are_closed_ends_as_it_would(tmp_path, command):
    done = shell(f"{{python}} {command}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@needs_full
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("{entry} model.num_layer=3 2>/dev/full", 78),
        ("{entry} check=true >/dev/full", 74),  # what was asked for is not there
        ("-m tools.cli describe model=tiny >/dev/full", 74),
        ("-m tools.cli --help >/dev/full", 0),
    ],
)
def test_a_process_on_a_full_disk_ends_with_a_code_of_the_contract(tmp_path, command, code):
    done = shell(f"{{python}} {command}", tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr + done.stdout
    assert code != 74 or done.stderr.startswith("error: ")
