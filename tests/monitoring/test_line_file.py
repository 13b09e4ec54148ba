"""Lines on a disk that fails: each is in the file once, in order, and none is lost before memory is."""

import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pretrain_gpt
from monitoring import line_file
from monitoring.line_file import LineFile
from runtime.errors import RunDirectoryError, StorageError
from verification.local_ranks import run_ranks

WORDS = ["model=tiny", "model.num_layers=1", "data=sample", "data.tokenizer=bytes", "data.seq_length=32",
         "train.global_batch_size=2", "checkpoint.interval=1", "log.sample_ids=true"]  # fmt: skip


class Disk:
    """Stands in for `os.write`: takes as many bytes as there is room for, then fails."""

    def __init__(self, monkeypatch):
        self.room = 10**9
        self._write = os.write
        monkeypatch.setattr(line_file.os, "write", self.write)

    def write(self, descriptor, content):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self._write(descriptor, bytes(content)[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def notes():
    return []


@pytest.fixture
def file(tmp_path, notes):
    made = LineFile(tmp_path / "lines", notes.append)
    made.open()
    return made


def test_a_line_that_is_cut_by_a_full_disk_goes_on_where_it_was_cut(file, disk, notes):
    file.append(b"first\n")
    disk.room = 3
    for line in (b"second\n", b"third\n"):
        file.append(line)
    assert file.path.read_bytes() == b"first\nsec"
    assert file.waiting == 2
    (said,) = notes
    assert said.startswith(f"{file.path} cannot be written: No space left on device; its lines wait in memory")
    disk.room = 10**9
    file.append(b"fourth\n")
    assert file.path.read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert file.close() is None


def test_a_failure_is_said_again_once_it_has_worked_in_between(file, disk, notes):
    for room in (0, 100, 0, 0):
        disk.room = room
        file.append(b"line\n")
    assert len(notes) == 2


@given(rooms=st.lists(st.integers(0, 12), max_size=30))
def test_every_line_is_there_once_and_in_order_whatever_the_disk_does(tmp_path_factory, rooms):
    with pytest.MonkeyPatch.context() as patched:
        disk = Disk(patched)
        file = LineFile(tmp_path_factory.mktemp("run") / "lines", lambda _: None)
        for number, room in enumerate(rooms):
            disk.room = room
            file.append(b"%d\n" % number)
        disk.room = 10**9
        assert file.write()
    assert file.path.exists() == bool(rooms)
    assert not rooms or file.path.read_bytes() == b"".join(b"%d\n" % number for number in range(len(rooms)))


def test_memory_is_bounded_and_lines_that_are_lost_are_counted(file, disk, monkeypatch):
    monkeypatch.setattr(line_file, "LARGEST_WAITING", 20)
    disk.room = 0
    for _ in range(5):
        file.append(b"8 bytes\n")
    assert (file.waiting, file.lost) == (2, 3)
    assert file.close() == f"{file.path} lacks 5 lines that could not be written: No space left on device"


def test_a_line_that_is_larger_than_the_bound_is_written_where_it_can_be(file, monkeypatch):
    monkeypatch.setattr(line_file, "LARGEST_WAITING", 3)
    file.append(b"8 bytes\n")
    assert file.path.read_bytes() == b"8 bytes\n"


def test_half_a_line_of_a_killed_writer_is_ended_once_there_is_room(tmp_path, disk, notes):
    (tmp_path / "lines").write_bytes(b'{"step"')
    file = LineFile(tmp_path / "lines", notes.append)
    file.open()
    assert (tmp_path / "lines").read_bytes() == b'{"step"'
    file.append(b"next\n")
    assert (tmp_path / "lines").read_bytes() == b'{"step"\nnext\n'


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_is_removed_or_replaced_is_noticed_at_the_next_line(file, disk, notes, replaced):
    disk.room = 10
    for line in (b"first\n", b"second\n"):
        file.append(line)
    file.path.rename(file.path.with_name("aside"))
    if replaced:
        file.path.write_bytes(b"of others")
    disk.room = 10**9
    for line in (b"third\n", b"fourth\n"):
        file.append(line)
    # What the file that is gone had of a line is no part of the new one.
    assert file.path.read_bytes() == (b"of others\n" if replaced else b"") + b"second\nthird\nfourth\n"
    assert [f"{file.path} was removed or replaced" in note for note in notes] == [False, True]


def test_a_folder_that_is_another_jobs_gets_no_new_file(tmp_path):
    def refuse():
        raise RunDirectoryError("gone")

    file = LineFile(tmp_path / "lines", lambda _: None, refuse)
    file.append(b"first\n")
    file.path.unlink()
    with pytest.raises(RunDirectoryError):
        file.append(b"second\n")
    assert file.close() is None
    assert list(tmp_path.iterdir()) == []


def rank_whose_disk_fills(rank, world_size, words, from_step, to_step, bound=line_file.LARGEST_WAITING):
    """A run under whose metrics and status the disk is full in some steps, and under its output all the time."""
    from runtime import files
    from training.trainer import Trainer

    take_step, write_line, write_whole = Trainer._take_step, os.write, files.write_whole
    full = []

    def refuse(*_):
        raise OSError(28, "No space left on device")

    def write(descriptor, content):
        return refuse() if full and descriptor > 2 else write_line(descriptor, content)

    def take_step_and_fill(self, step, micro_batches):
        full[:] = [True] if from_step <= step < to_step else []
        return take_step(self, step, micro_batches)

    always_full = os.open("/dev/full", os.O_WRONLY)
    for number in (1, 2):
        os.dup2(always_full, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    line_file.LARGEST_WAITING = bound
    Trainer._take_step, os.write = take_step_and_fill, write
    files.write_whole = lambda *arguments: refuse() if full else write_whole(*arguments)
    return pretrain_gpt.main(words, os.environ)


def run(out_dir, name, words, *disk):
    words = [*WORDS, f"out_dir={out_dir}", f"name={name}", *words]
    return run_ranks(1, rank_whose_disk_fills, words, *disk, initialize=False)


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_full_disk_under_the_metrics_ends_no_run_that_gets_room_again(runs_folder):
    out_dir = runs_folder("metrics")
    assert run(out_dir, "room", ["train.steps=6", "checkpoint.max_failures=9"], 2, 5) == [0]
    assert steps(out_dir / "room" / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert steps(out_dir / "room" / "samples.jsonl") == [1, 2, 3, 4, 5, 6]
    assert json.loads((out_dir / "room" / "status.json").read_text())["state"] == "completed"


@pytest.mark.parametrize(
    ("name", "words", "bound"),
    [
        # As too many saves in a row do that fail.
        ("lost", ["checkpoint.max_failures=2", "checkpoint.keep=9"], line_file.LARGEST_WAITING),
        ("bound", ["checkpoint.interval=99"], 800),
    ],
)
def test_metrics_that_stay_unwritten_stop_the_run_which_saves_and_says_how_many_are_lost(
    runs_folder, name, words, bound
):
    run_dir = runs_folder("metrics") / name
    with pytest.raises(StorageError, match=r"cannot write .*status\.json: No space left") as ended:
        run(run_dir.parent, name, ["train.steps=30", *words], 3, 99, bound)
    saved = max(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))
    assert 5 <= saved < 10
    lost = saved - max(steps(run_dir / "metrics.jsonl"))
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert f"{run_dir / file} lacks {lost} lines that could not be written" in str(ended.value)
