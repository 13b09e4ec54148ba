"""Saving the checkpoints of a run, beside training: it pauses only while values are copied to where they stay put."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.directory import DIRECTORY, Retention, require_space, step_name, tidy
from checkpoint.host_copy import HostCopy
from checkpoint.load import parts_of
from checkpoint.manifest import Manifest, TensorEntry
from checkpoint.plan import Claim, Plan, claims, share_out
from checkpoint.tensor_files import WrittenFile, write_parts
from checkpoint.writer import CheckpointWriter
from parallel.agreement import run_on_all_ranks, to_all
from parallel.sharding import TensorPart
from runtime.errors import RunDirectoryError
from runtime.fault_injection import Faults


@dataclass(frozen=True)
class SaveResult:
    """A save that is over, on all ranks alike."""

    step: int
    error: Exception | None
    """StorageError where storage failed: what stood before stands, and nothing is left of the save. RunDirectoryError
    where the run directory is another job's by now."""


class CheckpointSaver:
    """Saves one checkpoint after another as `<run_dir>/checkpoints/step_XXXXXXXX`.

    All ranks save at the same steps. With `asynchronous`, a thread of each rank writes from a copy in host memory,
    which is kept from save to save, and takes part in collectives of a group of its own.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: Retention,
        *,
        asynchronous: bool = False,
        faults: Faults | None = None,
        require_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """`require_owner` is that of CheckpointWriter; it is asked on rank 0 alone."""
        self._directory = run_dir / DIRECTORY
        self._keep = keep
        self._asynchronous = asynchronous
        self._faults = faults or Faults()
        self._require_owner = require_owner
        self._plan: Plan | None = None
        self._host = HostCopy()
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._ended: SaveResult | None = None
        self.written = threading.Event()
        """This rank's file of the last save is on disk, or never will be."""
        self.all_written = threading.Event()
        """Those of all ranks are, as rank 0 knows, which then finishes the checkpoint; or the save is over."""
        self.written.set()
        self.all_written.set()

    def require_space(self, tensors: Mapping[str, TensorPart | torch.Tensor]) -> None:
        """Collective. Raises StorageError on every rank where a checkpoint of `tensors` finds no room on the disk."""
        size = self._planned(parts_of(tensors)).size
        doing = f"looking for room in {self._directory}"
        run_on_all_ranks(lambda: None, to_all(lambda _: require_space(self._directory, size)), doing)

    def save(self, step: int, tensors: Mapping[str, TensorPart | torch.Tensor], state: dict[str, Any]) -> None:
        """Save `tensors` and the JSON `state`; what came of it, `ended` says. Collective.

        Ranks may have different tensors; a part that several have is the same on all, and written by one of them.
        `ended` was asked what came of the save before; its values may change once this one returns.
        """
        assert self._thread is None, "the save before has not ended"
        parts = parts_of(tensors)
        plan = self._planned(parts)
        own = {name: parts[name] for name in plan.names}
        passing = self._faults.of_step(step)
        manifest = Manifest(step, state, {}, plan.entries)
        writer = CheckpointWriter(self._directory, manifest, self._keep, passing, self._require_owner)
        if not self._asynchronous:
            self._write(writer, step, plan.size, own)
            return
        self.written.clear()
        self.all_written.clear()
        passing("checkpoint.stage")
        copies = self._host.take({name: part.values for name, part in own.items()})
        own = {name: replace(part, values=copies[name]) for name, part in own.items()}
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        arguments = writer, step, plan.size, own
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self, *, wait: bool = False) -> SaveResult | None:
        """What came of the last save, once; None where it goes on, or nothing is new. Ranks may see it at different
        moments; with `wait` all do."""
        if self._thread is not None and (wait or not self._thread.is_alive()):
            self._thread.join()
            self._thread = None
        if self._thread is not None:
            return None
        ended, self._ended = self._ended, None
        return ended

    def _planned(self, parts: Mapping[str, TensorPart]) -> Plan:
        if self._plan is None:

            def share(claimed: list[list[Claim]]) -> list[Plan]:
                entries = {claim.name: TensorEntry(claim.dtype, claim.shape, ()) for own in claimed for claim in own}
                size = sum({claim: claim.nbytes for own in claimed for claim in own}.values())
                shares = enumerate(share_out(claimed))
                return [Plan(names, {} if rank else entries, size) for rank, names in shares]

            self._plan = run_on_all_ranks(lambda: claims(parts), share, "sharing out the writing of checkpoints")
        return self._plan

    def _write(self, writer: CheckpointWriter, step: int, size: int, own: dict[str, TensorPart]) -> None:
        doing, error = f"saving {writer.target}", None
        passing = self._faults.of_step(step)
        try:
            folder = run_on_all_ranks(lambda: None, to_all(lambda _: writer.begin(size)), doing, self._group)
            file = folder / f"rank_{dist.get_rank():05d}.safetensors"

            def write() -> WrittenFile | None:
                written = write_parts(file, own, passing) if own else None
                self.written.set()
                return written

            def finish(files: list[WrittenFile | None]) -> list[None]:
                self.all_written.set()
                return writer.finish(files)

            run_on_all_ranks(write, finish, doing, self._group)
        except Exception as failure:
            error = failure
            if dist.get_rank() == 0:
                # What cannot be removed now is removed by the next save; what is another job's by now is left alone.
                with contextlib.suppress(OSError, RunDirectoryError):
                    self._require_owner()
                    tidy(self._directory)
        self._ended = SaveResult(step, error)
        self.written.set()
        self.all_written.set()


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, TensorPart | torch.Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Save one checkpoint, as CheckpointSaver does, and return its path; the newest `keep` up to `step` stay.

    Raises StorageError on every rank where storage fails on any, RuntimeError where anything else does; the checkpoints
    that stood before still stand then.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(run_dir, Retention(keep))
    saver.save(step, tensors, state)
    ended = saver.ended()
    if ended is not None and ended.error is not None:
        raise ended.error
    return run_dir / DIRECTORY / step_name(step)
