"""Checkpoints of a run: saved complete or not at all, found, verified, chosen, and loaded into any parallel layout."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from parallel.process_group import on_rank_zero
from training.checkpoint_storage import CheckpointReader, CheckpointWriter, step_directories, tidy
from training.errors import StorageError
from training.manifest import Manifest, read_manifest, verify

__all__ = ["choose_checkpoint", "load_checkpoint", "read_manifest", "save_checkpoint", "verify"]
DIRECTORY = "checkpoints"


def save_checkpoint(
    run_dir: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Save `tensors` and the JSON `state` as `<run_dir>/checkpoints/step_XXXXXXXX`; returns that path.

    Collective over the default process group. A tensor is a DTensor, whose shards are written where they lie, each
    once, or a plain one, which is equal on all ranks that have it and written by one of them. The newest `keep`
    checkpoints up to `step` stay; those of later steps, which a run leaves behind when it resumes from an earlier one,
    are removed.

    Raises StorageError on every rank where storage fails on any, RuntimeError where anything else does; the checkpoints
    that stood before still stand then.
    """
    directory = run_dir / DIRECTORY
    writer = CheckpointWriter(directory, Manifest(step, state, {}, {}), keep)
    try:
        save(tensors, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    except CheckpointException as error:
        if dist.get_rank() == 0:
            # What cannot be removed now is removed by the next save.
            with contextlib.suppress(OSError):
                tidy(directory)
        raise _translate(error, f"saving {writer.target}") from error
    return writer.target


def load_checkpoint(path: Path, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors`, of any layout, device and dtype, in place, from the checkpoint at `path`.

    Collective over the default process group; ranks may ask for different tensors. Raises StorageError on every rank
    where a tensor is missing or has another shape, or a file cannot be read, on any.
    """
    reader = CheckpointReader(path, manifest, tensors)
    try:
        load(dict(tensors), storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False))
    except CheckpointException as error:
        raise _translate(error, f"loading {path}") from error


def choose_checkpoint(run_dir: Path, resume: str, verify_mode: str) -> tuple[Path, Manifest] | None:
    """The checkpoint to continue from: with resume=auto the newest valid one, else the one of step number `resume`.

    Collective over the default process group: rank 0 looks, and names what it skips on stderr. None where auto finds no
    checkpoint at all. Raises StorageError on every rank where all are invalid, or the wanted step is not there.
    """
    return on_rank_zero(lambda: _choose(run_dir / DIRECTORY, resume, verify_mode))


def _choose(directory: Path, resume: str, verify_mode: str) -> tuple[Path, Manifest] | None:
    try:
        found = step_directories(directory)
    except OSError as error:
        raise StorageError(f"{directory}: cannot be read: {error}") from error
    steps = ", ".join(str(step) for step, _ in found) or "none"
    if resume != "auto":
        found = [(step, path) for step, path in found if str(step) == resume]
        if not found:
            raise StorageError(f"no checkpoint of step {resume} in {directory}; steps there: {steps}")
    problems = []
    for _, path in found:
        try:
            manifest = read_manifest(path)
            verify(path, manifest, verify_mode)
        except StorageError as error:
            problems.append(str(error))
            print(f"checkpoint {path.name} is invalid: {error}", file=sys.stderr)
        else:
            return path, manifest
    if problems:
        raise StorageError(
            f"no valid checkpoint in {directory} (steps there: {steps}): {'; '.join(problems)}. "
            "Restore a damaged file, or start a new run under another name"
        )
    return None


def _translate(error: CheckpointException, action: str) -> Exception:
    """What to raise for torch's exception, which is no Exception: storage failures first, then the lowest rank's."""
    failures = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
    for rank, cause in failures.items():
        if isinstance(cause, OSError | StorageError):
            return StorageError(f"{action}: rank {rank}: {cause}")
    rank, cause = next(iter(failures.items()))
    return RuntimeError(f"{action}: rank {rank}: {cause!r}")
