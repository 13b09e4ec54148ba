"""Time on a device, and what nvidia-smi says of it meanwhile."""

import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch

Mark = torch.cuda.Event | float
"""A moment of a device's work: an event on a GPU, seconds of a clock on a CPU."""
SMI_SECONDS = 5.0
"""How long nvidia-smi may take to answer."""


def mark(device: torch.device) -> Mark:
    """The moment at which the device will have done all that was started so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Seconds between two moments of one device; waits for the second."""
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def seconds_of(action: Callable[[], object], device: torch.device, *, enough: float) -> float:
    """Seconds of one call: the median of five rounds, each of as many calls as take about `enough` seconds."""
    action()
    begin = mark(device)
    action()
    once = seconds_between(begin, mark(device))
    calls = max(1, min(100, int(enough / max(once, 1e-6))))
    rounds = []
    for _ in range(5):
        begin = mark(device)
        for _ in range(calls):
            action()
        rounds.append(seconds_between(begin, mark(device)) / calls)
    return statistics.median(rounds)


def ask_nvidia_smi(*fields: str) -> list[str] | None:
    """What nvidia-smi says of the first GPU that this process sees, a word for each field; None where it is absent."""
    chosen = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        chosen = [f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *chosen]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [word.strip() for word in answer.stdout.splitlines()[0].split(",")]


class Sensors:
    """Asks for clock and power every half second while it is open, beside what is timed."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Sensors":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._closed.wait(0.5):
            words = ask_nvidia_smi("clocks.sm", "power.draw")
            if words is None:
                return
            try:
                self._samples.append((float(words[0]), float(words[1])))
            except ValueError:  # a field that the device does not report
                return

    def medians(self) -> tuple[float, float] | None:
        """(MHz of the multiprocessors, watts); None where nothing was reported."""
        if not self._samples:
            return None
        clocks, watts = zip(*self._samples, strict=True)
        return statistics.median(clocks), statistics.median(watts)
