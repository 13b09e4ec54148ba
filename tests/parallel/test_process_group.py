"""What rank 0 decides reaches every rank, errors included; a process alone is a group of one."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.agreement import is_peer_failure, on_rank_zero
from parallel.process_group import FLIGHT_RECORD, keep_flight_records, process_group
from runtime.errors import ConfigError
from verification.local_ranks import run_ranks


def decided(rank, world_size):
    return on_rank_zero(lambda: ("rank", dist.get_rank()))


def refused(rank, world_size):
    def refuse():
        raise ConfigError(f"refused by rank {dist.get_rank()}")

    try:
        on_rank_zero(refuse)
    except ConfigError as error:
        return str(error), error.exit_code
    return None


def crashed(rank, world_size):
    try:
        on_rank_zero(lambda: {}["absent"])
    except Exception as error:
        return repr(error), is_peer_failure(error)
    return None


def test_every_rank_gets_what_rank_zero_found():
    assert run_ranks(3, decided) == [("rank", 0)] * 3


def test_every_rank_raises_what_rank_zero_raised():
    assert run_ranks(3, refused) == [("refused by rank 0", 78)] * 3


def test_a_crash_of_rank_zero_is_its_own_and_a_peer_failure_to_the_rest():
    of_rank_zero, *of_others = run_ranks(3, crashed)
    assert of_rank_zero == ("KeyError('absent')", False)
    assert of_others == [("""RankZeroError("KeyError: 'absent'")""", True)] * 2


def test_a_process_alone_is_a_group_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(timedelta(seconds=10)) as process:
        assert (process.rank, process.world_size, dist.get_world_size()) == (0, 1, 1)
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="inside"), process_group(timedelta(seconds=10)):
        raise RuntimeError("inside")
    assert not dist.is_initialized()


def sum_where_rank_zero_keeps_the_store(rank, world_size, port):
    environment = os.environ | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    with process_group(timedelta(seconds=30), environment, run="run") as process:
        total = torch.tensor(float(process.rank + 1))
        dist.all_reduce(total)
        return total.item(), process.rank, process.world_size


def test_ranks_without_a_launchers_store_meet_in_that_of_rank_zero():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = run_ranks(3, sum_where_rank_zero_keeps_the_store, port, initialize=False)
    assert found == [(6.0, rank, 3) for rank in range(3)]


def test_a_world_of_one_needs_no_address():
    with process_group(timedelta(seconds=10), {"WORLD_SIZE": "1", "RANK": "0"}) as process:
        assert (process.rank, process.world_size) == (0, 1)


def test_flight_records_lie_with_the_run_unless_the_user_says_where(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    environment: dict[str, str] = {}
    keep_flight_records(Path("run/logs"), environment)
    assert environment == {"TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/run/logs/{FLIGHT_RECORD}"}
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        environment = {name: "/elsewhere/trace_"}
        keep_flight_records(Path("run/logs"), environment)
        assert environment == {name: "/elsewhere/trace_"}
    # These are the names that the installed torch reads.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.exists():
        assert b"TORCH_FR_DUMP_TEMP_FILE" in library.read_bytes()
