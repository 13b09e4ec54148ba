"""Each collective does what it says, and its gradient is that of the sum over ranks of what every rank computes."""

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import copy_to_ranks, gather_sequence, sum_over_ranks, sum_scatter_sequence
from verification.local_ranks import run_ranks

BATCH, SEQ, HIDDEN = 3, 8, 5


def on_rank(rank, world_size, name):
    """The collective of rank-dependent numbers, and the gradient under rank-dependent weights of its result."""
    generator = torch.Generator().manual_seed(rank)
    collective, shard_in, shard_out = {
        "copy": (copy_to_ranks, False, False),
        "sum": (sum_over_ranks, False, False),
        "gather": (gather_sequence, True, False),
        "sum_scatter": (sum_scatter_sequence, False, True),
    }[name]
    lengths = [SEQ // world_size if shard else SEQ for shard in (shard_in, shard_out)]
    x = torch.randn(BATCH, lengths[0], HIDDEN, dtype=torch.float64, generator=generator)
    weights = torch.randn(BATCH, lengths[1], HIDDEN, dtype=torch.float64, generator=generator)
    if name == "copy":
        dist.broadcast(x, 0)
    if name == "sum":
        dist.broadcast(weights, 0)
    before = x.clone()
    y = collective(x.requires_grad_(), dist.group.WORLD)
    (y * weights).sum().backward()
    assert torch.equal(x, before), "the input stays as it is"
    return x.detach(), weights, y.detach(), x.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["copy", "sum", "gather", "sum_scatter"])
def test_forward_and_backward(name, world_size):
    xs, weights, ys, gradients = zip(*run_ranks(world_size, on_rank, name), strict=True)
    total, weight_total = torch.stack(xs).sum(0), torch.stack(weights).sum(0)
    shards = range(world_size)
    expected_y, expected_gradient = {
        "copy": lambda: (xs, [weight_total for _ in shards]),
        "sum": lambda: ([total for _ in shards], weights),
        "gather": lambda: ([torch.cat(xs, 1) for _ in shards], weight_total.chunk(world_size, 1)),
        "sum_scatter": lambda: (total.chunk(world_size, 1), [torch.cat(weights, 1) for _ in shards]),
    }[name]()
    for found, expected in zip([*ys, *gradients], [*expected_y, *expected_gradient], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
