"""The directory that holds the checkpoints of a run: their names, which of them stay, and what is set aside."""

import errno
import itertools
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint.manifest import REPLACED, TEMPORARY, read_manifest
from runtime.errors import StorageError

DIRECTORY = "checkpoints"


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


def require_space(directory: Path, size: int) -> None:
    """Raise OSError where a checkpoint of `size` bytes does not fit on the file system of `directory`."""
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    if free < size:
        raise OSError(errno.ENOSPC, f"a checkpoint takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def temporary_name_of(path: Path) -> Path:
    """A name beside that of a checkpoint, under which it is written or removed and no reader looks for it."""
    return path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(4)}")
