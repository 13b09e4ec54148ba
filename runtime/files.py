"""Files that appear whole or not at all, and how files of others are read."""

import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.errors import DataPathError, StorageError

SECONDS_UNTIL_VISIBLE = 90.0
"""More than the minute for which NFS believes that a file is absent."""
SECONDS_BETWEEN_LOOKS = 0.2
LARGEST_JSON = 2**30
"""Bytes of a JSON file up to which it is read."""
_KINDS = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


def publish(temporary: Path, target: Path) -> None:
    """Renames a finished file to its name once its bytes are on disk, so that a crash leaves no part of it."""
    sync(temporary)
    temporary.replace(target)
    sync(target.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically, replacing what is there."""
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process takes, on any host that shares the file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


@contextmanager
def temporary_directory(beside: Path) -> Iterator[Path]:
    """A directory on the file system of `beside`, removed at the end. The umask rules its rights, unlike tempfile's."""
    directory = temporary_name(beside)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish_directory(temporary: Path, target: Path) -> None:
    """Renames a finished directory to its name once the bytes of all files in it are on disk."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    temporary.rename(target)
    sync(target.parent)


def wait_until_visible(path: Path, seconds: float = SECONDS_UNTIL_VISIBLE) -> None:
    """Waits for what another host has made: network file systems show it late. Raises FileNotFoundError."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{path} was made by another process but is not visible on {socket.gethostname()} after {seconds:g} s; "
                f"it must lie on a file system that all hosts share"
            )
        # Who lists the folder asks the file server, rather than what this host remembers of it.
        with suppress(OSError):
            any(next(parent for parent in path.parents if parent.exists()).iterdir())
        time.sleep(SECONDS_BETWEEN_LOOKS)


def sync(path: Path) -> None:
    """Puts the bytes of a file, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError from within that names no file, as one of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def irregular(path: Path) -> str | None:
    """What is at a path in place of a regular file, such as "a FIFO", which may be waited for without end; None for a
    regular file or none. Raises OSError where the file system does not answer."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if kind == stat.S_IFREG else f"a {_KINDS.get(kind, 'device')}"


def is_there(path: Path) -> bool:
    """Whether there is a regular file. Raises DataPathError where something else is."""
    if found := irregular(path):
        raise DataPathError(f"{path} is {found}, no regular file; name a regular file, or put one there")
    return path.is_file()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataPathError where there is none."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_JSON:
            raise DataPathError(f"{path} is no regular file of up to {LARGEST_JSON} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataPathError(f"{path} cannot be read: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise DataPathError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataPathError(f"{path} holds no JSON object")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `object_pairs_hook` of `json.loads`.

    Raises ValueError where it holds a key twice: what is checked could then be another value than what is used.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is there twice")
    return content


def safetensors_header(path: Path) -> dict[str, Any]:
    """What a safetensors file that the library has opened, so found sound, says of its tensors.

    Raises ValueError for a key that is there twice, which the library lets pass.
    """
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(
            file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique_keys
        )
    return header


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that a crash at any moment leaves the old content or the new. Raises StorageError."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free space there or choose another out_dir"
        ) from error
