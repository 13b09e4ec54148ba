"""`kilotron layouts`: the legal ways to divide a model over ranks, found by the configuration's own checks."""

import argparse
import itertools
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from data.errors import DataPathError, TokenizerError
from data.vocabulary import find_vocabulary
from parallel.config import ParallelConfig
from parallel.stages import build_stages, stages_of_rank
from training.advice import counted, divisors
from training.batch_schedule import either
from training.checks import check_ranges
from training.compose import compose, resolve
from training.config import RunConfig
from training.errors import ConfigError

DIMENSIONS = ("tp", "dp_replicate", "dp_shard")


@dataclass(frozen=True)
class Layouts:
    """What the checks say of every way to divide the ranks."""

    legal: list[RunConfig]
    """A resolved configuration a layout; smallest tp first, then fewest replicas."""
    refused: dict[str, tuple[str, ...]]
    """Sizes such as `tp=3, dp=1`, with what is wrong with them."""


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


def without_missing_data(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with other data where its own is not on this machine and all that is wanted of it, the
    vocabulary, is given; and a line that says so. Raises ConfigError where the vocabulary is not given either."""
    try:
        find_vocabulary(config.data, config.out_dir)
    except (DataPathError, TokenizerError) as error:
        if config.model.vocab_size is None:
            raise ConfigError(f"{error}; to do without the data, give model.vocab_size") from error
        data = replace(config.data, path=None, corpus="sample", tokenizer="bytes")
        note = f"the data is not looked at, and model.vocab_size taken as it stands: {error}"
        return replace(config, data=data), [note]
    return config, []


def find_layouts(config: RunConfig, kept: Collection[str] = ()) -> Layouts:
    """Puts every layout of `config.world_size` ranks to the checks of `training.compose.resolve`.

    Sizes of the dimensions in `kept` stay as they are. With parallel.sequence null, sequence parallelism is off where
    only that is legal. Raises ConfigError for what is wrong whatever the layout.
    """
    legal: list[RunConfig] = []
    refused: dict[str, tuple[str, ...]] = {}
    for layout in _candidates(config, kept):
        found = _check(config, layout)
        if isinstance(found, RunConfig):
            legal.append(found)
        else:
            refused[f"tp={layout.tp}, dp={layout.dp}"] = found
    if not legal:
        first, *others = refused.values()
        everywhere = [problem for problem in first if all(problem in problems for problems in others)]
        if everywhere:
            raise ConfigError(*everywhere)
    return Layouts(legal, refused)


def _candidates(config: RunConfig, kept: Collection[str]) -> list[ParallelConfig]:
    """Every way in which the sizes multiply to the world; where none does, what is configured, to be refused."""
    layout, world = config.parallel, config.world_size or 1
    if any(check_ranges(config)):
        return [layout]
    given = {name: [getattr(layout, name)] for name in kept if getattr(layout, name) != -1}
    choices = (given.get(name, divisors(world)) for name in DIMENSIONS)
    sizes = [triple for triple in itertools.product(*choices) if math.prod(triple) * layout.pp * layout.cp == world]
    return [replace(layout, **dict(zip(DIMENSIONS, triple, strict=True))) for triple in sizes] or [layout]


def _check(config: RunConfig, layout: ParallelConfig) -> RunConfig | tuple[str, ...]:
    """The resolved configuration with this layout, or what is wrong with it."""
    try:
        return resolve(replace(config, parallel=layout), {})
    except ConfigError as error:
        if layout.sequence_parallel and layout.sequence is None:
            return _check(config, replace(layout, sequence=False))
        return error.args


def number_bytes(config: RunConfig) -> int:
    """Bytes of a weight as the optimizer holds it, of its gradient, and of each moment."""
    return 8 if config.train.precision == "fp64" else 4


def optimizer_numbers(config: RunConfig) -> int:
    """Numbers that the optimizer keeps of all parameters: AdamW two of each, Muon one of each that it moves."""
    by_muon = config.model.matrix_parameters() if config.optimizer.name == "muon" else 0
    return 2 * config.model.parameter_count() - by_muon


def state_bytes(config: RunConfig) -> int:
    """Bytes a rank holds of weights, gradients and optimizer state, cut over pp, tp and dp_shard: float32 numbers,
    float64 under fp64; of the pipeline rank that holds most. A rank with the most of a weight that dp_shard cuts
    unevenly holds up to a row more."""
    layout, model = config.parallel, config.model
    stages, most = build_stages(config.layers_per_stage), 0
    for rank in range(layout.pp):
        own = [stages[index] for index in stages_of_rank(rank, layout.pp, layout.stages_a_rank, layout.pp_schedule)]
        parameters = sum(
            model.stage_parameters(len(stage.layers), is_first=stage.is_first, is_last=stage.is_last, tp=layout.tp)
            for stage in own
        )
        if layout.pp == 1:
            parameters = model.parameter_count(layout.tp)
        layers = sum(len(stage.layers) for stage in own)
        matrices = model.matrix_parameters(layout.tp) // model.num_layers * layers
        most = max(most, 4 * parameters - (matrices if config.optimizer.name == "muon" else 0))
    return number_bytes(config) * -(-most // layout.dp_shard)


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
