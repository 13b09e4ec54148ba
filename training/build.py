"""What a configuration's model is on this rank: on the meta device, cut by pipeline, tensor and data parallelism."""

import torch

from core.loss import compiles_loss
from models.gpt import GPTModel, build_meta_model
from parallel.data_parallel import DataParallel, shard_data_parallel
from parallel.mesh import ParallelMesh
from parallel.stages import Stage, build_stages, stages_of_rank
from settings.config import RunConfig
from training.precision import PRECISIONS, choose_precision

TIED = "embedding.word.weight"
"""What the first and the last stage have in common where embeddings are tied."""


def assemble(
    config: RunConfig, mesh: ParallelMesh, device: torch.device, *, compile_layers: bool = False
) -> DataParallel:
    """The model of a resolved configuration without memory; `parallel.initialization.materialize` gives it values.

    `compile_layers` is what `train.compile` comes to, as `training.compilation` decides for all ranks. Collective.
    """
    layout = config.parallel
    stages = build_stages(config.layers_per_stage)
    if layout.pp == 1:
        return _sharded(config, mesh, stages[0], compile_layers)[1]
    from parallel.pipeline import Pipeline  # torch's pipelining takes a second to import

    precision = PRECISIONS[config.train.precision]
    own = stages_of_rank(mesh.pp_rank, layout.pp, layout.stages_per_rank, layout.pp_schedule)

    def activation_meta(input_ids: torch.Tensor) -> torch.Tensor:
        samples, length = input_ids.shape
        shape = samples, length // (mesh.tp_size if layout.sequence_parallel else 1), config.model.hidden_size
        return torch.empty(shape, dtype=precision.compute, device="meta", requires_grad=True)

    tied = TIED if config.model.tie_embeddings else None
    modules = [_sharded(config, mesh, stages[index], compile_layers)[0] for index in own]
    return Pipeline(modules, layout, mesh, device, activation_meta, tied)


def _sharded(
    config: RunConfig, mesh: ParallelMesh, stage: Stage, compile_layers: bool
) -> tuple[GPTModel, DataParallel]:
    """A stage as data parallelism shards it."""
    precision = choose_precision(config.train.precision)
    model = build_meta_model(
        config.model, precision.master, mesh.tensor, stage=stage, seed=config.seed, recompute=config.train.recompute
    )
    if compile_layers:
        model.block.compile_layers()
    units, zero = model.sharding_units(), config.parallel.zero_stage
    return model, shard_data_parallel(model, units, mesh, zero, precision.compute)


def compiled_parts(config: RunConfig, mesh: ParallelMesh, *, compile_layers: bool) -> str | None:
    """What the first step of a resolved configuration compiles, in words; None where it compiles nothing."""
    rows = -(-config.model.vocabulary // mesh.tp_size)
    dtype = PRECISIONS[config.train.precision].compute
    loss = compiles_loss(rows, dtype, mesh.device_mesh.device_type)
    return "layers" if compile_layers else "the loss" if loss else None
