"""What must hold of files and folders in a run directory before a start reads them, or counts on writing there."""

import os
from pathlib import Path

from runtime.errors import ConfigError, StorageError
from runtime.files import irregular, temporary_name


def require_regular(path: Path) -> None:
    """Raises StorageError where something is at `path` that is no regular file: to open a FIFO may take for ever."""
    try:
        found = irregular(path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if found:
        raise StorageError(f"{path} is {found}, where a regular file belongs; remove it, or restore the file")


def require_folder(path: Path) -> None:
    """Makes nothing. Raises ConfigError where something stands at `path` that is no folder, StorageError where that is
    a link which leads nowhere, a disk that is not mounted, say."""
    if path.is_dir() or not os.path.lexists(path):
        return
    if path.is_symlink() and not path.exists():
        raise StorageError(
            f"{path} is a link to {path.readlink()}, which is not there; mount it or make it, or remove the link"
        )
    raise ConfigError(f"{path} is no directory, and the run needs one there; remove it, or choose another name")


def require_writable(folder: Path) -> None:
    """Makes nothing that stays. Raises StorageError where the folder is there and nothing can be written into it."""
    probe = temporary_name(folder / "probe")
    try:
        if folder.is_dir():
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write in {folder}: {error.strerror}; make it writable, or choose another out_dir"
        ) from error
