"""Requests to stop: which reason counts, when a signal ends the process at once, and how often the disk is asked."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import stop
from runtime.stop import StopRequest, stoppable

ROOT = Path(stop.__file__).parent.parent


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told otherwise."""
    now = [1000.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def hangups_arrive():
    """As where these tests are not run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_signal_is_a_wish_and_the_second_ends_the_process(tmp_path, number, hangups_arrive):
    before = signal.getsignal(number)
    with stoppable(tmp_path / "STOP") as request:
        request.graceful = True
        os.kill(os.getpid(), number)
        assert request.reason == number.name
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(number) == before


def test_a_hangup_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stoppable(tmp_path / "STOP") as request:
            request.graceful = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_directory_of_that_name_is_said_once_and_passed_over(tmp_path, clock, capfd):
    request = StopRequest(tmp_path / "STOP", says=True)
    request.file.mkdir()
    for _ in range(2):
        clock[0] += 2
        request.look()
    request.settle(completed=True)
    assert request.reason is None
    assert capfd.readouterr().err.count("STOP is a directory and stops nothing") == 1
    assert request.file.is_dir()


def test_a_signal_that_nobody_heeds_yet_ends_the_process(tmp_path):
    with stoppable(tmp_path / "STOP"), pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.value.code == 128 + signal.SIGUSR1


def test_a_signal_after_the_file_is_still_polite(tmp_path):
    request = StopRequest(tmp_path / "STOP")
    request.graceful = True
    request.file.touch()
    request.look()
    request.receive(signal.SIGTERM, None)
    assert request.reason == "STOP file"
    with pytest.raises(SystemExit):
        request.receive(signal.SIGTERM, None)


def test_the_disk_is_asked_at_most_once_a_second(tmp_path, clock):
    request = StopRequest(tmp_path / "STOP")
    request.look()
    request.file.touch()
    clock[0] += 0.9
    request.look()
    assert request.reason is None
    clock[0] += 0.2
    request.look()
    assert request.reason == "STOP file"


def test_the_clock_asks_once_the_deadline_has_passed(tmp_path, clock):
    request = StopRequest(tmp_path / "STOP", deadline=1002.0)
    for now, reason in [(1000.0, None), (1001.5, None), (1002.5, "train.max_minutes")]:
        clock[0] = now
        request.look()
        assert request.reason == reason


def test_a_disk_that_does_not_answer_is_asked_again(tmp_path, clock, monkeypatch):
    request = StopRequest(tmp_path / "STOP")
    request.file.touch()
    with monkeypatch.context() as patched:
        patched.setattr(type(request.file), "is_file", lambda _: (_ for _ in ()).throw(OSError(116, "Stale")))
        request.look()
    assert request.reason is None
    clock[0] += 2
    request.look()
    assert request.reason == "STOP file"


@pytest.mark.parametrize(
    ("reason", "completed", "stays"),
    [("STOP file", False, False), (None, True, False), ("SIGUSR1", False, True), (None, False, True)],
)
def test_the_file_goes_where_it_was_heeded_and_stays_for_the_next_start_otherwise(tmp_path, reason, completed, stays):
    request = StopRequest(tmp_path / "STOP")
    request.settle(completed=True)
    request.file.touch()
    request.reason = reason
    request.settle(completed=completed)
    assert request.file.exists() is stays


READS_FOR_EVER = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from data.batches import BatchReader
from data.gpt_dataset import Sample
from runtime.stop import stoppable

class Slow:
    def sample(self, index):
        time.sleep(0.01)
        return Sample(0, 0, index, np.zeros(9, dtype=np.int64))

def send_twice():
    for _ in range(2):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

with stoppable(Path("STOP")) as request:
    request.graceful = True
    threading.Thread(target=send_twice).start()
    BatchReader(Slow(), lambda _: 10**6, 10**6, 0, 1, num_workers=int(sys.argv[1])).read(0)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_second_signal_ends_a_process_that_reads_a_batch(workers):
    command = [sys.executable, "-c", READS_FOR_EVER, str(workers)]
    done = subprocess.run(command, cwd=ROOT, timeout=20, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
