"""Building the optimizer, and its state as named tensors."""

import torch
from torch import nn

from training.checkpoint_tensor import tensor_part
from training.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW (arXiv:1711.05101) over the model's parameters; its state exists from the start.

    Weight decay applies to the matrices of linear layers, not to norms, biases and embeddings.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.startswith("embedding.")
        (decayed if is_matrix else others).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            # Fused AdamW counts its steps in float32 on the parameter's device.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def training_tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, shapes: dict[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Every tensor a checkpoint holds, by name: `model.NAME` and `optimizer.KEY.NAME`.

    Args:
        parameters: by global name, sharded as the optimizer holds them.
        optimizer: whose state exists.
        shapes: of the whole parameters, without padding.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = tensor_part(parameter, shapes[name])
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = tensor_part(value, shapes[name] if value.dim() else value.shape)
    return tensors
