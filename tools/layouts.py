"""`kilotron layouts`: the legal ways to divide a model over ranks, found by the configuration's own checks."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from planning.layouts import DIMENSIONS, Layouts, find_layouts, without_missing_data
from planning.memory import state_bytes
from runtime.errors import ConfigError
from runtime.messages import counted, either
from settings.compose import compose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron layouts`."""
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="settings as pretrain_gpt.py takes them; world_size=N is needed, and parallel.* sizes given are kept",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the table. Raises ConfigError where the settings are wrong or nothing is legal."""
    config = compose(arguments.overrides)
    if config.world_size is None:
        started = os.environ.get("WORLD_SIZE", "")
        if not started.isdecimal():
            raise ConfigError("the number of ranks is missing; say world_size=N, such as world_size=64")
        config = replace(config, world_size=int(started))
    config, note = without_missing_data(config)
    kept = {word.lstrip("+").partition("=")[0] for word in arguments.overrides}
    layouts = find_layouts(config, [name for name in DIMENSIONS if f"parallel.{name}" in kept])
    if not layouts.legal:
        reasons = [f"{sizes}: {problem}" for sizes, problems in layouts.refused.items() for problem in problems]
        raise ConfigError(f"no layout of {config.world_size} ranks is legal", *reasons)
    print("\n".join([*_table(layouts), *note]))
    return 0


def _table(layouts: Layouts) -> Iterator[str]:
    first = layouts.legal[0]
    count, pp = len(layouts.legal), first.parallel.pp
    stages = f", {pp} pipeline ranks ({first.parallel.pp_schedule})" if pp > 1 else ""
    yield (
        f"{counted(count, 'legal layout')} of {counted(first.world_size or 1, 'rank')} for "
        f"{first.model.parameter_count():,} parameters, {either(first.batches.sizes)} samples a step{stages}"
    )
    yield _row("tp", "sequence", "dp_replicate", "dp_shard", "micro_batch", "accumulated", "state GB/rank")
    for config in layouts.legal:
        layout = config.parallel
        yield _row(
            layout.tp,
            "-" if layout.tp == 1 else str(layout.sequence_parallel).lower(),
            layout.dp_replicate,
            layout.dp_shard,
            config.micro_batch_size,
            "/".join(map(str, config.accumulated)),
            f"{state_bytes(config) / 1e9:.2f}",
        )
    number = "float64" if first.train.precision == "fp64" else "float32"
    moments = "both moments of AdamW" if first.optimizer.name == "adamw" else "the moments of Muon and AdamW"
    zero, whole = first.parallel.zero_stage, "a rank's whole weights in the type of train.precision"
    held = {1: f"{whole}, and their whole gradients", 2: whole, 3: "the weights of the layer at hand"}[zero]
    yield (
        f"state: weights, gradients and {moments} in {number}; activations come on top, and what data parallelism "
        f"gathers with parallel.zero={zero}: {held}"
    )
    if pp == 1 and (first.world_size or 1) > 1:
        yield "all of them have parallel.pp=1; parallel.pp=N lists those with pipelines of N ranks"
    for sizes, problems in layouts.refused.items():
        yield from (f"not {sizes}: {problem}" for problem in problems)


def _row(*cells: object) -> str:
    widths: Sequence[int] = (4, 8, 12, 8, 11, 11, 13)
    return "  ".join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
