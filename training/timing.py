"""How long steps take and how much memory they hold."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Times the steps between two logged ones; what lies outside `step` (evaluations, checkpoints) does not count."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._waited = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surrounds a whole step, waiting for data and reading results included."""
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin
        self._steps += 1

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Surrounds the wait for a batch, inside a step."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def take(self) -> tuple[float, float]:
        """(milliseconds a step, milliseconds of it waiting for data) since the last call."""
        steps = max(1, self._steps)
        taken = 1000 * self._seconds / steps, 1000 * self._waited / steps
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return taken


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in GB of 1e9 bytes: on a GPU by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
