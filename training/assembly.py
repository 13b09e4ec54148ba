"""What a configuration's model is on this rank: built on the meta device, cut by tensor and by data parallelism."""

from core.compilation import missing_compiler
from core.loss import compiles_loss
from models.gpt import build_meta_model
from parallel.data_parallel import DataParallel, shard_data_parallel
from parallel.mesh import ParallelMesh
from training.config import RunConfig
from training.errors import ConfigError
from training.precision import PRECISIONS, choose_precision


def assemble(config: RunConfig, mesh: ParallelMesh) -> DataParallel:
    """The model of a resolved configuration without memory; `parallel.initialization.materialize` gives it values.

    Raises ConfigError where `train.compile` finds no compiler.
    """
    precision = choose_precision(config.train.precision)
    model = build_meta_model(
        config.model, precision.master, mesh.tensor, seed=config.seed, recompute=config.train.recompute
    )
    if config.train.compile:
        missing = missing_compiler(mesh.device_mesh.device_type)
        if missing is not None:
            raise ConfigError(
                f"train.compile=true: torch.compile needs the {missing}, which is not here; install it, or use "
                "train.compile=false"
            )
        model.block.compile_layers()
    return shard_data_parallel(model, model.sharding_units(), mesh, config.parallel.zero, precision.compute)


def compiles(config: RunConfig, mesh: ParallelMesh) -> bool:
    """Whether something of a resolved configuration's first step is compiled: its layers, or its loss."""
    rows = -(-config.model.vocabulary // mesh.tp_size)
    dtype = PRECISIONS[config.train.precision].compute
    return config.train.compile or compiles_loss(rows, dtype, mesh.device_mesh.device_type)
