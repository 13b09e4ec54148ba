"""loss.png: drawn from what was logged, atomically, without touching matplotlib's global state."""

import json
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.metrics import read_curves
from monitoring.plot import plot_loss, smooth
from runtime.errors import StorageError


def write_records(run_dir: Path, *records: dict) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def plot(run_dir: Path, *references: dict[str, float]) -> Path | None:
    return plot_loss(run_dir, read_curves(run_dir / "metrics.jsonl"), *references)


def picture_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert b"IEND" in content[-12:]
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_nothing_logged_draws_nothing(tmp_path: Path):
    assert plot(tmp_path) is None
    write_records(tmp_path, {"step": 1, "loss": None}, {"step": 1, "eval_loss": None})
    assert plot(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


def test_training_validation_and_references_are_drawn_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    steps = [{"step": step, "loss": 8 - step / 50, "consumed_tokens": step * 10} for step in range(1, 201)]
    write_records(tmp_path, *steps)
    (tmp_path / "plain.png").write_bytes(plot(tmp_path).read_bytes())
    write_records(tmp_path, *steps, {"step": 100, "eval_loss": 6.1}, {"step": 200, "eval_loss": 4.1})
    path = plot(tmp_path, {"ln(vocabulary)": 8.03, "unigram entropy": 6.3})
    assert path == tmp_path / "loss.png"
    assert picture_size(path) == (1350, 750)
    assert path.read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl", "plain.png"]


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "loss": 8.0}],
        [{"step": 5, "eval_loss": 4.0}],
        [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0}],
        [{"step": 1, "loss": "x", "consumed_tokens": "x"}, {"step": 2**61, "loss": 3, "consumed_tokens": [True]}],
    ],
)
def test_a_single_point_a_gap_and_a_flat_curve_are_drawn(tmp_path: Path, records: list[dict]):
    run_dir = tmp_path / "cost$_$a"
    run_dir.mkdir()
    write_records(run_dir, *records)
    assert picture_size(plot(run_dir)) == (1350, 750)


def test_a_picture_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    write_records(tmp_path, {"step": 1, "loss": 8.0})
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(StorageError, match=r"loss\.png"):
        plot(tmp_path)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50),
    st.integers(0, 10),
)
def test_smoothing_starts_at_the_first_value_and_stays_within_the_neighbours(values: list[float], reach: int):
    averages = smooth(values, reach)
    assert len(averages) == len(values)
    assert averages[0] == pytest.approx(values[0], abs=1e-9)
    for position, average in enumerate(averages):
        near = values[max(0, position - reach) : position + reach + 1]
        assert min(near) - 1e-9 <= average <= max(near) + 1e-9


def test_smoothing_does_not_lag_on_a_slope():
    assert list(smooth([float(value) for value in range(20)], 4))[:16] == [float(value) for value in range(16)]
