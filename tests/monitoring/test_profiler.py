"""A profile holds the steps that were asked for, and whatever fails about it stays with it."""

import gzip
import json
import re
from contextlib import contextmanager

import pytest
import torch

from monitoring.profiler import OPERATORS, StepProfiler

CPU = torch.device("cpu")


def profiled(folder, asked, taken, notes, device=CPU):
    """Takes steps under a profiler, as the trainer does; returns the files by name."""
    profiler = StepProfiler(asked, folder, device, notes.append)
    for step in taken:
        profiler.begin(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.end(step)
    profiler.close()
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


def test_steps_are_taken_outside_of_the_pauses_in_which_it_sets_up_and_writes(tmp_path):
    order = []

    @contextmanager
    def pause():
        order.append("pause")
        yield
        order.append("go on")

    profiler = StepProfiler(range(3, 5), tmp_path, CPU, lambda _: order.append("written"), pause)
    for step in range(1, 7):
        profiler.begin(step)
        order.append(step)
        profiler.end(step)
    profiler.close()
    assert order == [1, "pause", "go on", 2, "pause", "go on", 3, 4, "pause", "written", "go on", 5, 6]


def traced_steps(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    products = sum(event["name"] == "aten::mm" for event in events)
    return sorted(int(name.split()[1]) for name in names if re.fullmatch(r"step \d+", name)), products


@pytest.mark.parametrize(
    ("taken", "found"),
    [
        (range(1, 8), [3, 4, 5]),
        (range(3, 6), [3, 4, 5]),
        (range(4, 9), [4, 5]),  # resumed inside
        (range(1, 5), [3, 4]),  # told to stop inside
    ],
)
def test_the_trace_holds_exactly_the_steps_of_the_range(tmp_path, taken, found):
    notes = []
    files = profiled(tmp_path / "logs" / "profile", range(3, 6), taken, notes)
    name = f"steps_{found[0]}-{found[-1]}"
    assert set(files) == {f"{name}.trace.json.gz", f"{name}.operators.txt"}
    assert traced_steps(files[f"{name}.trace.json.gz"]) == (found, len(found))
    table = files[f"{name}.operators.txt"].read_text()
    assert "aten::mm" in table
    assert "CPU Mem" in table
    rows = [line for line in table.splitlines()[3:] if re.search(r"\d%", line)]
    assert len(rows) <= OPERATORS
    assert len(notes) == 1
    assert name in notes[0]


@pytest.mark.parametrize("taken", [range(6, 9), range(1, 2), range(1, 3)], ids=["after", "long before", "just before"])
def test_a_start_that_takes_none_of_the_steps_writes_nothing(tmp_path, taken):
    notes = []
    assert profiled(tmp_path / "profile", range(3, 6), taken, notes) == {}
    assert notes == []
    # The tracer is free again.
    assert profiled(tmp_path / "profile", range(1, 2), range(1, 2), notes)


def test_a_failure_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    notes = []
    profiled(tmp_path / "file" / "profile", range(2, 4), range(1, 9), notes)
    assert len(notes) == 1
    assert notes[0].startswith("profile: given up (FileExistsError: ")
    assert profiled(tmp_path / "profile", range(1, 2), range(1, 2), notes)


def test_on_a_gpu_the_memory_is_recorded_for_as_long_as_the_profile_and_shown_in_a_page(monkeypatch, tmp_path):
    calls, notes = [], []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: calls.append(enabled))
    monkeypatch.setattr(memory, "_snapshot", lambda: calls.append("snapshot") or {"segments": [], "device_traces": []})
    files = profiled(tmp_path / "profile", range(2, 4), range(1, 6), notes, torch.device("cuda"))
    assert calls == ["all", "snapshot", None]
    assert set(files) == {f"steps_2-3.{end}" for end in ("trace.json.gz", "operators.txt", "memory.html")}
    assert "snapshot" in files["steps_2-3.memory.html"].read_text()
