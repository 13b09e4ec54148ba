"""What a configuration with pipeline stages must satisfy."""

from collections.abc import Iterator

from parallel.config import ParallelConfig
from parallel.stages import SPLIT_BACKWARD, V_SHAPED, supports_micro_batches
from runtime.messages import counted, divisors
from settings.checks.batch import fits_into_memory
from settings.config import RunConfig


def pipeline_sizes(config: RunConfig) -> list[int]:
    """The sizes of parallel.pp above 1 that it could have in place of data parallelism."""
    return [size for size in divisors(config.parallel.pp * max(config.parallel.dp_shard, 1)) if size > 1]


def check_pipeline_settings(config: RunConfig) -> Iterator[str]:
    """What describes stages comes with several of them, and a step to draw is taken."""
    layout, step = config.parallel, config.train.timeline_step
    if layout.pp > 1:
        if step is not None and step > config.train.steps:
            yield f"train.timeline_step={step} is not out of train.steps={config.train.steps}"
        return
    if step is not None:
        yield "train.timeline_step is about pipeline stages, but parallel.pp=1; use train.profile instead"
    given, virtual, sizes = layout.layers_per_stage, layout.virtual_stages, pipeline_sizes(config)
    if given not in (None, [config.model.num_layers]):
        advice = f"parallel.pp={len(given)} or " if len(given) in sizes else ""
        yield (
            f"parallel.layers_per_stage={given} is about pipeline stages, but parallel.pp=1; try {advice}"
            "parallel.layers_per_stage=null"
        )
    if virtual not in (None, 1):
        fitting = [size for size in sizes if size * virtual <= config.model.num_layers]
        advice = f"parallel.pp={fitting[0]} with parallel.pp_schedule=interleaved or " if fitting else ""
        yield (
            f"parallel.virtual_stages={virtual} is about pipeline stages, but parallel.pp=1; try {advice}"
            "parallel.virtual_stages=null"
        )


def check_virtual_stages(config: RunConfig) -> Iterator[str]:
    """Every schedule has as many stages a rank as it is made for."""
    layout = config.parallel
    number, schedule = layout.stages_per_rank, layout.pp_schedule
    stated = f"parallel.virtual_stages={number}, but parallel.pp_schedule={schedule}"
    if layout.pp == 1:
        return
    if schedule in V_SHAPED and number != 2:
        yield f"{stated} has two stages a rank, one on the way down and one on the way up; use 2 or null"
    elif schedule in ("gpipe", "1f1b") and number != 1:
        yield f"{stated} has one stage a rank; use null, or parallel.pp_schedule=interleaved"
    elif schedule == "interleaved" and number == 1:
        yield f"{stated} goes through several stages a rank; use 2 or null, or parallel.pp_schedule=1f1b"


def check_stages(config: RunConfig) -> Iterator[str]:
    """Every stage has a layer, and where layers are counted out, they are all there."""
    layout, layers = config.parallel, config.model.num_layers
    if layout.pp == 1:
        return
    if layout.stages > layers:
        stated = f"parallel.pp={layout.pp}"
        stated += (
            f" * {layout.stages_per_rank} stages a rank = {layout.stages} stages" if layout.stages_per_rank > 1 else ""
        )
        fewer = [size for size in pipeline_sizes(config) if size * layout.stages_per_rank <= layers]
        virtual = layers // layout.pp
        advice = [f"parallel.pp={fewer[-1]}"] if fewer else []
        if layout.virtual_stages is None:
            advice += ["parallel.pp_schedule=1f1b"] if layout.stages_per_rank > 1 and virtual else []
        elif virtual > (layout.pp_schedule != "zb") and layout.pp_schedule not in V_SHAPED:
            advice += [f"parallel.virtual_stages={virtual}"]
        advice += [f"model.num_layers={layout.stages}"]
        yield f"{stated} is more than model.num_layers={layers}, but every stage has a layer; try {' or '.join(advice)}"
        return
    given = layout.layers_per_stage
    if given is not None and (len(given), sum(given)) != (layout.stages, layers):
        yield (
            f"parallel.layers_per_stage={given} has {counted(sum(given), 'layer')} in {counted(len(given), 'stage')}, "
            f"but there are model.num_layers={layers} in {layout.stages}; try {config.balanced_layers}"
        )


def check_pipeline_batch(config: RunConfig) -> Iterator[str]:
    """There are micro-batches enough to keep the stages busy, and as many as the schedule can order."""
    layout, ranks, schedule = config.parallel, config.parallel.dp, config.parallel.pp_schedule
    if layout.pp == 1 or ranks < 1 or not fits_into_memory(config):
        return
    try:
        micro, sizes = config.micro_batch_size, config.batches.sizes
    except ValueError:
        return  # check_batch says why
    for size in sizes:
        number, rest = divmod(size, ranks * micro)
        if rest or supports_micro_batches(schedule, layout.pp, number):
            continue
        least = layout.pp * (2 if schedule == "dualpipev" else 1)
        needs = f"at least {least} micro-batches"
        if number >= least:
            needs = f"micro-batches that {number // layout.pp} rounds share equally"
        counts = range(max(1, number - 2 * least), number + 2 * least + 1)
        legal = [count for count in counts if supports_micro_batches(schedule, layout.pp, count)]
        near = sorted({min(legal, key=lambda count: abs(count - number - shift)) for shift in (-0.5, 0.5)})
        nearest = " or ".join(str(count * ranks * micro) for count in near)
        smaller = [each for each in reversed(divisors(size // ranks)) if each < micro]
        fitting = [each for each in smaller if supports_micro_batches(schedule, layout.pp, size // (ranks * each))]
        advice = [f"train.micro_batch_size={fitting[0]}"] if fitting else []
        constant = config.train.batch_schedule is None
        advice += [f"train.global_batch_size={nearest}" if constant else f"a size of {nearest}"]
        yield (
            f"parallel.pp={layout.pp} with parallel.pp_schedule={schedule} needs {needs} a step, but a global batch of "
            f"{size} over {counted(ranks, 'data-parallel rank')} * {counted(micro, 'sample')} gives {number}; "
            f"try {', or '.join(advice)}"
        )


def check_pipeline_options(config: RunConfig) -> Iterator[str]:
    """What goes with pipeline schedules, and what does not."""
    layout = config.parallel
    if layout.pp == 1:
        return
    if layout.zero_stage != 1 and layout.pp_schedule in SPLIT_BACKWARD:
        yield (
            f"parallel.zero={layout.zero} with parallel.pp_schedule={layout.pp_schedule}: gradients of weights come "
            "after the backward pass that would reduce them; use parallel.zero=1 or null, or parallel.pp_schedule=1f1b"
        )
    refusal = compile_refusal(layout)
    if config.train.compile and refusal is not None:
        yield f"train.compile=true with {refusal}; use train.compile=null or parallel.pp_schedule=interleaved"


def compile_refusal(layout: ParallelConfig) -> str | None:
    """What in a layout compiled layers do not go with, in words; None where there is nothing."""
    if layout.pp == 1 or layout.pp_schedule not in SPLIT_BACKWARD:
        return None
    return f"parallel.pp_schedule={layout.pp_schedule}: a compiled layer cannot put off the gradients of its weights"
