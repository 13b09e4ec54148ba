"""A rank that is killed or hangs inside a schedule: the run ends in time, and says which rank and what it was doing."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

import pretrain_gpt
from parallel import mesh
from parallel.pipeline import ObservedStage
from training import trainer
from training.heartbeat import FOLDER, Heartbeat, culprits

SMALL = ["model=tiny", "model.num_layers=4", "model.hidden_size=48", "data=sample", "data.tokenizer=bytes",
         "data.seq_length=32", "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=1",
         "parallel.pp=2", "parallel.timeout_minutes=0.05"]  # fmt: skip


def rank_that_fails(action, at, words):
    """A run whose rank 1 dies or sleeps in its backward pass number `at`; returns its exit code."""
    backward, calls = ObservedStage.backward_one_chunk, iter(range(10**9))

    def failing_backward(self, chunk, *arguments, **settings):
        if os.environ["RANK"] == "1" and next(calls) == at:
            with self._observer()(f"backward {chunk}"):
                os.kill(os.getpid(), signal.SIGKILL) if action == "kill" else time.sleep(100)
        return backward(self, chunk, *arguments, **settings)

    ObservedStage.backward_one_chunk = failing_backward
    if action == "hang unnoticed":
        # By the backend, as with NCCL, whose watchdog would end the rank later and without a word.
        mesh.group_timeout = lambda *_: timedelta(hours=1)
        trainer.set_timeout = lambda *_: None
    sys.argv[1:] = words
    return pretrain_gpt.run()


@pytest.mark.parametrize(
    ("schedule", "action", "at", "doing"),
    [
        ("1f1b", "hang", 13, "backward 5"),
        ("1f1b", "hang unnoticed", 13, "backward 5"),
        *(
            pytest.param(schedule, action, random.randrange(*of_step_2), "backward", marks=pytest.mark.faults)
            for schedule, of_step_2 in (("1f1b", (8, 16)), ("interleaved", (16, 32)), ("zbv", (16, 32)))
            for action in ("kill", "hang")
        ),
    ],
)
def test_the_others_end_in_time_and_name_the_rank(tmp_path, schedule, action, at, doing):
    words = [*SMALL, f"out_dir={tmp_path}", f"parallel.pp_schedule={schedule}"]
    code = f"from {__name__} import *; pretrain_gpt.end(rank_that_fails({action!r}, {at}, {words}))"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=common | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        _, said = processes[0].communicate(timeout=60)
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == 76, said
    what = "is gone" if action == "kill" else "does not answer"
    assert re.search(rf"rank 1 {what}: step 2, {doing}", said), said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_rank_that_ends_well_leaves_nothing(tmp_path):
    with Heartbeat(tmp_path, 0, 100) as heartbeat, heartbeat.during("something"):
        assert culprits(tmp_path, 100) == {}, "it is alive and has not been at it for long"
        assert "rank 0 does not answer: step 0, something" in culprits(tmp_path, 0)[0]
    assert not list((tmp_path / FOLDER).iterdir())


def test_who_is_gone_is_named_before_who_is_busy(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Heartbeat(tmp_path, 0, 100) as busy, Heartbeat(tmp_path, 3, 100) as gone, busy.during("something"):
        gone._who["pid"] = dead.pid
        gone.step = 7
        gone.beat(None)
        assert list(culprits(tmp_path, 0)) == [3]
        assert "rank 3 is gone: step 7, waiting for others" in culprits(tmp_path, 0)[3]
