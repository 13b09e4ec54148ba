"""Checkpoints of a run: saved complete or not at all, found, verified, chosen, and loaded into any parallel layout."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from parallel.process_group import on_rank_zero
from parallel.sharding import TensorPart, tensor_part
from training.checkpoint_storage import CheckpointWriter, claims, read_parts, step_directories, tidy, write_parts
from training.errors import StorageError
from training.manifest import Manifest, read_manifest, verify

__all__ = ["choose_checkpoint", "load_checkpoint", "read_manifest", "save_checkpoint", "verify"]
DIRECTORY = "checkpoints"
Found = TypeVar("Found")
Answer = TypeVar("Answer")


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, TensorPart | torch.Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Save `tensors` and the JSON `state` as `<run_dir>/checkpoints/step_XXXXXXXX`; returns that path.

    Collective over the default process group. Ranks may have different tensors; a part that several have is the same on
    all, and written by one of them. The newest `keep` checkpoints up to `step` stay; those of later steps, which a run
    leaves behind when it resumes from an earlier one, are removed.

    Raises StorageError on every rank where storage fails on any, RuntimeError where anything else does; the checkpoints
    that stood before still stand then.
    """
    directory, parts = run_dir / DIRECTORY, _parts(tensors)
    writer = CheckpointWriter(directory, Manifest(step, state, {}, {}), keep)
    doing = f"saving {writer.target}"
    try:
        temporary, names = _exchange(lambda: claims(parts), writer.begin, doing)
        file = temporary / f"rank_{dist.get_rank():05d}.safetensors"
        own = {name: parts[name] for name in names}
        _exchange(lambda: write_parts(file, own) if own else None, writer.finish, doing)
    except (StorageError, RuntimeError):
        if dist.get_rank() == 0:
            # What cannot be removed now is removed by the next save.
            with contextlib.suppress(OSError):
                tidy(directory)
        raise
    return writer.target


def load_checkpoint(path: Path, manifest: Manifest, tensors: Mapping[str, TensorPart | torch.Tensor]) -> None:
    """Fill `tensors`, of any layout, device and dtype, in place, from the checkpoint at `path`.

    Collective over the default process group; ranks may ask for different tensors. Raises StorageError on every rank
    where a tensor is missing or has another shape, or a file cannot be read, on any.
    """
    _exchange(lambda: read_parts(path, manifest, _parts(tensors)), lambda nothing: nothing, f"loading {path}")


def _parts(tensors: Mapping[str, TensorPart | torch.Tensor]) -> dict[str, TensorPart]:
    """Tensors without padding need not say so."""
    return {
        name: tensor if isinstance(tensor, TensorPart) else tensor_part(tensor, tensor.shape)
        for name, tensor in tensors.items()
    }


def _exchange(action: Callable[[], Found], conclude: Callable[[list[Found]], list[Answer]], doing: str) -> Answer:
    """Every rank acts, and rank 0 concludes from what all found what each of them gets back.

    Raises StorageError on every rank where storage fails on any, RuntimeError where anything else does.
    """
    outcomes: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_attempt(action, doing), outcomes)
    answers = None
    if outcomes is not None:
        # Storage first: a user can mend that.
        failures = sorted((error for _, error in outcomes if error), key=lambda error: isinstance(error, RuntimeError))
        if not failures:
            concluded, failure = _attempt(lambda: conclude([found for found, _ in outcomes]), doing)
            failures = [failure] if failure else []
        answers = [(None, failures[0])] * len(outcomes) if failures else [(each, None) for each in concluded or ()]
    received: list[Any] = [None]
    dist.scatter_object_list(received, answers)
    answer, failure = received[0]
    if failure is not None:
        raise failure
    return cast(Answer, answer)


def _attempt(action: Callable[[], Found], doing: str) -> tuple[Found | None, Exception | None]:
    """The action's result, or an error for all ranks to raise."""
    try:
        return action(), None
    except (OSError, StorageError) as error:
        return None, StorageError(f"{doing}: rank {dist.get_rank()}: {error}")
    except Exception as error:
        return None, RuntimeError(f"{doing}: rank {dist.get_rank()}: {error!r}")


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
    for step, path in found:
        try:
            if path.is_symlink():
                raise StorageError(f"{path}: is a symbolic link; copy the checkpoint there, or use checkpoint.load")
            manifest = read_manifest(path)
            if manifest.step != step:
                raise StorageError(f"{path}: its manifest is of step {manifest.step}")
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
