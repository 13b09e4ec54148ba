"""Runs a function on local ranks of a gloo group, in processes forked from a server that has already imported torch.

Pickled bytes travel between a caller and its own ranks only, as `multiprocessing` itself does it.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "hypothesis",
    "pytest",
]
"""What the server imports before it forks; of tests, what is not installed is passed over."""
SECONDS_TO_EXIT = 10


class RankError(Exception):
    """A rank died without an answer, ran out of time, or raised what cannot be sent to the caller."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    initialize: bool = True,
    timeout: float = 120.0,
) -> list[Any]:
    """Call the module-level `function(rank, world_size, *arguments)` on every rank; returns the results in rank order.

    Each rank sees the caller's environment and computes on one thread. `initialize` gives it the default process group
    (gloo); without it the rank gets what torchrun would set (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT), for code that makes the group itself.

    The first exception of a rank is raised here with a note that holds its traceback. Raises RankError where a rank
    dies or `timeout` seconds pass. Whatever happens, no rank outlives the call.
    """
    call = pickle.dumps((function, arguments))
    processes: list[ForkServerProcess] = []
    connections: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="kilotron-ranks-") as directory:
        store = Path(directory, "store") if initialize else None
        port = _free_port()
        try:
            for rank in range(world_size):
                environment = dict(os.environ, OMP_NUM_THREADS="1")
                if not initialize:
                    environment |= _torchrun_environment(rank, world_size, port)
                receiver, process = _start(rank, world_size, call, store, environment, timeout)
                connections.append(receiver)
                processes.append(process)
            results = _collect(connections, processes, timeout)
            deadline = time.monotonic() + SECONDS_TO_EXIT
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for connection in connections:
                connection.close()


def _start(
    rank: int, world_size: int, call: bytes, store: Path | None, environment: dict[str, str], timeout: float
) -> tuple[Connection, ForkServerProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_rank_main, args=(sender, rank, world_size, call, store, environment, timeout))
    process.start()
    # The rank holds the only sending end from here on, so that its death is seen as the end of the stream.
    sender.close()
    return receiver, process


def _collect(connections: list[Connection], processes: list[ForkServerProcess], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while missing := [rank for rank in range(len(connections)) if rank not in results]:
        ready = wait([connections[rank] for rank in missing], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {missing} did not answer within {timeout:g} s")
        failures = []
        for rank in missing:
            if connections[rank] not in ready:
                continue
            try:
                when, error, value = pickle.loads(connections[rank].recv_bytes())  # noqa: S301 - our own child's bytes
            except EOFError:
                processes[rank].join(SECONDS_TO_EXIT)
                died = RankError(f"rank {rank} died without an answer, exit code {processes[rank].exitcode}")
                failures.append((float("-inf"), rank, died))
                continue
            if error is not None:
                failures.append((when, rank, error))
            results[rank] = value
        if failures:
            # Peers of a failed rank fail a moment later with less telling messages.
            raise min(failures, key=lambda failure: failure[:2])[2]
    return [results[rank] for rank in range(len(connections))]


def _rank_main(
    sender: Connection,
    rank: int,
    world_size: int,
    call: bytes,
    store: Path | None,
    environment: dict[str, str],
    timeout: float,
) -> None:
    # The server's environment is that of the moment it was started, not the caller's.
    os.environ.clear()
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answer: tuple[float, BaseException | None, Any]
    try:
        if store is not None:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(store), world_size),  # type: ignore[attr-defined]
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=timeout),
            )
        function, arguments = pickle.loads(call)  # noqa: S301 - our own parent's bytes
        answer = (time.monotonic(), None, function(rank, world_size, *arguments))
        payload = pickle.dumps(answer)
    except BaseException as error:
        payload = _failure(rank, error)
    sender.send_bytes(payload)
    if dist.is_initialized():
        # A rank that leaves early can break a peer's last collective.
        with contextlib.suppress(Exception):
            dist.barrier()
            dist.destroy_process_group()


def _failure(rank: int, error: BaseException) -> bytes:
    when, note = time.monotonic(), f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        error.add_note(note)
        payload = pickle.dumps((when, error, None))
        pickle.loads(payload)  # noqa: S301 - tells whether the caller could read it
    except Exception:
        payload = pickle.dumps((when, RankError(note), None))
    return payload


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
