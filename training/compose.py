"""From words on the command line to one frozen configuration: composed by Hydra, checked, and filled in."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import cast

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import DataPathError, TokenizerError
from data.locations import data_prefix
from data.vocabulary import find_vocabulary
from training.batch_checks import check_batch_epochs, most_tokens
from training.checks import check_choices, check_deterministic, check_ranges, check_relations, check_vocabulary
from training.config import RunConfig
from training.errors import ConfigError
from training.overrides import check_overrides, expand_sweep, thawed_schema
from training.settings import CONF, describe_type, setting_types, unknown


def compose(overrides: Sequence[str]) -> RunConfig:
    """The configuration that defaults, presets, experiment and overrides (`key=value`, last word wins) add up to.

    Raises ConfigError naming every override that is wrong, or what is wrong in a file of conf/.
    """
    accepted, problems = check_overrides(overrides)
    if problems:
        raise ConfigError(*problems)
    ConfigStore.instance().store("schema", thawed_schema())
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return cast(RunConfig, OmegaConf.to_object(hydra_compose("config", overrides=accepted)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_composing_problem(str(error))) from error


def _composing_problem(message: str) -> str:
    """Hydra's own message, with what would work in the place of its types."""
    lines = [line.strip() for line in message.partition("Config search path:")[0].splitlines() if line.strip()]
    where = next((f" (conf/{name}.yaml)" for name in re.findall("^In '([^']*)'", message)), "")
    key = next(iter(re.findall(r"full_key: (\S+)", message)), None)
    if key is not None and "not in '" in message:
        return unknown(f"key {key}", key) + where
    if key in setting_types() and "interpolation" not in message.lower():
        return f"{key}: {lines[1] if where else lines[0]}{where}; expected {describe_type(setting_types()[key])}"
    shown = [line for line in lines if not line.startswith(("full_key", "reference_type", "object_type"))]
    return " ".join([f"{key}:", *shown] if key else shown)


def compose_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a sweep; each has a name, so a run directory, of its own. Raises ConfigError."""
    return [[*run, f"name='{compose(run).name}{suffix}'"] for run, suffix in expand_sweep(overrides)]


def to_yaml(config: RunConfig) -> str:
    """The configuration as plain YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


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
