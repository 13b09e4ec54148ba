"""Storage for torch's distributed checkpoints: one safetensors file a rank, written as a stream, read by mapped ranges.

torch.distributed.checkpoint plans who writes and who reads which part of a tensor; the bytes are ours.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from data.files import sync, write_whole
from training.errors import StorageError
from training.manifest import DTYPES, MANIFEST_NAME, Chunk, FileEntry, Manifest, TensorEntry, encode_manifest

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, attribute) for name, attribute in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
TEMPORARY = ".tmp-"
REPLACED = ".replaced"


def step_directories(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint under `directory`, complete or not, newest first; [] where it is missing.

    One that was set aside for another of the same step counts until that one is there.
    """
    if not directory.is_dir():
        return []
    names = {path.name for path in directory.iterdir() if path.is_dir()}
    matches = [match for name in names if (match := re.fullmatch(rf"(step_(\d{{8,}}))({re.escape(REPLACED)})?", name))]
    found = [(int(match[2]), directory / match[0]) for match in matches if not match[3] or match[1] not in names]
    return sorted(found, reverse=True)


def tidy(directory: Path) -> None:
    """Remove what interrupted saves left under `directory`. Only for the run that saves there."""
    replaced = [path for path in directory.glob(f"step_*{REPLACED}") if path.with_suffix("").exists()]
    for path in [*replaced, *directory.glob("*.tmp*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class _OneCheckpoint:
    """What torch asks of storage that could be sent from checkpoint to checkpoint; ours is made for one."""

    @classmethod
    def validate_checkpoint_id(cls, *_: Any) -> bool:
        return True

    def reset(self, *_: Any) -> None:
        pass


class CheckpointWriter(_OneCheckpoint, StorageWriter):
    """Writes `<directory>/step_XXXXXXXX` so that it is either complete or invisible, then keeps the newest `keep`.

    Every rank streams its share into a file of a temporary directory; the coordinator writes the manifest last, renames
    the directory, points `latest` to it, and removes older checkpoints, and those of later steps, whose course the run
    has left. Methods raise OSError where storage fails; torch.distributed.checkpoint carries that to every rank.
    """

    def __init__(self, directory: Path, manifest: Manifest, keep: int) -> None:
        """`manifest` says step and state, and nothing of files and tensors yet."""
        self.target = directory / f"step_{manifest.step:08d}"
        self._directory = directory
        self._manifest = manifest
        self._keep = keep

    def set_up_storage_writer(self, *_: Any, **__: Any) -> None:
        """Refuse a state that is not finite JSON before a byte is written. Raises ValueError or TypeError."""
        encode_manifest(self._manifest)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave out empty shards: several may claim one place, and a rank that has nothing else writes no file.

        Raises TypeError for what is no tensor, or of a dtype that safetensors files cannot hold.
        """
        items = []
        for item in plan.items:
            data = item.tensor_data
            if data is None or data.properties.dtype not in DTYPE_NAMES:
                raise TypeError(f"{item.index.fqn} is no tensor of a dtype that a checkpoint can hold")
            if 0 not in data.chunk.sizes or 0 in data.size:
                items.append(item)
        return dataclasses.replace(plan, items=items)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the temporary directory, on the coordinator, and tell every rank its name."""
        self._directory.mkdir(parents=True, exist_ok=True)
        tidy(self._directory)
        temporary = _temporary_name(self.target)
        temporary.mkdir()
        return [dataclasses.replace(plan, storage_data=temporary.name) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, where it has anything to write, and make it durable."""
        self._temporary = self._directory / plan.storage_data
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write_file(plan, planner) if plan.items else [])
        return future

    def _write_file(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"rank_{dist.get_rank():05d}.safetensors"
        tensors = [(item.index, cast(torch.Tensor, planner.resolve_data(item))) for item in plan.items]
        # Widest numbers first: then each tensor starts at a multiple of its own item size.
        tensors.sort(key=lambda entry: entry[1].dtype.itemsize, reverse=True)
        keys, header, size = safetensors_layout([(at.fqn, tensor.dtype, tuple(tensor.shape)) for at, tensor in tensors])
        digest = hashlib.sha256(header)
        with (self._temporary / name).open("xb") as file:
            file.write(header)
            for _, tensor in tensors:
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                digest.update(content)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        entry = FileEntry(size, digest.hexdigest())
        return [
            WriteResult(at, tensor.nbytes, (Chunk(name, key, tuple(at.offset or ()), tuple(tensor.shape)), entry))
            for key, (at, tensor) in zip(keys, tensors, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest, make the checkpoint visible and remove those that are not to be kept."""
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        files: dict[str, FileEntry] = {}
        for result in [result for written in results for result in written]:
            chunk, files[chunk.file] = result.storage_data
            chunks[result.index.fqn].append(chunk)
        tensors = {
            name: TensorEntry(DTYPE_NAMES[entry.properties.dtype], tuple(entry.size), tuple(chunks[name]))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        manifest = dataclasses.replace(self._manifest, files=files, tensors=tensors)
        write_whole(self._temporary / MANIFEST_NAME, encode_manifest(manifest))
        replaced = self.target.with_name(self.target.name + REPLACED)
        if self.target.exists():
            self.target.rename(replaced)
        self._temporary.rename(self.target)
        sync(self._directory)
        sync(self._directory.parent)
        write_whole(self._directory / "latest", f"{self.target.name}\n".encode())
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_others()

    def _remove_others(self) -> None:
        found = step_directories(self._directory)
        complete = [path for step, path in found if step <= self._manifest.step and (path / MANIFEST_NAME).is_file()]
        for _, path in found:
            if path not in complete[: self._keep]:
                # Renamed first, so that a checkpoint that is half removed is invisible.
                shutil.rmtree(path.rename(_temporary_name(path)), ignore_errors=True)


class CheckpointReader(_OneCheckpoint, StorageReader):
    """Reads the parts of a checkpoint that this rank's `tensors` need, out of the files that hold them."""

    def __init__(self, directory: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        self._directory = directory
        self._manifest = manifest
        self._tensors = tensors

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The manifest's tensors in the planner's terms."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(TORCH_DTYPES[entry.dtype]),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths)) for box in entry.chunks],
                )
                for name, entry in self._manifest.tensors.items()
                if name in self._tensors
            }
        )

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        """Refuse a checkpoint that lacks a wanted tensor, or has it in another shape. Raises StorageError."""
        problems = []
        for name, tensor in self._tensors.items():
            entry = self._manifest.tensors.get(name)
            if entry is None:
                problems.append(f"{name} is not in it")
            elif entry.shape != tuple(tensor.size()):
                problems.append(f"{name} has shape {list(entry.shape)}, wanted is {list(tensor.size())}")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise StorageError(f"the checkpoint does not fit this model: {'; '.join(problems[:5])}{more}")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every box of `plan` into its tensor. Raises StorageError where a file is not what the manifest says."""
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = defaultdict(list)
        for item in plan.items:
            if 0 not in item.lengths:
                chunks = self._manifest.tensors[item.storage_index.fqn].chunks
                chunk = next(chunk for chunk in chunks if chunk.offsets == item.storage_index.offset)
                by_file[chunk.file].append((item, chunk))
        for name, requests in by_file.items():
            file = SafetensorsFile(self._directory / name, self._manifest.files[name].size)
            for item, chunk in requests:
                saved = file.tensor(chunk.key, self._manifest.tensors[item.storage_index.fqn].dtype, chunk.lengths)
                for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    saved = saved.narrow(dimension, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(saved)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future


class SafetensorsFile:
    """A safetensors file, mapped: only the pages that are touched are read."""

    def __init__(self, path: Path, size: int) -> None:
        """Raise StorageError where `path` is not `size` bytes long or damaged, OSError where it will not open."""
        self._path = path
        if (found := path.stat().st_size) != size:
            raise StorageError(f"{path}: expected {size} bytes, found {found}")
        try:
            self._file = safe_open(path, "pt")
        except SafetensorError as error:
            raise StorageError(f"{path}: damaged header: {error}") from error

    def tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor [shape] under `key`, backed by the file. Raises StorageError where the file has another one."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(key)
        except SafetensorError as error:
            raise StorageError(f"{self._path}: damaged header: tensor {key!r}: {error}") from error
        wanted, found = (TORCH_DTYPES[dtype], list(shape)), (tensor.dtype, list(tensor.shape))
        if found != wanted:
            raise StorageError(f"{self._path}: damaged header: tensor {key!r}: expected {wanted}, found {found}")
        return tensor


def safetensors_layout(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[list[str], bytes, int]:
    """Lay out a safetensors file of (name, dtype, shape) in this order: their keys, the header, the file's size.

    A key is the tensor's name; further chunks of one tensor are told apart by a number.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    keys: list[str] = []
    end = 0
    for name, dtype, shape in tensors:
        key, number = name, 0
        while key in header:
            number += 1
            key = f"{name}#{number}"
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        keys.append(key)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return keys, struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(4)}")
