"""What a configuration's model is on this rank: built on the meta device, cut by tensor and by data parallelism."""

from models.gpt import build_meta_model
from parallel.data_parallel import DataParallel, shard_data_parallel
from parallel.mesh import ParallelMesh
from training.config import RunConfig
from training.precision import choose_precision


def assemble(config: RunConfig, mesh: ParallelMesh) -> DataParallel:
    """The model of a resolved configuration without memory; `parallel.initialization.materialize` gives it values."""
    precision = choose_precision(config.train.precision)
    model = build_meta_model(
        config.model,
        precision.master,
        mesh.tensor,
        seed=config.seed,
        recompute=config.train.recompute == "full",
    )
    return shard_data_parallel(model, model.sharding_units(), mesh, config.parallel.zero, precision.compute)
