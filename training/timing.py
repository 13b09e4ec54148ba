"""How long steps take, as the device sees it, and how much memory they hold."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Moment:
    """The moment at which a device has done all that it was given before this object was made; on a CPU that is now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._seconds = time.perf_counter()

    def wait(self) -> None:
        """Lets the host wait until the moment has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Seconds that passed on the device since an earlier moment of the same device; both have come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1000


class StepTimer:
    """Adds up the time of the host that is no part of a step, and the time that it waits for data."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waited = 0.0
        self._paused = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Surrounds the wait for a batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Surrounds what is no part of a step, such as an evaluation.

        The device finishes its steps first, so that no step goes on during the time that is left out.
        """
        Moment(self._device).wait()
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def take(self) -> tuple[float, float]:
        """(seconds that the host waited for data, seconds of pauses) since the last call."""
        taken = self._waited, self._paused
        self._waited, self._paused = 0.0, 0.0
        return taken


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in GB of 1e9 bytes: on a GPU by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
