"""Ranks that meet: all of them, one too many, one too few, at a port that is somebody else's; and signals meanwhile."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from parallel import rendezvous
from parallel.rendezvous import RendezvousError, meet


@pytest.fixture
def port():
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "SECONDS_FOR_RANK_ZERO", 0.3)
    monkeypatch.setattr(rendezvous, "SECONDS_TO_ANSWER", 0.5)


def environment(port, **more):
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def come(port, world_size, ranks, seconds=60.0, run="run", **more):
    """What each of `ranks` gets, or raises, where they come together; and after how many seconds all of them have."""

    def one(rank):
        try:
            return meet(rank, world_size, timedelta(seconds=seconds), environment(port, **more), run)
        except RendezvousError as error:
            return error

    begin = time.monotonic()
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(one, ranks))
    return found, time.monotonic() - begin


def test_ranks_that_are_all_there_share_a_store(port):
    stores, _ = come(port, 3, [2, 0, 1])
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


@pytest.mark.parametrize("ranks", [[0, 1, 1], [0, 0, 1]])
def test_a_rank_that_is_there_twice_ends_all_of_them_at_once(port, ranks):
    found, seconds = come(port, 3, ranks)
    who = f"process {os.getpid()} on {socket.gethostname()}"
    twice = next(rank for rank in ranks if ranks.count(rank) == 2)
    for error in found:
        assert f"RANK={twice} is there twice: {who}, and {who}; each process of a run needs a RANK of its own" in str(
            error
        )
        assert error.exit_code == 78
    # The one that rank 0 does not know of says it as well.
    assert [error.unheard for error in found].count(True) == 1
    assert seconds < 10


def test_a_rank_that_is_too_many_leaves_those_alone_that_are_together(port):
    stores, _ = come(port, 2, [0, 1])
    (error,), _ = come(port, 2, [1])
    assert "RANK=1 is there twice" in str(error)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_a_second_rank_zero_on_the_host_of_the_first_is_told_from_another_program(port, impatient):
    first = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    dist.PrefixStore("kilotron//0/run", first).set("rank_0", "mark process 7 on elsewhere")
    (error,), _ = come(port, 2, [0])
    assert "RANK=0 is there twice: process 7 on elsewhere, and process" in str(error)
    assert error.exit_code == 78
    (error,), _ = come(port, 2, [0], run="another")
    assert f"MASTER_PORT={port} is in use on {socket.gethostname()} by another program, perhaps another run" in str(
        error
    )
    assert error.exit_code == 78


def test_ranks_that_do_not_come_are_named(port, impatient):
    found, seconds = come(port, 4, [0, 2], seconds=0.5)
    for error in found:
        assert f"of 4 ranks 2 did not come to 127.0.0.1:{port} within 0.00833 minutes" in str(error)
        assert "RANK 1, 3;" in str(error)
        assert (error.exit_code, error.unheard) == (76, False)
    assert seconds < 10


def test_where_rank_zero_does_not_come_everybody_says_so(port, impatient):
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    found, _ = come(store.port, 3, [1, 2], seconds=0.5, TORCHELASTIC_USE_AGENT_STORE="True")
    assert ["RANK 0;" in str(error) for error in found] == [True, True]
    assert [error.unheard for error in found] == [True, True]


def test_nobody_at_the_address_is_said_by_who_looked(port, impatient):
    (error,), seconds = come(port, 2, [1], seconds=1.0)
    assert f"rank 1 on {socket.gethostname()} did not reach rank 0 at MASTER_ADDR:MASTER_PORT" in str(error)
    assert f"127.0.0.1:{port} within 0.0167 minutes (parallel.startup_minutes): nothing answers there" in str(error)
    assert (error.exit_code, error.unheard) == (76, True)
    assert seconds < 10


def test_a_port_at_which_something_else_listens_is_refused_and_never_waited_for(impatient, monkeypatch):
    monkeypatch.setattr(rendezvous, "SECONDS_TO_SPARE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        (error,), seconds = come(port, 2, [0])
        assert f"MASTER_PORT={port} is in use on {socket.gethostname()} by another program" in str(error)
        assert (error.exit_code, seconds < 5) == (78, True)
        (error,), seconds = come(port, 2, [1], seconds=0.5)
        assert "what answers there is no store of this torch, but another program" in str(error)
        assert (error.exit_code, error.unheard, seconds < 10) == (76, True, True)


def test_runs_at_one_address_do_not_meet(impatient):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(come, store.port, 2, [0], 0.5, "one", **more)
        (error,), _ = come(store.port, 2, [1], 0.5, "other", **more)
    assert "RANK 0;" in str(error)
    assert "RANK 1;" in str(waiting.result()[0][0])


def test_ranks_that_a_launcher_starts_again_meet_in_its_store_again():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(2):
        more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(start)}
        stores, _ = come(store.port, 2, [0, 1], TORCHELASTIC_RUN_ID="id", **more)
        assert stores[0].add("a key of this start", 1) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_is_seen_while_others_are_waited_for(port, rank):
    def end(number, _):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    begin = time.monotonic()
    try:
        with pytest.raises(SystemExit):
            meet(rank, 2, timedelta(seconds=60), environment(port), "run")
        assert time.monotonic() - begin < 5
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
