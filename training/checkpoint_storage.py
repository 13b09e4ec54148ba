"""Storage for torch's distributed checkpoints: one safetensors file a rank, written as a stream, read by mapped ranges.

torch.distributed.checkpoint plans who writes and who reads which part of a tensor; the bytes are ours.
"""

import dataclasses
import hashlib
import json
import math
import mmap
import os
import re
import secrets
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from data.files import sync
from training.errors import StorageError
from training.manifest import DTYPES, MANIFEST_NAME, Chunk, FileEntry, Manifest, TensorEntry, encode_manifest

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, attribute) for name, attribute in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
HEADER_LENGTH = struct.Struct("<Q")
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
    for path in list(directory.glob(f"step_*{REPLACED}")):
        if path.with_suffix("").exists():
            shutil.rmtree(path, ignore_errors=True)
    for path in list(directory.glob(f"*{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class CheckpointWriter(StorageWriter):
    """Writes `<directory>/step_XXXXXXXX` so that it is either complete or invisible, then keeps the newest `keep`.

    Every rank streams its share into a file of a temporary directory; the coordinator writes the manifest last, renames
    the directory, points `latest` to it, and removes older checkpoints, and those of later steps, whose course the run
    has left. Methods raise OSError where storage fails; torch.distributed.checkpoint carries that to every rank.
    """

    def __init__(self, directory: Path, step: int, state: dict[str, Any], keep: int) -> None:
        self.target = directory / f"step_{step:08d}"
        self._directory = directory
        self._step = step
        self._state = state
        self._keep = keep

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Only paths name a checkpoint."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer writes one checkpoint, where it was told to at the start."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Refuse a state that is not finite JSON before a byte is written. Raises ValueError or TypeError."""
        if is_coordinator:
            encode_manifest(Manifest(self._step, self._state, {}, {}))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave out empty shards: several may claim one place, and a rank that has nothing else writes no file.

        Raises TypeError for what is no tensor, or of a dtype that safetensors files cannot hold.
        """
        items = [item for item in plan.items if 0 not in _data(item).chunk.sizes or 0 in _data(item).size]
        return dataclasses.replace(plan, items=items)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the temporary directory, on the coordinator, and tell every rank its name."""
        self._directory.mkdir(parents=True, exist_ok=True)
        tidy(self._directory)
        temporary = self.target.with_name(f"{self.target.name}{TEMPORARY}{secrets.token_hex(4)}")
        temporary.mkdir()
        return [dataclasses.replace(plan, storage_data=temporary.name) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, where it has anything to write, and make it durable."""
        self._temporary = self._directory / plan.storage_data
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write_file(plan.items, planner) if plan.items else [])
        return future

    def _write_file(self, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        name = f"rank_{dist.get_rank():05d}.safetensors"
        # Widest numbers first: then each tensor starts at a multiple of its own item size.
        items = sorted(items, key=lambda item: _data(item).properties.dtype.itemsize, reverse=True)
        boxes = [_data(item).chunk for item in items]
        keys, header, size = safetensors_layout(
            [
                (item.index.fqn, _data(item).properties.dtype, tuple(box.sizes))
                for item, box in zip(items, boxes, strict=True)
            ]
        )
        digest = hashlib.sha256()
        with (self._temporary / name).open("xb") as file:
            for piece in _pieces(header, items, planner):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != size:
                raise ValueError(f"{name}: wrote {file.tell()} bytes where the plan has {size}")
        entry = FileEntry(size, digest.hexdigest())
        results = []
        for item, key, box in zip(items, keys, boxes, strict=True):
            chunk = Chunk(name, key, tuple(box.offsets), tuple(box.sizes))
            size = math.prod(box.sizes) * _data(item).properties.dtype.itemsize
            results.append(WriteResult(item.index, size, (chunk, entry)))
        return results

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
        manifest = encode_manifest(Manifest(self._step, self._state, files, tensors))
        _write_durably(self._temporary / MANIFEST_NAME, manifest)
        sync(self._temporary)
        self._make_visible()
        latest = self._directory / f"latest{TEMPORARY}{secrets.token_hex(4)}"
        _write_durably(latest, f"{self.target.name}\n".encode())
        latest.rename(self._directory / "latest")
        sync(self._directory)
        self._remove_others()

    def _make_visible(self) -> None:
        replaced = self.target.with_name(self.target.name + REPLACED)
        if self.target.exists():
            self.target.rename(replaced)
        self._temporary.rename(self.target)
        sync(self._directory)
        sync(self._directory.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _remove_others(self) -> None:
        found = step_directories(self._directory)
        complete = [path for step, path in found if step <= self._step and (path / MANIFEST_NAME).is_file()]
        for _, path in found:
            if path not in complete[: self._keep]:
                # Renamed first, so that a checkpoint that is half removed is invisible.
                doomed = path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(4)}")
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


class CheckpointReader(StorageReader):
    """Reads the parts of a checkpoint that this rank's `tensors` need, out of the files that hold them."""

    def __init__(self, directory: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
        self._directory = directory
        self._manifest = manifest
        self._tensors = tensors

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Only paths name a checkpoint."""
        return isinstance(checkpoint_id, (str, os.PathLike))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader reads one checkpoint, which it was given at the start."""

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
        """The planner's own plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The planner's own plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every box of `plan` into its tensor. Raises StorageError where a file is not what the manifest says."""
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = defaultdict(list)
        for item in plan.items:
            if 0 not in item.lengths:
                chunk = self._chunk(item.storage_index)
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

    def _chunk(self, index: MetadataIndex) -> Chunk:
        chunks = self._manifest.tensors[index.fqn].chunks
        if index.index is not None and chunks[index.index].offsets == index.offset:
            return chunks[index.index]
        return next(chunk for chunk in chunks if chunk.offsets == index.offset)


class SafetensorsFile:
    """A safetensors file, mapped: only the pages that are touched are read."""

    def __init__(self, path: Path, size: int) -> None:
        """Raise StorageError where `path` is not `size` bytes long or has no header, OSError where it will not open."""
        self._path = path
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size or size < HEADER_LENGTH.size:
                raise StorageError(f"{path}: expected {size} bytes, found {found}")
            # Private pages: torch wants memory that may be written to.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = HEADER_LENGTH.unpack_from(self._bytes)
        self._start = HEADER_LENGTH.size + length
        try:
            self._header = json.loads(self._bytes[HEADER_LENGTH.size : self._start])
        except (RecursionError, ValueError) as error:
            raise StorageError(f"{path}: damaged header: {error}") from error

    def tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor [shape] under `key`, backed by the file. Raises StorageError where the file has another one."""
        count = math.prod(shape)
        try:
            entry = self._header[key]
            begin, end = entry["data_offsets"]
            expected = (dtype, list(shape), count * TORCH_DTYPES[dtype].itemsize)
            if (entry["dtype"], entry["shape"], end - begin) != expected or not 0 <= begin <= end:
                raise ValueError(f"expected {dtype} {list(shape)}, found {entry}")
            return torch.frombuffer(
                self._bytes, dtype=TORCH_DTYPES[dtype], count=count, offset=self._start + begin
            ).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{self._path}: damaged header: tensor {key!r}: {error!r}") from error


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
    return keys, HEADER_LENGTH.pack(len(text)) + text, HEADER_LENGTH.size + len(text) + end


def _data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None or item.tensor_data.properties.dtype not in DTYPE_NAMES:
        raise TypeError(f"{item.index.fqn} is no tensor of a dtype that a checkpoint can hold")
    return item.tensor_data


def _pieces(header: bytes, items: list[WriteItem], planner: SavePlanner) -> Iterator[bytes | memoryview]:
    yield header
    for item in items:
        tensor = cast(torch.Tensor, planner.resolve_data(item))
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
