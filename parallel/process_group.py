"""Joining and leaving the process group: who this rank is, which device it has, and which backend connects it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

Result = TypeVar("Result")


@dataclass(frozen=True)
class ProcessInfo:
    """This process among all: its global rank, the number of ranks, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def process_group(timeout: timedelta) -> Iterator[ProcessInfo]:
    """Join the group that torchrun describes in the environment, or one of a single process; leave it at the end.

    NCCL connects CUDA tensors and gloo CPU tensors; without CUDA there is gloo alone.
    """
    device = _device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device_id)
    try:
        yield ProcessInfo(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Let rank 0 alone act, and give every rank its result, or its error, so that all ranks go the same way.

    A collective call; the result travels, so it should be small.
    """
    outcome: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return cast(Result, result)
