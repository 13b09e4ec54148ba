"""A rank that is killed or hangs inside a schedule: the run ends in time, and says which rank and what it was doing."""

import json
import os
import random
import re
import shutil
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
from parallel.schedule_timeline import Action
from runtime.heartbeat import FOLDER, Heartbeat, find_unresponsive_ranks
from training import trainer

SMALL = ["model=tiny", "model.num_layers=4", "model.hidden_size=48", "data=sample", "data.tokenizer=bytes",
         "data.seq_length=32", "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=1",
         "parallel.pp=2", "parallel.timeout_minutes=0.05"]  # fmt: skip


def rank_that_fails(action, who, at, words):
    """A run whose rank `who` fails in its backward pass number `at`; returns its exit code."""
    backward, calls = ObservedStage.backward_one_chunk, iter(range(10**9))

    def failing_backward(self, chunk, *arguments, **settings):
        if os.environ["RANK"] == str(who) and next(calls) == at:
            if action == "stop":  # while it does nothing
                os.kill(os.getpid(), signal.SIGSTOP)
            with self._observer()(Action("B", self.stage_index, chunk)):
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
    ("schedule", "action", "who", "at", "doing"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.faults)
            for case in (
                ("1f1b", "hang", 1, 13, "backward pass of micro-batch 5"),
                ("1f1b", "hang unnoticed", 1, 13, "backward pass of micro-batch 5"),
                ("zb", "stop", 0, 11, ""),
                ("zbv", "stop", 1, 20, ""),
            )
        ),
        *(
            pytest.param(schedule, action, 1, random.randrange(*of_step_2), "backward pass", marks=pytest.mark.faults)
            for schedule, of_step_2 in (("1f1b", (8, 16)), ("interleaved", (16, 32)), ("zbv", (16, 32)))
            for action in ("kill", "hang")
        ),
    ],
)
def test_the_others_end_in_time_and_name_the_rank(tmp_path, schedule, action, who, at, doing):
    words = [*SMALL, f"out_dir={tmp_path}", f"parallel.pp_schedule={schedule}"]
    code = f"from {__name__} import *; pretrain_gpt.end(rank_that_fails({action!r}, {who}, {at}, {words}))"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=common | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        _, said = processes[1 - who].communicate(timeout=60)
    finally:
        processes[who].kill()
        processes[who].communicate()
    assert processes[1 - who].returncode == 76, said
    what = "is gone" if action == "kill" else "does not answer"
    assert re.search(rf"rank {who} {what}: step 2, {doing}", said), said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_rank_with_a_stale_file_is_named_even_where_it_waited(tmp_path):
    with Heartbeat(tmp_path, 0, 100) as runs, Heartbeat(tmp_path, 1, 100) as stopped:
        runs.beat(None)
        stopped.beat(None)
        os.utime(tmp_path / FOLDER / "rank_00001.json", (0, time.time() - 30))
        os.utime(tmp_path / FOLDER / "rank_00000.json", (0, time.time() - 30))
        runs.refresh()
        assert list(find_unresponsive_ranks(tmp_path, 100)) == [1]
        assert "rank 1 does not answer: step 0, waiting for others" in find_unresponsive_ranks(tmp_path, 100)[1]
        # Stopped, but not for long enough to be sure.
        os.utime(tmp_path / FOLDER / "rank_00001.json", (0, time.time() - 1.7))
        runs.refresh()
        assert list(find_unresponsive_ranks(tmp_path, 3)) == [1]


def test_a_rank_that_ends_well_leaves_nothing(tmp_path):
    with Heartbeat(tmp_path, 0, 100) as heartbeat, heartbeat.during("something"):
        assert find_unresponsive_ranks(tmp_path, 100) == {}, "it is alive and has not been at it for long"
        assert "rank 0 does not answer: step 0, something" in find_unresponsive_ranks(tmp_path, 0)[0]
    assert not list((tmp_path / FOLDER).iterdir())
    heartbeat.refresh()  # of a thread that is late
    assert not list((tmp_path / FOLDER).iterdir())


def test_who_is_gone_is_named_before_who_is_busy(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Heartbeat(tmp_path, 0, 100) as busy, Heartbeat(tmp_path, 3, 100) as gone, busy.during("something"):
        gone._who["pid"] = dead.pid
        gone.step = 7
        gone.beat(None)
        assert list(find_unresponsive_ranks(tmp_path, 0)) == [3]
        assert "rank 3 is gone: step 7, waiting for others" in find_unresponsive_ranks(tmp_path, 0)[3]


@pytest.mark.parametrize("removed", [True, False])
def test_a_rank_that_outlived_its_start_takes_nothing_from_the_next_one(tmp_path, removed):
    orphan = Heartbeat(tmp_path, 1, 100)
    orphan.beat("something of then")
    if removed:  # as every start does, where the file system lets it
        shutil.rmtree(tmp_path / FOLDER)
    with Heartbeat(tmp_path, 1, 100) as hung, hung.during("something of now"):
        orphan.beat("something else of then")
        orphan.refresh()
        orphan.__exit__(None, None, None)
        assert "rank 1 does not answer: step 0, something of now" in find_unresponsive_ranks(tmp_path, 0)[1]
    assert not list((tmp_path / FOLDER).iterdir())
