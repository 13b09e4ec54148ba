"""Endings: whatever asks a run to stop, wherever it is, nothing is lost, and the next start goes on unmoved."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import pretrain_gpt
from monitoring.run_directory import RunDirectory
from runtime.errors import NonFiniteError
from training.failures import _last_status
from verification.local_ranks import RankError, run_ranks

ROOT = Path(pretrain_gpt.__file__).parent
SMALL = ["model=tiny", "model.num_layers=2", "data=sample", "data.seq_length=32", "train.global_batch_size=4",
         "train.eval_interval=10", "train.eval_steps=5", "checkpoint.interval=15", "optimizer.lr=1e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def out_dir(runs_folder):
    """One place for all runs, so that the sample corpus is prepared once."""
    return runs_folder("runs")


def words(out_dir, name, *more):
    return [*SMALL, f"out_dir={out_dir}", f"name={name}", *more]


def one_rank(rank, world_size, words, place=None, delay=None, number=signal.SIGUSR1, only_rank=None):
    """A start of one rank, which sends itself a signal: as it enters `place` (a Trainer's method), or after `delay`."""
    from training.trainer import Trainer

    def interrupt(*_):
        if only_rank in (None, rank):
            os.kill(os.getpid(), number)

    if place is not None:
        original = getattr(Trainer, place)

        def method(self, *arguments):
            setattr(Trainer, place, original)
            interrupt()
            return original(self, *arguments)

        setattr(Trainer, place, method)
    if delay is not None:
        threading.Timer(delay, interrupt).start()
    return pretrain_gpt.main(words, os.environ)


def start(ranks, *arguments):
    """Exit code of a start, the same on all ranks."""
    try:
        codes = run_ranks(ranks, one_rank, *arguments, initialize=False)
    except SystemExit as ended:
        return ended.code
    assert len(set(codes)) == 1
    return codes[0]


def status(out_dir, name):
    return json.loads((out_dir / name / "status.json").read_text())


def losses(out_dir, name):
    """Logged losses by (step, kind); of a step logged twice the last counts. And how many steps were taken twice."""
    file = out_dir / name / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = {(r["step"], kind): r[kind] for r in records for kind in ("loss", "eval_loss") if kind in r}
    return found, len([r for r in records if "loss" in r]) - len([key for key in found if key[1] == "loss"])


@pytest.fixture(scope="module")
def uninterrupted(out_dir):
    """What runs of 30 steps on one and on two ranks log, and the seconds that the one on one rank takes."""
    found = {}
    for ranks in (2, 1):
        begin = time.monotonic()
        assert start(ranks, words(out_dir, f"whole{ranks}", "train.steps=30")) == 0
        found[ranks], twice = losses(out_dir, f"whole{ranks}")
        assert Counter(kind for _, kind in found[ranks]) == {"loss": 30, "eval_loss": 3}
        assert twice == 0
    return found, time.monotonic() - begin


def test_whatever_asks_the_next_start_goes_on(out_dir, uninterrupted):
    run, folder = words(out_dir, "asked", "train.steps=30"), out_dir / "asked"

    def stands(state, step, reason):
        found = status(out_dir, "asked")
        return (found["state"], found["step"], found["reason"]) == (state, step, reason)

    folder.mkdir()
    (folder / "STOP").touch()
    assert start(1, run) == 75
    assert not (folder / "STOP").exists()
    assert stands("preempted", 2, "STOP file")
    assert start(1, [*run, "train.max_minutes=1e-9"]) == 75
    assert stands("preempted", 4, "train.max_minutes")
    # Before training begins a signal ends the process at once, and takes nothing away.
    assert start(1, run, "_restore_or_initialize") == 128 + signal.SIGUSR1
    assert stands("preempted", 4, "ended by SIGUSR1")
    assert start(1, [*run, "train.max_minutes=60", "train.exit_after=25"]) == 75
    assert stands("preempted", 29, "train.exit_after")
    # A last evaluation that was cut short keeps the run from being complete.
    assert start(1, run, "_evaluate") == 75
    assert stands("preempted", 30, "SIGUSR1")
    assert start(1, run) == 0
    assert stands("completed", 30, "reached train.steps=30")
    assert losses(out_dir, "asked") == (uninterrupted[0][1], 0)


def test_a_signal_to_one_rank_stops_all_of_them_and_no_step_is_taken_twice(out_dir, uninterrupted):
    """In an evaluation and in a save no further step is taken, for those may have taken all the time there is."""
    run = words(out_dir, "told", "train.steps=30")
    for place, step in [("_take_step", 2), ("_evaluate", 10), ("_state", 15)]:
        assert start(2, run, place, None, signal.SIGUSR1, 1) == 75
        expected = {"state": "preempted", "step": step, "reason": "a signal to another rank"}
        assert status(out_dir, "told").items() >= expected.items()
        assert (step, "eval_loss") not in losses(out_dir, "told")[0]
    assert start(2, run, "_finish", None, signal.SIGUSR1, 1) == 0
    assert status(out_dir, "told")["state"] == "completed"
    assert losses(out_dir, "told") == (uninterrupted[0][2], 0)


@pytest.mark.parametrize("moment", range(2))
def test_a_signal_at_a_random_moment_loses_at_most_one_step(out_dir, uninterrupted, moment):
    name, chance = f"moment{moment}", random.Random(moment)
    run = words(out_dir, name, "train.steps=30")
    number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    delay = chance.uniform(0.0, uninterrupted[1])
    # Before anybody listens the process dies of the signal.
    with contextlib.suppress(RankError, KeyboardInterrupt):
        assert start(1, run, None, delay, number) in (0, 75, 128 + number)
    assert start(1, run) == 0
    found, twice = losses(out_dir, name)
    assert found == uninterrupted[0][1]
    assert twice <= 1


@pytest.fixture(scope="module", params=[1, 2])
def long_run(request, out_dir):
    """Command, words, losses and seconds of a run of real processes, as a shell starts them."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *(torchrun if request.param > 1 else []), "pretrain_gpt.py"]
    more = ["train.steps=300", "train.eval_interval=20", "checkpoint.interval=50"]
    begin = time.monotonic()
    name = f"long{request.param}"
    subprocess.run([*command, *words(out_dir, name, *more)], cwd=ROOT, check=True, capture_output=True)
    return command, more, losses(out_dir, name)[0], time.monotonic() - begin


@pytest.mark.faults
@pytest.mark.parametrize("moment", range(10))
def test_processes_that_are_interrupted_at_a_random_moment_lose_at_most_one_step(out_dir, long_run, moment):
    command, more, expected, seconds = long_run
    alone = "torch.distributed.run" not in command
    chance = random.Random(10 * alone + moment)
    name = f"fault{len(command)}-{moment}"
    run = [*command, *words(out_dir, name, *more)]
    # torchrun hands on what ends it; SIGUSR1 would end torchrun alone.
    wish = ["SIGTERM", "SIGINT", "STOP", "SIGUSR1" if alone else "SIGTERM"][moment % 4]
    delay = chance.uniform(0.0, seconds)
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(delay)
    if wish == "STOP":
        (out_dir / name).mkdir(exist_ok=True)
        (out_dir / name / "STOP").touch()
    else:
        process.send_signal(signal.Signals[wish])
    printed, _ = process.communicate(timeout=100)
    interrupted = losses(out_dir, name)[0]
    again = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, printed + again.stdout + again.stderr
    found, twice = losses(out_dir, name)
    print(f"{wish} after {delay:.1f} of {seconds:.1f} s: {len(interrupted)} losses logged, {twice} steps taken twice")
    assert found == expected
    assert twice <= 1
    assert status(out_dir, name)["state"] == "completed"


@pytest.mark.parametrize("foreign", ["{", '{"state": 3}', "[" * 100_000])
def test_a_foreign_status_takes_no_word_from_a_run_that_fails(tmp_path, foreign):
    directory = RunDirectory(tmp_path)
    (tmp_path / "status.json").write_text(foreign)
    found = _last_status(NonFiniteError("step 3: the loss is not finite"), directory, 3)
    assert found == ("failed", 3, "NonFiniteError: step 3: the loss is not finite")
