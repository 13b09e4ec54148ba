"""Matrices whose shards lie on ranks: put together, each on another rank, worked on as a whole, and cut up again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.sharding import Box, local_box


@dataclass(frozen=True)
class Turn:
    """Matrices that are worked on at the same time, the first by the first rank, and so on."""

    indices: list[int]
    held: list[Box]
    """What this rank holds of each."""
    parts: list[Box]
    """What each rank holds of the one that this rank works on; empty where there is none left for it."""


class MatrixExchange:
    """Applies a function of whole matrices to matrices that ranks share.

    The ranks that hold one copy of the weights between them, dp_shard * tp, take the matrices in turns, so that none
    does another's work. Replicas do not talk to each other: each does the same as the others.

    Args:
        matrices: two-dimensional and without padding: DTensors on one mesh, or plain ones, which this rank has alone.
            The same in the same order on all ranks.
    """

    def __init__(self, matrices: Sequence[torch.Tensor]) -> None:
        first, self._group, self._rank = matrices[0], None, 0
        coordinates: list[list[int]] = [[]]
        if isinstance(first, DTensor):
            self._group = _sharing_group(first.device_mesh)
            self._rank = dist.get_rank(self._group)
            ranks = dist.get_process_group_ranks(self._group)
            coordinates = [(first.device_mesh.mesh == rank).nonzero()[0].tolist() for rank in ranks]
        self._size = len(coordinates)
        self._shapes = [matrix.shape for matrix in matrices]
        by_size = sorted(range(len(matrices)), key=lambda index: -matrices[index].numel())
        self.turns: list[Turn] = []
        """Large matrices first, so that those of a turn are alike."""
        for start in range(0, len(matrices), self._size):
            indices = by_size[start : start + self._size]
            held = [local_box(matrices[index], self._shapes[index]) for index in indices]
            own = indices[self._rank : self._rank + 1]
            parts = [local_box(matrices[index], self._shapes[index], place) for index in own for place in coordinates]
            self.turns.append(Turn(indices, held, parts))

    def apply(
        self, turn: Turn, shards: Sequence[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """This rank's shards of `function(matrix)` for the matrices of a turn, given its shards of them.

        Collective. The function keeps shape and dtype, which is that of all shards.
        """
        if self._size == 1:
            return [function(shard) for shard in shards]
        pieces = self._exchange(shards, turn.parts, shards[0])
        returning: list[torch.Tensor] = []
        if turn.parts:
            whole = shards[0].new_empty(self._shapes[turn.indices[self._rank]])
            for piece, box in zip(pieces, turn.parts, strict=True):
                whole[box.slices] = piece
            result = function(whole)
            returning = [result[box.slices] for box in turn.parts]
        return self._exchange(returning, turn.held, shards[0])

    def _exchange(
        self, outgoing: Sequence[torch.Tensor], boxes: Sequence[Box], like: torch.Tensor
    ) -> list[torch.Tensor]:
        """Send a tensor to each of the first ranks, and get what fills `boxes` from as many; all are `like` one."""
        sent = torch.cat([like.new_empty(0), *(tensor.flatten() for tensor in outgoing)])
        received = like.new_empty(sum(box.size for box in boxes))
        sizes = [box.size for box in boxes] + [0] * (self._size - len(boxes))
        counts = [tensor.numel() for tensor in outgoing] + [0] * (self._size - len(outgoing))
        dist.all_to_all_single(received, sent, sizes, counts, group=self._group)
        return [piece.view(box.lengths) for piece, box in zip(received.split(sizes), boxes, strict=False)]


def _sharing_group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The ranks of the mesh that hold one copy of what is on it between them, this rank among them. Collective."""
    names, ranks = mesh.mesh_dim_names or (), mesh.mesh
    if "dp_replicate" in names:
        ranks = ranks.select(names.index("dp_replicate"), mesh.get_local_rank("dp_replicate"))
    if ranks.numel() == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(ranks.flatten().tolist(), use_local_synchronization=True, group_desc="dp_shard*tp")
