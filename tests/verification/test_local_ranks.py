"""Local ranks: results, failures, deaths, time limits and environments."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from verification.local_ranks import RankError, run_ranks


def _sum_of_ranks(rank, world_size, offset):
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return total


def _one_fails(rank, world_size):
    if rank == 1:
        raise KeyError("wanted")
    dist.barrier()


def _one_dies(rank, world_size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _hangs(rank, world_size):
    time.sleep(60)


def _environment(rank, world_size):
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    everyone = [None] * world_size
    dist.all_gather_object(everyone, (os.environ["LOCAL_RANK"], os.environ["KILOTRON_RANKS_TEST"]))
    return everyone, torch.get_num_threads()


def test_results_come_back_in_rank_order():
    results = run_ranks(4, _sum_of_ranks, 1)
    assert [result.item() for result in results] == [10.0] * 4


def test_an_exception_is_raised_with_its_ranks_traceback():
    with pytest.raises(KeyError, match="wanted") as caught:
        run_ranks(2, _one_fails)
    assert "on rank 1" in caught.value.__notes__[0]
    assert "_one_fails" in caught.value.__notes__[0]


def test_a_killed_rank_is_named():
    with pytest.raises(RankError, match=r"rank 1 died .* -9"):
        run_ranks(2, _one_dies)


def test_a_hung_rank_is_ended():
    with pytest.raises(RankError, match=r"ranks \[0, 1\] did not answer within 1 s"):
        run_ranks(2, _hangs, timeout=1)


def test_torchrun_environment_and_the_callers_own(monkeypatch):
    monkeypatch.setenv("KILOTRON_RANKS_TEST", "seen")
    results = run_ranks(2, _environment, initialize=False)
    assert results == [([("0", "seen"), ("1", "seen")], 1)] * 2


class UnreadableError(Exception):
    """One that can be sent, but takes more to put together again than it says."""

    def __init__(self, one, other):
        super().__init__(f"{one}{other}")


def _raises_what_cannot_be_read(rank, world_size):
    raise UnreadableError(1, 2)


def _raises_what_cannot_be_sent(rank, world_size):
    raise ValueError(lambda: None)


def _returns_what_cannot_be_sent(rank, world_size):
    return lambda: None


@pytest.mark.parametrize(
    ("function", "error", "line"),
    [
        (_raises_what_cannot_be_read, RankError, "raise UnreadableError(1, 2)"),
        (_raises_what_cannot_be_sent, RankError, "raise ValueError(lambda: None)"),
        (_returns_what_cannot_be_sent, Exception, "sender.send"),
    ],
)
def test_what_cannot_travel_is_told_with_its_traceback(function, error, line):
    with pytest.raises(error) as caught:
        run_ranks(1, function)
    assert caught.value.__notes__[0].startswith("on rank 0:")
    assert line in caught.value.__notes__[0]


class ReadsToNothing:
    def __reduce__(self):
        return _fails_to_read, ()


def _fails_to_read():
    raise ValueError("torn")


def _returns_what_cannot_be_read(rank, world_size):
    return ReadsToNothing()


def test_a_result_that_cannot_be_read_is_told():
    with pytest.raises(RankError, match=r"rank 0 sent what cannot be read: ValueError\('torn'\)"):
        run_ranks(1, _returns_what_cannot_be_read)


def _changes_its_copy(rank, world_size, tensors):
    tensors["a"].add_(rank)
    return tensors, [tensors["a"][0], torch.zeros(0, 3), torch.tensor(True)]


def test_tensors_travel_by_value():
    given = {"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)}
    for rank, (tensors, (row, empty, flag)) in enumerate(run_ranks(2, _changes_its_copy, given, initialize=False)):
        assert torch.equal(tensors["a"], given["a"] + rank)
        assert torch.equal(row, tensors["a"][0])
        assert (empty.shape, flag.item(), flag.shape) == ((0, 3), True, ())
    assert torch.equal(given["a"], torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)), "the ranks wrote on ours"
