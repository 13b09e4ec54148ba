"""What `check=true` says of a legal configuration: how its ranks divide the work."""

from runtime.messages import counted, either
from settings.config import RunConfig


def summary(config: RunConfig) -> str:
    """Layout, batch, tokens and vocabulary of a resolved configuration, a line each."""
    layout, sizes, ranks = config.parallel, config.batches.sizes, counted(config.world_size or 1, "rank")
    by_tokens = f" ({config.train.batch_schedule})" if config.train.batch_schedule else ""
    tensor, sequence, takers = "", "", counted(layout.dp, "rank")
    if layout.tp * layout.pp > 1:
        takers = f"{counted(layout.dp, 'group')} of {layout.tp * layout.pp} ranks"
    if layout.tp > 1:
        tensor = f" * tp {layout.tp}"
        sequence = f", {'with' if layout.sequence_parallel else 'without'} sequence parallelism"
    pipeline, stages = "", []
    if layout.pp > 1:
        pipeline, stages = f"pp {layout.pp} * ", [f"  stages      {describe_stages(config)}"]
    elif layout.pp_schedule != type(layout).pp_schedule:
        stages = [f"  stages      1: parallel.pp_schedule={layout.pp_schedule} counts from parallel.pp=2 on"]
    return "\n".join(
        [
            f"OK: {config.name} is legal on {ranks}",
            f"  layout      {pipeline}dp_replicate {layout.dp_replicate} * dp_shard {layout.dp_shard}{tensor} = "
            f"{ranks}{sequence}",
            *stages,
            f"  batch       {either(sizes)} samples a step{by_tokens}: {takers} * micro-batch "
            f"{config.micro_batch_size} * {either(config.accumulated)} accumulated",
            f"  tokens      {either(size * config.seq_length for size in sizes)} a step, {config.seq_length} a sample",
            f"  vocabulary  {config.model.vocabulary:,}",
        ]
    )


def describe_stages(config: RunConfig) -> str:
    """What the pipeline ranks of a resolved configuration have, and in which order they go through it."""
    return f"{config.layers_per_stage} layers, {config.parallel.pp_schedule}"
