"""Counts the bytes that collectives move, by the ranks they run over and by kind; FSDP and backward passes included."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import ParallelMesh

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "recv_": "receive",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
}
"""Names of torch's operators, those of compiled code last, in the field's words; others keep their own."""


class Traffic(TorchDispatchMode):
    """A context: `bytes[dimension, kind]` grows with every collective that this rank takes part in.

    A collective counts the bytes of the whole it works on: for an all-reduce the tensor, for an all-gather what is
    gathered, for a reduce-scatter what is summed. The dimension is that of the mesh, or "world"; where one spans all
    ranks, its own name counts.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._dimensions: dict[str, str] = {dist.group.WORLD.group_name: "world"} if dist.group.WORLD else {}
        self._dimensions.setdefault(mesh.data_group.group_name, "dp")
        self._dimensions |= {
            mesh.device_mesh.get_group(name).group_name: name
            for name, size in zip(mesh.device_mesh.mesh_dim_names or (), mesh.device_mesh.shape, strict=True)
            if size > 1
        }

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether functions are compiled inside the context as they would be outside: torch asks."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at one operator and lets it run."""
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [tensor for argument in (*args, result) for tensor in _tensors(argument)]
            # Compiled code names its group last; otherwise it is the first object.
            candidates = args if func.namespace == "c10d" else args[-1:]
            group = next(filter(None, map(_group, candidates)), None)
            if tensors and group is not None:
                name, description = group
                kind = func.overloadpacket.__name__
                whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)
                self.bytes[self._dimensions.get(name, description), KINDS.get(kind, kind)] += whole
        return result


def _group(argument: Any) -> tuple[str, str] | None:
    """Name and description of the group that an operator communicates over, where an argument says it."""
    if isinstance(argument, torch.ScriptObject):
        argument = dist.ProcessGroup.unbox(argument)
    if isinstance(argument, dist.ProcessGroup):
        return argument.group_name, argument.group_desc
    return (argument, argument) if isinstance(argument, str) else None


def _tensors(argument: Any) -> list[torch.Tensor]:
    return [item for item in (argument if isinstance(argument, list) else [argument]) if isinstance(item, torch.Tensor)]
