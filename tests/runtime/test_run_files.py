"""What stands in a run directory in the place of a file or folder: refused or replaced at once, never waited for."""

import os
import threading
from pathlib import Path

import pytest

import pretrain_gpt
from runtime.errors import ConfigError, StorageError
from runtime.run_files import require_folder, require_regular, require_writable
from settings.config import CheckpointConfig, RunConfig
from training.resume import go_back
from training.run import _take_directory
from verification.local_ranks import run_ranks


def start(out_dir, resume="auto"):
    """Begins a run in `out_dir`; fails the test where that takes as long as the opening of a FIFO."""
    outcome = []

    def begin():
        try:
            config = RunConfig(out_dir=str(out_dir), checkpoint=CheckpointConfig(resume=resume))
            outcome.append(_take_directory(config, []))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=begin, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome, "the start hangs"
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    recorder, _ = outcome[0]
    recorder.close("failed", 0, "ended by the test")


@pytest.mark.parametrize(
    "name", ["status.json", "metrics.jsonl", "samples.jsonl", "config.yaml", ".lock.7", "checkpoints/gone_back_to"]
)
def test_a_fifo_that_a_start_would_read_is_refused_by_name(tmp_path: Path, name: str):
    fifo = tmp_path / "run" / name
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    os.mkfifo(fifo)
    with pytest.raises(StorageError, match=name) as caught:
        start(tmp_path, resume="3")
    assert "regular file" in str(caught.value)
    fifo.unlink()
    start(tmp_path, resume="3")


@pytest.mark.parametrize("name", ["environment.json", "overrides.txt", "tokenizer.json"])
def test_a_fifo_where_a_start_only_writes_is_replaced_or_let_be(tmp_path: Path, name: str):
    fifo = tmp_path / "run" / name
    fifo.parent.mkdir()
    os.mkfifo(fifo)
    start(tmp_path)
    assert fifo.is_file() == (name != "tokenizer.json")  # which is written once there is data


def test_a_fifo_in_the_place_of_latest_is_replaced(tmp_path: Path):
    (tmp_path / "step_00000003").mkdir()
    os.mkfifo(tmp_path / "latest")
    go_back(tmp_path, 3)
    assert (tmp_path / "latest").read_text() == "step_00000003\n"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_said(tmp_path: Path, make):
    require_regular(tmp_path / "absent")
    require_regular(Path(__file__))
    make(tmp_path / "file")
    with pytest.raises(StorageError, match=r"file is a \w+.*, where a regular file belongs; remove it"):
        require_regular(tmp_path / "file")


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_folder_that_cannot_be_one_is_found_before_the_first_step(tmp_path: Path, name: str):
    place = tmp_path / "run" / name
    place.parent.mkdir()
    place.symlink_to(tmp_path / "unmounted")
    with pytest.raises(StorageError, match=rf"{name} is a link to {tmp_path}/unmounted, which is not there; mount it"):
        start(tmp_path)
    (tmp_path / "unmounted").mkdir()
    start(tmp_path)
    place.unlink()
    place.touch()
    with pytest.raises(ConfigError, match=rf"{name} is no directory, and the run needs one there; remove it"):
        start(tmp_path)
    place.unlink()
    place.symlink_to("/proc/self")  # which takes no file, whoever asks
    with pytest.raises(StorageError, match=rf"cannot write in {place}"):
        start(tmp_path)


def test_looking_makes_nothing(tmp_path: Path):
    for name in ("absent", "there"):
        require_folder(tmp_path / name)
        require_writable(tmp_path / name)
        assert list((tmp_path).rglob("*")) == ([] if name == "absent" else [tmp_path / "there"])
        (tmp_path / "there").mkdir(exist_ok=True)


def one_rank(rank, world_size, words):
    try:
        pretrain_gpt.main(words, os.environ)
    except StorageError as error:
        return str(error)


def test_all_ranks_say_alike_that_checkpoints_lead_nowhere(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("nowhere")
    words = ["model=tiny", "data=sample", "data.tokenizer=bytes", f"out_dir={tmp_path}"]
    said = run_ranks(2, one_rank, words, initialize=False)
    assert said[0] == said[1]
    assert "checkpoints is a link to nowhere, which is not there" in said[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock.1", "checkpoints"]
