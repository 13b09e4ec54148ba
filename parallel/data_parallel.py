"""Data parallelism by FSDP2: one mechanism for replicas, sharding, both, and the cast from float32 master weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.mesh import ParallelMesh

Batch = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A micro-batch: what enters the model, and what goes with it by name; all with the samples first."""
Scaling = Callable[[torch.Tensor], torch.Tensor]
"""Makes of a micro-batch's loss what its gradient is taken of."""


class DataParallel:
    """A model whose gradients are summed over the data-parallel ranks.

    Gradients are summed, never averaged: the loss is divided once, by the tokens of the global batch.

    Args:
        zero: that of ParallelConfig.
    """

    def __init__(self, model: nn.Module, zero: int) -> None:
        self.model = model
        self.zero = zero

    @property
    def tied_duplicates(self) -> list[nn.Parameter]:
        """Parameters that are copies of others."""
        return []

    def forward_backward(self, batches: Sequence[Batch], scaling: Scaling) -> torch.Tensor:
        """Add to every parameter's `grad`; returns the losses `[micro_batches]` in float64."""
        losses = []
        for index, (inputs, others) in enumerate(batches):
            before_backward(self.model, self.zero, last=index == len(batches) - 1)
            loss = self.model(inputs, **others)
            losses.append(loss.detach().double())
            scaling(loss).backward()
        return torch.stack(losses)

    def evaluate(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The losses `[micro_batches]` in float64. To be called without gradients; gathered weights stay so."""
        return torch.stack([self.model(inputs, **others).double() for inputs, others in batches])

    def reshard(self) -> None:
        """Free gathered weights that no backward will free: after a forward without one."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def shard_data_parallel(
    model: nn.Module, units: Iterable[nn.Module], mesh: ParallelMesh, zero: int, compute_dtype: torch.dtype
) -> DataParallel:
    """Wrap the model, or one pipeline stage, in FSDP2: each of `units` gathered on its own, and what remains with the
    root.

    Parameters keep the dtype they have (the master weights) and are cast to `compute_dtype` when gathered; gradients
    are reduced in the master dtype. One rank that needs no cast is left unwrapped.
    """
    master_dtype = next(model.parameters()).dtype
    if mesh.dp_size == 1:
        zero = 1
        if compute_dtype == master_dtype:
            return DataParallel(model, zero)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master_dtype, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=zero == 3)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        if mesh.dp_size > 1:  # torch before 2.15 would divide those of one rank, into a copy
            module.set_gradient_divide_factor(1.0)
            # Without it a factor of one still asks gloo for a pre-multiplied sum, which it does not have.
            module.set_force_sum_reduction_for_comms(True)
        if mesh.fsdp.shape[-1] == 1:
            module.set_custom_reduce_scatter(cast(Any, _ScatterToOneself()))
    return DataParallel(model, zero)


def before_backward(model: nn.Module, zero: int, *, last: bool) -> None:
    """Tell FSDP what to do in a micro-batch's backward pass; `last` closes the step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or zero > 1)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or zero > 2)


def run_fsdp_post_backward(model: nn.Module) -> None:
    """Let FSDP take up gradients that were added outside of a backward pass, as it does those of one: in the master
    dtype, and without reducing them yet."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                group.post_backward()


class _ScatterToOneself:
    """The reduce-scatter of a rank that shares gradients with none: FSDP copies them from its input to its output, for
    which it gets the same memory."""

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for the input, and at the next call for the output."""
        memory, self._input = self._input, None
        if memory is None:
            memory = self._input = torch.empty(size, dtype=dtype, device=device)
        elif memory.is_cuda:
            # FSDP takes the input on the stream of layers and sums into the output on its own, and may let go of it
            # there before that stream is done: without this, layers could be given the memory meanwhile.
            memory.record_stream(torch.cuda.current_stream())
        return memory
