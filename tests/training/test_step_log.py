"""The numbers of a step are looked at while the next one runs, and before anything is made of the step."""

import itertools
import json
import math
import os
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pretrain_gpt
import training.step_log
from data.batches import MicroBatch
from parallel.config import ParallelConfig
from parallel.mesh import ParallelMesh
from parallel.process_group import process_group
from runtime.errors import NonFiniteError
from runtime.fault_injection import Faults
from settings.compose import compose
from settings.resolve import resolve
from training.learning_rate import learning_rate
from training.step_log import StepLog
from training.train_step import StepResult
from verification.local_ranks import run_ranks

CPU = torch.device("cpu")
SMALL = ["model=tiny", "model.num_layers=1", "data=sample", "data.tokenizer=bytes", "data.seq_length=16",
         "train.global_batch_size=2", "log.sample_ids=true"]  # fmt: skip


class At:
    """A moment at a number of seconds; the log's own first moment is at 0."""

    def __init__(self, seconds):
        self.seconds = 0.0 if isinstance(seconds, torch.device) else seconds

    def seconds_since(self, earlier):
        return self.seconds - earlier.seconds


class Numbers:
    """What a step computed, and whether somebody has asked for it."""

    def __init__(self, loss, seconds=1.0, norm=0.5, scale=None, stop=False):
        self.loss, self.norm, self.scale, self.stop = loss, norm, scale, stop
        self.moment = At(seconds)
        self.was_read = False

    def read(self):
        self.was_read = True
        return self.loss, self.norm

    def loss_scale(self):
        return self.scale

    def stop_requested(self):
        return self.stop


class Sink:
    """A recorder that keeps what it is told."""

    def __init__(self):
        self.lines, self.notes, self.moved = [], [], []
        self.console = SimpleNamespace(note=self.notes.append, progress=self.moved.append)

    def step(self, metrics):
        self.lines.append(metrics)


class Times:
    """A step timer whose every step waited and paused as long as the last `of_step` says."""

    def __init__(self):
        self.of_step = 100.0, 100.0

    def take(self):
        return self.of_step


def result(step, numbers):
    batch = MicroBatch(np.zeros((1, 4), np.int64), np.zeros((1, 4), np.int64), [], np.zeros(1, np.int64))
    return StepResult(step, numbers, torch.tensor([numbers.loss]), [batch])


@pytest.fixture
def memory(monkeypatch):
    """GB that are held by now."""
    held = iter(range(1, 100))
    monkeypatch.setattr(training.step_log, "peak_memory_gb", lambda _: float(next(held)))
    monkeypatch.setattr(training.step_log, "Moment", At)


@pytest.fixture
def make(memory, tmp_path):
    def make(*words, mesh=None, step=0, consumed_samples=0):
        config = resolve(compose(["data.corpus=sample", f"out_dir={tmp_path}", "train.steps=20", *words]), {})
        recorder, times = Sink(), Times()
        stalls = itertools.count(10.0)
        where = {"step": step, "consumed_samples": consumed_samples}
        log = StepLog(config, mesh, CPU, recorder, Faults(), times, lambda: next(stalls), **where)
        return log, recorder, times, config

    return make


def test_nothing_is_read_before_somebody_looks_and_then_once(make):
    log, recorder, *_ = make()
    assert log.look() is False, "there is no step yet"
    numbers = Numbers(2.0, stop=True)
    log.put(result(1, numbers), 8)
    assert not numbers.was_read
    with pytest.raises(RuntimeError, match="step 1 was not looked at before step 2 came"):
        log.put(result(2, Numbers(1.0)), 16)
    assert log.look() is True
    assert numbers.was_read
    assert log.look() is False
    assert [line.step for line in recorder.lines] == [1]


def test_a_line_holds_the_values_of_its_own_step_and_of_its_own_interval(make):
    log, recorder, times, config = make("train.log_interval=2", "schedule.warmup_steps=9", step=3, consumed_samples=100)
    tokens = config.seq_length
    # Steps end at 1, 3, 7 and 15 s; each waits for data and pauses before it is launched.
    for step, seconds, waited, paused, consumed in [
        (4, 1.0, 0.25, 0.5, 108),
        (5, 3.0, 0.5, 0.0, 116),
        (6, 7.0, 0.125, 1.0, 132),
        (7, 15.0, 50.0, 50.0, 148),
    ]:
        log.look()
        times.of_step = waited, paused
        log.put(result(step, Numbers(10.0 - step, seconds, scale=2.0**step)), consumed)
    assert [line.step for line in recorder.lines] == [4, 6], "7 waits for the next step"
    assert recorder.moved == [5]
    first, second = recorder.lines
    assert (first.loss, first.loss_scale, first.consumed_samples, first.consumed_tokens) == (6, 16, 108, 108 * tokens)
    assert first.step_ms == pytest.approx(500.0), "one step of one second, half of which was a pause"
    assert first.data_ms == pytest.approx(250.0)
    assert first.tokens_per_second == pytest.approx(8 * tokens / 0.5)
    assert (first.lr, second.lr) == (learning_rate(config, 4), learning_rate(config, 6))
    assert second.loss == 4
    assert second.consumed_samples == 132
    assert second.step_ms == pytest.approx((7 - 1 - 1) / 2 * 1000)
    assert second.data_ms == pytest.approx(625 / 2)
    assert second.tokens_per_second == pytest.approx(24 * tokens / 5)
    assert (first.memory_gb, second.memory_gb) == (1.0, 3.0)
    assert (first.checkpoint_stall_ms, second.checkpoint_stall_ms) == (10.0, 11.0)


def test_weights_from_which_no_step_can_be_taken_are_named(make):
    """Weights of a checkpoint may be finite and yet so large that no smaller rate helps."""
    with process_group(timedelta(seconds=30), {}):
        log, *_ = make(mesh=ParallelMesh(ParallelConfig(dp_shard=1), "cpu"), step=21, consumed_samples=100)
        log.put(result(22, Numbers(math.nan)), 108)
        with pytest.raises(
            NonFiniteError, match=r"no step was taken since step 21, .*checkpoint.resume=STEP goes back"
        ):
            log.look()


@pytest.mark.parametrize(
    ("loss", "norm", "words"), [(math.nan, 1.0, "loss is not finite"), (1.0, math.inf, "gradient")]
)
def test_a_step_that_is_not_finite_has_no_line(make, loss, norm, words):
    with process_group(timedelta(seconds=30), {}):
        log, recorder, *_ = make(mesh=ParallelMesh(ParallelConfig(dp_shard=1), "cpu"))
        log.put(result(1, Numbers(2.0)), 8)
        log.look()
        log.put(result(2, Numbers(loss, norm=norm)), 16)
        with pytest.raises(NonFiniteError, match=f"^step 2: .*{words}"):
            log.look()
    assert [line.step for line in recorder.lines] == [1]


def test_a_step_that_a_loss_scale_skips_is_said_once_and_logged(make):
    log, recorder, *_ = make()
    log.put(result(1, Numbers(2.0, norm=math.inf, scale=8.0)), 8)
    log.look()
    log.look()
    assert recorder.notes == ["step 1 is skipped: float16 overflows at loss scale 8, which is halved"]
    assert [(line.step, line.loss_scale) for line in recorder.lines] == [(1, 8.0)]


def order_of_a_run(rank, world_size, words):
    """What happens in a run, in order: steps launched, their numbers read, lines, evaluations, checkpoints."""
    import training.train_step
    import training.trainer
    from monitoring.recorder import Recorder
    from training.checkpointing import CheckpointManager
    from training.train_step import StepNumbers, TrainStep
    from training.trainer import Trainer

    order = []

    class Watched(StepNumbers):
        def __init__(self, numbers):
            super().__init__(numbers)
            self.step = order[-1][1]

        def _values(self):
            if ("read", self.step) not in order:
                order.append(("read", self.step))
            return super()._values()

    def before(owner, name, word, number):
        original = getattr(owner, name)

        def method(self, *arguments, **others):
            order.append((word, number(self, *arguments)))
            return original(self, *arguments, **others)

        setattr(owner, name, method)

    training.train_step.StepNumbers = Watched
    before(TrainStep, "update", "launch", lambda _, step, *__: step)
    before(Recorder, "step", "line", lambda _, metrics: metrics.step)
    before(Recorder, "samples", "samples", lambda _, step, __: step)
    before(Trainer, "_evaluate", "evaluate", lambda self: self.step)
    before(CheckpointManager, "save", "save", lambda _, step, *__: step)
    assert pretrain_gpt.main(words, os.environ) == 0
    return order


@pytest.mark.parametrize("log_interval", [1, 3])
def test_the_host_is_a_step_behind_but_never_behind_an_evaluation_or_a_checkpoint(runs_folder, log_interval):
    words = ["train.steps=7", "train.eval_interval=5", "train.eval_steps=1", "checkpoint.interval=4"]
    words += [f"train.log_interval={log_interval}", f"out_dir={runs_folder('order')}"]
    own, other = run_ranks(2, order_of_a_run, [*SMALL, *words], initialize=False)

    def looked_at(step):
        line = [("line", step)] if log_interval == 1 or step in (1, 3, 6, 7) else []
        return [("read", step), ("samples", step), *line]

    assert own == [
        ("launch", 1),
        ("launch", 2), *looked_at(1),
        ("launch", 3), *looked_at(2),
        ("launch", 4), *looked_at(3), *looked_at(4), ("save", 4),
        ("launch", 5), *looked_at(5), ("evaluate", 5),
        ("launch", 6),
        ("launch", 7), *looked_at(6), *looked_at(7), ("evaluate", 7), ("save", 7),
    ]  # fmt: skip
    assert other == [(word, step) for word, step in own if word not in ("line", "samples")], "ranks do alike"


@pytest.mark.parametrize("log_interval", [1, 10])
def test_no_checkpoint_is_made_of_a_step_that_is_not_finite(runs_folder, log_interval, monkeypatch):
    out_dir = runs_folder("nan")
    words = [
        *SMALL,
        f"out_dir={out_dir}",
        "train.steps=9",
        "checkpoint.interval=2",
        f"train.log_interval={log_interval}",
    ]
    monkeypatch.setenv("KILOTRON_FAULT", "step=4,phase=backward,action=nan")
    with pytest.raises(NonFiniteError, match=r"^step 4: "):
        run_ranks(2, order_of_a_run, words, initialize=False)
    run = out_dir / "run"
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000002"]
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == ([1, 2, 3] if log_interval == 1 else [1])
    fed = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert fed == [1, 2, 3]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 4)


def order_of_an_evaluation(rank, world_size, words):
    """The batches of an evaluation whose numbers are made and asked for, in order; 0 is what there is before."""
    import training.trainer
    from training.train_step import StepNumbers

    order = []

    class Watched(StepNumbers):
        def __init__(self, numbers):
            super().__init__(numbers)
            self.batch = sum(word == "made" for word, _ in order)
            order.append(("made", self.batch))

        def _values(self):
            order.append(("asked", self.batch))
            return super()._values()

    training.trainer.StepNumbers = Watched
    assert pretrain_gpt.main(words, os.environ) == 0
    return order


def test_an_evaluation_looks_at_a_batch_once_the_next_one_is_launched(runs_folder):
    words = ["train.steps=1", "train.eval_interval=1", "train.eval_steps=4", f"out_dir={runs_folder('evaluation')}"]
    (order,) = run_ranks(1, order_of_an_evaluation, [*SMALL, *words], initialize=False)
    assert order[: order.index(("made", 4)) + 1] == [
        ("made", 0), ("asked", 0),
        ("made", 1), ("asked", 0),
        ("made", 2), ("asked", 1),
        ("made", 3), ("asked", 2),
        ("made", 4),
    ]  # fmt: skip


def slow_evaluations(rank, world_size, words):
    """Evaluations and saves that take two seconds longer."""
    from checkpoint.save import CheckpointSaver
    from training.trainer import Trainer

    for owner, name in ((Trainer, "_evaluate_validation"), (CheckpointSaver, "save")):
        original = getattr(owner, name)

        def slowly(self, *arguments, original=original):
            time.sleep(2.0)
            return original(self, *arguments)

        setattr(owner, name, slowly)
    return pretrain_gpt.main(words, os.environ)


def test_evaluations_and_saves_are_in_no_steps_time(runs_folder):
    out_dir = runs_folder("pauses")
    words = ["train.steps=5", "train.eval_interval=2", "train.eval_steps=1", "checkpoint.interval=3"]
    assert run_ranks(1, slow_evaluations, [*SMALL, *words, f"out_dir={out_dir}"], initialize=False) == [0]
    records = [json.loads(line) for line in (out_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record for record in records if "step_ms" in record}
    assert list(steps) == [1, 2, 3, 4, 5]
    assert all(0 < line["step_ms"] < 2000 for line in steps.values())
    assert all(line["tokens_per_second"] == pytest.approx(32 / line["step_ms"] * 1000) for line in steps.values())
    assert [line["checkpoint_stall_ms"] >= 2000 for line in steps.values()] == [False, False, False, True, False]
