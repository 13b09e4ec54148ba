"""One owner of a run directory at a time: the living are respected, the dead succeeded by exactly one, aloud."""

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import pretrain_gpt
from runtime import directory_lock
from runtime.directory_lock import Ownership, _this_process
from runtime.errors import RunDirectoryError
from verification.local_ranks import run_ranks

ROOT = Path(pretrain_gpt.__file__).parent
TAKES = """
import sys
from pathlib import Path
from runtime.directory_lock import Ownership
from runtime.errors import RunDirectoryError
print("ready", flush=True)
for line in sys.stdin:
    try:
        Ownership(Path(line.strip())).take()
        print("taken", flush=True)
    except RunDirectoryError as error:
        print(error, flush=True)
"""


def taking_process():
    """A process that takes each folder which it is told."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", TAKES], cwd=ROOT, stderr=subprocess.DEVNULL, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def leave(folder, number=1, **changes):
    """The lock of this process, but for `changes`."""
    path = folder / f".lock.{number}"
    path.write_text(json.dumps(asdict(replace(_this_process(), **changes))))
    return path


def locks(folder):
    return sorted(path.name for path in folder.glob(".lock.*"))


@pytest.fixture
def owned(tmp_path):
    """The ownership of an empty folder, to be taken."""
    ownership = Ownership(tmp_path)
    yield ownership
    ownership.release()


def test_an_owner_that_is_killed_is_succeeded_at_once_and_named(tmp_path, owned, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    process = taking_process()
    print(tmp_path, file=process.stdin, flush=True)
    assert process.stdout.readline() == "taken\n"
    who = rf"process {process.pid} on \S+ of job 4711 since \d{{4}}-"
    with pytest.raises(RunDirectoryError, match=rf"in use by {who}.*name={tmp_path.name}-2") as caught:
        owned.take()
    assert caught.value.exit_code == 73
    process.send_signal(signal.SIGKILL)
    while directory_lock.process_start(process.pid) is not None:
        time.sleep(0.01)
    owned.take()
    process.communicate()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} is taken over from process {process.pid} on" in line
    assert locks(tmp_path) == [".lock.2"]


def test_another_process_under_the_number_of_the_owner_is_not_the_owner(tmp_path, owned, capsys):
    leave(tmp_path, started="1")
    owned.take()
    assert f"taken over from process {os.getpid()}" in capsys.readouterr().err


def test_what_was_released_is_taken_in_silence_and_leaves_no_more_than_one_file(tmp_path, capsys):
    for number in (1, 2, 3):
        owner = Ownership(tmp_path)
        owner.take()
        owner.release()
        owner.check()
        assert locks(tmp_path) == [f".lock.{number}"]
    assert capsys.readouterr().err == ""


def test_neither_locks_of_the_file_system_nor_links_nor_locks_of_older_versions_matter(tmp_path, owned, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on here since 2026-01-01 00:00:00\n")
    owned.take()
    with pytest.raises(RunDirectoryError, match="in use"):
        Ownership(tmp_path).take()


def test_an_owner_on_another_host_lives_for_as_long_as_it_touches_its_lock(tmp_path, owned, capsys, monkeypatch):
    monkeypatch.setattr(directory_lock, "SECONDS_UNTIL_DEAD", 2.0)
    monkeypatch.setattr(directory_lock, "SECONDS_BETWEEN_LOOKS", 0.05)
    lock = leave(tmp_path, host="elsewhere", kernel="another", pid=1)
    os.utime(lock, (2**31, 2**31))  # its clock is decades ahead
    threading.Timer(0.5, os.utime, [lock]).start()
    with pytest.raises(RunDirectoryError, match="in use by process 1 on elsewhere since"):
        owned.take()
    assert "up to 2 s to see whether process 1 on elsewhere" in capsys.readouterr().err
    os.utime(lock, (2**31, 2**31))
    owned.take()
    assert "taken over from process 1 on elsewhere" in capsys.readouterr().err


def test_a_lock_that_is_just_being_written_is_waited_for(tmp_path, owned, monkeypatch):
    monkeypatch.setattr(directory_lock, "SECONDS_BETWEEN_LOOKS", 0.05)
    (tmp_path / ".lock.1").touch()
    threading.Timer(0.3, leave, [tmp_path]).start()
    with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()}"):
        owned.take()


def test_of_several_that_succeed_a_dead_owner_exactly_one_wins(tmp_path):
    processes = [taking_process() for _ in range(4)]
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        leave(folder, number=9, started="1")
        for process in processes:
            print(folder, file=process.stdin, flush=True)
        said = [process.stdout.readline() for process in processes]
        winner = processes[said.index("taken\n")].pid
        assert sum(f"in use by process {winner} " in line for line in said) == 3, said
        assert locks(folder) == [".lock.10"]
    for process in processes:
        process.kill()
        process.communicate()


def test_an_owner_that_was_succeeded_notices_and_says_by_whom(tmp_path, owned, monkeypatch):
    monkeypatch.setattr(directory_lock, "SECONDS_BETWEEN_BEATS", 0.05)
    owned.take()
    owned.check()
    leave(tmp_path, number=2, host="elsewhere")
    time.sleep(0.5)
    assert owned.lost
    with pytest.raises(RunDirectoryError, match=r"no longer this run's: process .* on elsewhere .* took it over"):
        owned.check()


def test_an_owner_whose_lock_was_removed_notices(tmp_path, owned):
    owned.take()
    (tmp_path / ".lock.1").unlink()
    with pytest.raises(RunDirectoryError, match="its lock file was removed"):
        owned.check()


def test_a_process_that_stood_still_looks_before_it_writes(tmp_path, owned, monkeypatch):
    owned.take()
    leave(tmp_path, number=2, host="elsewhere")
    owned.check_after_a_pause()  # it looked a moment ago
    now = directory_lock._clock()
    monkeypatch.setattr(directory_lock, "_clock", lambda: now + directory_lock.LONGEST_BETWEEN_BEATS + 1)
    with pytest.raises(RunDirectoryError, match="took it over"):
        owned.check_after_a_pause()


@pytest.mark.parametrize("moved", [True, False])
def test_a_folder_that_was_removed_or_moved_is_said_to_be(tmp_path, monkeypatch, moved):
    monkeypatch.setattr(directory_lock, "SECONDS_BETWEEN_BEATS", 0.05)
    folder = tmp_path / "run"
    folder.mkdir()
    owner = Ownership(folder)
    owner.take()
    if moved:
        folder.rename(tmp_path / "elsewhere")
    else:
        (folder / ".lock.1").unlink()
        folder.rmdir()
    time.sleep(0.3)
    assert owner.lost
    with pytest.raises(RunDirectoryError, match=f"{folder} was removed or moved"):
        owner.check()
    owner.release()
    assert not folder.exists()


def test_a_file_system_that_does_not_answer_is_asked_again(tmp_path, owned, monkeypatch):
    owned.take()

    def fail(_):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(directory_lock, "_numbers", fail)
        owned.check()
    owned.check()


def test_another_folder_of_the_same_name_is_not_the_one_that_was_taken(tmp_path):
    """Its first lock has the same number."""
    folder = tmp_path / "run"
    folder.mkdir()
    first = Ownership(folder)
    first.take()
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    lock = leave(folder, number=1, host="elsewhere")
    with pytest.raises(RunDirectoryError, match=r"process .* on elsewhere .* took it over"):
        first.check()
    before = lock.read_bytes()
    first.release()
    assert lock.read_bytes() == before


def rank_that_loses_its_directory(rank, world_size, words):
    """A run whose directory another process takes over in step 2."""
    from training.trainer import Trainer

    take_step, directory_lock.SECONDS_BETWEEN_BEATS = Trainer._take_step, 0.01

    def take_step_and_lose(self, step, micro_batches):
        result = take_step(self, step, micro_batches)
        if rank == 0 and step == 2:
            leave(Path(self.config.run_dir), number=99)
            time.sleep(0.2)
        return result

    Trainer._take_step = take_step_and_lose
    return pretrain_gpt.main(words, os.environ)


def test_a_run_that_lost_its_directory_ends_and_saves_nothing(tmp_path):
    words = ["model=tiny", "model.num_layers=1", "data=sample", "data.tokenizer=bytes", "data.seq_length=32",
             "train.steps=20", "train.global_batch_size=2", "checkpoint.interval=19",
             f"out_dir={tmp_path}"]  # fmt: skip
    with pytest.raises(RunDirectoryError, match="no longer this run's"):
        run_ranks(2, rank_that_loses_its_directory, words, initialize=False)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 6


def rank_whose_directory_is_moved(rank, world_size, words):
    """A run whose directory somebody moves in step 3."""
    from training.trainer import Trainer

    take_step = Trainer._take_step

    def take_step_and_move(self, step, micro_batches):
        if step == 3:
            Path(self.config.run_dir).rename(f"{self.config.run_dir}-moved")
        return take_step(self, step, micro_batches)

    Trainer._take_step = take_step_and_move
    return pretrain_gpt.main(words, os.environ)


def test_a_run_whose_directory_is_moved_ends_and_makes_nothing_in_its_place(runs_folder):
    out_dir = runs_folder("moved")
    words = ["model=tiny", "model.num_layers=1", "data=sample", "data.tokenizer=bytes", "data.seq_length=32",
             "train.steps=20", "train.global_batch_size=2", "checkpoint.interval=5", f"out_dir={out_dir}"]  # fmt: skip
    with pytest.raises(RunDirectoryError, match=r"run was removed or moved") as ended:
        run_ranks(1, rank_whose_directory_is_moved, words, initialize=False)
    assert ended.value.exit_code == 73
    assert not (out_dir / "run").exists()
    lines = (out_dir / "run-moved" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_a_full_disk_leaves_no_lock_that_the_next_start_would_wait_for(tmp_path, owned, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    def open_full(path, *_, **__):
        path.touch(exist_ok=False)
        return Full()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        patch.setattr(Full, "close", lambda _: None)
        with pytest.raises(OSError, match="No space left"):
            owned.take()
    assert locks(tmp_path) == []
    owned.take()


def test_who_waits_for_a_lock_without_a_name_says_so(tmp_path, owned, capsys, monkeypatch):
    """Left by a host that lost its power while it wrote."""
    (tmp_path / ".lock.1").touch()
    monkeypatch.setattr(directory_lock, "SECONDS_UNTIL_DEAD", 0.2)
    monkeypatch.setattr(directory_lock, "SECONDS_BETWEEN_LOOKS", 0.05)
    owned.take()
    first, second = capsys.readouterr().err.splitlines()
    assert "up to 0 s to see whether a process that left no name lives" in first
    assert "is taken over from a process that left no name" in second
