"""Models as Hugging Face directories hold them: a family's names for settings and tensors, as tables read both ways.

Free of torch, so that a configuration is checked at once.
"""

import itertools
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from core.config import ModelConfig
from runtime.errors import HuggingFaceError
from runtime.files import read_object

HEAD, WORDS = "head.weight", "embedding.word.weight"
OTHER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)
"""Files that accompany the weights and go through import and export as they are."""


class Setting(NamedTuple):
    """A setting of ModelConfig under the family's key."""

    ours: str
    theirs: str
    """Key of config.json; `rope.KEY` is one of the rotary settings, wherever the file's version keeps them."""
    default: Any
    """What the family takes where the key is absent."""
    words: Mapping[str, Any] = {}
    """Our value for each of their words; of several for one value, the first is written."""


class TensorRule(NamedTuple):
    """One of their tensors: ours, one after another by rows, then transposed where they store `[in, out]`."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of their tensor, from the `shapes` of ours."""
        stacked = (sum(shapes[name][0] for name in self.ours), *shapes[self.ours[0]][1:])
        return stacked[::-1] if self.transposed else stacked


@dataclass(frozen=True)
class Family:
    """The models of one `model_type`."""

    model_type: str
    architecture: str
    """Class of transformers that holds the model with its head."""
    base: str
    """What names start with inside that class; files of the model without its head lack it."""
    settings: tuple[Setting, ...]
    constants: Mapping[str, Any]
    """Our settings that all members share, where they are not ModelConfig's defaults."""
    requirements: Mapping[str, Any]
    """Keys of config.json with the one value, also that of an absent key, that Kilotron computes."""
    modules: Mapping[str, str]
    """Our module, or modules that theirs fuses, for each of theirs; with `{layer}`, ours are of that layer."""
    transposed: Collection[str]
    """Last names of modules of theirs whose weights are stored `[in, out]`."""
    ignored: str
    """Pattern of names, without the base, of stored tensors that hold nothing learned."""

    def model_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """The model that a config.json describes. Raises HuggingFaceError naming all that Kilotron cannot do."""
        flat, types, settings = _with_flat_rope(config), get_type_hints(ModelConfig), dict(self.constants)
        required = {"quantization_config": None, **self.requirements}.items()
        problems = [f"{k}={flat[k]!r}, only {v!r} is supported" for k, v in required if flat.get(k, v) != v]
        for ours, theirs, default, words in self.settings:
            value, kind = flat.get(theirs, default), types[ours]
            positive = type(value) not in (int, float) or value > 0
            if words and isinstance(value, str) and value in words:
                value = words[value]
            elif words or not isinstance(value, (int, float) if kind is float else kind) or not positive:
                problems.append(f"{theirs}={value!r}" + (f", only {', '.join(words)} is supported" if words else ""))
                continue
            value = float(value) if kind is float else value
            if settings.setdefault(ours, value) != value:
                problems.append(f"{theirs}={value!r} where others differ, but model.{ours} is one for all")
        if problems:
            raise HuggingFaceError(f"config.json: {'; '.join(problems)}")
        return ModelConfig(**settings)

    def unsupported_settings(self, model: ModelConfig) -> list[str]:
        """What of a model the family cannot express, as in "model.bias=True (it has False)"."""
        words = {setting.ours: setting.words.values() for setting in self.settings}
        fixed: dict[str, Any] = {part.name: part.default for part in fields(ModelConfig)} | dict(self.constants)
        found = []
        for key, value in identity(model).items():
            legal = words[key] if key in words else [replace(model, **{key: fixed[key]}).resolved()[key]]
            if legal and value not in legal:
                found.append(f"model.{key}={value} (it has {', '.join(map(str, legal))})")
        return found

    def config_json(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model without unsupported settings."""
        values = model.resolved()
        written: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for ours, theirs, _, words in self.settings:
            value = values[ours]
            written[theirs] = next(word for word, known in words.items() if known == value) if words else value
        return _with_nested_rope(written)

    def tensor_rules(self, parameters: Collection[str], num_layers: int, base: str) -> list[TensorRule]:
        """The rules of a model's tensors, in files whose names start with `base`. Raises HuggingFaceError where a
        parameter has no name here."""
        rules = []
        for theirs, ours in self.modules.items():
            layers = num_layers if "{layer}" in theirs else 1
            for layer, kind in itertools.product(range(layers), ("weight", "bias")):
                prefix = f"block.layers.{layer}." if "{layer}" in theirs else ""
                names = tuple(f"{prefix}{name}.{kind}" for name in ours.split())
                if names[0] in parameters:
                    transposed = kind == "weight" and theirs.rpartition(".")[2] in self.transposed
                    rules.append(TensorRule(f"{theirs.format(base=base, layer=layer)}.{kind}", names, transposed))
        unnamed = set(parameters).difference(*(rule.ours for rule in rules))
        if unnamed:
            raise HuggingFaceError(f"{self.model_type} has no tensor for {', '.join(sorted(unnamed)[:5])}")
        return rules


class HuggingFaceDirectory(NamedTuple):
    """A directory whose config.json is understood, and the files that hold its weights."""

    path: Path
    family: Family
    config: dict[str, Any]
    model: ModelConfig
    files: list[Path]


def copy_others(source: Path, target: Path) -> None:
    """Copies what accompanies the weights from one directory to another."""
    for name in OTHER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def identity(model: ModelConfig) -> dict[str, Any]:
    """The settings that say what the weights mean, without those that mean nothing beside the others."""
    idle = {"dropout", "init_std"} | ({"moe_top_k"} if model.num_experts is None else set())
    if model.position_embedding != "learned":
        idle |= {"max_position_embeddings"}
    scaling = ("rope_scaling_factor", "rope_low", "rope_high", "rope_original")
    no_rope = ("rope_",) if model.position_embedding != "rope" else scaling if model.rope_scaling is None else ()
    return {key: v for key, v in model.resolved().items() if key not in idle and not key.startswith(no_rope)}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory: those that its index names, or the only one. Raises HuggingFaceError, or
    DataPathError where the index cannot be read."""
    index, names = path / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HuggingFaceError(f"{index.name} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # A name is joined to the directory's path, so it may not lead out of it.
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise HuggingFaceError(f"{index.name}: {name!r} is no plain file name")
        if not (path / name).is_file():
            pickled = any(path.glob("*.bin"))
            raise HuggingFaceError(f"it has no {name}" + ("; pickled weights (.bin) are not read" if pickled else ""))
    return [path / name for name in names]


def _with_flat_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of all versions of config.json (top level, `rope_scaling`, `rope_parameters`) as `rope.KEY`."""
    rope = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    for part in (config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        if not isinstance(part, dict):
            raise HuggingFaceError(f"config.json: rotary settings are no object but {part!r}")
        rope |= part
    rope.setdefault("rope_type", rope.get("type", "default"))
    return dict(config) | {f"rope.{key}": value for key, value in rope.items()}


def _with_nested_rope(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The form that every version reads: the base at the top level, the rest in `rope_scaling`."""
    config = {key: value for key, value in flat.items() if not key.startswith("rope.")}
    rope = {key.removeprefix("rope."): value for key, value in flat.items() if key.startswith("rope.")}
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config
