"""metrics.jsonl and samples.jsonl: the contract's fields, and every whole line readable after a kill."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.metrics import EvaluationMetrics, MetricsLog, StepMetrics, last_attempt, read_curves, read_metrics
from runtime.directory_lock import Ownership
from runtime.errors import RunDirectoryError, StorageError

STEP = StepMetrics(
    step=3,
    consumed_samples=72,
    consumed_tokens=18432,
    loss=4.125,
    lr=6e-4,
    grad_norm=0.83,
    tokens_per_second=12345.0,
    tokens_per_second_per_gpu=6172.5,
    step_ms=84.0,
    data_ms=0.5,
    mfu=None,
    memory_gb=0.7,
)
METRICS = "metrics.jsonl"


def test_step_line_holds_the_fields_of_the_contract_in_its_order(tmp_path: Path):
    MetricsLog(tmp_path, attempt=2).log_step(STEP)
    counts = ["step", "attempt", "consumed_samples", "consumed_tokens"]
    rates = ["loss", "lr", "grad_norm", "tokens_per_second", "tokens_per_second_per_gpu", "step_ms", "data_ms"]
    rates += ["mfu", "memory_gb", "checkpoint_stall_ms"]
    record = json.loads((tmp_path / METRICS).read_text())
    assert list(record) == [*counts, *rates, "loss_scale"]
    assert (record["step"], record["attempt"], record["loss"], record["mfu"]) == (3, 2, 4.125, None)


def test_evaluation_and_sample_lines(tmp_path: Path):
    log = MetricsLog(tmp_path, attempt=0)
    log.log_evaluation(EvaluationMetrics(step=4, loss=2.0))
    assert not (tmp_path / "samples.jsonl").exists()
    log.log_samples(4, [(0, 1, 17), (0, 1, 3)], crc=123)
    log.close()
    assert read_metrics(tmp_path / METRICS) == [
        {"step": 4, "attempt": 0, "eval_loss": 2.0, "perplexity": math.exp(2.0)}
    ]
    assert (tmp_path / "samples.jsonl").read_text() == (
        '{"step": 4, "attempt": 0, "samples": [[0, 1, 17], [0, 1, 3]], "crc": 123}\n'
    )


def test_lines_are_on_disk_at_once_and_appended_to_earlier_ones(tmp_path: Path):
    for attempt in range(2):
        log = MetricsLog(tmp_path, attempt)
        log.log_step(replace(STEP, step=attempt))
        assert (tmp_path / METRICS).read_bytes().count(b"\n") == attempt + 1
    assert [record["attempt"] for record in read_metrics(tmp_path / METRICS)] == [0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float):
    log = MetricsLog(tmp_path, attempt=0)
    log.log_step(replace(STEP, loss=value))
    log.log_evaluation(EvaluationMetrics(step=9, loss=value))
    first, second = read_metrics(tmp_path / METRICS)
    assert first["loss"] is None
    assert second["eval_loss"] is None
    assert "NaN" not in (tmp_path / METRICS).read_text()


def test_perplexity_that_overflows_is_infinite():
    assert EvaluationMetrics(step=1, loss=1e4).perplexity == math.inf


@given(loss=st.floats(allow_nan=False, allow_infinity=False))
def test_a_loss_is_read_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, loss: float):
    folder = tmp_path_factory.mktemp("run")
    MetricsLog(folder, attempt=0).log_step(replace(STEP, loss=loss))
    assert read_metrics(folder / METRICS)[0]["loss"] == loss


@given(cut=st.integers(min_value=0))
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_takes_more(tmp_path_factory: pytest.TempPathFactory, cut: int):
    folder = tmp_path_factory.mktemp("run")
    log = MetricsLog(folder, attempt=0)
    for step in range(3):
        log.log_step(replace(STEP, step=step))
    content = (folder / METRICS).read_bytes()
    size = cut % (len(content) + 1)
    os.truncate(folder / METRICS, size)
    whole = content[:size].count(b"\n") + (content[size : size + 1] == b"\n")
    MetricsLog(folder, attempt=1).log_step(replace(STEP, step=7))
    assert [record["step"] for record in read_metrics(folder / METRICS)] == [*range(whole), 7]


def test_what_was_logged_on_a_course_that_the_run_left_is_not_read(tmp_path: Path):
    log = MetricsLog(tmp_path, attempt=0)
    for step, loss in [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5)]:
        log.log_step(replace(STEP, step=step, loss=loss))
        log.log_evaluation(EvaluationMetrics(step=step, loss=loss + 1))
    records = read_metrics(tmp_path / METRICS)
    assert [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records] == [
        (1, 5.0, None),
        (1, None, 6.0),
        (2, 4.5, None),
        (2, None, 5.5),
    ]


def test_lines_of_a_start_that_was_succeeded_take_nothing_from_the_one_that_succeeded_it(tmp_path: Path):
    """It wrote them before it knew."""
    first, second = MetricsLog(tmp_path, attempt=0), MetricsLog(tmp_path, attempt=1)
    first.log_step(replace(STEP, step=1, loss=5.0))
    for step in (1, 2, 3):
        second.log_step(replace(STEP, step=step, loss=4.0))
    first.log_step(replace(STEP, step=2, loss=5.0))
    second.log_step(replace(STEP, step=4, loss=4.0))
    records = read_metrics(tmp_path / METRICS)
    assert [(record["step"], record["loss"]) for record in records] == [(step, 4.0) for step in (1, 2, 3, 4)]
    assert last_attempt(tmp_path / METRICS) == 1


def test_an_owner_is_asked_for_before_a_line_is_written(tmp_path: Path):
    class Lost(Ownership):
        def check_after_a_pause(self) -> None:
            raise RunDirectoryError("another job's")

    log = MetricsLog(tmp_path, attempt=0, ownership=Lost(tmp_path))
    with pytest.raises(RunDirectoryError):
        log.log_step(STEP)
    assert (tmp_path / METRICS).read_bytes() == b""
    assert last_attempt(tmp_path / METRICS) == last_attempt(tmp_path / "none") == -1


def test_an_evaluation_that_a_start_makes_up_for_follows_its_step(tmp_path: Path):
    log = MetricsLog(tmp_path, attempt=0)
    for step in (1, 2, 3):
        log.log_step(replace(STEP, step=step))
    log.log_evaluation(EvaluationMetrics(step=2, loss=1.0))
    records = read_metrics(tmp_path / METRICS)
    assert [(record["step"], "eval_loss" in record) for record in records] == [(1, False), (2, False), (2, True)]


def test_reading_skips_what_is_no_record(tmp_path: Path):
    (tmp_path / METRICS).write_bytes(
        b"[" * 100_000
        + b'\n{"step": 0, "attempt": "x"}\n{"step": 1}\n[1]\n\xff\x00\n{"loss": 2}\n{"step": "x"}\n'
        + b'{"step": true}\n{"step": -1}\n{"step": 1%s}\n{"step": 0, "attempt": 1%s}\n' % (b"0" * 400, b"0" * 400)
        + b'{"step": 2, "lo\n{"step": 3}\n'
    )
    assert [record["step"] for record in read_metrics(tmp_path / METRICS)] == [1, 3]
    assert read_metrics(tmp_path / "none.jsonl") == []


LINES = st.fixed_dictionaries(
    {"step": st.integers(0, 9), "attempt": st.integers(0, 2)},
    optional={"loss": st.floats(), "eval_loss": st.floats(), "consumed_tokens": st.integers(0, 99)},
)


@given(lines=st.lists(LINES, max_size=40))
def test_curves_are_those_of_the_whole_records(tmp_path_factory: pytest.TempPathFactory, lines: list[dict]):
    path = tmp_path_factory.mktemp("run") / METRICS
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    curves, records = read_curves(path), read_metrics(path)
    for series, key, of_evaluation in (
        (curves.training, "loss", False),
        (curves.tokens, "consumed_tokens", False),
        (curves.validation, "eval_loss", True),
    ):
        of_kind = [record for record in records if ("eval_loss" in record) == of_evaluation]
        assert list(series.steps) == [record["step"] for record in of_kind]
        found = [(r["step"], r[key]) for r in of_kind if math.isfinite(r.get(key, math.nan))]
        assert list(zip(series.finite().steps, series.finite().values, strict=True)) == found


@pytest.mark.parametrize("value", ["true", '"x"', "[1]", "{}", "null", "NaN", "-Infinity", "1" + 400 * "0", "1e999"])
def test_what_is_no_number_is_no_point_of_a_curve(tmp_path: Path, value: str):
    (tmp_path / METRICS).write_text(
        f'{{"step": 1, "loss": {value}, "consumed_tokens": {value}}}\n{{"step": 1, "eval_loss": {value}}}\n'
        '{"step": 2, "loss": 3}\n'
    )
    curves = read_curves(tmp_path / METRICS)
    assert list(curves.training.finite().values) == [3.0]
    assert list(curves.validation.finite().values) == list(curves.tokens.finite().values) == []


def test_on_a_disk_that_is_full_lines_wait_and_are_said_to_be_lost_at_the_end(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / METRICS).symlink_to("/dev/full")
    notes: list[str] = []
    log = MetricsLog(tmp_path, attempt=0, note=notes.append)
    for step in (1, 2):
        log.log_step(replace(STEP, step=step))
    log.log_samples(2, [(0, 1, 17)], crc=1)
    (said,) = notes
    assert "metrics.jsonl cannot be written: No space left" in said
    assert (log.retry(), log.lost) == (2, 0)
    with pytest.raises(StorageError, match=r"metrics\.jsonl lacks 2 lines that could not be written: No space"):
        log.close()
    assert len(read_metrics(tmp_path / "samples.jsonl")) == 1


def test_a_directory_that_is_gone_is_a_storage_error(tmp_path: Path):
    with pytest.raises(StorageError, match=r"gone/metrics\.jsonl: No such file") as caught:
        MetricsLog(tmp_path / "gone", attempt=0)
    assert caught.value.exit_code == 74
