"""Checkpoints of a run: found, verified by all ranks together, chosen, and loaded into any parallel layout."""

import re
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from checkpoint.directory import DIRECTORY, set_aside, step_directories, step_name
from checkpoint.manifest import (
    CORRUPT,
    LEFT,
    MANIFEST_NAME,
    REPLACED,
    Manifest,
    compare_hashes,
    compare_sizes,
    read_manifest,
)
from checkpoint.tensor_files import read_parts
from parallel.agreement import on_rank_zero, run_on_all_ranks, to_all
from parallel.sharding import Box, TensorPart, local_box, tensor_part
from runtime.errors import DamageError, RemovedError, StorageError
from runtime.files import wait_until_visible
from runtime.streams import tell

AUTO_HASHES_UP_TO = 50 * 10**9
"""Bytes of a checkpoint for each node up to which verify=auto hashes every file."""
FilesNeeded = Callable[[Manifest], Collection[str]]
"""Which files of a checkpoint this rank will read."""


def all_files(manifest: Manifest) -> Collection[str]:
    """For who does not know yet what to read."""
    return manifest.files


def load_checkpoint(path: Path, manifest: Manifest, tensors: Mapping[str, TensorPart | torch.Tensor]) -> None:
    """Fill `tensors`, of any layout, device and dtype, in place, from the checkpoint at `path`.

    Collective over the default process group; ranks may ask for different tensors. Raises StorageError on every rank
    where a tensor is missing or has another shape, or a file cannot be read, on any.
    """

    def read() -> None:
        if dist.get_rank():  # rank 0 has read the manifest; other hosts may see later that it is there
            wait_until_visible(path / MANIFEST_NAME)
        read_parts(path, manifest, parts_of(tensors))

    on_rank_zero(lambda: _require_manifest(path))
    run_on_all_ranks(read, to_all(lambda _: None), f"loading {path}")


def _require_manifest(path: Path) -> None:
    if not (path / MANIFEST_NAME).is_file():
        raise RemovedError(f"{path}: is there no more: its run has removed it")


def parts_of(tensors: Mapping[str, TensorPart | torch.Tensor]) -> dict[str, TensorPart]:
    """Tensors without padding need not say so."""
    return {
        name: tensor if isinstance(tensor, TensorPart) else tensor_part(tensor, tensor.shape)
        for name, tensor in tensors.items()
    }


def verify_together(path: Path, manifest: Manifest, mode: str, needed: FilesNeeded = all_files) -> None:
    """Compare the files of the checkpoint at `path` with its manifest, the work shared by all ranks.

    `full` hashes every file once, `sizes` compares lengths only, `off` looks at nothing. `auto` is `full` up to 50 GB
    for each node; above, every node hashes the files that its ranks need. Collective over the default process group.
    Raises DamageError on every rank where a file is not what was written, StorageError where it cannot be read.
    """
    if mode == "off":
        return
    doing = "verifying"

    def look() -> tuple[str, Collection[str]]:
        if dist.get_rank() == 0:
            compare_sizes(path, manifest)
        return socket.gethostname(), needed(manifest) if mode == "auto" else ()

    def share(found: list[tuple[str, Collection[str]]]) -> list[list[str]]:
        if mode == "sizes":
            return [[] for _ in found]
        nodes = len({host for host, _ in found})
        wanted: dict[tuple[str, str], list[int]] = defaultdict(list)
        if mode == "full" or sum(entry.size for entry in manifest.files.values()) <= nodes * AUTO_HASHES_UP_TO:
            wanted |= {(name, "any node"): list(range(len(found))) for name in manifest.files}
        else:
            for rank, (host, names) in enumerate(found):
                for name in names:
                    wanted[name, host].append(rank)
        return _shares(wanted, manifest, len(found))

    names = run_on_all_ranks(look, share, doing)
    run_on_all_ranks(lambda: compare_hashes(path, manifest, names), to_all(lambda _: None), doing)


def _shares(wanted: Mapping[tuple[str, str], Iterable[int]], manifest: Manifest, ranks: int) -> list[list[str]]:
    """Each file to the one of its ranks that has the least to hash so far, the largest files first."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for (name, _), candidates in sorted(wanted.items(), key=lambda item: -manifest.files[item[0][0]].size):
        rank = min(candidates, key=load.__getitem__)
        shares[rank].append(name)
        load[rank] += manifest.files[name].size
    return shares


def was_replaced(path: Path, manifest: Manifest) -> bool:
    """Whether the run that a checkpoint is of has removed it since its manifest was read, or saved its step anew."""
    try:
        return read_manifest(path) != manifest
    except DamageError:
        return not path.exists()


def choose_checkpoint(
    run_dir: Path, resume: str, verify_mode: str, needed: FilesNeeded = all_files, *, owned: bool = False
) -> tuple[Path, Manifest] | None:
    """The checkpoint to continue from: with resume=auto the newest valid one, else the one of step number `resume`.

    Collective over the default process group. What auto passes over is named on rank 0's stderr and, where the run is
    `owned` by the caller, set aside as `.corrupt`. None where auto finds no checkpoint at all. Raises StorageError on
    every rank where all are damaged, the wanted step is damaged or not there, or a file cannot be read: an older
    checkpoint is no answer to a disk that fails for a moment. RemovedError where the run is not `owned`, and whoever
    owns it removed the checkpoint that was looked at.
    """
    directory = run_dir / DIRECTORY
    damaged: list[tuple[Path, DamageError]] = []
    for path in on_rank_zero(lambda: candidates(directory, resume)):
        try:
            manifest = on_rank_zero(partial(_manifest_of, path))
            verify_together(path, manifest, verify_mode, needed)
        except DamageError as error:
            if not owned and not on_rank_zero(path.exists):
                raise RemovedError(f"{path}: was removed by its run while it was read") from error
            damaged.append((path, error))
        else:
            on_rank_zero(lambda: _pass_over(damaged, owned=owned))
            return path, manifest
    if damaged and resume != "auto":
        others = ", ".join(str(step) for step, _ in step_directories(directory) if str(step) != resume) or "none"
        raise StorageError(
            f"the checkpoint of step {resume} is damaged: {damaged[0][1]}; other steps there: {others}; "
            "checkpoint.resume=auto takes the newest that is whole"
        )
    if damaged:
        # Not set aside: the next start would take the run for one that never saved.
        found = "".join(f"\n  {path.name}: {error}" for path, error in damaged)
        raise StorageError(
            f"no valid checkpoint in {directory}{found}\nrestore a damaged file, or start a new run under another name"
        )
    return None


def _manifest_of(path: Path) -> Manifest:
    if path.is_symlink():
        raise DamageError(f"{path}: is a symbolic link; copy the checkpoint there, or use checkpoint.load")
    manifest = read_manifest(path)
    if path.name.removesuffix(REPLACED) != step_name(manifest.step):
        raise DamageError(f"{path}: its manifest is of step {manifest.step}")
    return manifest


def _pass_over(damaged: list[tuple[Path, DamageError]], *, owned: bool) -> None:
    for path, error in damaged:
        fate = f"set aside as {set_aside(path, CORRUPT).name}" if owned else "passed over"
        tell(f"checkpoint {path.name} is damaged and {fate}: {error}")


def candidates(directory: Path, resume: str) -> list[Path]:
    """The checkpoints that `resume` allows, whole or not, the newest first.

    Raises StorageError where the directory cannot be read, or `resume` is a step of which there is none.
    """
    try:
        found = step_directories(directory)
    except OSError as error:
        raise StorageError(f"{directory}: cannot be read: {error.strerror}") from error
    wanted = [path for step, path in found if resume in ("auto", str(step))]
    if resume == "auto":
        return wanted
    if not wanted:
        steps = ", ".join(str(step) for step, _ in found)
        there = f"steps there: {steps}" if steps else "nor of any other step"
        for aside in sorted(directory.glob(f"{step_name(int(resume))}{LEFT}*"))[:1]:
            there += f"; {aside.name} is of a course that was left: rename it to {step_name(int(resume))} to take it up"
        raise StorageError(f"no checkpoint of step {resume} in {directory}; {there}")
    return wanted


def files_needed(
    manifest: Manifest, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]
) -> set[str]:
    """Which files of a checkpoint hold something of these shards of parameters, or of the optimizer's state of them."""
    boxes = {name: local_box(parameter, shapes[name]) for name, parameter in parameters.items()}
    files = set()
    for name, entry in manifest.tensors.items():
        box = boxes.get(re.sub(r"^(model|optimizer\.[^.]+)\.", "", name))
        if box is None:  # of another pipeline stage
            continue
        for chunk in entry.chunks:
            # The optimizer's counters have no dimensions, and everybody reads them.
            if len(chunk.lengths) != len(box.lengths) or box.overlap(Box(chunk.offsets, chunk.lengths)).size:
                files.add(chunk.file)
    return files
