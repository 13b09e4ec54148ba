"""The registry of Hugging Face families, and which of them a directory or a model belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import ModelConfig
from models.gpt2 import GPT2
from models.hugging_face import Family, HuggingFaceDirectory, weight_files
from models.llama import LLAMA
from runtime.errors import DataPathError, HuggingFaceError
from runtime.files import read_object

FAMILIES = (GPT2, LLAMA)
HUGGING_FACE_PREFIX = "hf:"
"""What a Hugging Face directory is marked with in checkpoint.load."""


def open_directory(path: Path) -> HuggingFaceDirectory:
    """A directory with config.json and safetensors files, understood but not read. Raises HuggingFaceError."""
    try:
        config = read_object(path / "config.json")
        family = family_of(config)
        return HuggingFaceDirectory(path, family, config, family.model_config(config), weight_files(path))
    except (DataPathError, HuggingFaceError) as error:
        raise HuggingFaceError(f"{path}: {error}") from None


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises HuggingFaceError."""
    for family in FAMILIES:
        if config.get("model_type") == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise HuggingFaceError(f"config.json: model_type={config.get('model_type')!r} is not supported; known: {known}")


def family_for(model: ModelConfig) -> Family:
    """The first family that can express a model. Raises HuggingFaceError with what stands in each one's way."""
    unsupported_settings = [(family, family.unsupported_settings(model)) for family in FAMILIES]
    for family, found in unsupported_settings:
        if not found:
            return family
    reasons = "\n".join(f"  {family.model_type}: {', '.join(found)}" for family, found in unsupported_settings)
    raise HuggingFaceError(f"no Hugging Face family can express this model\n{reasons}")
