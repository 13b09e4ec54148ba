"""How fast a device trains: the time of a step, its memory, and the share of its peak arithmetic."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core.flops import flops_per_token
from settings.config import RunConfig


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


PEAK_TERAFLOPS: dict[str, dict[str, float]] = {
    "v100": {"fp16": 125, "fp32": 15.7},
    "v100 pcie": {"fp16": 112, "fp32": 14},
    "v100s pcie": {"fp16": 130, "fp32": 16.4},
    "t4": {"fp16": 65, "fp32": 8.1},
    "a10": {"fp16": 125, "bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "a30": {"fp16": 165, "bf16": 165, "tf32": 82, "fp32": 10.3},
    "a40": {"fp16": 149.7, "bf16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "a100": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    "a100 pcie": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    "rtx 3090": {"fp16": 71, "bf16": 71, "tf32": 35.6, "fp32": 35.6},
    "rtx 4090": {"fp16": 165.2, "bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "l4": {"fp16": 121, "bf16": 121, "tf32": 60, "fp32": 30.3},
    "l40": {"fp16": 181, "bf16": 181, "tf32": 90.5, "fp32": 90.5},
    "l40s": {"fp16": 362, "bf16": 362, "tf32": 183, "fp32": 91.6},
    "h100": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "h100 pcie": {"fp16": 756, "bf16": 756, "tf32": 378, "fp32": 51.2},
    "h100 nvl": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.5, "fp32": 60},
    "gh200": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "h200": {"fp16": 989.4, "bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "h200 nvl": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.5, "fp32": 60},
    "b200": {"fp16": 2250, "bf16": 2250, "tf32": 1125, "fp32": 75},
    "gb200": {"fp16": 2500, "bf16": 2500, "tf32": 1250, "fp32": 80},
    # One of the card's two dies, which is what a process sees.
    "mi250x": {"fp16": 191.5, "bf16": 191.5},
    "mi300x": {"fp16": 1307.4, "bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},
    "mi325x": {"fp16": 1307.4, "bf16": 1307.4, "tf32": 653.7, "fp32": 163.4},
}
"""Teraflops by device and `train.precision`, from the makers' data sheets: dense, summed in float32; fp32 on NVIDIA's
without tensor cores. What is not certain is absent."""
PLAIN_WORDS = re.compile(r"nvidia|tesla|geforce|amd|instinct|sxm[245]|\d+gb|hbm3e?")
"""Words in a device's name that make no difference to its peak. Any other does: `MIG`, `Laptop`, `Ti`."""


def device_name(device: torch.device) -> str:
    """A device as a person calls it: the name of a GPU, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(device: str, precision: str) -> float | None:
    """Floating-point operations a second of a device by its name, as `torch.cuda.get_device_name` has it; None where
    they are not known in `precision`."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    model = " ".join(word for word in words if not PLAIN_WORDS.fullmatch(word))
    teraflops = PEAK_TERAFLOPS.get(model, {}).get(precision)
    return None if teraflops is None else teraflops * 1e12


def model_flops_utilization(config: RunConfig, tokens_per_second: float, device: str) -> float | None:
    """MFU (arXiv:2204.02311): the share, 0 to 1, of the arithmetic of all ranks' devices that the model needs.

    Args:
        config: resolved.
        tokens_per_second: over all ranks.
        device: the name of each rank's device.

    None where the device's peak is not known.
    """
    peak = peak_flops(device, config.train.precision)
    if peak is None:
        return None
    needed = flops_per_token(config.model, config.seq_length) * tokens_per_second
    return needed / (peak * (config.world_size or 1))
