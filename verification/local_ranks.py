"""Runs a function on local ranks of a gloo group, in processes forked from a server that has already imported torch."""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "hypothesis",
    "pytest",
]
"""What the server imports before it forks; of tests, what is not installed is passed over."""
SECONDS_TO_EXIT = 10


class RankError(Exception):
    """A rank died without an answer, ran out of time, or raised what cannot be sent to the caller."""


Rank = tuple[ForkServerProcess, Connection]
Answer = tuple[float, BaseException | None, Any]
"""When a rank was done, what it raised, what it returned."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    initialize: bool = True,
    timeout: float = 120.0,
) -> list[Any]:
    """Call the module-level `function(rank, world_size, *arguments)` on every rank; returns the results in rank order.

    Each rank sees the caller's environment with what torchrun would set, and computes on one thread. `initialize` gives
    it the default process group (gloo); without it the function makes the group itself.

    The first exception of a rank is raised here with a note that holds its traceback. Raises RankError where a rank
    dies or `timeout` seconds pass. Whatever happens, no rank outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    environment = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=store.host,
        MASTER_PORT=str(store.port),
        # As under torchrun: the store above is met, and rank 0 opens none of its own.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    call = function, _without_tensors(arguments)
    ranks: list[Rank] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            of_rank = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank_main, args=(sender, *call, of_rank, initialize, timeout))
            process.start()
            ranks.append((process, receiver))
            # The rank holds the only sending end from here on, so that its death is seen as the end of the stream.
            sender.close()
        results = _collect(ranks, timeout)
        deadline = time.monotonic() + SECONDS_TO_EXIT
        for process, _ in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return results
    finally:
        for process, connection in ranks:
            process.kill()
            process.join()
            connection.close()


def _collect(ranks: Sequence[Rank], timeout: float) -> list[Any]:
    answers: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout
    while missing := [rank for rank in range(len(ranks)) if rank not in answers]:
        ready = wait([ranks[rank][1] for rank in missing], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {missing} did not answer within {timeout:g} s")
        answers |= {rank: _answer_of(rank, *ranks[rank]) for rank in missing if ranks[rank][1] in ready}
        failures = [(when, error) for when, error, _ in answers.values() if error is not None]
        if failures:
            # Peers of a failed rank fail a moment later with less telling messages.
            raise min(failures, key=lambda failure: failure[0])[1]
    return [answers[rank][2] for rank in range(len(ranks))]


def _answer_of(rank: int, process: ForkServerProcess, connection: Connection) -> Answer:
    unread = None
    try:
        try:
            found = connection.recv()
        except Exception as error:
            if isinstance(error, EOFError):
                raise
            found = unread = RankError(f"rank {rank} sent what cannot be read: {error!r}")
        when, note = connection.recv()
    except EOFError:
        process.join(SECONDS_TO_EXIT)
        died = RankError(f"rank {rank} died without an answer, exit code {process.exitcode}")
        return float("-inf"), died, None
    if not note and unread is None:
        return when, None, _with_tensors(found)
    found.add_note(note)
    return when, found, None


def _rank_main(
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    initialize: bool,
    timeout: float,
) -> None:
    # The server's environment is that of the moment it was started, not the caller's.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    note = ""
    try:
        if initialize:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        sender.send(_without_tensors(function(rank, world_size, *_with_tensors(arguments))))
        when = time.monotonic()
    except BaseException as error:
        when, note = time.monotonic(), f"on rank {rank}:\n{''.join(traceback.format_exception(error))}"
        try:
            sender.send(error)
        except Exception:
            sender.send(RankError(f"rank {rank} raised what cannot be sent: {error!r}"))
    # Apart from what the caller may be unable to read, and behind it: whether that can be sent shows only there.
    sender.send((when, note))
    if dist.is_initialized():
        # A rank that leaves early can break a peer's last collective.
        with contextlib.suppress(Exception):
            dist.barrier()
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Values:
    """A tensor by value: a process would share its memory, which takes an open file and ends with the sender."""

    values: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: torch.Size


def _without_tensors(nested: Any) -> Any:
    return tree_map_only(
        torch.Tensor,
        lambda tensor: _Values(
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape
        ),
        nested,
    )


def _with_tensors(nested: Any) -> Any:
    return tree_map_only(
        _Values, lambda sent: torch.from_numpy(sent.values).view(sent.dtype).reshape(sent.shape), nested
    )
