"""The keys of settings: their types and values, and the known names that are nearest to what was typed."""

from collections.abc import Iterable, Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_origin

from runtime.messages import closest
from settings.config import RunConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
TYPE_NAMES = MappingProxyType(
    {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
)


def setting_types(schema: type[Any] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every key that can be set, such as `train.steps`, with its declared type."""
    types: dict[str, Any] = {}
    for item in fields(schema):
        if is_dataclass(item.type) and isinstance(item.type, type):
            types |= setting_types(item.type, f"{item.name}.")
        else:
            types[prefix + item.name] = item.type
    return types


def describe_type(declared: Any) -> str:
    """A declared type in words: `int | None` is "an integer or null"."""
    if get_origin(declared) is list:
        return f"a list like [{', '.join(TYPE_NAMES[item].split()[-1] for item in get_args(declared) * 2)}]"
    if declared in TYPE_NAMES:
        return TYPE_NAMES[declared]
    return " or ".join(describe_type(item) for item in get_args(declared))


def presets() -> dict[str, list[str]]:
    """The groups of conf/ with the names of their presets."""
    folders = sorted(folder for folder in CONF.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def suggest_keys(key: str) -> list[str]:
    """The known keys that an unknown one most likely means; a dash counts as an underscore."""
    wanted = key.replace("-", "_").lower()
    known = [*setting_types(), *presets()]
    by_last_word: dict[str, list[str]] = {}
    for candidate in known:
        by_last_word.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    if wanted in known:
        return [wanted]
    last_word = wanted.rpartition(".")[2]
    if last_word not in by_last_word:
        guess = _with_the_words_of(wanted, known) or closest(wanted, known)
        if guess is not None:
            return [guess]
        last_word = closest(last_word, by_last_word) or last_word
    return by_last_word.get(last_word, [])


def _with_the_words_of(wanted: str, known: Iterable[str]) -> str | None:
    """The shortest key of the same group that has the beginnings of all words that were typed, as num_attention_heads
    has those of num_head; None where there is none, or several are as short."""
    group, _, name = wanted.rpartition(".")
    beginnings = name.split("_")

    def has_all(key: str) -> bool:
        words = iter(key.rpartition(".")[2].split("_"))
        return all(any(word.startswith(beginning) for word in words) for beginning in beginnings)

    found = [key for key in known if key.rpartition(".")[0] == group and has_all(key)]
    found.sort(key=lambda key: key.count("_"))
    if not found or (len(found) > 1 and found[0].count("_") == found[1].count("_")):
        return None
    return found[0]


def unknown(typed: str, key: str, value: str | None = None) -> str:
    """The message for a key that is not known, `typed` so, with the value that it was to have."""
    assigned = "" if value is None else f"={value}"
    guesses = " or ".join(f"{guess}{assigned}" for guess in suggest_keys(key))
    hint = f"did you mean {guesses}?" if guesses else "--help shows the groups, --cfg job every key=value"
    return f"unknown {typed}; {hint}"


def each_setting(config: Any, prefix: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Every key of a configuration with its field and its value."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from each_setting(value, f"{item.name}.")
        else:
            yield prefix + item.name, item, value


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
