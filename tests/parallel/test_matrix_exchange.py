"""Whole matrices out of shards, each on one rank that shares it, and shards out of what becomes of them."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from parallel.matrix_exchange import MatrixExchange
from verification.local_ranks import run_ranks

SHAPES = [(6, 5), (3, 8), (8, 3), (5, 5), (1, 4), (7, 2)]


def matrices_in(mesh_shape, names):
    """Matrices cut by rows, by columns or not at all over tp, then by rows over dp_shard."""
    values = [torch.arange(r * c, dtype=torch.float64).view(r, c) + 100 * i for i, (r, c) in enumerate(SHAPES)]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    module = torch.nn.Module()
    for index, value in enumerate(values):
        parameter = value
        if "tp" in names:
            cut = next((dim for dim in (index % 2, 1 - index % 2) if value.shape[dim] % mesh["tp"].size() == 0), None)
            placement = Replicate() if cut is None else Shard(cut)
            parameter = distribute_tensor(value, mesh["tp"], [placement], src_data_rank=None)
        module.register_parameter(str(index), torch.nn.Parameter(parameter))
    data = tuple(name for name in names if name != "tp")
    if data:
        fully_shard(module, mesh=mesh[data])
    return values, list(module.parameters())


def exchange_rank(rank, world_size, mesh_shape, names):
    values, matrices = matrices_in(mesh_shape, names)
    exchange = MatrixExchange(matrices)
    worked_on = []

    def mirrored(matrix):
        worked_on.append(matrix.clone())
        return matrix.flip(0, 1)

    for turn in exchange.turns:
        shards = [matrices[index].detach().to_local() for index in turn.indices]
        found = exchange.apply(turn, shards, mirrored)
        for index, piece in zip(turn.indices, found, strict=True):
            whole = DTensor.from_local(
                piece.contiguous(), matrices[index].device_mesh, matrices[index].placements, run_check=False,
                shape=matrices[index].shape, stride=matrices[index].stride(),
            ).full_tensor()  # fmt: skip
            assert torch.equal(whole, values[index].flip(0, 1)), (index, rank)
    for matrix in worked_on:
        assert any(torch.equal(matrix, value) for value in values), "put together wrongly"
    return [int(matrix.flatten()[0]) // 100 for matrix in worked_on]


@pytest.mark.parametrize(
    ("mesh_shape", "names", "ranks_that_share"),
    [
        ((1,), ("dp_shard",), 1),
        ((3,), ("dp_shard",), 3),
        ((2,), ("tp",), 2),
        ((2, 2), ("dp_shard", "tp"), 4),
        ((2, 2), ("dp_replicate", "dp_shard"), 2),
        ((2, 2, 2), ("dp_replicate", "dp_shard", "tp"), 4),
        ((2, 1), ("dp_replicate", "dp_shard"), 1),
    ],
)
def test_every_matrix_is_worked_on_once_a_copy_and_every_rank_gets_its_shard(mesh_shape, names, ranks_that_share):
    world = torch.Size(mesh_shape).numel()
    found = run_ranks(world, exchange_rank, mesh_shape, names)
    replicas = world // ranks_that_share
    worked_on = sorted(index for of_rank in found for index in of_rank)
    assert worked_on == sorted(list(range(len(SHAPES))) * replicas)
    assert max(map(len, found)) == -(-len(SHAPES) // ranks_that_share), "shared out evenly"
