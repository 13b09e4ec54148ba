"""Configurations that runs have stored: taken as data, checked like one of now, and compared with it."""

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from checkpoint.manifest import Manifest
from runtime.errors import ConfigError
from settings.checks.values import check_ranges
from settings.config import RunConfig
from settings.keys import describe_type, each_setting, show

Config = TypeVar("Config")


def refuse_another_run(found: str, differences: Sequence[str], name: str) -> None:
    """Raise ConfigError where what is `found`, which begins the message, differs from the run of this `name`."""
    if not differences:
        return
    advice = f"choose another name, such as name={name}-2"
    if all(line.startswith("optimizer.name:") for line in differences):
        problem = f"of another optimizer; checkpoint.drop_moments=true goes on without its state, or {advice}"
    else:
        problem = f"of another run; {advice}"
    raise ConfigError("\n  ".join([f"{found} is {problem}", *differences]))


def difference(saved: RunConfig, current: RunConfig) -> list[str]:
    """Where two configurations mean another model, optimizer, data or order of it: "seed: was 1, now 2"."""
    before, now = _identity(saved), _identity(current)
    if current.checkpoint.drop_moments:
        before["optimizer.name"] = now["optimizer.name"]
    return [
        f"{key}: was {_shown(before.get(key))}, now {_shown(now.get(key))}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]


def changed_settings(saved: RunConfig, current: RunConfig) -> list[str]:
    """Every setting whose value is another one than it was: "optimizer.beta2: was 0.95, now 0.99"."""
    before = {key: value for key, _, value in each_setting(saved)}
    return [
        f"{key}: was {show(before[key])}, now {show(value)}"
        for key, _, value in each_setting(current)
        if value != before[key]
    ]


def config_of(path: Path, manifest: Manifest) -> RunConfig:
    """The configuration with which the checkpoint at `path` was saved.

    Raises ConfigError where it holds none that this version understands, or one of another model than its tensors': a
    model is only built in a size that the files have.
    """
    try:
        config = restore_config(manifest.state.get("config"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    stored = sum(math.prod(each.shape) for name, each in manifest.tensors.items() if name.startswith("model."))
    described = config.model.vocab_size and config.model.parameter_count()
    if described != stored:
        raise ConfigError(f"{path}: the saved configuration is of {described} parameters, its tensors have {stored}")
    return config


def restore_config(values: object) -> RunConfig:
    """The configuration that `dataclasses.asdict` turned into `values`, as config.yaml and checkpoints hold it.

    A key that is lacking, because an older version wrote it, has its default. Raises ConfigError for a key that this
    version does not know, and for a value of another type than the key's or out of its range.
    """
    config = _restore(RunConfig, values, "")
    if problems := list(check_ranges(config)):
        raise ConfigError(f"the saved configuration is not one: {'; '.join(problems)}")
    return config


def _restore(kind: type[Config], values: Any, prefix: str) -> Config:
    if not isinstance(values, dict):
        raise ConfigError(f"the saved configuration holds no keys under {prefix.rstrip('.') or 'its root'}")
    kinds = get_type_hints(kind)
    unknown = [f"{prefix}{name}" for name in values if name not in kinds]
    if unknown:
        raise ConfigError(
            f"the saved configuration holds {', '.join(unknown)}, which this version of Kilotron does not know"
        )
    groups = {
        name: _restore(kinds[name], value, f"{prefix}{name}.")
        for name, value in values.items()
        if is_dataclass(kinds[name])
    }
    plain = {name: value for name, value in values.items() if name not in groups}
    wrong = [
        f"{prefix}{name} is not {describe_type(kinds[name])}"
        for name, value in plain.items()
        if not _fits(value, kinds[name])
    ]
    if wrong:
        raise ConfigError(f"the saved configuration is not one: {', '.join(wrong)}")
    return kind(**plain, **groups)


def _fits(value: Any, declared: Any) -> bool:
    """Whether a plain value is of a setting's type."""
    kinds = get_args(declared)
    if get_origin(declared) is list:
        return isinstance(value, list) and all(_fits(item, kinds[0]) for item in value)
    return (
        any(_fits(value, kind) for kind in kinds)
        or type(value) is declared
        or (declared is float and type(value) is int)
    )


def _identity(config: RunConfig) -> dict[str, Any]:
    """What a run must keep to stay the same run; derived values are filled in, so null equals what it stands for."""
    model = {f"model.{key}": value for key, value in config.model.resolved().items()}
    data = {f"data.{part.name}": getattr(config.data, part.name) for part in fields(config.data)}
    data["data.seq_length"] = config.seq_length
    del data["data.num_workers"]
    if config.data.path is not None:
        del data["data.corpus"]  # which the path overrules
    return {**model, **data, "seed": config.seed, "optimizer.name": config.optimizer.name}


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
