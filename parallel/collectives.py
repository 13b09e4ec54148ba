"""Collectives that know their gradient: each is the backward pass of its conjugate.

    copy_to_ranks        forward: nothing         backward: sum over ranks
    sum_over_ranks       forward: sum over ranks  backward: nothing
    gather_sequence      forward: gather shards   backward: sum over ranks, each keeps its shard
    sum_scatter_sequence forward: sum over ranks, each keeps its shard   backward: gather shards

Tensors are `[batch, seq, ...]`; a shard is a slice of the sequence, in the order of ranks. Inside a layer that is
compiled they are torch's functional collectives, the only ones that a graph can hold.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

functional = torch.ops._c10d_functional
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sums = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Finish = Callable[[], torch.Tensor]
"""Waits for a collective that was started and returns its result."""


def start_sum(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start summing `x`, any shape, over the ranks. `x` itself becomes the sum."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return _finish(functional.all_reduce(x, "sum", group.group_name))
    work = dist.all_reduce(x, group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return x

    return finish


def start_gather(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start putting the ranks' shards `[batch, seq / ranks, ...]` together to `[batch, seq, ...]`."""
    x = x.contiguous()
    ranks = dist.get_world_size(group)

    def put_together(gathered: torch.Tensor) -> torch.Tensor:
        return gathered.unflatten(0, (ranks, -1)).transpose(0, 1).reshape(x.shape[0], -1, *x.shape[2:])

    if torch.compiler.is_compiling():
        return _finish(functional.all_gather_into_tensor(x, ranks, group.group_name), put_together)
    gathered = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    work = _gather_into(gathered, x, group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return put_together(gathered)

    return finish


def start_sum_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start summing `[batch, seq, ...]` over the ranks, each of which gets its shard `[batch, seq / ranks, ...]`."""
    ranks = dist.get_world_size(group)
    by_rank = x.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    if torch.compiler.is_compiling():
        return _finish(functional.reduce_scatter_tensor(by_rank.flatten(0, 1), "sum", ranks, group.group_name))
    shard = torch.empty_like(by_rank[0])
    work = _scatter_sums(shard, by_rank.flatten(0, 1), group=group, async_op=True)

    def finish() -> torch.Tensor:
        work.wait()
        return shard

    return finish


def _finish(pending: torch.Tensor, then: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Finish:
    def finish() -> torch.Tensor:
        arrived = functional.wait_tensor(pending)
        return arrived if then is None else then(arrived)

    return finish


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_over_ranks(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return start_sum(x.clone(), group)()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return copy_to_ranks(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return start_gather(x, group)()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_scatter_sequence(gradients[0], ctx.group), None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return start_sum_scatter(x, group)()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_sequence(gradients[0], ctx.group), None


def copy_to_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`x`, equal on all ranks, for each to use in its own way; its gradient is the sum of what the ranks find."""
    return cast(torch.Tensor, _Copy.apply(x, group))


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' `x`, on every rank."""
    return cast(torch.Tensor, _Sum.apply(x, group))


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Shards `[batch, seq / ranks, ...]` to the whole sequence `[batch, seq, ...]` on every rank."""
    return cast(torch.Tensor, _Gather.apply(x, group))


def sum_scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' `x` `[batch, seq, ...]`, of which every rank gets its shard `[batch, seq / ranks, ...]`."""
    return cast(torch.Tensor, _SumScatter.apply(x, group))
