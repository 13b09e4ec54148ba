"""A configuration completed by its data and its ranks, and checked."""

import os
from collections.abc import Mapping
from dataclasses import replace

from data.locations import data_prefix
from data.vocabulary import find_vocabulary
from runtime.errors import ConfigError, DataPathError, TokenizerError
from settings.checks.batch import check_batch_epochs, most_tokens
from settings.checks.model import check_vocabulary
from settings.checks.rules import check_relations
from settings.checks.training import check_deterministic
from settings.checks.values import check_choices, check_ranges
from settings.config import RunConfig


def resolve(config: RunConfig, environment: Mapping[str, str] = os.environ) -> RunConfig:
    """Checks the whole configuration once and fills in what is derived.

    Filled in: world_size, model.vocab_size, schedule.steps, parallel.dp_shard, train.micro_batch_size, and of a
    train.batch_schedule train.global_batch_size.
    Raises ConfigError with every problem found, and CorruptDataError for a broken description of the data. Relations
    between settings are looked at once each number by itself is legal.
    """
    out_of_range = list(check_ranges(config))
    problems = [*out_of_range, *check_choices(config), *check_deterministic(config, environment)]
    filled, tokens = config, None
    try:
        filled = replace(filled, world_size=_world_size(config, environment))
    except ConfigError as error:
        problems.append(str(error))
    try:
        vocabulary = find_vocabulary(config.data, config.out_dir)
        problems += check_vocabulary(config, vocabulary.size, vocabulary.source)
        filled = replace(filled, model=replace(config.model, vocab_size=config.model.vocab_size or vocabulary.size))
        tokens = most_tokens(data_prefix(config.data, config.out_dir))
    except (DataPathError, TokenizerError) as error:
        problems.append(str(error))
    if not out_of_range:
        layout = config.parallel
        remaining, rest = divmod(filled.world_size or 0, layout.pp * layout.dp_replicate * layout.cp * layout.tp)
        if layout.dp_shard == -1 and filled.world_size and not rest:
            filled = replace(filled, parallel=replace(layout, dp_shard=remaining))
        problems += check_relations(filled)
        if tokens is not None:
            problems += check_batch_epochs(filled, max(1, (tokens - 1) // filled.seq_length))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))  # two numbers of a list may be wrong alike
    return replace(
        filled,
        schedule=replace(filled.schedule, steps=filled.schedule_steps),
        train=replace(
            filled.train, micro_batch_size=filled.micro_batch_size, global_batch_size=filled.batches.sizes[0]
        ),
    )


def _world_size(config: RunConfig, environment: Mapping[str, str]) -> int:
    """Ranks of the run: as configured, else as torchrun says, else 1. Raises ConfigError where the two differ."""
    started = environment.get("WORLD_SIZE", "")
    if started and (not started.isdecimal() or int(started) < 1):
        raise ConfigError(
            f"the environment variable WORLD_SIZE={started} is no number of ranks; unset it or use torchrun"
        )
    if started and config.world_size not in (None, int(started)):
        raise ConfigError(
            f"world_size={config.world_size}, but {started} ranks were started (WORLD_SIZE={started}); "
            f"leave world_size out or use world_size={started}"
        )
    return config.world_size or int(started or 1)
