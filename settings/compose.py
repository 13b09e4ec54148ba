"""From presets and the command line to a configuration."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.errors import ConfigError
from settings.command_line import check_overrides, expand_sweep, mutable_schema
from settings.config import RunConfig
from settings.keys import CONF, describe_type, setting_types, unknown


def compose(overrides: Sequence[str]) -> RunConfig:
    """The configuration that defaults, presets, experiment and overrides (`key=value`, last word wins) add up to.

    Raises ConfigError naming every override that is wrong, or what is wrong in a file of conf/.
    """
    accepted, problems = check_overrides(overrides)
    if problems:
        raise ConfigError(*problems)
    ConfigStore.instance().store("schema", mutable_schema())
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
