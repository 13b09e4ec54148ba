"""The command line: which words are options, which are `key=value`, what is wrong with each, and sweeps."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from training.config import RunConfig
from training.errors import ConfigError
from training.settings import describe_type, presets, setting_types, suggest_keys, unknown_key, unknown_preset


@dataclass(frozen=True)
class CommandLine:
    """What was typed after `pretrain_gpt.py`."""

    overrides: list[str]
    """Everything that is no option, in order."""
    show_help: bool = False
    """--help"""
    show_config: bool = False
    """--cfg job"""
    sweep: bool = False
    """-m, --multirun"""


def read_command_line(words: Sequence[str]) -> CommandLine:
    """Separates options from overrides. Raises ConfigError when --cfg asks for anything but `job`."""
    text = list(words)
    for index, word in enumerate(text):
        if word in ("--cfg", "-c"):
            text[index : index + 2] = [f"--cfg={text[index + 1] if index + 1 < len(text) else ''}"]
    shown = [word.removeprefix("--cfg=") for word in text if word.startswith("--cfg=")]
    if any(what != "job" for what in shown):
        raise ConfigError(f"--cfg {shown[0]}: only `--cfg job`, the composed configuration, can be shown")
    options = ("-h", "--help", "-m", "--multirun", "--cfg=job")
    return CommandLine(
        overrides=[word for word in text if word not in options],
        show_help="-h" in text or "--help" in text,
        show_config=bool(shown),
        sweep="-m" in text or "--multirun" in text,
    )


def thawed_schema() -> DictConfig:
    """The dataclasses as an OmegaConf schema that can be merged into, though they are frozen."""
    schema = OmegaConf.structured(RunConfig)
    for node in (schema, *(schema[key] for key in schema)):
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, None)
    return schema


def check_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides that Hydra can take, and one message for each that is wrong."""
    accepted: list[str] = []
    problems: list[str] = []
    remaining = list(words)
    schema = thawed_schema()
    while remaining:
        word = remaining.pop(0)
        if word.startswith("-"):
            separate = "=" not in word and bool(remaining) and not re.search("^-|=", remaining[0])
            problems.append(_option_problem(word, remaining.pop(0) if separate else None))
            continue
        problem = _override_problem(word, schema)
        if problem is None:
            accepted.append(word.lstrip("+"))
        else:
            problems.append(problem)
    return accepted, problems


def _option_problem(word: str, following: str | None) -> str:
    key, _, value = word.lstrip("-").partition("=")
    guesses = suggest_keys(key)
    if not guesses:
        return f"unknown option {word}; settings are written key=value, and --help shows them"
    value = following or value or "VALUE"
    return f"unknown option {word}; did you mean {' or '.join(f'{guess}={value}' for guess in guesses)}?"


def _override_problem(word: str, schema: DictConfig) -> str | None:
    """What is wrong with one `key=value`, or None. Adding (`+key`) a known key is setting it."""
    key, equals, value = word.partition("=")
    if word.startswith("~"):
        return f"{word}: a setting cannot be removed; give it another value, or null where null is allowed"
    if not equals:
        guesses = suggest_keys(key.lstrip("+"))
        return f"{word}: settings are written key=value" + (f", such as {guesses[0]}=VALUE" if guesses else "")
    known = key.lstrip("+")
    if "@" in known:
        return f"{word}: packages (@) are not used here; write {known.partition('@')[0]}={value}"
    sections = {name.partition(".")[0] for name in setting_types() if "." in name}
    if known not in setting_types() and known not in presets():
        if known in sections:
            return f"{word}: {known} has no presets; set one of its keys, such as {_first_key(known)}=VALUE"
        return unknown_key(known, value)
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        quoted = f"['{value.strip('[]')}']" if "list[str]" in str(setting_types().get(known)) else f"'{value}'"
        return f'{word}: the value cannot be read ({reason}); quote it: "{known}={quoted}"'
    return _value_problem(word, known, override, schema)


def _first_key(section: str) -> str:
    return next(name for name in setting_types() if name.startswith(f"{section}."))


def _value_problem(word: str, key: str, override: Override, schema: DictConfig) -> str | None:
    declared = setting_types().get(key)
    if override.is_sweep_override():
        values = word.partition("=")[2]
        as_list = f" or, for a list, write {key}=[{values}]" if "list" in str(declared) else ""
        return f"{word}: several values; add -m to run one after another{as_list}, or quote: \"{key}='{values}'\""
    value = override.value()
    if declared is None:
        known = value in presets()[key] or (key == "experiment" and value is None)
        hint = f"; for a file of tokens write data.path={value}" if key == "data" else ""
        return None if known else unknown_preset(key, value) + hint
    try:
        if "bool" in str(declared) and isinstance(value, (int, float)) and value not in (0, 1):
            raise ValidationError  # OmegaConf would take any number for true
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        whole = isinstance(value, float) and value.is_integer() and describe_type(declared).startswith("an integer")
        return f"{word}: expected {describe_type(declared)}" + (f"; try {key}={value:.0f}" if whole else "")
    return None


def expand_sweep(words: Sequence[str]) -> list[tuple[list[str], str]]:
    """The runs of a sweep over `key=a,b` or `key=range(1,4)`, the last key varying fastest: the overrides of each, and
    the values that distinguish it, as a suffix for its name. Raises ConfigError where a sweep cannot be listed."""
    parser = OverridesParser.create()
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException:
            fixed.append(word)  # composing says what is wrong with it
            continue
        if not override.is_sweep_override():
            fixed.append(word)
            continue
        try:
            swept[override.key_or_group] = list(override.sweep_string_iterator())
        except HydraException as error:
            raise ConfigError(f"{word}: cannot be swept over; list the values: {override.key_or_group}=a,b") from error
    runs = []
    for values in itertools.product(*swept.values()):
        chosen = [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
        suffix = "".join(f"-{word}" for word in chosen if not word.startswith("name="))
        runs.append(([*fixed, *chosen], re.sub(r"[^\w.=+-]", "_", suffix)))
    return runs
