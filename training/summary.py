"""What `check=true` says of a legal configuration: how its ranks divide the work."""

from training.batch_schedule import either
from training.config import RunConfig


def summary(config: RunConfig) -> str:
    """Layout, batch, tokens and vocabulary of a resolved configuration, a line each."""
    layout, sizes = config.parallel, config.batches.sizes
    by_tokens = f" ({config.train.batch_schedule})" if config.train.batch_schedule else ""
    tensor, sequence, takers = "", "", "ranks"
    if layout.tp > 1:
        tensor, takers = f" * tp {layout.tp}", f"groups of {layout.tp} ranks"
        sequence = f", {'with' if layout.sequence_parallel else 'without'} sequence parallelism"
    pipeline, stages = "", []
    if layout.pp > 1:
        pipeline, takers = f"pp {layout.pp} * ", f"groups of {layout.pp * layout.tp} ranks"
        stages = [f"  stages      {config.layers_per_stage} layers, {layout.pp_schedule}"]
    return "\n".join(
        [
            f"OK: {config.name} is legal on {config.world_size} rank{'s' if config.world_size != 1 else ''}",
            f"  layout      {pipeline}dp_replicate {layout.dp_replicate} * dp_shard {layout.dp_shard}{tensor} = "
            f"{config.world_size} ranks{sequence}",
            *stages,
            f"  batch       {either(sizes)} samples a step{by_tokens}: {layout.dp} {takers} * micro-batch "
            f"{config.micro_batch_size} * {either(config.accumulated)} accumulated",
            f"  tokens      {either(size * config.seq_length for size in sizes)} a step, {config.seq_length} a sample",
            f"  vocabulary  {config.model.vocabulary:,}",
        ]
    )
