"""TensorBoard: what it reads back is what was logged, once a step, whatever was resumed."""

import sys
from dataclasses import replace

import pytest

from monitoring.metrics import EvaluationMetrics
from monitoring.trackers import open_tensorboard
from tests.monitoring.test_metrics import STEP


def scalars(run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def start(run_dir, resumed, steps, loss):
    notes = []
    mirror = open_tensorboard(run_dir, resumed, notes.append)
    for step in steps:
        mirror.log_step(replace(STEP, step=step, loss=loss))
    mirror.log_evaluation(EvaluationMetrics(step=steps[-1], loss=0.0))
    mirror.close(failed=False)
    return notes


def test_every_known_number_is_a_point_of_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    assert start(tmp_path, 0, [3], loss=4.125) == []
    found = scalars(tmp_path)
    assert found["loss"] == [(3, 4.125)]
    assert found["eval_loss"] == [(3, 0.0)]
    assert found["perplexity"] == [(3, 1.0)]
    assert "tokens_per_second_per_gpu" in found
    assert not {"mfu", "step"} & set(found)


def test_a_resume_takes_back_what_came_after_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    start(tmp_path, 0, range(1, 8), loss=1.0)
    # From the checkpoint of step 4, and logging more rarely than before.
    start(tmp_path, 4, [6, 9], loss=2.0)
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (6, 2.0), (9, 2.0)]
    assert scalars(tmp_path)["eval_loss"] == [(9, 0.0)]


def test_a_missing_package_or_an_obstacle_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    (note,) = start(tmp_path, 0, [1], loss=1.0)
    assert note.startswith("tensorboard: no event files (")
    assert "\n" not in note
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (note,) = start(tmp_path, 0, [1], loss=1.0)
    assert note.endswith("`pip install tensorboard` brings it)")
