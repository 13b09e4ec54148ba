"""Times training steps of one shape, of Kilotron or of transformers; for a process of its own."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_clock import Sensors, mark, seconds_between
from benchmarks.gpu_profile import profile_steps
from benchmarks.gpu_variants import VARIANTS
from benchmarks.steps import Step, kilotron_step, transformers_step
from core.config import ModelConfig
from core.flops import flops_per_token
from monitoring.throughput import peak_flops
from parallel.process_group import process_group

Row = dict[str, Any]
"""What is known of a figure, by name; plain values only."""
PRECISION = "bf16"
WARM_UP = 3
"""Steps that compile and allocate, and are not timed."""


@dataclass(frozen=True)
class StepCase:
    """One figure: which step to time."""

    part: str
    shape: str
    config: ModelConfig
    seq_length: int
    rows: int
    """Of a micro-batch."""
    accumulate: int
    """Micro-batches a step."""
    peer: str
    mode: str
    variant: str
    goal: float | None
    """Model FLOPs utilisation to reach, 0 to 1; None: none."""
    steps: int
    profiles: Path
    """Folder for the profile."""
    wrapped: bool = True
    """False: weights are bfloat16 themselves, and FSDP has nothing to cast."""

    @property
    def title(self) -> str:
        """Names the case in a line and in the name of a file."""
        words = [self.shape, self.peer, self.mode, f"{self.rows}x{self.seq_length}"]
        words += [f"accumulate-{self.accumulate}"] if self.accumulate > 1 else []
        words += [self.variant] if self.variant != "base" else []
        words += [] if self.wrapped else ["unwrapped"]
        return " ".join(words)

    def described(self) -> Row:
        """What the case itself says."""
        return {
            "part": self.part,
            "title": self.title,
            "shape": self.shape,
            "peer": self.peer,
            "mode": self.mode,
            "variant": self.variant,
            "layers": self.config.num_layers,
            "vocabulary": self.config.vocabulary,
            "batch": f"{self.accumulate} x {self.rows} x {self.seq_length}",
            "wrapped": self.wrapped,
            "goal": self.goal,
        }

    def build(self, config: ModelConfig, device: torch.device) -> Step:
        """The step of a configuration that a variant may have changed."""
        shape = config, self.rows, self.seq_length, PRECISION, device
        how: dict[str, Any] = {"compiled": self.mode == "compiled", "accumulate": self.accumulate}
        if self.peer == "kilotron":
            return kilotron_step(*shape, **how, wrapped=self.wrapped)
        return transformers_step(*shape, **how)


def measure(case: StepCase) -> list[Row]:
    """The case's figures. Raises RuntimeError where a loss is not finite."""
    with process_group(timedelta(minutes=10), {}) as process, VARIANTS[case.variant](case.config) as config:
        device = process.device
        step = case.build(config, device)
        for _ in range(WARM_UP):
            step()()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with Sensors() as sensors:
            seconds, mean, losses = time_steps(step, case.steps, device)
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(f"losses that are not finite: {losses}")
        memory = torch.cuda.memory_stats() if device.type == "cuda" else {}
        profiled = profile_steps(step, device)
    median = statistics.median(seconds)
    path = case.profiles / f"profile {case.title}.txt".replace(" ", "_")
    path.write_text(profiled.table(case.title, median), encoding="utf-8")
    rate = case.rows * case.accumulate * case.seq_length / median
    peak = peak_flops(torch.cuda.get_device_name(), PRECISION) if device.type == "cuda" else None
    mfu = None if peak is None else rate * flops_per_token(case.config, case.seq_length) / peak
    clock, watts = sensors.medians() or (None, None)
    found = {
        "median_ms": 1000 * median,
        "mean_ms": 1000 * mean,
        "tokens_per_second": rate,
        "mfu": mfu,
        "goal_met": None if mfu is None or case.goal is None else mfu >= case.goal,
        "allocated_gb": _gigabytes(memory.get("allocated_bytes.all.peak")),
        "reserved_gb": _gigabytes(memory.get("reserved_bytes.all.peak")),
        "attention": profiled.attention[:60],
        "busy_ms": None if profiled.busy is None else 1000 * profiled.busy,
        "idle": profiled.idle,
        "clock_mhz": clock,
        "watts": watts,
        "loss": losses[-1],
    }
    return [case.described() | found]


def time_steps(step: Step, steps: int, device: torch.device) -> tuple[list[float], float, list[float]]:
    """Seconds of each step by the device's own clock, their mean by the host's, and losses. The host waits only at the
    end, as a trainer that logs rarely does."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin, marks = time.perf_counter(), [mark(device)]
    waiting: list[Callable[[], float]] = []
    for _ in range(steps):
        waiting.append(step())
        marks.append(mark(device))
    losses = [finish() for finish in waiting]
    if device.type == "cuda":
        torch.cuda.synchronize()
    mean = (time.perf_counter() - begin) / steps
    return [seconds_between(*pair) for pair in pairwise(marks)], mean, losses


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e9
