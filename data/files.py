"""Files that appear whole or not at all, and the paths of a prepared `.bin`/`.idx` pair."""

import difflib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import CorruptDataError, DataPathError


def publish(temporary: Path, target: Path) -> None:
    """Renames a finished file to its name once its bytes are on disk, so that a crash leaves no part of it."""
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_pair(prefix: str) -> tuple[Path, Path]:
    """The `.bin` and `.idx` of `prefix`.

    Raises DataPathError where neither exists, naming the nearest prefixes in that folder, and CorruptDataError where
    only one does.
    """
    paths = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == 1:
        present = next(path for path in paths if path not in missing)
        raise CorruptDataError(
            f"{present} has no {missing[0].name} beside it: the copy or preparation was interrupted; prepare it again"
        )
    if missing:
        raise DataPathError(f"no prepared data at {prefix} (wanted {prefix}.bin and {prefix}.idx); {_nearest(prefix)}")
    return paths


def _nearest(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        return f"a prefix has no suffix: try {prefix[:-4]}"
    folder = Path(prefix).parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = sorted(path.stem for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    nearest = difflib.get_close_matches(Path(prefix).name, names, n=3, cutoff=0.0)
    if not nearest:
        return f"{folder} holds no prepared data; `kilotron prepare INPUT --output {prefix}` makes it from text"
    return "nearest: " + ", ".join(str(folder / name) for name in nearest)
