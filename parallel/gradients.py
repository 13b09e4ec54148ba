"""Gradients over all ranks: sums that tensor parallelism leaves to the end of a step, the global norm, and scaling."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from parallel.mesh import ParallelMesh
from parallel.tensor import TensorParallel, local


def is_whole_on_each_rank(parameter: torch.Tensor) -> bool:
    """Whether all tensor-parallel ranks hold the same of a parameter."""
    if not isinstance(parameter, DTensor):
        return True
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tp" not in names or parameter.placements[names.index("tp")].is_replicate()


def partial_parameters(model: nn.Module, tensor: TensorParallel) -> list[nn.Parameter]:
    """Parameters of whose gradient each tensor-parallel rank finds a summand only.

    These are the ones that are whole on each rank but see a part of the work: all of them where the sequence is cut,
    and always those of modules whose `partial_gradient` is true because a rank uses them for its own heads alone: keys
    and values that are fewer than ranks, norms of queries and keys.
    """
    if tensor.size == 1:
        return []
    return [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if is_whole_on_each_rank(parameter) and (tensor.sequence or getattr(module, "partial_gradient", False))
    ]


def sum_partial_gradients(parameters: Sequence[nn.Parameter], tensor: TensorParallel) -> None:
    """Sum gradients over tensor-parallel ranks, in place, all in one collective."""
    gradients = local_gradients(parameters)
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=tensor.group)
    for gradient, piece in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """The shards of gradients that lie on this rank; a parameter without a gradient has none."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def square_sum(parameters: Sequence[nn.Parameter], mesh: ParallelMesh) -> torch.Tensor:
    """This rank's part of the squared norm of the whole gradient, a float64 scalar: over all ranks it adds up.

    What several ranks hold alike counts on the first of them.
    """
    if mesh.dp_replicate_rank > 0:
        return torch.zeros((), dtype=torch.float64, device=mesh.device_mesh.device_type)
    if mesh.tp_rank > 0:
        parameters = [parameter for parameter in parameters if not is_whole_on_each_rank(parameter)]
    gradients = local_gradients(parameters)
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).double().square().sum()


def scale_gradients(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients in place by a scalar tensor, without waiting for its value."""
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
