"""Time is the device's own, and pauses and waits are added up until somebody takes them."""

import time
from typing import ClassVar

import pytest
import torch

from monitoring.throughput import Moment, StepTimer

CPU = torch.device("cpu")


def test_on_a_cpu_a_moment_is_when_it_is_made():
    first = Moment(CPU)
    time.sleep(0.05)
    second = Moment(CPU)
    second.wait()
    assert 0.05 <= second.seconds_since(first) < time.perf_counter()
    assert second.seconds_since(first) == -first.seconds_since(second)


class Event:
    """A CUDA event of a device on which one second passes between any two."""

    asked: ClassVar[list[str]] = []

    def __init__(self, *, enable_timing):
        assert enable_timing
        self.place = None

    def record(self, stream):
        self.place = len([word for word in self.asked if word == f"recorded on {stream}"])
        self.asked.append(f"recorded on {stream}")

    def synchronize(self):
        self.asked.append(f"waited for {self.place}")

    def elapsed_time(self, later):
        return 1000.0 * (later.place - self.place)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(Event, "asked", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    return torch.device("cuda:0")


def test_on_a_gpu_a_moment_is_an_event_of_its_stream(gpu):
    first, second, third = (Moment(gpu) for _ in range(3))
    assert Event.asked == ["recorded on the stream of cuda:0"] * 3
    third.wait()
    assert Event.asked[3:] == ["waited for 2"]
    assert (third.seconds_since(first), third.seconds_since(second)) == (2.0, 1.0)


def test_a_pause_waits_for_the_device_first(gpu):
    with StepTimer(gpu).pause():
        assert Event.asked == ["recorded on the stream of cuda:0", "waited for 0"]


def test_waits_and_pauses_add_up_until_they_are_taken():
    timer = StepTimer(CPU)
    for _ in range(2):
        with timer.waiting_for_data():
            time.sleep(0.02)
        with timer.pause():
            time.sleep(0.05)
    waited, paused = timer.take()
    assert 0.04 <= waited < paused
    assert paused >= 0.1
    assert timer.take() == (0.0, 0.0)
