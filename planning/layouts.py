"""Parallel layouts that fit: their candidates, and what they need of memory and move between ranks."""

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from data.vocabulary import find_vocabulary
from parallel.config import ParallelConfig
from runtime.errors import ConfigError, DataPathError, TokenizerError
from runtime.messages import divisors
from settings.checks.values import check_ranges
from settings.config import RunConfig
from settings.resolve import resolve

DIMENSIONS = ("tp", "dp_replicate", "dp_shard")


@dataclass(frozen=True)
class Layouts:
    """What the checks say of every way to divide the ranks."""

    legal: list[RunConfig]
    """A resolved configuration a layout; smallest tp first, then fewest replicas."""
    refused: dict[str, tuple[str, ...]]
    """Sizes such as `tp=3, dp=1`, with what is wrong with them."""


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
    """Puts every layout of `config.world_size` ranks to the checks of `settings.compose.resolve`.

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
