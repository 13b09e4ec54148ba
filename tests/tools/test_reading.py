"""A checkpoint is read of a run that trains: what it removes meanwhile is no damage, and the newest is read instead."""

import shutil
import time

import pytest
import torch
import torch.distributed as dist

from checkpoint import load
from checkpoint.load import load_checkpoint
from checkpoint.save import save_checkpoint
from runtime.errors import ConfigError, RemovedError, StorageError
from tools import reading
from tools.reading import read_run


@pytest.fixture
def run_dir(tmp_path):
    """A run with the checkpoint of step 1, whose weight is 1."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save(tmp_path, 1)
    yield tmp_path
    dist.destroy_process_group()


def save(run_dir, step):
    save_checkpoint(run_dir, step, {"weight": torch.full((4,), float(step))}, {}, keep=1)


def weight(path, manifest):
    value = torch.zeros(4)
    load_checkpoint(path, manifest, {"weight": value})
    return manifest.step, value.tolist()


def once(action, then):
    """`then`, and before its first call `action`."""
    calls = []

    def both(*arguments, **settings):
        calls.append(1)
        if len(calls) == 1:
            action()
        return then(*arguments, **settings)

    return both


@pytest.mark.parametrize("moment", ["_manifest_of", "verify_together", "load"])
def test_a_checkpoint_that_gives_way_to_the_next_is_not_missed(run_dir, monkeypatch, capsys, moment):
    began, read = time.monotonic(), weight
    if moment == "load":
        read = once(lambda: save(run_dir, 2), weight)
    else:
        monkeypatch.setattr(load, moment, once(lambda: save(run_dir, 2), getattr(load, moment)))
    assert read_run(run_dir, "auto", read) == (2, [2.0] * 4)
    assert time.monotonic() - began < 10, "nobody waits for what is gone"
    assert capsys.readouterr().err == "", "and nothing is called damaged"


def test_a_step_that_was_asked_for_and_is_removed_is_said_to_be_gone(run_dir):
    with pytest.raises(StorageError, match=r"no checkpoint of step 1 in .*; steps there: 2"):
        read_run(run_dir, "1", once(lambda: save(run_dir, 2), weight))


def test_a_step_that_is_saved_anew_meanwhile_is_read_anew(run_dir):
    def replace():
        save_checkpoint(run_dir, 1, {"weight": torch.full((4,), 9.0), "more": torch.zeros(1)}, {}, keep=1)

    assert read_run(run_dir, "auto", once(replace, weight)) == (1, [9.0] * 4)


def test_damage_is_not_read_again(run_dir):
    (file,) = (run_dir / "checkpoints" / "step_00000001").glob("*.safetensors")
    calls = []

    def read(path, manifest):
        calls.append(path)
        file.write_bytes(file.read_bytes()[:-1])
        return weight(path, manifest)

    with pytest.raises(StorageError, match=r"expected \d+ bytes, found"):
        read_run(run_dir, "auto", read)
    assert len(calls) == 1


def test_a_run_that_is_faster_than_its_reader_ends_the_reader(run_dir, monkeypatch):
    monkeypatch.setattr(reading, "MOST_READS", 3)
    steps = iter(range(2, 99))

    def read(path, manifest):
        save(run_dir, next(steps))
        return weight(path, manifest)

    with pytest.raises(StorageError, match=r"removes its checkpoints faster than they can be read; .*checkpoint.keep"):
        read_run(run_dir, "auto", read)
    assert next(steps) == 5


def test_what_is_gone_is_not_waited_for(run_dir):
    path = run_dir / "checkpoints" / "step_00000001"
    manifest = load.read_manifest(path)
    shutil.rmtree(path)
    with pytest.raises(RemovedError, match="its run has removed it"):
        weight(path, manifest)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        read_run(run_dir, "auto", weight)
