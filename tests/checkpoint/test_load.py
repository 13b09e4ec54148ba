"""Checkpoints: every layout loads every other, bit for bit; a failure leaves what stood before; damage is refused."""

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from checkpoint import manifest as manifest_module
from checkpoint import tensor_files
from checkpoint.directory import step_directories
from checkpoint.load import choose_checkpoint, load_checkpoint
from checkpoint.manifest import read_manifest, verify
from checkpoint.save import save_checkpoint
from runtime.errors import StorageError
from verification.local_ranks import RankError, run_ranks

# name -> (world size, mesh shape, mesh dimensions); rows are sharded over dp_shard and tp, in uneven parts.
LAYOUTS = {
    "plain": (1, (), ()),
    "shard1": (1, (1,), ("dp_shard",)),
    "shard2": (2, (2,), ("dp_shard",)),
    "shard4": (4, (4,), ("dp_shard",)),
    "hybrid": (4, (2, 2), ("dp_replicate", "dp_shard")),
    "shard2_tp2": (4, (2, 2), ("dp_shard", "tp")),
}
SHAPES = {"matrix": (7, 6), "row": (1, 3), "vector": (5,), "cube": (3, 2, 4)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Parameters(torch.nn.Module):
    def __init__(self, dtype, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(value))


def _parameters_and_moments(layout, seed):
    """Parameters and AdamW state after two steps, in the given layout."""
    _, sizes, dimensions = LAYOUTS[layout]
    model = torch.nn.ModuleList(Parameters(dtype, seed) for dtype in DTYPES)
    if dimensions:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=dimensions)
        for module in model:
            if "tp" in dimensions:
                for name, parameter in list(module.named_parameters()):
                    placement = {"matrix": Shard(0), "cube": Shard(2)}.get(name, Replicate())
                    sharded = distribute_tensor(parameter.detach(), mesh["tp"], [placement], src_data_rank=None)
                    setattr(module, name, torch.nn.Parameter(sharded))
            fully_shard(module, mesh=mesh["dp_shard"] if "tp" in dimensions else mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _full(tensors):
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def _save_layout(rank, world_size, layout, run_dir):
    tensors = _parameters_and_moments(layout, seed=1)
    tensors["empty"] = torch.empty(0, 3)
    tensors["counter"] = torch.tensor(7, dtype=torch.int64)
    path = save_checkpoint(run_dir, 100, tensors, {"consumed_samples": 3}, keep=2)
    return path, _full(tensors)


def _load_layout(rank, world_size, layout, paths):
    results = {}
    for saved_as, path in paths.items():
        tensors = _parameters_and_moments(layout, seed=2)
        tensors["empty"] = torch.empty(0, 3)
        tensors["counter"] = torch.tensor(0, dtype=torch.int64)
        load_checkpoint(path, read_manifest(path), tensors)
        results[saved_as] = _full(tensors)
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """layout -> (checkpoint directory, full tensors as they were saved)"""
    root = tmp_path_factory.mktemp("layouts")
    return {name: run_ranks(world, _save_layout, name, root / name)[0] for name, (world, _, _) in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_every_other_bit_for_bit(saved, layout):
    for results in run_ranks(
        LAYOUTS[layout][0], _load_layout, layout, {name: path for name, (path, _) in saved.items()}
    ):
        for saved_as, (_, expected) in saved.items():
            found = results[saved_as]
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), f"{saved_as} loaded as {layout}: {name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_plain_safetensors_and_hold_each_element_once(saved, layout):
    path, expected = saved[layout]
    manifest = read_manifest(path)
    verify(path, manifest, "full")
    assert (manifest.step, manifest.state) == (100, {"consumed_samples": 3})
    assert {file.name for file in path.iterdir()} == {*manifest.files, "manifest.json"}
    for name, entry in manifest.files.items():
        content = (path / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.sha256
        (length,) = struct.unpack_from("<Q", content)
        for key, value in json.loads(content[8 : 8 + length]).items():
            item_size = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2}.get(value.get("dtype"), 1)
            assert key == "__metadata__" or value["data_offsets"][0] % item_size == 0, "not aligned"
    for name, tensor in expected.items():
        whole, times = torch.zeros_like(tensor), torch.zeros(tensor.shape)
        for chunk in manifest.tensors[name].chunks:
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.lengths, strict=True))
            with safe_open(path / chunk.file, framework="pt") as file:
                whole[box] = file.get_tensor(chunk.key)
            times[box] += 1
            assert 0 not in chunk.lengths or tensor.numel() == 0
        assert torch.equal(whole, tensor)
        assert (times == 1).all()


def test_ranks_share_the_writing_of_replicated_tensors(saved):
    sizes = [file.size for file in read_manifest(saved["hybrid"][0]).files.values()]
    assert len(sizes) == 4
    assert max(sizes) < sum(sizes) / 2


def _save_one_row(rank, world_size, run_dir):
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp_shard",))
    row = distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])
    return save_checkpoint(run_dir, 1, {"row": row}, {}, keep=1)


def test_a_rank_without_anything_to_write_writes_no_file(tmp_path):
    path = run_ranks(2, _save_one_row, tmp_path)[1]
    assert list(read_manifest(path).files) == ["rank_00000.safetensors"]


def _save_and_swap_layers(rank, world_size, run_dir):
    """As pipeline stages do: each rank holds layers of its own, and another layout asks for others."""
    path = save_checkpoint(run_dir, 1, {f"layers.{rank}": torch.full((2,), float(rank))}, {}, keep=1)
    manifest = read_manifest(path)
    other = {f"layers.{1 - rank}": torch.zeros(2)}
    load_checkpoint(path, manifest, other)
    message = ""
    try:
        load_checkpoint(path, manifest, {"layers.7": torch.zeros(2)} if rank == 1 else other)
    except StorageError as error:
        message = str(error)
    return other[f"layers.{1 - rank}"].tolist(), message


def test_ranks_may_save_and_load_different_tensors_and_fail_together(tmp_path):
    results = run_ranks(2, _save_and_swap_layers, tmp_path)
    assert [values for values, _ in results] == [[1.0, 1.0], [0.0, 0.0]]
    assert all("rank 1: " in message and "layers.7 is not in it" in message for _, message in results)


def test_looking_for_checkpoints_disturbs_no_save(tmp_path, one_rank):
    temporary = _save(tmp_path, 10).with_name("step_00000020.tmp-deadbeef")
    temporary.mkdir()
    choose_checkpoint(tmp_path, "auto", "auto")
    assert temporary.exists()


def test_numbers_are_cast_to_the_wanted_dtype(saved, one_rank):
    path, expected = saved["shard4"]
    wanted = torch.empty(7, 6, dtype=torch.float64)
    load_checkpoint(path, read_manifest(path), {"model.0.matrix": wanted})
    assert torch.equal(wanted, expected["model.0.matrix"].double())


# What follows needs no layout: one process is its own group of one rank.


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _tensors(value):
    return {"weight": torch.full((64, 4), float(value)), "step": torch.tensor(float(value))}


def _save(run_dir, step, keep=10, value=None):
    return save_checkpoint(run_dir, step, _tensors(step if value is None else value), {"value": value}, keep)


def _complete(run_dir):
    """The complete checkpoints of a run, newest first."""
    return [path for _, path in step_directories(run_dir / "checkpoints") if (path / "manifest.json").is_file()]


def _names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_newest_are_kept_and_latest_names_the_last(tmp_path, one_rank):
    for step in (5, 10, 123_456_789):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == ["latest", "step_00000010", "step_123456789"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_123456789\n"
    assert [path.name for path in _complete(tmp_path)] == ["step_123456789", "step_00000010"]


def test_a_save_leaves_later_steps_alone(tmp_path, one_rank):
    for step in (10, 20, 30):
        _save(tmp_path, step)
    _save(tmp_path, 25, keep=1)
    assert [path.name for path in _complete(tmp_path)] == ["step_00000030", "step_00000025"]


def test_leftovers_are_removed(tmp_path, one_rank):
    leftover = tmp_path / "checkpoints" / "step_00000009.tmp-deadbeef"
    leftover.mkdir(parents=True)
    (leftover / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / "latest.tmp-deadbeef").write_bytes(b"")
    assert _complete(tmp_path) == []
    _save(tmp_path, 10)
    assert _names(tmp_path) == ["latest", "step_00000010"]


def test_the_same_step_is_replaced(tmp_path, one_rank):
    _save(tmp_path, 10, value=1)
    _save(tmp_path, 10, value=2)
    assert _names(tmp_path) == ["latest", "step_00000010"]
    path, manifest = choose_checkpoint(tmp_path, "auto", "full")
    assert manifest.state == {"value": 2}
    tensors = _tensors(0)
    load_checkpoint(path, manifest, tensors)
    assert tensors["step"].item() == 2


def test_a_checkpoint_set_aside_counts_until_it_is_replaced(tmp_path, one_rank, monkeypatch):
    path = _save(tmp_path, 10)
    path.rename(path.with_name("step_00000010.replaced"))

    def fail(descriptor):
        raise OSError(errno.EIO, "bad disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="bad disk"):
            _save(tmp_path, 10)
    assert choose_checkpoint(tmp_path, "auto", "full")[1].step == 10
    _save(tmp_path, 10)
    assert _names(tmp_path) == ["latest", "step_00000010"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_a_state_that_is_no_finite_json_is_refused(tmp_path, one_rank, value):
    with pytest.raises(RuntimeError, match=r"rank 0: (ValueError|TypeError)"):
        save_checkpoint(tmp_path, 1, _tensors(1), {"loss": value}, keep=1)
    assert _complete(tmp_path) == []


def test_a_dtype_without_a_name_is_refused(tmp_path, one_rank):
    with pytest.raises(RuntimeError, match="phase is no tensor of a dtype"):
        save_checkpoint(tmp_path, 1, {"phase": torch.zeros(2, dtype=torch.complex64)}, {}, keep=1)


def test_choosing(tmp_path, one_rank):
    assert choose_checkpoint(tmp_path, "auto", "auto") is None
    for step in (10, 20):
        _save(tmp_path, step)
    assert choose_checkpoint(tmp_path, "auto", "auto")[1].step == 20
    assert choose_checkpoint(tmp_path, "10", "auto")[1].step == 10
    with pytest.raises(StorageError, match=r"no checkpoint of step 15 in .*; steps there: 20, 10"):
        choose_checkpoint(tmp_path, "15", "auto")


def _truncate(path):
    with (path / "rank_00000.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def _flip_bit(path):
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _remove(path):
    (path / "rank_00000.safetensors").unlink()


def _garble_manifest(path):
    (path / "manifest.json").write_bytes(b"\x00{not json")


def _remove_manifest(path):
    (path / "manifest.json").unlink()


DAMAGES = {
    _truncate: r"rank_00000.safetensors: expected \d+ bytes, found \d+",
    _flip_bit: r"rank_00000.safetensors: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}",
    _remove: r"rank_00000.safetensors: is missing",
    _garble_manifest: r"manifest.json: not a valid manifest",
    _remove_manifest: r"manifest.json: is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(tmp_path, one_rank, capsys, damage):
    _save(tmp_path, 10)
    damage(_save(tmp_path, 20))
    assert choose_checkpoint(tmp_path, "auto", "auto")[1].step == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("checkpoint step_00000020 is damaged and passed over: ")
    with pytest.raises(StorageError, match=DAMAGES[damage]):
        choose_checkpoint(tmp_path, "20", "auto")
    damage(tmp_path / "checkpoints" / "step_00000010")
    with pytest.raises(StorageError, match=r"no valid checkpoint [^$]*step_00000020: .*\n  step_00000010: ") as caught:
        choose_checkpoint(tmp_path, "auto", "auto")
    assert caught.value.exit_code == 74


def test_what_cannot_be_read_now_is_no_reason_to_go_back(tmp_path, one_rank, monkeypatch):
    for step in (10, 20):
        _save(tmp_path, step)

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(manifest_module, "sha256_of", fail)
    with pytest.raises(StorageError, match="cannot be read: Input/output error"):
        choose_checkpoint(tmp_path, "auto", "full", owned=True)
    assert _names(tmp_path) == ["latest", "step_00000010", "step_00000020"]


def test_sizes_look_at_lengths_only_and_off_at_nothing(tmp_path, one_rank):
    path = _save(tmp_path, 10)
    _flip_bit(path)
    verify(path, read_manifest(path), "sizes")
    with pytest.raises(StorageError, match="sha256"):
        verify(path, read_manifest(path), "full")
    _truncate(path)
    verify(path, read_manifest(path), "off")
    with pytest.raises(StorageError, match="bytes"):
        verify(path, read_manifest(path), "sizes")


@pytest.mark.parametrize("damage", [_truncate, _remove])
def test_loading_unverified_damage_is_a_storage_error(tmp_path, one_rank, damage):
    path = _save(tmp_path, 10)
    manifest = read_manifest(path)
    damage(path)
    with pytest.raises(StorageError, match=r"rank_00000\.safetensors"):
        load_checkpoint(path, manifest, _tensors(0))


def test_what_does_not_fit_is_named(tmp_path, one_rank):
    path = _save(tmp_path, 10)
    wanted = {"weight": torch.zeros(64, 5), "step": torch.zeros(()), "other": torch.zeros(1)}
    with pytest.raises(StorageError, match=r"weight has shape \[64, 4\], wanted is \[64, 5\]; other is not in it"):
        load_checkpoint(path, read_manifest(path), wanted)


# Failures and deaths in the middle of a save.


def _storage_fails_on(rank, failing_rank, tensors, run_dir):
    """Save on a full disk, then on one that has room again; returns what the first try raised."""
    fsync = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == failing_rank:
        tensor_files.os.fsync = full
    try:
        save_checkpoint(run_dir, 20, tensors, {}, keep=2)
    except StorageError as error:
        message = str(error)
    dist.barrier()
    before = _names(run_dir)
    dist.barrier()
    tensor_files.os.fsync = fsync
    save_checkpoint(run_dir, 30, tensors, {}, keep=2)
    return message, before


def _disk_full(rank, world_size, failing_rank, run_dir):
    tensors = _parameters_and_moments("shard2", seed=1)
    save_checkpoint(run_dir, 10, tensors, {}, keep=2)
    return _storage_fails_on(rank, failing_rank, tensors, run_dir)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path, failing_rank):
    for message, names in run_ranks(2, _disk_full, failing_rank, tmp_path, timeout=60):
        assert f"step_00000020: rank {failing_rank}: [Errno 28] No space left on device" in message
        assert names == ["latest", "step_00000010"]
    assert _names(tmp_path) == ["latest", "step_00000010", "step_00000030"]


def _peer_is_killed(rank, world_size, run_dir):
    tensors = _parameters_and_moments("shard2", seed=1)
    save_checkpoint(run_dir, 10, tensors, {}, keep=2)
    if rank == 1:
        tensor_files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    save_checkpoint(run_dir, 20, tensors, {}, keep=2)


def test_a_rank_killed_in_a_save_leaves_the_previous_checkpoint(tmp_path, one_rank):
    with pytest.raises((RankError, RuntimeError)):
        run_ranks(2, _peer_is_killed, tmp_path, timeout=60)
    assert [path.name for path in _complete(tmp_path)] == ["step_00000010"]
    assert choose_checkpoint(tmp_path, "auto", "full")[1].step == 10


def _die_at(rank, world_size, operation, step, run_dir):
    """Save, dying before the given file system operation; returns how many there were where that is never reached."""
    counter = itertools.count()

    def counted(function):
        def call(*arguments, **options):
            if next(counter) == operation:
                os._exit(9)
            return function(*arguments, **options)

        return call

    tensor_files.os.fsync = counted(os.fsync)
    os.rename = counted(os.rename)
    os.replace = counted(os.replace)
    shutil.rmtree = counted(shutil.rmtree)
    save_checkpoint(run_dir, step, _tensors(2), {"value": 2}, keep=1)
    return next(counter)


@pytest.mark.parametrize("step", [10, 20])
def test_a_death_at_any_moment_leaves_a_valid_checkpoint(tmp_path, one_rank, step):
    """Over the same step, and over an earlier one that is removed afterwards."""
    values = []
    for operation in itertools.count():
        run_dir = tmp_path / str(operation)
        _save(run_dir, 10, value=1)
        try:
            run_ranks(1, _die_at, operation, step, run_dir)
        except RankError:
            path, manifest = choose_checkpoint(run_dir, "auto", "full")
            tensors = _tensors(0)
            load_checkpoint(path, manifest, tensors)
            assert tensors["step"].item() == manifest.state["value"]
            values.append(manifest.state["value"])
            _save(run_dir, step + 1, keep=1)
            assert _names(run_dir) == ["latest", f"step_{step + 1:08d}"]
        else:
            break
    assert operation >= 9
    assert values == sorted(values)
    assert set(values) == {1, 2}


def test_manifest_is_what_the_documents_say(tmp_path, one_rank):
    document = json.loads((_save(tmp_path, 10, value=3) / "manifest.json").read_bytes())
    assert document["format"] == 1
    assert document["step"] == 10
    assert document["state"] == {"value": 3}
    size = Path(tmp_path, "checkpoints", "step_00000010", "rank_00000.safetensors").stat().st_size
    assert document["files"]["rank_00000.safetensors"]["bytes"] == size
    assert document["tensors"]["weight"] == {
        "dtype": "F32",
        "shape": [64, 4],
        "chunks": [{"file": "rank_00000.safetensors", "key": "weight", "offsets": [0, 0], "lengths": [64, 4]}],
    }
