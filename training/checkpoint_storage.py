"""Storage of checkpoints: a safetensors file a rank, written as a stream, read by mapped ranges; visible when whole."""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from data.files import safetensors_header, sync, wait_until_visible, write_whole
from parallel.sharding import Box, TensorPart
from training.errors import StorageError
from training.faults import Passing, pass_by
from training.manifest import (
    DTYPES,
    MANIFEST_NAME,
    REPLACED,
    TEMPORARY,
    Chunk,
    FileEntry,
    Manifest,
    encode_manifest,
    read_manifest,
    regular_size,
)

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, attribute) for name, attribute in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


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


def step_name(step: int) -> str:
    """What the checkpoint of a step is called."""
    return f"step_{step:08d}"


def set_aside(path: Path, ending: str) -> Path:
    """Rename a checkpoint to one with CORRUPT or LEFT as `ending`, so that it is none of the run's any more; returns
    its new path. Raises StorageError."""
    taken = itertools.count(2)
    aside = path.with_name(path.name + ending)
    while aside.exists():
        aside = path.with_name(f"{path.name}{ending}.{next(taken)}")
    try:
        return path.rename(aside)
    except OSError as error:
        raise StorageError(f"{path} cannot be renamed to {aside.name}: {error.strerror}") from error


def tidy(directory: Path) -> None:
    """Remove what interrupted saves left under `directory`. Only for the run that saves there."""
    replaced = [path for path in directory.glob(f"step_*{REPLACED}") if path.with_suffix("").exists()]
    for path in [*replaced, *directory.glob("*.tmp*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last`, those of every `every`-th step, the best of those evaluated."""

    last: int
    every: int = 0
    """0: none."""
    best: bool = False
    """By the `eval_loss` of their states."""

    def of(self, checkpoints: Sequence[tuple[int, Path]]) -> set[Path]:
        """Those of (step, path) that stay, given the newest first."""
        kept = {path for _, path in checkpoints[: self.last]}
        kept |= {path for step, path in checkpoints if self.every and step % self.every == 0}
        losses = {}
        for _, path in checkpoints if self.best else ():
            with suppress(StorageError):
                losses[path] = read_manifest(path).state.get("eval_loss")
        evaluated = {path: loss for path, loss in losses.items() if loss is not None}
        return kept | ({min(evaluated, key=evaluated.__getitem__)} if evaluated else set())


class Claim(NamedTuple):
    """A rank's part of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    nbytes: int


class WrittenFile(NamedTuple):
    """What a rank wrote."""

    name: str
    entry: FileEntry
    chunks: list[tuple[str, Chunk]]
    """With the names of their tensors."""


class CheckpointWriter:
    """Writes `<directory>/step_XXXXXXXX` so that it is either complete or invisible, then removes what is not kept.

    Rank 0 begins, ranks write into a temporary directory, and rank 0 finishes: it writes the manifest last, renames the
    directory, points `latest` to it, and removes older checkpoints. Methods raise OSError where storage fails.

    A process that stood still for minutes may find that another has taken over its run directory. Rank 0 therefore asks
    `require_owner` before each change that others see; it raises RunDirectoryError in that case.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        keep: Retention,
        passing: Passing = pass_by,
        require_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """`manifest` says step and state, and the tensors without their chunks."""
        self.target = directory / step_name(manifest.step)
        self._temporary = _temporary_name(self.target)
        self._directory = directory
        self._manifest = manifest
        self._keep = keep
        self._passing = passing
        self._require_owner = require_owner

    def begin(self, size: int) -> Path:
        """Make the temporary directory for ranks to write `size` bytes into, and return it.

        Raises ValueError or TypeError for a state that is not finite JSON.
        """
        encode_manifest(self._manifest)
        self._require_owner()
        # No parents: where the run directory has just been moved away, none is begun in its place.
        self._directory.mkdir(exist_ok=True)
        tidy(self._directory)
        require_space(self._directory, size)
        self._temporary.mkdir()
        return self._temporary

    def finish(self, wrote: list[WrittenFile | None]) -> list[None]:
        """Write the manifest, make the checkpoint visible, and remove those that are not to be kept."""
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        files = [file for file in wrote if file is not None]
        for name, chunk in [pair for file in files for pair in file.chunks]:
            chunks[name].append(chunk)
        tensors = {name: replace(entry, chunks=tuple(chunks[name])) for name, entry in self._manifest.tensors.items()}
        manifest = replace(self._manifest, files={file.name: file.entry for file in files}, tensors=tensors)
        self._passing("checkpoint.manifest")
        write_whole(self._temporary / MANIFEST_NAME, encode_manifest(manifest))
        self._passing("checkpoint.rename")
        self._require_owner()
        replaced = self.target.with_name(self.target.name + REPLACED)
        if self.target.exists():
            self.target.rename(replaced)
        self._temporary.rename(self.target)
        sync(self._directory)
        sync(self._directory.parent)
        self._require_owner()
        write_whole(self._directory / "latest", f"{self.target.name}\n".encode())
        self._passing("checkpoint.prune")
        self._require_owner()
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_others()
        return [None] * len(wrote)

    def _remove_others(self) -> None:
        found = [pair for pair in step_directories(self._directory) if pair[0] <= self._manifest.step]
        complete = [pair for pair in found if (pair[1] / MANIFEST_NAME).is_file()]
        kept = self._keep.of(complete)
        for _, path in found:
            if path not in kept:
                # Renamed first, so that a checkpoint that is half removed is invisible.
                shutil.rmtree(path.rename(_temporary_name(path)), ignore_errors=True)


def require_space(directory: Path, size: int) -> None:
    """Raise OSError where a checkpoint of `size` bytes does not fit on the file system of `directory`."""
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    if free < size:
        raise OSError(errno.ENOSPC, f"a checkpoint takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def claims(parts: Mapping[str, TensorPart]) -> list[Claim]:
    """What this rank has. Raises TypeError for a dtype that safetensors files cannot hold."""
    for name, part in parts.items():
        if part.values.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name} is no tensor of a dtype that a checkpoint can hold")
    return [
        Claim(name, DTYPE_NAMES[part.values.dtype], part.shape, part.box, part.values.nbytes)
        for name, part in parts.items()
    ]


def share_out(claimed: Sequence[Sequence[Claim]]) -> list[list[str]]:
    """Which tensors each rank writes its part of, so that every box is written once and all write about as much.

    Empty parts are written by none.
    """
    holders: dict[Claim, list[int]] = defaultdict(list)
    for rank, own in enumerate(claimed):
        for claim in own:
            if claim.box.size:
                holders[claim].append(rank)
    shares: list[list[str]] = [[] for _ in claimed]
    load = [0] * len(claimed)
    # What few ranks have first, and the largest of it: the rest evens out what they got.
    for claim in sorted(holders, key=lambda claim: (len(holders[claim]), -claim.nbytes)):
        writer = min(holders[claim], key=load.__getitem__)
        shares[writer].append(claim.name)
        load[writer] += claim.nbytes
    return shares


def write_parts(path: Path, parts: Mapping[str, TensorPart], passing: Passing = pass_by) -> WrittenFile:
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


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(4)}")
