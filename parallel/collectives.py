"""Collectives that know their gradient: each is the backward pass of its conjugate.

    copy_to_ranks        forward: nothing         backward: sum over ranks
    sum_over_ranks       forward: sum over ranks  backward: nothing
    gather_sequence      forward: gather shards   backward: sum over ranks, each keeps its shard
    sum_scatter_sequence forward: sum over ranks, each keeps its shard   backward: gather shards

Tensors are `[batch, seq, ...]`; a shard is a slice of the sequence, in the order of ranks.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sums = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Finish = Callable[[], torch.Tensor]
"""Waits for a collective that was started and returns its result."""
Collective = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]


def start_sum(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start summing `x`, any shape, over the ranks. `x` itself becomes the sum."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return x

    return finish


def start_gather(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start putting the ranks' shards `[batch, seq / ranks, ...]` together to `[batch, seq, ...]`."""
    x = x.contiguous()
    ranks = dist.get_world_size(group)
    gathered = x.new_empty(ranks, *x.shape)
    work = _gather_into(gathered.flatten(0, 1), x, group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return gathered.transpose(0, 1).reshape(x.shape[0], -1, *x.shape[2:])

    return finish


def start_sum_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start summing `[batch, seq, ...]` over the ranks, each of which gets its shard `[batch, seq / ranks, ...]`."""
    ranks = dist.get_world_size(group)
    by_rank = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    shard = torch.empty_like(by_rank[0])
    work = _scatter_sums(shard, by_rank.flatten(0, 1), group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return shard

    return finish


class _Conjugate(torch.autograd.Function):
    """A collective whose gradient another one collects."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, start: Callable[..., Finish], of_gradient: Collective
    ) -> torch.Tensor:
        ctx.group, ctx.of_gradient = group, of_gradient
        return start(x, group)()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.of_gradient(gradients[0], ctx.group), None, None, None


def copy_to_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`x`, equal on all ranks, for each to use in its own way; its gradient is the sum of what the ranks find."""
    return cast(torch.Tensor, _Conjugate.apply(x, group, lambda x, _: lambda: x.view_as(x), sum_over_ranks))


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' `x`, on every rank."""
    return cast(torch.Tensor, _Conjugate.apply(x, group, lambda x, group: start_sum(x.clone(), group), copy_to_ranks))


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Shards `[batch, seq / ranks, ...]` to the whole sequence `[batch, seq, ...]` on every rank."""
    return cast(torch.Tensor, _Conjugate.apply(x, group, start_gather, sum_scatter_sequence))


def sum_scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' `x` `[batch, seq, ...]`, of which every rank gets its shard `[batch, seq / ranks, ...]`."""
    return cast(torch.Tensor, _Conjugate.apply(x, group, start_sum_scatter, gather_sequence))
