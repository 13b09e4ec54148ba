"""Joining and leaving the process group: who this rank is, which device it has, and which backend connects it."""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from parallel.rendezvous import meet

FLIGHT_RECORD = "nccl_trace_rank_"
"""How the files begin that NCCL's flight recorder writes; the rank follows."""
WATCHDOG_DELAY = timedelta(minutes=1)
"""How much later NCCL's watchdog ends a rank than a rank that can say who holds it up would end itself."""


@dataclass(frozen=True)
class ProcessInfo:
    """This process among all: its global rank, the number of ranks, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def process_group(
    timeout: timedelta, environment: Mapping[str, str] = os.environ, logs: Path | None = None, run: str = ""
) -> Iterator[ProcessInfo]:
    """Join the group that torchrun describes in the environment, or one of a single process; leave it at the end.

    Ranks of the same `run` wait up to `timeout` for each other. Raises RendezvousError where they do not come together.

    NCCL connects CUDA tensors and gloo CPU tensors; without CUDA there is gloo alone. With an empty `environment` the
    process stays alone wherever it was started. Where a collective on CUDA takes a minute longer than `timeout`, NCCL's
    watchdog ends each rank, which leaves what it had communicated in the folder `logs`, if that is there by then.
    """
    device = _device(environment)
    if device.type == "cuda" and logs is not None:
        keep_flight_records(logs, os.environ)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    world_size = int(environment.get("WORLD_SIZE") or 1)
    rank = 0
    store: Store = HashStore()
    if world_size > 1:
        rank = int(environment["RANK"])
        store = meet(rank, world_size, timeout, environment, run)
    timeout = group_timeout(timeout, device.type)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    alone = dist.get_world_size() == 1
    try:
        yield ProcessInfo(dist.get_rank(), dist.get_world_size(), device)
    except BaseException:
        # Leaving a group in which others still wait can wait for them in turn.
        if alone:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def group_timeout(timeout: timedelta, device_type: str) -> timedelta:
    """How long a backend waits, for ranks on that kind of device, where a rank itself waits for `timeout`.

    gloo then raises an error; NCCL's watchdog would end the process before it could say anything.
    """
    return timeout + WATCHDOG_DELAY if device_type == "cuda" else timeout


def set_timeout(timeout: timedelta, device_type: str) -> None:
    """Let collectives of every group wait no longer than that from now on, as `group_timeout` has it; torch gives new
    groups half an hour.

    What waits for a single rank in gloo keeps to the time-out that its group was made with.
    """
    timeout = group_timeout(timeout, device_type)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def keep_flight_records(folder: Path, environment: MutableMapping[str, str]) -> None:
    """Let NCCL's flight recorder, which torch keeps on, write into `folder` where the user has not chosen a place."""
    if not {"TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"} & environment.keys():
        environment["TORCH_FR_DUMP_TEMP_FILE"] = str(folder.absolute() / FLIGHT_RECORD)


def _device(environment: Mapping[str, str]) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
