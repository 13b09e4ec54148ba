"""What a recorder says beside the lines of the contract, and the order in which it closes."""

import io
import json
import tracemalloc
from dataclasses import asdict, replace

import pytest

from monitoring import recorder as recorder_module
from monitoring.console import Console
from monitoring.metrics import read_curves
from monitoring.recorder import Recorder
from monitoring.run_directory import RunDirectory
from runtime.errors import StorageError
from settings.config import ModelConfig, RunConfig, TrainConfig
from tests.monitoring.test_metrics import STEP


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
        stream = io.StringIO()
        recorder.console = Console(9, interactive=False, stream=stream)
        speed = STEP.tokens_per_second / ranks
        recorder.step(replace(STEP, step_ms=100.0, data_ms=100.0 * share, tokens_per_second_per_gpu=speed))
        step, *more = stream.getvalue().splitlines()
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
        stream = io.StringIO()
        recorder.console = Console(9, interactive=False, stream=stream)
        recorder.start(3)
        assert stream.getvalue().count("records nothing: the run goes on from step 3\n") == notes


def test_the_status_is_written_before_a_picture_is_drawn(tmp_path, monkeypatch):
    directory, seen = RunDirectory(tmp_path), []
    monkeypatch.setattr(recorder_module, "plot_loss", lambda *_: seen.append(directory.read_status().state))
    Recorder(RunConfig(), directory).close("failed", 0, "nothing to draw yet")
    assert seen == []
    recorder = Recorder(RunConfig(), directory)
    recorder.step(STEP)
    recorder.close("preempted", 3, "SIGUSR1")
    assert seen == ["preempted"]


def test_a_status_that_cannot_be_rewritten_is_said_once_until_it_can_be(recorder, monkeypatch):
    stream = io.StringIO()
    recorder.console = Console(9, interactive=False, stream=stream)
    disk = {"full": True}

    def write(path, content):
        if disk["full"]:
            raise StorageError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("monitoring.run_directory.write_atomically", write)
    for step, full in enumerate((True, True, False, True), start=1):
        disk["full"] = full
        recorder.running(step)
    assert stream.getvalue().count("status.json: No space left on device; training goes on\n") == 2
    assert recorder.directory.saved_step == 4, "which the last status says"


def test_the_end_says_everything_that_could_not_be_written(tmp_path, monkeypatch):
    recorder = Recorder(RunConfig(), RunDirectory(tmp_path))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    recorder.step(STEP)
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    with pytest.raises(StorageError) as ended:
        recorder.close("completed", 3, "reached train.steps=3")
    status, metrics = str(ended.value).splitlines()
    assert status.startswith(f"cannot write {tmp_path / 'status.json'}")
    assert metrics.startswith(f"{tmp_path / 'metrics.jsonl'} lacks 1 line that could not be written: No space left")


HOSTILE = [
    '{"step": true, "loss": 1}', '{"step": 3, "loss": "x", "consumed_tokens": "x"}', '{"step": 3, "loss": [[1]]}',
    '{"step": 3, "eval_loss": {}}', '{"step": 3, "loss": NaN, "eval_loss": 1e999}', '{"step": 3, "loss": 1%s}',
    '{"step": 1%s, "loss": 3}', '{"step": 3, "loss": true}', '{"a": ' * 100_000, '[' * 100_000, "7", "null", "",
    '{"step": 3, "loss": 1, "attempt": {}}', "\\udcff",
]  # fmt: skip


def test_foreign_lines_and_a_foreign_status_change_no_end(tmp_path, capsys):
    directory = RunDirectory(tmp_path)
    recorder = Recorder(RunConfig(model=ModelConfig(vocab_size=64)), directory)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line.replace('%s', '0' * 400)}\n" for line in HOSTILE)
    recorder.step(STEP)
    recorder.evaluation(3, 2.0)
    (tmp_path / "status.json").write_text('{"state": 3, "step": "x", "reason": [], "attempt": null}')
    recorder.summarise(lambda: 1.0)
    recorder.close("completed", 3, "reached train.steps=3")
    printed = capsys.readouterr().out
    assert f"first loss {STEP.loss:.3f}" in printed
    assert "validation loss 2.000 at step 3, 1.000 nats above" in printed
    assert f"loss curve: {tmp_path}" in printed
    assert directory.read_status().state == "completed"


def test_a_long_run_is_summed_up_in_one_reading_and_little_memory(tmp_path, monkeypatch):
    recorder, readings = Recorder(RunConfig(model=ModelConfig(vocab_size=64)), RunDirectory(tmp_path)), []
    line = json.dumps({"step": 0, "attempt": 0, **asdict(STEP)})
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(line.replace('"step": 3', f'"step": {step}') + "\n" for step in range(20_000))
    monkeypatch.setattr(recorder_module, "plot_loss", lambda *_: None)
    monkeypatch.setattr(recorder_module, "read_curves", lambda path: readings.append(path) or read_curves(path))
    tracemalloc.start()
    recorder.summarise(None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    recorder.close("completed", 20_000, "")
    assert readings == [tmp_path / "metrics.jsonl"]
    assert peak < 100 * 20_000  # bytes; five numbers of eight take 40


def test_an_owner_that_was_succeeded_draws_no_picture(recorder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(recorder_module, "plot_loss", lambda *_: drawn.append(1))
    said(recorder, 0)
    recorder.directory.ownership.lost = True
    monkeypatch.setattr(recorder.directory, "write_status", lambda *_: None)
    recorder.close("failed", 1, "")
    assert drawn == []
