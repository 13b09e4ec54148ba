"""Matrices whose shards lie on ranks: put together, each on another rank, worked on as a whole, and cut up again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.sharding import Box, local_box


@dataclass(frozen=True)
class _Share:
    """Who holds what of a matrix, by rank of the group."""

    boxes: list[Box]
    senders: set[int]
    """The first of those that hold the same, for each part."""


class MatrixExchange:
    """Applies a function of whole matrices to matrices that ranks share.

    The ranks that hold one copy of the weights between them, dp_shard * tp, take the matrices in turn, so that none
    does another's work. Replicas do not talk to each other: each does the same as the others.

    Args:
        matrices: two-dimensional and without padding: DTensors on one mesh, or plain ones, which this rank has alone.
            The same in the same order on all ranks.
    """

    def __init__(self, matrices: Sequence[torch.Tensor]) -> None:
        self._group: dist.ProcessGroup | None = None
        self._rank = 0
        coordinates: list[list[int]] = [[]]
        if isinstance(matrices[0], DTensor):
            mesh = matrices[0].device_mesh
            self._group = _sharing_group(mesh)
            self._rank = dist.get_rank(self._group)
            ranks = dist.get_process_group_ranks(self._group)
            coordinates = [(mesh.mesh == rank).nonzero()[0].tolist() for rank in ranks]
        self._size = len(coordinates)
        known: dict[Any, _Share] = {}
        for matrix in matrices:
            if (kind := _kind(matrix)) not in known:
                boxes = [local_box(matrix, matrix.shape, coordinate) for coordinate in coordinates]
                known[kind] = _Share(boxes, {boxes.index(box) for box in boxes})
        self._shares = [known[_kind(matrix)] for matrix in matrices]
        self._shapes = [matrix.shape for matrix in matrices]
        by_size = sorted(range(len(matrices)), key=lambda index: -matrices[index].numel())
        self.rounds = [by_size[start : start + self._size] for start in range(0, len(matrices), self._size)]
        """Indices of the matrices that are worked on at the same time, one a rank; large ones first."""

    def apply(
        self, turn: Sequence[int], shards: Sequence[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """This rank's shards of `function(matrix)` for the matrices of one of the `rounds`, given its shards of them.

        Collective. The function keeps shape and dtype, which is that of all shards.
        """
        if self._size == 1:
            return [function(shard) for shard in shards]
        shares = [self._shares[index] for index in turn]
        nothing = shards[0].new_empty(0)
        outgoing = [
            shard if self._rank in share.senders else nothing for shard, share in zip(shards, shares, strict=True)
        ]
        own = shares[self._rank] if self._rank < len(turn) else _Share([Box((0,), (0,))] * self._size, set())
        sizes = [box.size if rank in own.senders else 0 for rank, box in enumerate(own.boxes)]
        pieces = self._exchange(outgoing, sizes)
        returning = [nothing] * self._size
        if self._rank < len(turn):
            whole = shards[0].new_empty(self._shapes[turn[self._rank]])
            for rank in own.senders:
                whole[own.boxes[rank].slices] = pieces[rank].view(own.boxes[rank].lengths)
            result = function(whole)
            returning = [result[box.slices] for box in own.boxes]
        boxes = [share.boxes[self._rank] for share in shares]
        received = self._exchange(returning, [box.size for box in boxes])
        return [piece.view(box.lengths) for piece, box in zip(received, boxes, strict=False)]

    def _exchange(self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]) -> Sequence[torch.Tensor]:
        """Send a tensor to each of the first ranks, nothing to the others; get `sizes` elements of each, flat."""
        missing = [0] * (self._size - len(sizes))
        sent = torch.cat([tensor.flatten() for tensor in outgoing])
        counts = [tensor.numel() for tensor in outgoing] + [0] * (self._size - len(outgoing))
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, [*sizes, *missing], counts, group=self._group)
        return received.split([*sizes, *missing])


def _sharing_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The ranks of the mesh that hold one copy of what is on it between them, this rank among them. Collective."""
    names, ranks = list(mesh.mesh_dim_names or ()), mesh.mesh
    shared = [name for name, size in zip(names, mesh.shape, strict=True) if size > 1 and name != "dp_replicate"]
    if len(shared) < 2:
        return mesh.get_group(shared[0] if shared else names[-1])
    if "dp_replicate" in names:
        ranks = ranks.select(names.index("dp_replicate"), mesh.get_local_rank("dp_replicate"))
    if ranks.numel() == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(ranks.flatten().tolist(), use_local_synchronization=True, group_desc="*".join(shared))


def _kind(matrix: torch.Tensor) -> Any:
    """What shards lie by."""
    return matrix.shape, matrix.placements if isinstance(matrix, DTensor) else None
