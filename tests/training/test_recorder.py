"""What a recorder says beside the lines of the contract, and the order in which it closes."""

import io
from dataclasses import replace

import pytest

from tests.training.test_metrics import STEP
from training import recorder as recorder_module
from training.config import RunConfig, TrainConfig
from training.console import Console
from training.recorder import Recorder
from training.run_directory import RunDirectory


@pytest.fixture
def recorder(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.own()
    made = Recorder(RunConfig(name=tmp_path.name, out_dir=str(tmp_path.parent), train=TrainConfig(steps=9)), directory)
    made.start(0)
    yield made
    made.close("failed", 0, "")


def said(recorder, *shares, ranks=1):
    """What is printed below each logged step, in which waiting for data took such a share."""
    lines = []
    for share in shares:
        recorder.console = Console(9, interactive=False, stream=io.StringIO())
        speed = STEP.tokens_per_second / ranks
        recorder.step(replace(STEP, step_ms=100.0, data_ms=100.0 * share, tokens_per_second_per_gpu=speed))
        step, *more = recorder.console._stream.getvalue().splitlines()
        assert step.startswith("step ")
        lines.append(more)
    return lines


def test_slow_data_is_said_once_until_it_gets_better(recorder):
    first, slow, slower, hardly_better, slow_again, good, bad = said(recorder, 0.9, 0.06, 0.5, 0.04, 0.06, 0.01, 0.2)
    assert first == slower == hardly_better == slow_again == good == []
    (line,) = slow
    assert "waited for its batches 6% of the time" in line
    assert "try data.num_workers=2" in line
    assert "20%" in bad[0]


def test_the_speed_of_a_rank_is_said_once_and_only_of_many(recorder):
    assert said(recorder, 0, 0, 0, ranks=2) == [[], ["speed  6.17k tok/s a rank"], []]


def test_one_rank_has_no_speed_of_its_own(recorder):
    assert said(recorder, 0, 0) == [[], []]


def test_steps_to_record_that_lie_before_the_start_are_said(recorder):
    for profile, timeline_step, notes in (("2-3", 3, 2), ("2-4", 4, 0), (None, None, 0)):
        train = replace(recorder.config.train, profile=profile, timeline_step=timeline_step)
        recorder.config = replace(recorder.config, train=train)
        recorder.console = Console(9, interactive=False, stream=io.StringIO())
        recorder.start(3)
        assert recorder.console._stream.getvalue().count("records nothing: the run goes on from step 3\n") == notes


def test_the_status_is_written_before_a_picture_is_drawn(tmp_path, monkeypatch):
    directory, seen = RunDirectory(tmp_path), []
    monkeypatch.setattr(recorder_module, "plot_loss", lambda *_: seen.append(directory.read_status().state))
    Recorder(RunConfig(), directory).close("failed", 0, "nothing to draw yet")
    assert seen == []
    recorder = Recorder(RunConfig(), directory)
    recorder.step(STEP)
    recorder.close("preempted", 3, "SIGUSR1")
    assert seen == ["preempted"]
