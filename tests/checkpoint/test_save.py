"""Saving beside training: values may change at once, one save at a time, failures surface, the right ones are kept."""

import errno
import shutil
import threading
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist

from checkpoint import tensor_files
from checkpoint.directory import Retention
from checkpoint.load import choose_checkpoint, load_checkpoint, verify_together
from checkpoint.manifest import Manifest, TensorEntry, read_manifest
from checkpoint.plan import claims, share_out
from checkpoint.save import CheckpointSaver, save_checkpoint
from checkpoint.tensor_files import read_parts, write_parts
from checkpoint.writer import CheckpointWriter
from parallel.sharding import Box, TensorPart
from runtime.errors import DamageError, RunDirectoryError, StorageError
from runtime.fault_injection import Faults
from verification.local_ranks import run_ranks

ROWS = 10


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loaded(run_dir):
    path, manifest = choose_checkpoint(run_dir, "auto", "full")
    tensor = torch.zeros(ROWS, 4)
    load_checkpoint(path, manifest, {"weight": tensor})
    return manifest.step, tensor


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path, one_rank, monkeypatch):
    may_write, write = threading.Event(), tensor_files.os.fsync
    monkeypatch.setattr(tensor_files.os, "fsync", lambda descriptor: may_write.wait(10) and write(descriptor))
    saver = CheckpointSaver(tmp_path, Retention(2), asynchronous=True)
    weight = torch.full((ROWS, 4), 1.0)
    for step in (1, 2):
        saver.save(step, {"weight": weight}, {})
        weight += 1
        assert saver.ended() is None or may_write.is_set()
        may_write.set()
        ended = saver.ended(wait=True)
        assert (ended.step, ended.error) == (step, None)
        assert saver.ended() is None, "said once"
        found, tensor = loaded(tmp_path)
        assert found == step
        assert torch.equal(tensor, weight - 1)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_says_so_and_leaves_nothing(tmp_path, one_rank, asynchronous):
    faults = Faults(0, {"KILOTRON_FAULT": "step=2,phase=checkpoint.manifest,action=enospc"})
    saver = CheckpointSaver(tmp_path, Retention(5), asynchronous=asynchronous, faults=faults)
    errors = []
    for step in (1, 2, 3):
        saver.save(step, {"weight": torch.ones(ROWS, 4)}, {})
        errors.append(saver.ended(wait=True).error)
        assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.tmp*")) == []
    assert [type(error) for error in errors] == [type(None), StorageError, type(None)]
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("asked", range(4))
@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_owner_that_was_succeeded_publishes_and_removes_nothing(tmp_path, one_rank, asynchronous, asked):
    """Whenever it is succeeded: before it tidies, before it renames, before `latest`, or before it prunes."""
    save_checkpoint(tmp_path, 1, {"weight": torch.ones(ROWS, 4)}, {}, keep=1)
    others = tmp_path / "checkpoints" / "step_00000009.tmp-of-the-new-owner"
    others.mkdir()
    times = iter(range(100))

    def require_owner():
        if next(times) >= asked:
            raise RunDirectoryError("another job took it over")

    saver = CheckpointSaver(tmp_path, Retention(1), asynchronous=asynchronous, require_owner=require_owner)
    if asked:
        others.rmdir()  # a save that may begin tidies up
    saver.save(2, {"weight": torch.zeros(ROWS, 4)}, {})
    error = saver.ended(wait=True).error
    assert isinstance(error, RunDirectoryError)
    assert "another job took it over" in str(error)
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir(), "nothing is pruned"
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_0000000{2 if asked == 3 else 1}\n"
    assert (tmp_path / "checkpoints" / "step_00000002").exists() == (asked >= 2)
    assert others.exists() == (asked == 0)


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, one_rank, monkeypatch):
    usage = namedtuple("usage", "total used free")
    tensors = {"weight": torch.ones(ROWS, 4)}
    save_checkpoint(tmp_path, 1, tensors, {}, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, ROWS * 16 - 1))
    saver = CheckpointSaver(tmp_path, Retention(1))
    with pytest.raises(StorageError, match=r"a checkpoint takes 0.00 GB, and 0.00 GB are free"):
        saver.require_space(tensors)
    saver.save(2, tensors, {})
    assert str(errno.ENOSPC) in str(saver.ended().error)
    assert names(tmp_path) == ["step_00000001"]


def test_the_newest_every_nth_and_the_best_are_kept(tmp_path, one_rank):
    saver = CheckpointSaver(tmp_path, Retention(last=1, every=4, best=True))
    for step, loss in enumerate([5.0, None, 2.0, 4.0, 3.0, None, 3.5], start=1):
        saver.save(step, {"weight": torch.ones(1)}, {"eval_loss": loss})
        assert saver.ended().error is None
    assert names(tmp_path) == ["step_00000003", "step_00000004", "step_00000007"]
    saver.save(8, {"weight": torch.ones(1)}, {"eval_loss": 1.0})
    assert names(tmp_path) == ["step_00000004", "step_00000008"]


def hashed_by_each(rank, world_size, run_dir, mode, needed):
    from checkpoint import load

    hashed, compare = [], load.compare_hashes
    load.compare_hashes = lambda path, manifest, files: hashed.extend(files) or compare(path, manifest, files)
    load.AUTO_HASHES_UP_TO = 100
    tensors = {f"layers.{rank}": torch.ones(50) * rank}
    path = save_checkpoint(run_dir, 1, tensors, {}, keep=1)
    manifest = read_manifest(path)
    try:
        verify_together(path, manifest, mode, lambda _: needed[rank])
        dist.barrier()
        if rank == 0:
            with (path / "rank_00001.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")
        dist.barrier()
        verify_together(path, manifest, mode, lambda _: needed[rank])
    except DamageError as error:
        return hashed, str(error)
    return hashed, None


def test_ranks_share_the_hashing_and_find_damage_together(tmp_path):
    everything = [[f"rank_{rank:05d}.safetensors" for rank in range(3)]] * 3
    found = run_ranks(3, hashed_by_each, tmp_path, "full", everything)
    assert sorted(file for hashed, _ in found for file in hashed) == sorted(2 * everything[0]), "each file once a time"
    assert all("rank_00001.safetensors: expected sha256" in error for _, error in found)


def test_of_a_large_checkpoint_a_node_hashes_what_it_reads(tmp_path):
    files = [f"rank_{rank:05d}.safetensors" for rank in range(3)]
    found = run_ranks(3, hashed_by_each, tmp_path, "auto", [files[:1], [], files[:1]])
    assert [file for hashed, _ in found for file in hashed] == 2 * files[:1]
    assert all(error is None for _, error in found), "what nobody reads is compared by its length"
    found = run_ranks(3, hashed_by_each, tmp_path, "sizes", [files] * 3)
    assert [hashed for hashed, _ in found] == [[], [], []]


def test_a_rank_of_a_thousand_opens_the_files_that_it_needs(tmp_path, monkeypatch):
    """The files of 1,000 ranks that share the rows of each matrix, written by one process."""
    ranks, rows, width = 1000, 3000, 2
    whole = {f"layers.{layer}": torch.randn(rows, width) for layer in range(3)}

    def part(tensor, offset, length):
        return TensorPart(tensor[offset : offset + length], Box((offset, 0), (length, width)), tuple(tensor.shape))

    def shards(rank, world):
        share = rows // world
        return {name: part(tensor, rank * share, share) for name, tensor in whole.items()}

    claimed = [claims(shards(rank, ranks)) for rank in range(ranks)]
    entries = {claim.name: TensorEntry(claim.dtype, claim.shape, ()) for claim in claimed[0]}
    writer = CheckpointWriter(tmp_path, Manifest(7, {}, {}, entries), Retention(1))
    folder, wrote = writer.begin(0), []
    monkeypatch.setattr(tensor_files.os, "fsync", lambda _: None)
    for rank, shared in enumerate(share_out(claimed)):
        own = shards(rank, ranks)
        wrote.append(write_parts(folder / f"rank_{rank:05d}.safetensors", {name: own[name] for name in shared}))
    writer.finish(wrote)
    manifest = read_manifest(writer.target)
    assert len(manifest.files) == ranks

    opened, open_file = [], tensor_files.SafetensorsFile

    def counted(path, size):
        opened.append(path.name)
        return open_file(path, size)

    monkeypatch.setattr(tensor_files, "SafetensorsFile", counted)
    for world, rank, most in ((1000, 17, 1), (500, 3, 2), (600, 1, 3), (8, 5, 126), (1, 0, 1000)):
        opened.clear()
        wanted = {
            name: TensorPart(torch.zeros_like(part.values), part.box, part.shape)
            for name, part in shards(rank, world).items()
        }
        read_parts(writer.target, manifest, wanted)
        assert len(opened) == len(set(opened)) <= most
        for name, found in wanted.items():
            assert torch.equal(found.values, shards(rank, world)[name].values)
