"""A profile of a few steps: a trace of what ran when, the operators that took longest, and on a GPU the memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from runtime.messages import first_line

OPERATORS = 10
"""Rows of the table."""
MEMORY_EVENTS = 100_000
"""Allocations and releases that the picture of the memory goes back."""


class StepProfiler:
    """Profiles the steps in a range, on this rank. Best effort: a failure is one line, and the end of the profile."""

    def __init__(
        self,
        steps: range,
        folder: Path,
        device: torch.device,
        note: Callable[[str], None],
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Does nothing where `steps` is empty or was passed; `note` prints a line. Setting up and writing happen within
        `pause`, which lets the device finish its steps and leaves the time out of theirs."""
        self._steps, self._folder, self._device, self._note = steps, folder, device, note
        self._pause = pause
        self._profile: profile | None = None
        self._recorded: list[int] = []
        self._marker: record_function | None = None

    def begin(self, step: int) -> None:
        """Goes before a step."""
        self._attempt(self._begin, step)

    def end(self, step: int) -> None:
        """Goes after a step; after the last of the range it writes the profile."""
        self._attempt(self._end, step)

    def close(self) -> None:
        """Writes what there is of a profile where the run ends inside the range. Waits for the device."""
        self._attempt(self._end, self._steps.stop - 1)

    def _attempt(self, action: Callable[[int], None], step: int) -> None:
        try:
            action(step)
        except Exception as error:
            self._steps, self._profile = range(0), None
            self._note(f"profile: given up ({type(error).__name__}: {first_line(error)})")

    def _begin(self, step: int) -> None:
        # Tracers slow down the step after they were set up, which should be the one before those that count.
        if self._profile is None and (step in self._steps or step + 1 in self._steps):
            with self._pause():
                self._profile = self._set_up()
        if self._profile is not None and step in self._steps:
            if not self._recorded:
                with self._pause():
                    self._profile.start_trace()
            self._recorded.append(step)
            self._marker = record_function(f"step {step}")
            self._marker.__enter__()

    def _set_up(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        profiled = profile(activities=activities, record_shapes=True, profile_memory=True)
        profiled.prepare_trace()
        return profiled

    def _end(self, step: int) -> None:
        if self._marker is not None:
            self._marker.__exit__(None, None, None)
            self._marker = None
        if self._profile is None or step != self._steps[-1]:
            return
        with self._pause():
            if not self._recorded:
                self._profile.start_trace()
            self._profile.stop_trace()
            if self._recorded:
                self._write(self._profile, f"steps_{self._recorded[0]}-{self._recorded[-1]}")
        self._steps, self._profile = range(0), None

    def _write(self, profiled: profile, name: str) -> None:
        order, memory = "self_cpu_time_total", None
        if self._device.type == "cuda":
            order, memory = "self_device_time_total", torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
        for folder in (self._folder.parent, self._folder):  # not the run directory, which may have been moved away
            folder.mkdir(exist_ok=True)
        table = profiled.key_averages().table(sort_by=order, row_limit=OPERATORS)
        (self._folder / f"{name}.operators.txt").write_text(f"{table}\n", encoding="utf-8")
        profiled.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        if memory is not None:
            # A page that a browser reads, rather than torch's pickle, which nobody should have to load.
            from torch.cuda._memory_viz import trace_plot

            (self._folder / f"{name}.memory.html").write_text(trace_plot(memory), encoding="utf-8")
        self._note(f"profile: {self._folder / name}.* (the trace opens in ui.perfetto.dev)")
