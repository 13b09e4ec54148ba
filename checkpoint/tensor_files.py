"""Safetensors files that hold parts of tensors: written as a stream, read by mapped ranges."""

import hashlib
import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.manifest import DTYPES, Chunk, FileEntry, Manifest, regular_size
from parallel.sharding import Box, TensorPart
from runtime.errors import StorageError
from runtime.fault_injection import Passing, no_faults
from runtime.files import safetensors_header, wait_until_visible

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, attribute) for name, attribute in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class WrittenFile(NamedTuple):
    """What a rank wrote."""

    name: str
    entry: FileEntry
    chunks: list[tuple[str, Chunk]]
    """With the names of their tensors."""


def write_parts(path: Path, parts: Mapping[str, TensorPart], passing: Passing = no_faults) -> WrittenFile:
    """Stream parts of tensors into the safetensors file `path`, and make it durable."""
    # Widest numbers first: then each tensor starts at a multiple of its own item size.
    order = sorted(parts, key=lambda name: parts[name].values.dtype.itemsize, reverse=True)
    header, size = safetensors_layout([(name, parts[name].values.dtype, parts[name].box.lengths) for name in order])
    digest = hashlib.sha256(header)
    wait_until_visible(path.parent)
    with path.open("xb") as file:
        file.write(header)
        for name in order:
            content = parts[name].values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
            passing("checkpoint.write")
        file.flush()
        passing("checkpoint.fsync")
        os.fsync(file.fileno())
    chunks = [(name, Chunk(path.name, name, parts[name].box.offsets, parts[name].box.lengths)) for name in order]
    return WrittenFile(path.name, FileEntry(size, digest.hexdigest()), chunks)


def read_parts(directory: Path, manifest: Manifest, parts: Mapping[str, TensorPart]) -> None:
    """Fill parts of tensors out of the checkpoint's files that hold them.

    Raises StorageError where it lacks one, has one in another shape, or a file is not what the manifest says.
    """
    _refuse_what_does_not_fit(manifest, parts)
    by_file: dict[str, list[tuple[str, Chunk, Box]]] = defaultdict(list)
    for name, part in parts.items():
        for chunk in manifest.tensors[name].chunks:
            shared = part.box.overlap(Box(chunk.offsets, chunk.lengths))
            if shared.size:
                by_file[chunk.file].append((name, chunk, shared))
    for file_name, pieces in by_file.items():
        file = SafetensorsFile(directory / file_name, manifest.files[file_name].size)
        for name, chunk, shared in pieces:
            saved = file.tensor(chunk.key, manifest.tensors[name].dtype, chunk.lengths)
            found = saved[shared.within(Box(chunk.offsets, chunk.lengths))]
            parts[name].values[shared.within(parts[name].box)].copy_(found)


def _refuse_what_does_not_fit(manifest: Manifest, parts: Mapping[str, TensorPart]) -> None:
    problems = []
    for name, part in parts.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            problems.append(f"{name} is not in it")
        elif entry.shape != part.shape:
            problems.append(f"{name} has shape {list(entry.shape)}, wanted is {list(part.shape)}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise StorageError(f"the checkpoint does not fit this model: {'; '.join(problems[:5])}{more}")


class SafetensorsFile:
    """A safetensors file, mapped: only the pages that are touched are read."""

    def __init__(self, path: Path, size: int) -> None:
        """Raise StorageError where `path` is not `size` bytes long, a link or damaged, OSError where it is missing."""
        self._path = path
        if (found := regular_size(path)) != size:
            raise StorageError(f"{path}: expected {size} bytes, found {found}")
        try:
            self._file = safe_open(path, "pt")
            self._header = safetensors_header(path)
        except (SafetensorError, ValueError) as error:
            raise StorageError(f"{path}: damaged header: {error}") from error

    def tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor [shape] under `key`, backed by the file. Raises StorageError where the file has another one."""
        entry = self._header.get(key, {})
        wanted, found = (dtype, list(shape)), (entry.get("dtype"), entry.get("shape"))
        if found != wanted:
            raise StorageError(f"{self._path}: damaged header: tensor {key!r}: expected {wanted}, found {found}")
        tensor: torch.Tensor = self._file.get_tensor(key)
        return tensor


def safetensors_layout(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Lay out a safetensors file of (name, dtype, shape) in this order: the header, and the file's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end
