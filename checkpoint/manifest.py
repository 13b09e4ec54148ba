"""The manifest of a checkpoint: where each tensor lies, and whether the files are still what was written."""

import functools
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from runtime.errors import DamageError, StorageError
from runtime.files import LARGEST_JSON, sha256_of, unique_keys

MANIFEST_NAME = "manifest.json"
TEMPORARY = ".tmp-"
"""In the name of a checkpoint that is not finished."""
REPLACED = ".replaced"
"""Ends the name of one that gives way to another of the same step."""
CORRUPT = ".corrupt"
"""In the name of one that was found damaged and set aside."""
LEFT = ".left"
"""In the name of one whose course the run has left, to go on from an older one."""
FORMAT = 1
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""What the safetensors format calls the dtypes that a checkpoint can hold, and what torch calls them."""
PRIME = 2**127 - 1


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written: its size in bytes and the SHA-256 of all of them."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, `lengths` elements from `offsets` on, stored whole under `key` of a safetensors `file`."""

    file: str
    key: str
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: its dtype as safetensors writes it, its global shape, and the disjoint chunks that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says of itself; `state` is the caller's own JSON."""

    step: int
    state: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON that holds a digest of itself. Raises ValueError where `state` is not plain, finite JSON."""
    files = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in manifest.files.items()}
    tensors = {
        name: vars(entry) | {"chunks": list(map(vars, entry.chunks))} for name, entry in manifest.tensors.items()
    }
    document = {"format": FORMAT, "step": manifest.step, "state": manifest.state, "files": files, "tensors": tensors}
    return json.dumps(document | {"sha256": _digest(document)}, allow_nan=False).encode()


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the checkpoint directory `path`.

    Raises DamageError where it is missing, damaged, of another format, no regular file or of absurd size, names files
    outside the directory, or describes tensors that its chunks do not fill exactly or that the files are too small for;
    StorageError where it cannot be read.
    """
    file = path / MANIFEST_NAME
    try:
        if (size := regular_size(file)) > LARGEST_JSON:
            raise ValueError(f"it is of {size} bytes, and one of up to {LARGEST_JSON} is read")
        document = json.loads(file.read_bytes(), parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
        if (found := document["format"]) != FORMAT:
            raise ValueError(f"format {found!r}; this version reads format {FORMAT}")
        if document.pop("sha256") != _digest(document):
            raise ValueError("its content does not match its own sha256")
        return _parse(document)
    except OSError as error:
        raise _unreadable(file, error) from error
    except KeyError as error:
        raise DamageError(f"{file}: not a valid manifest: {error} is missing") from error
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise DamageError(f"{file}: not a valid manifest: {str(error)[:500]}") from error


def regular_size(file: Path) -> int:
    """The bytes of a file of a checkpoint.

    Raises OSError where there is none, DamageError where it is a symbolic link, which may lead anywhere, or anything
    else that is no regular file, whose reading may never end.
    """
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise DamageError(f"{file}: is {kind}; a checkpoint is read from regular files, so copy what belongs there")
    return status.st_size


def verify(path: Path, manifest: Manifest, mode: str) -> None:
    """Compare the files of the checkpoint directory `path` with its manifest.

    `full` hashes every file, `sizes` compares lengths only, `off` looks at nothing. Raises DamageError, which names the
    file, what was expected and what was found, and StorageError where one cannot be read.
    """
    if mode != "off":
        compare_sizes(path, manifest)
    if mode == "full":
        compare_hashes(path, manifest, manifest.files)


def compare_sizes(path: Path, manifest: Manifest) -> None:
    """Compare the lengths of files with the manifest. Raises as `verify` does."""
    for name, entry in manifest.files.items():
        _check(path / name, "{} bytes", entry.size, regular_size)


def compare_hashes(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare what is in files with the manifest, several at once. Raises as `verify` does."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda name: _check(path / name, "sha256 {}", manifest.files[name].sha256, sha256_of), names))


def _check(file: Path, wanted: str, expected: int | str, measure: Callable[[Path], int | str]) -> None:
    try:
        found = measure(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    if found != expected:
        raise DamageError(f"{file}: expected {wanted.format(expected)}, found {found}")


def _unreadable(file: Path, error: OSError) -> StorageError:
    """Damage where the file is missing; what a disk or network cannot read now it may read later."""
    if isinstance(error, FileNotFoundError):
        return DamageError(f"{file}: is missing")
    return StorageError(f"{file}: cannot be read: {error.strerror}")


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, allow_nan=False, sort_keys=True).encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parse(document: dict[str, Any]) -> Manifest:
    (step,) = _naturals([document["step"]], "step")
    state = document["state"]
    if not isinstance(state, dict):
        raise TypeError("state is no object")
    files = {}
    for name, entry in document["files"].items():
        # A name is joined to the checkpoint's path, so it may not lead out of it.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"file name {name!r} is not a plain one")
        (size,) = _naturals([entry["bytes"]], name)
        files[name] = FileEntry(size, str(entry["sha256"]))
    tensors = {name: _parse_tensor(name, entry, files) for name, entry in document["tensors"].items()}
    _check_room(files, tensors)
    return Manifest(step, state, files, tensors)


def _check_room(files: dict[str, FileEntry], tensors: dict[str, TensorEntry]) -> None:
    """Raise ValueError where chunks share bytes, or have more of them than their file."""
    places, held = set(), dict.fromkeys(files, 0)
    for name, entry in tensors.items():
        item_size = int(re.sub(r"\D", "", entry.dtype) or 8) // 8
        for chunk in entry.chunks:
            if (chunk.file, chunk.key) in places:
                raise ValueError(f"tensor {name}: {chunk.key!r} of {chunk.file} is another chunk already")
            places.add((chunk.file, chunk.key))
            held[chunk.file] += math.prod(chunk.lengths) * item_size
    for file, size in held.items():
        if size > files[file].size:
            raise ValueError(f"{file} has {files[file].size} bytes, and its chunks have {size}")


def _parse_tensor(name: str, entry: dict[str, Any], files: dict[str, FileEntry]) -> TensorEntry:
    shape = _naturals(entry["shape"], name)
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    chunks = []
    for item in entry["chunks"]:
        chunk = Chunk(item["file"], item["key"], _naturals(item["offsets"], name), _naturals(item["lengths"], name))
        if type(chunk.key) is not str:
            raise TypeError(f"tensor {name}: key {chunk.key!r} is no string")
        if chunk.file not in files:
            raise ValueError(f"tensor {name} lies in {chunk.file!r}, which is not among the files")
        ends = zip(chunk.offsets, chunk.lengths, shape, strict=True)
        if any(offset + length > size for offset, length, size in ends):
            raise ValueError(f"tensor {name}: chunk {chunk} reaches beyond shape {list(shape)}")
        chunks.append(chunk)
    if not _fill(shape, chunks):
        stored = sum(math.prod(chunk.lengths) for chunk in chunks)
        raise ValueError(f"tensor {name}: its chunks hold {stored} elements and do not fill shape {list(shape)} once")
    return TensorEntry(entry["dtype"], shape, tuple(chunks))


def _fill(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether every element is in one chunk: whether the sum of x^i y^j... over all elements (i, j, ...) of all chunks
    is that over the whole tensor, as a polynomial, so at random x, y, ... (but for a chance of 2^-57).

    Takes a time that is linear in the chunks, however they lie.
    """
    bases = [secrets.randbelow(PRIME) for _ in shape]
    power = functools.cache(lambda dimension, exponent: pow(bases[dimension], exponent, PRIME))

    def box_sum(offsets: tuple[int, ...], lengths: tuple[int, ...]) -> int:
        """Times (x - 1)(y - 1)..., as that makes a difference of two powers of each geometric series."""
        total = 1
        for dimension, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
            total = total * (power(dimension, start + length) - power(dimension, start)) % PRIME
        return total

    whole = box_sum((0,) * len(shape), shape)
    return sum(box_sum(chunk.offsets, chunk.lengths) for chunk in chunks) % PRIME == whole


def _naturals(values: list[Any], name: str) -> tuple[int, ...]:
    if len(values) > 64 or any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise ValueError(f"{name}: not whole numbers from 0 on that torch can hold: {values}")
    return tuple(values)
