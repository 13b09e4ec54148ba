"""Building the optimizer, and its state as named tensors."""

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from parallel.sharding import TensorPart, tensor_part
from runtime.errors import ConfigError
from runtime.messages import closest
from settings.config import OptimizerConfig
from settings.parameter_groups import parse_group
from training.muon import Muon


def build_optimizer(model: nn.Module, config: OptimizerConfig, names: Collection[str] = ()) -> torch.optim.Optimizer:
    """The configured optimizer over the model's parameters; its state exists from the start. `names` are those of the
    whole model, where this is a part of it.

    AdamW (arXiv:1711.05101) is fused. Where `optimizer.groups` says nothing else, weight decay applies to the matrices
    of linear layers and not to norms, biases and embeddings. Raises ConfigError where a pattern matches no parameter.
    """
    groups = _parameter_groups(model, config, names)
    by_muon = [group for group in groups if group["muon"]]
    by_adamw = [group for group in groups if not group["muon"]]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        by_adamw, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
    for parameter in [parameter for group in by_adamw for parameter in group["params"]]:
        optimizer.state[parameter] = {
            # Fused AdamW counts its steps in float32 on the parameter's device.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return Muon(by_muon, optimizer, config) if by_muon else optimizer


def _parameter_groups(model: nn.Module, config: OptimizerConfig, names: Collection[str]) -> list[dict[str, Any]]:
    """Parameters of equal settings; those of a `muon` group, matrices of layers, are Muon's, the others AdamW's."""
    named = list(model.named_parameters())
    rules = [parse_group(text) for text in config.groups]
    names = names or [name for name, _ in named]
    unused = [pattern for pattern, _ in rules if not any(fnmatchcase(name, pattern) for name in names)]
    if unused:
        raise ConfigError(*(_no_such_parameter(pattern, list(names)) for pattern in unused))
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named:
        is_matrix = parameter.dim() == 2 and not name.startswith("embedding.")
        settings: dict[str, Any] = {"lr_scale": 1.0, "weight_decay": config.weight_decay if is_matrix else 0.0}
        settings["muon"] = config.name == "muon" and is_matrix and name.startswith("block.")
        for pattern, exceptions in rules:
            settings |= exceptions if fnmatchcase(name, pattern) else {}
        groups.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def _no_such_parameter(pattern: str, names: list[str]) -> str:
    guess = closest(pattern, names) or closest(pattern.strip("*"), names)
    hint = f"did you mean {guess}?" if guess else f"names are like {names[0]} and {names[-1]}"
    return f"optimizer.groups: {pattern} matches no parameter; {hint}"


def training_tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, shapes: dict[str, torch.Size]
) -> dict[str, TensorPart]:
    """Every tensor a checkpoint holds, by name: `model.NAME` and `optimizer.KEY.NAME`.

    Args:
        parameters: by global name, sharded as the optimizer holds them.
        optimizer: whose state exists.
        shapes: of the whole parameters, without padding.
    """
    tensors: dict[str, TensorPart] = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = tensor_part(parameter, shapes[name])
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = tensor_part(value, shapes[name] if value.dim() else value.shape)
    return tensors


@torch.no_grad()
def sync_tied_weights(model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Where a rank has a weight twice, at both ends of a pipeline, give the other what the one in `parameters` has."""
    for name, duplicate in model.named_parameters():
        original = parameters[name]
        if duplicate is not original:
            duplicate.copy_(original)
            for key, value in optimizer.state[original].items():
                optimizer.state[duplicate][key].copy_(value)
