"""The batch script on a real SLURM, two nodes: it saves when asked to, goes on, and the losses stay the same."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pretrain_gpt
from tools.cli import main
from verification.local_ranks import run_ranks

SMALL = ["model=tiny", "model.num_layers=2", "data=sample", "data.seq_length=32", "train.global_batch_size=4",
         "train.steps=300", "checkpoint.interval=1000", "optimizer.lr=1e-3"]  # fmt: skip
SECONDS = 120


def answer(*command, timeout=30.0):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def why_not():
    """Why there is no SLURM to test on; empty where there is one."""
    if shutil.which("sinfo") is None:
        return "no SLURM here: sinfo is not installed"
    try:
        nodes = answer("sinfo", "--noheader", "--Node", "--format=%N", "--states=idle", timeout=4)
    except subprocess.TimeoutExpired:
        return "no SLURM here: sinfo does not answer"
    return "" if len(set(nodes.stdout.split())) >= 2 else f"no two idle nodes: sinfo says {nodes.stdout}{nodes.stderr}"


@pytest.fixture(scope="module", autouse=True)
def slurm():
    """Asked for only once these tests run: a SLURM that is down takes its time to say so."""
    if reason := why_not():
        pytest.skip(reason)


def one_rank(rank, world_size, words):
    return pretrain_gpt.main(words, os.environ)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """Where nodes, which are on this machine, find runs and the sample corpus."""
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def uninterrupted(out_dir):
    """Losses of two ranks that nobody disturbs."""
    run_ranks(2, one_rank, [*SMALL, f"out_dir={out_dir}", "name=whole"], initialize=False)
    return losses(out_dir / "whole")


def losses(run):
    return {record["step"]: record["loss"] for record in records(run)}


def records(run):
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def state(job):
    """What SLURM says of a job, such as COMPLETED, and how often it was requeued."""
    words = dict(word.split("=", 1) for word in answer("scontrol", "show", "job", job).stdout.split() if "=" in word)
    return words["JobState"], int(words["Restarts"])


def until(condition, job, run):
    """Waits for a condition; fails with the job's log where it does not come."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        log = run / f"slurm-{job}.log"
        assert time.monotonic() < deadline, f"{state(job)}\n{log.read_text() if log.exists() else 'no log'}"
        time.sleep(0.2)


@pytest.fixture
def submit(out_dir, capfd):
    """Launches a run by name; its job is cancelled at the end, whatever became of it."""
    jobs = []

    def launch(name):
        options = ["--nodes", "2", "--gpus-per-node", "1", "--time", "10", "--submit"]
        assert main(["launch", *options, "--", *SMALL, f"out_dir={out_dir}", f"name={name}"]) == 0
        jobs.append(capfd.readouterr().out.split()[-1])  # sbatch: Submitted batch job N
        return jobs[-1]

    yield launch
    for job in jobs:
        answer("scancel", job)


def test_a_stop_file_ends_the_job_and_submitting_again_finishes_the_run(out_dir, uninterrupted, submit):
    run = out_dir / "stopped"
    job = submit("stopped")
    until(lambda: len(records(run)) > 5, job, run)
    (run / "STOP").touch()
    until(lambda: state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), job, run)
    assert state(job) == ("COMPLETED", 0)
    stopped = json.loads((run / "status.json").read_text())
    assert (stopped["state"], stopped["reason"]) == ("preempted", "STOP file")
    assert 5 < stopped["step"] < 300
    again = submit("stopped")
    until(lambda: state(again)[0] not in ("PENDING", "RUNNING", "COMPLETING"), again, run)
    assert state(again) == ("COMPLETED", 0)
    assert losses(run) == uninterrupted
    assert len(records(run)) == 300, "no step is taken twice"
    assert {record["attempt"] for record in records(run)} == {0, 1}


def test_sigusr1_saves_requeues_resumes_and_completes(out_dir, uninterrupted, submit):
    run = out_dir / "signalled"
    job = submit("signalled")
    until(lambda: len(records(run)) > 5, job, run)
    # What SLURM itself does two minutes before the time limit, and at preemption.
    assert answer("scancel", "--batch", "--signal=USR1", job).returncode == 0
    until(lambda: state(job)[0] == "COMPLETED", job, run)
    assert state(job)[1] == 1
    assert losses(run) == uninterrupted
    assert len(records(run)) == 300, "no step is taken twice"
    log = (run / f"slurm-{job}.log").read_text()
    assert "stopped by SIGUSR1 and saved" in log
    assert log.count("goes back into the queue") == 1
    assert log.count("step 300/300") == 1


def test_a_configuration_that_is_wrong_fails_before_ranks_start(out_dir, tmp_path, monkeypatch):
    script = Path(pretrain_gpt.__file__).parent / "slurm" / "pretrain.sbatch"
    log = tmp_path / "log"
    options = ["--nodes=2", "--gpus-per-node=1", "--time=5", f"--output={log}"]
    words = [*SMALL, f"out_dir={out_dir}", "name=wrong", "train.global_batch_size=3"]
    monkeypatch.setenv("PYTHON", sys.executable)
    job = answer("sbatch", *options, f"--chdir={script.parent.parent}", str(script), *words).stdout.split()[-1]
    until(lambda: state(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), job, tmp_path)
    assert state(job)[0] == "FAILED"
    assert "train.global_batch_size=3" in log.read_text()
    assert not (out_dir / "wrong").exists()
