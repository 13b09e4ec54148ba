"""What becomes of a run's saves: begun, waited for, counted where they fail, and the time that they cost training."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from checkpoint.save import CheckpointSaver
from monitoring.recorder import Recorder
from parallel.agreement import on_rank_zero, run_on_all_ranks, to_all
from parallel.sharding import TensorPart
from runtime.errors import NonFiniteError, StorageError
from runtime.heartbeat import Heartbeat
from runtime.messages import counted
from runtime.stop import StopRequest

SLOW_FIRST_SAVE = 2.0
"""Seconds from which on the first save is worth a word."""


class CheckpointManager:
    """Saves of one run; every method but `poll` is collective, at the same step on all ranks.

    Args:
        most_failures: saves in a row that may fail before the run is asked to stop.
        recorder: on rank 0 alone.
        saved_step: that of the checkpoint from which the run goes on.
    """

    def __init__(
        self,
        saver: CheckpointSaver,
        most_failures: int,
        heartbeat: Heartbeat,
        stop: StopRequest,
        recorder: Recorder | None,
        saved_step: int,
    ) -> None:
        self._saver, self._heartbeat, self._stop, self._recorder = saver, heartbeat, stop, recorder
        self._most_failures = most_failures
        self._failures = 0
        self._error: StorageError | None = None
        self._stalled = 0.0
        self._ending = False
        self._is_first = True
        self.saved_step = saved_step
        """Of the newest checkpoint of this run that is known to be whole."""

    def save(self, step: int, tensors: Mapping[str, TensorPart], state: dict[str, Any]) -> None:
        """Begin to save, once the save before is over; tensors may change afterwards.

        Raises NonFiniteError on all ranks where a weight is not finite: who went on from such a checkpoint would get no
        further.
        """
        began = time.perf_counter()
        self.wait()
        recorder = self._recorder
        on_rank_zero(lambda: recorder.directory.ownership.check() if recorder else None)
        self._require_finite(step, tensors)
        with self._heartbeat.during("saving a checkpoint"):
            self._saver.save(step, tensors, state)
        self.poll()
        seconds = time.perf_counter() - began
        self._stalled += seconds
        if self._is_first and self._recorder and seconds > SLOW_FIRST_SAVE and not self._ending:
            self._recorder.console.note(
                f"the first save held training up for {seconds:.1f} s, as the memory of its copy was new; the next "
                "ones use it again"
            )
        self._is_first = False

    def _require_finite(self, step: int, tensors: Mapping[str, TensorPart]) -> None:
        named = {name: part.values for name, part in tensors.items() if name.startswith("model.")}
        weights = {name: values for name, values in named.items() if values.numel()}  # a shard may be empty
        non_finite = torch.tensor(float(not get_total_norm(weights.values(), math.inf).isfinite()))
        dist.all_reduce(non_finite)
        if not non_finite:
            return

        def own() -> str | None:
            names = (name for name, values in weights.items() if not values.isfinite().all())
            return next(names, "").removeprefix("model.")

        name = run_on_all_ranks(
            own, to_all(lambda found: next(filter(None, found))), "looking for weights that are not finite"
        )
        goes_on = f"the newest checkpoint is of step {self.saved_step}" if self.saved_step else "there is no checkpoint"
        raise NonFiniteError(
            f"step {step}: its update made weights of {name} not finite, so the step is not saved; {goes_on}; try a "
            "smaller optimizer.lr, or more schedule.warmup_steps"
        )

    def save_last(self, step: int, tensors: Mapping[str, TensorPart], state: dict[str, Any]) -> None:
        """Save, and wait for it. Raises StorageError on all ranks where that fails."""
        self._ending = True
        self.save(step, tensors, state)
        self.wait()
        if self.saved_step != step and self._error is not None:
            raise StorageError(
                f"step {step} is not saved: {self._error}; once that is mended, the same command goes on from step "
                f"{self.saved_step}"
            ) from self._error

    def wait(self) -> None:
        """Until the last save is over on all ranks."""
        # Each rank says what is its own to do, and nothing while it waits for others.
        with self._heartbeat.during("writing a checkpoint"):
            self._saver.written.wait()
        self._saver.all_written.wait()
        with self._heartbeat.during("finishing a checkpoint" if self._recorder else None):
            self.poll(wait=True)

    def poll(self, *, wait: bool = False) -> None:
        """Take note of a save that is over. Too many that failed in a row ask the run to stop."""
        ended = self._saver.ended(wait=wait)
        if ended is None:
            return
        if ended.error is None:
            self.saved_step = ended.step
            trouble = self._recorded(ended.step)
        elif isinstance(ended.error, StorageError):
            self._error = ended.error
            trouble = f"step {ended.step} is not saved", str(ended.error)
        else:
            raise ended.error
        if trouble is None:
            self._failures = 0
            return
        self._failures += 1
        stops = self._failures > self._most_failures
        if self._recorder and not self._ending:
            fate = f"failure {self._failures} in a row, {'which stops the run' if stops else 'training goes on'}"
            self._recorder.console.note(f"{trouble[0]} ({fate}): {trouble[1]}")
        if stops:
            unwritten = " or left metrics unwritten" if ended.error is None else ""
            self._stop.ask(f"{counted(self._failures, 'save')} in a row that failed{unwritten}")

    def _recorded(self, step: int) -> tuple[str, str] | None:
        """Puts down a save that is whole; what is wrong all the same, and why, where lines of metrics wait."""
        if self._recorder is None:
            return None
        self._recorder.running(step)
        waiting = self._recorder.metrics.retry()
        return (f"step {step} is saved", f"{counted(waiting, 'line')} of metrics wait in memory") if waiting else None

    def pop_stall_ms(self) -> float:
        """Milliseconds that saves held training up since the last call."""
        stalled, self._stalled = self._stalled, 0.0
        return 1000 * stalled
