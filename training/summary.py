"""What `check=true` says of a legal configuration: how its ranks divide the work."""

from training.config import RunConfig


def summary(config: RunConfig) -> str:
    """Layout, batch, tokens and vocabulary of a resolved configuration, a line each."""
    layout, train = config.parallel, config.train
    tensor, sequence, takers = "", "", "ranks"
    if layout.tp > 1:
        tensor, takers = f" * tp {layout.tp}", f"groups of {layout.tp} ranks"
        sequence = f", {'with' if layout.sequence_parallel else 'without'} sequence parallelism"
    return "\n".join(
        [
            f"OK: {config.name} is legal on {config.world_size} ranks",
            f"  layout      dp_replicate {layout.dp_replicate} * dp_shard {layout.dp_shard}{tensor} = "
            f"{config.world_size} ranks{sequence}",
            f"  batch       {train.global_batch_size} samples a step: {layout.dp} {takers} * micro-batch "
            f"{config.micro_batch_size} * {config.accumulation_steps} accumulated",
            f"  tokens      {train.global_batch_size * config.seq_length:,} a step, {config.seq_length} a sample",
            f"  vocabulary  {config.model.vocabulary:,}",
        ]
    )
