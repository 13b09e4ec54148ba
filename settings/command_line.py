"""The command line: which words are options, which are `key=value`, what is wrong with each, and sweeps."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from runtime.errors import ConfigError
from runtime.messages import closest
from settings.config import RunConfig
from settings.keys import describe_type, presets, setting_types, suggest_keys, unknown


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


def mutable_schema() -> DictConfig:
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
    schema = mutable_schema()
    while remaining:
        word = remaining.pop(0)
        if word.startswith("-"):
            key, _, value = word.lstrip("-").partition("=")
            if "=" not in word and remaining and not re.search("^-|=", remaining[0]):
                value = remaining.pop(0)
            problems.append(unknown(f"option {word}", key, value or "VALUE"))
        elif problem := _override_problem(word, schema):
            problems.append(problem)
        else:
            accepted.append(word.lstrip("+"))
    return accepted, problems


def _override_problem(word: str, schema: DictConfig) -> str | None:
    """What is wrong with one `key=value`, or None. Adding (`+key`) a known key is setting it."""
    key, equals, text = word.lstrip("+").partition("=")
    types, groups = setting_types(), presets()
    if word.startswith("~"):
        return f"{word}: a setting cannot be removed; give it another value, or null where null is allowed"
    if not equals:
        guesses = suggest_keys(key)
        return f"{word}: settings are written key=value" + (f", such as {guesses[0]}=VALUE" if guesses else "")
    if "@" in key:
        return f"{word}: packages (@) are not used here; write {key.partition('@')[0]}={text}"
    if key not in types and key not in groups:
        inside = [name for name in types if name.startswith(f"{key}.")]
        if inside:
            return f"{word}: {key} has no presets; set one of its keys, such as {inside[0]}=VALUE"
        return unknown(f"key {key}={text}", key, text)
    declared = types.get(key)
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        quoted = f"['{text.strip('[]')}']" if "list[str]" in str(declared) else f"'{text}'"
        return f'{word}: the value cannot be read ({str(error).splitlines()[0]}); quote it: "{key}={quoted}"'
    if override.is_sweep_override():
        as_list = f" or, for a list, write {key}=[{text}]" if "list" in str(declared) else ""
        return f"{word}: several values; add -m to run one after another{as_list}, or quote: \"{key}='{text}'\""
    value = override.value()
    if declared is None:
        if value in groups[key] or (key == "experiment" and value is None):
            return None
        guess = closest(str(value), groups[key])
        known = f"{f'did you mean {guess}? ' if guess else ''}known: {', '.join(groups[key])}"
        hint = f"; for a file of tokens write data.path={value}" if key == "data" else ""
        return f"{key}={value}: no such preset; {known}{hint}"
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
            override = None  # composing says what is wrong with it
        if override is None or not override.is_sweep_override():
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
