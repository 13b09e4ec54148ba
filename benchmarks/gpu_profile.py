"""A profile of a few training steps: which kernels take the device's time, and how long it has nothing to do."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.steps import Step

STEPS = 2
"""Steps that are profiled."""
LISTED = 25
ATTENTION = r"(?!triton_).*(flash|fmha|sdpa|scaled_dot_product)"
"""Kernels of attention, by name; compiled kernels are named after all operations that they are fused of."""
BACKWARD = r".*(bwd|bprop|backward|dgrad|cutlassB)"


@dataclass(frozen=True)
class StepProfile:
    """Where the time of the profiled steps went."""

    kernels: dict[str, tuple[float, int]]
    """(seconds, calls) of all the steps, by the name of a kernel; on a CPU of an operator."""
    busy: float | None
    """Seconds of a step in which some kernel ran; None on a CPU."""
    idle: float | None
    """Share of the profiled time, 0 to 1, in which none did; None on a CPU. The profiler itself slows the host down."""

    @property
    def attention(self) -> str:
        """The kernel of attention's forward pass that took the longest."""
        names = [name for name in self.kernels if re.match(ATTENTION, name) and not re.match(BACKWARD, name)]
        return max(names, key=lambda name: self.kernels[name][0], default="none found")

    def table(self, title: str, step_seconds: float) -> str:
        """Text for a file; `step_seconds` is the median of a step that was not profiled."""
        total = sum(seconds for seconds, _ in self.kernels.values())
        lines = [title, f"median of a step without the profiler: {1000 * step_seconds:.2f} ms"]
        if self.busy is not None and self.idle is not None:
            lines.append(
                f"the device is busy for {1000 * self.busy:.2f} ms of a step, and idle for {self.idle:.1%} of the "
                f"profiled time"
            )
        lines.append(f"{'ms a step':>10} {'share':>6} {'calls':>6}  kernel")
        for name, (seconds, calls) in sorted(self.kernels.items(), key=lambda item: -item[1][0])[:LISTED]:
            lines.append(f"{1000 * seconds / STEPS:10.3f} {seconds / total:6.1%} {calls // STEPS:6}  {name[:160]}")
        return "\n".join(lines) + "\n"


def profile_steps(step: Step, device: torch.device) -> StepProfile:
    """Takes STEPS steps under the profiler."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        waiting: list[Callable[[], float]] = [step() for _ in range(STEPS)]
        for finish in waiting:
            finish()
        if on_gpu:
            torch.cuda.synchronize()
    if not on_gpu:
        averages = found.key_averages()
        return StepProfile({each.key: (each.self_cpu_time_total / 1e6, each.count) for each in averages}, None, None)
    events = [event for event in found.events() if "CUDA" in str(event.device_type) and not event.is_user_annotation]
    seconds, calls = Counter[str](), Counter[str]()
    for event in events:
        seconds[event.name] += event.time_range.elapsed_us() / 1e6
        calls[event.name] += 1
    busy, idle = busy_and_idle([(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events])
    return StepProfile({name: (seconds[name], calls[name]) for name in seconds}, busy / STEPS, idle)


def busy_and_idle(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds in which at least one of the (begin, end) runs, and the share of the whole time in which none does."""
    if not spans:
        return 0.0, 1.0
    busy, reached = 0.0, min(begin for begin, _ in spans)
    first = reached
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy, 1 - busy / (reached - first)
