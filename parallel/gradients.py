"""The global gradient norm over sharded gradients, and scaling them."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from parallel.mesh import ParallelMesh


def local_gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The shards of gradients that lie on this rank; a parameter without a gradient has none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def square_sum(gradients: list[torch.Tensor], mesh: ParallelMesh) -> torch.Tensor:
    """This rank's part of the squared global norm, a float64 scalar: summed over all ranks it is the whole.

    Replicas hold the same shards, so only the first replica's count.
    """
    norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=_wide(gradients))).double()
    return norms.square().sum() * (mesh.dp_replicate_rank == 0)


def scale_gradients(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients in place by a scalar tensor, without waiting for its value."""
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def _wide(gradients: list[torch.Tensor]) -> torch.dtype:
    return torch.promote_types(gradients[0].dtype, torch.float32)
