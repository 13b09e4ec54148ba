"""Bugs of the kind that combined parallelisms breed, each planted into a rank's own process."""

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

import core.attention
import models.gpt
import parallel.collectives
import parallel.initialization
import parallel.pipeline
import parallel.tensor
import training.build
import training.train_step
from core.norm import LayerNorm, RMSNorm
from core.rotary import RotaryTable
from parallel.matrix_exchange import MatrixExchange
from parallel.mesh import ParallelMesh
from parallel.tensor import RowParallelLinear, TensorParallel, VocabParallelEmbedding, local


def _forget_to_sum(forgotten):
    """Leave some parameters out of the sum of gradients over tensor-parallel ranks."""
    partial_parameters = training.train_step.partial_parameters

    def fewer(model, tensor):
        left_out = {id(p) for name, module in model.named_modules() if forgotten(name, module)
                    for p in module.parameters(recurse=False)}  # fmt: skip
        assert left_out
        return [parameter for parameter in partial_parameters(model, tensor) if id(parameter) not in left_out]

    training.train_step.partial_parameters = fewer


def norm_gradient_not_summed():
    _forget_to_sum(lambda name, module: isinstance(module, LayerNorm | RMSNorm) and "1.mlp_norm" in name)


def key_gradient_not_summed():
    _forget_to_sum(lambda name, _: name == "block.layers.2.attention.key")


def query_norm_gradient_not_summed():
    _forget_to_sum(lambda name, _: name == "block.layers.1.attention.query_norm")


def row_bias_gradient_not_summed():
    _forget_to_sum(lambda name, module: isinstance(module, RowParallelLinear) and name.endswith("0.mlp.down"))


def gradient_scaled_by_ranks():
    """The backward pass of a sum whose gradient every rank has already sums once more."""

    def of_gradient(gradient, group):
        return dist.get_world_size(group) * gradient

    parallel.collectives.copy_to_ranks = of_gradient


def bias_on_every_rank():
    def forward(self, x):
        return self.tensor.reduce(F.linear(x, local(self.weight), None if self.bias is None else local(self.bias)))

    RowParallelLinear.forward = forward


def loss_divided_by_local_tokens():
    def count_tokens(batches, mesh):
        counts = [(others["labels"] != -100).sum() for _, others in batches]
        return torch.stack(counts).sum().double().clamp(min=1) * mesh.dp_size

    training.train_step.count_tokens = count_tokens


def gradients_averaged_over_ranks():
    """FSDP's own habit: Adam and clipping hide it from every loss."""
    FSDPModule.set_gradient_divide_factor = lambda *_: None


def replicas_never_meet():
    """Gradients are summed over shards, not over replicas."""
    ParallelMesh.fsdp = property(lambda self: self.device_mesh["dp_shard"])


def shards_swapped():
    """The sequence is put together from its shards in the wrong order."""
    start_gather = parallel.collectives.start_gather

    def swapped(x, group):
        finish = start_gather(x, group)
        return lambda: finish().roll(x.shape[1], 1)

    parallel.tensor.start_gather = swapped


def wrong_rotary_offset():
    """Keys, but not queries, count positions from the start of the rank's shard."""
    apply_rotary = core.attention.apply_rotary
    calls = iter(range(10**9))

    def shifted(x, table):
        is_key, offset = next(calls) % 2 == 1, dist.get_rank() % 2
        return apply_rotary(x, RotaryTable(*(part.roll(offset, 0) for part in table)) if is_key else table)

    core.attention.apply_rotary = shifted


def positions_of_the_first_shard():
    TensorParallel.sequence_shard = lambda self, x, dim: x.chunk(self.size, dim)[0] if self.sequence else x


def dropout_by_place_in_the_batch():
    class Key(models.gpt.DropoutKey):
        @classmethod
        def build(cls, rate, seed, sample_indices, positions, hidden_size):
            return super().build(rate, seed, torch.arange(len(sample_indices)), positions, hidden_size)

    models.gpt.DropoutKey = Key


def norm_counted_twice():
    """What all tensor-parallel ranks hold alike counts once a rank."""
    square_sum = training.train_step.square_sum

    def too_much(parameters, mesh):
        first = SimpleNamespace(dp_replicate_rank=mesh.dp_replicate_rank, tp_rank=0, device_mesh=mesh.device_mesh)
        return square_sum(parameters, first)

    training.train_step.square_sum = too_much


def replicas_counted_twice():
    square_sum = training.train_step.square_sum

    def too_much(parameters, mesh):
        first = SimpleNamespace(dp_replicate_rank=0, tp_rank=mesh.tp_rank, device_mesh=mesh.device_mesh)
        return square_sum(parameters, first)

    training.train_step.square_sum = too_much


def norm_of_own_shard():
    """Each rank clips by what it holds itself."""
    all_reduce = dist.all_reduce
    training.train_step.dist = SimpleNamespace(
        all_reduce=lambda tensor, group=None: all_reduce(tensor, group=group) if group is not None else None
    )


def initial_weight_drawn_per_rank():
    parameter_seed = parallel.initialization.parameter_seed

    def own(seed, name):
        return parameter_seed(seed + dist.get_rank() * (name == "block.layers.0.mlp.up.weight"), name)

    parallel.initialization.parameter_seed = own


def padding_not_masked():
    VocabParallelEmbedding.own_tokens = property(lambda self: self.local_rows)


def micro_batch_scaled_twice():
    scaled_loss = parallel.pipeline.Pipeline._scaled_loss

    def twice(self, loss, number):
        return scaled_loss(self, loss, number) * (2 if int(number) == 1 else 1)

    parallel.pipeline.Pipeline._scaled_loss = twice


def tied_gradient_not_exchanged():
    parallel.pipeline.Pipeline._sum_tied_gradients = lambda _: None


def tied_gradient_counted_twice():
    parallel.pipeline.Pipeline.tied_duplicates = property(lambda _: [])


def stage_with_a_layer_too_few():
    build_stages = training.build.build_stages

    def fewer(numbers):
        *stages, last = build_stages(numbers)
        return [*stages, replace(last, layers=last.layers[:-1])]

    training.build.build_stages = fewer


def muon_of_own_shard():
    """Each rank makes its own shard orthogonal."""
    MatrixExchange.apply = staticmethod(lambda _turn, shards, function: list(map(function, shards)))
