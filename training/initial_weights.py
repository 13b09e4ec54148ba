"""What `checkpoint.load` gives a new run: weights alone, of another run's checkpoint or of a Hugging Face directory."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from checkpoint.directory import step_directories
from checkpoint.load import files_needed, load_checkpoint, verify_together
from checkpoint.manifest import read_manifest
from models.families import HUGGING_FACE_PREFIX, open_directory
from models.hugging_face_weights import HuggingFaceWeights
from parallel.agreement import on_rank_zero
from parallel.sharding import tensor_part
from runtime.errors import ConfigError, DamageError, HuggingFaceError, RemovedError
from settings.config import RunConfig
from settings.stored import config_of, difference


def load_weights(
    load: str, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size], config: RunConfig
) -> None:
    """Fill the parameters, of whole `shapes`, from where `load` says. Collective.

    Raises ConfigError where the weights are of another model, StorageError where they are damaged or unreadable.
    """
    if load.startswith(HUGGING_FACE_PREFIX):
        _load_hugging_face(load, parameters, shapes)
        return
    path = Path(load)
    try:
        manifest = on_rank_zero(lambda: read_manifest(path))
        verify_together(path, manifest, config.checkpoint.verify, lambda it: files_needed(it, parameters, shapes))
        differences = difference(config_of(path, manifest), config)
        of_model = [line for line in differences if re.match(r"model\.(?!dropout|init_std)", line)]
        if of_model:
            raise ConfigError(f"checkpoint.load={path} is of another model\n  " + "\n  ".join(of_model))
        load_checkpoint(
            path, manifest, {f"model.{name}": tensor_part(value, shapes[name]) for name, value in parameters.items()}
        )
    except DamageError as error:
        raise on_rank_zero(partial(_not_to_be_loaded, path, error)) from error


def _not_to_be_loaded(path: Path, error: DamageError) -> DamageError:
    """What to say of a checkpoint that is damaged, or that its run has removed; what else could be loaded is advice."""
    beside = [str(other) for _, other in step_directories(path.parent) if other.name != path.name]
    others = f"others there: {', '.join(beside)}" if beside else "there is no other beside it"
    if path.exists():
        return DamageError(f"checkpoint.load={path} is damaged: {error}; {others}")
    return RemovedError(f"checkpoint.load={path} was removed by its run, which saves others; {others}")


def _load_hugging_face(load: str, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]) -> None:
    def opened() -> HuggingFaceWeights:
        return HuggingFaceWeights(open_directory(Path(load.removeprefix(HUGGING_FACE_PREFIX))), shapes)

    def check() -> None:
        try:
            opened()
        except HuggingFaceError as error:
            raise ConfigError(f"checkpoint.load={load}: {error}") from error

    # Rank 0 first: what is wrong with the files is then said once, by all ranks alike.
    on_rank_zero(check)
    opened().copy_to(parameters)
