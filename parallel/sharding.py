"""Where the shards of a tensor lie in the whole: cut over tensor-parallel ranks first, then over data-parallel ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Box:
    """A block of a whole tensor."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes the block in the whole."""
        return tuple(slice(offset, offset + length) for offset, length in zip(self.offsets, self.lengths, strict=True))

    @property
    def size(self) -> int:
        """Elements in it."""
        return math.prod(self.lengths)

    def overlap(self, other: "Box") -> "Box":
        """What two boxes of one tensor share; of size 0 where they share nothing."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [
            min(own + length, its + its_length)
            for own, length, its, its_length in zip(
                self.offsets, self.lengths, other.offsets, other.lengths, strict=True
            )
        ]
        return Box(starts, tuple(max(0, end - start) for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """What indexes the block in the values of an outer one."""
        offsets = (own - its for own, its in zip(self.offsets, outer.offsets, strict=True))
        return Box(tuple(offsets), self.lengths).slices


@dataclass(frozen=True)
class TensorPart:
    """The values in a box of a whole tensor of `shape`; they share memory with the tensor that they were taken of."""

    values: torch.Tensor
    box: Box
    shape: tuple[int, ...]


def local_box(tensor: torch.Tensor, shape: torch.Size, coordinate: Sequence[int] | None = None) -> Box:
    """Where this rank's shard lies in a whole tensor of `shape`, which excludes the padding of a vocabulary; or that of
    the rank at another `coordinate` of the tensor's mesh.

    Ranks that hold the same values have the same box. Raises RuntimeError where torch has cut the tensor another way.
    """
    offsets, lengths = [0] * len(shape), list(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        names = mesh.mesh_dim_names or ()
        place = mesh.get_coordinate() or () if coordinate is None else coordinate
        for dimension in [names.index(name) for name in ("tp", "dp_shard") if name in names]:
            placement = tensor.placements[dimension]
            if placement.is_replicate():
                continue
            cut = placement.dim  # type: ignore[attr-defined]
            # Like torch.chunk: the last ranks may have less, or nothing.
            share = -(-lengths[cut] // mesh.size(dimension))
            start = min(place[dimension] * share, lengths[cut])
            offsets[cut] += start
            lengths[cut] = min(share, lengths[cut] - start)
        if coordinate is None and tuple(lengths) != tuple(tensor.to_local().shape):
            raise RuntimeError(f"a shard of {list(tensor.to_local().shape)} where {lengths} was expected")
    clipped = [max(0, min(length, size - start)) for start, length, size in zip(offsets, lengths, shape, strict=True)]
    starts = [min(start, size) for start, size in zip(offsets, shape, strict=True)]
    return Box(tuple(starts), tuple(clipped))


def local_values(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """This rank's shard without padding: a view of its memory, of the box's lengths."""
    values = tensor.detach()
    values = values.to_local() if isinstance(values, DTensor) else values
    return values[tuple(slice(length) for length in box.lengths)]


def tensor_part(tensor: torch.Tensor, shape: torch.Size) -> TensorPart:
    """This rank's part of `tensor`, sharded or not, whose whole has `shape` without padding."""
    box = local_box(tensor, shape)
    return TensorPart(local_values(tensor, box), box, tuple(shape))


def logical_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The whole shape of every parameter by its global name, without the padding of a vocabulary."""
    shapes = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            shapes[f"{module_name}.{name}"] = getattr(module, "logical_shapes", {}).get(name, parameter.shape)
    return shapes
