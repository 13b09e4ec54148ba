"""Layer normalisation and root-mean-square normalisation, computed in at least float32."""

import torch
import torch.nn.functional as F
from torch import nn

from core.config import ModelConfig
from parallel.initialization import Constant, InitialValue
from parallel.tensor import TensorParallel, local


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (arXiv:1607.06450)."""

    def __init__(self, hidden_size: int, eps: float, *, bias: bool, tensor: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.weight = tensor.parameter(hidden_size)
        self.initial_values: dict[str, InitialValue] = {"weight": Constant(1.0)}
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = tensor.parameter(hidden_size)
            self.initial_values["bias"] = Constant(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to the same shape and dtype."""
        bias = None if self.bias is None else local(self.bias)
        return F.layer_norm(x, self.weight.shape, local(self.weight), bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467).

    Args:
        per_head: whether `x` are heads, of which a tensor-parallel rank has its own.
    """

    def __init__(self, hidden_size: int, eps: float, *, tensor: TensorParallel, per_head: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.partial_gradient = per_head
        self.weight = tensor.parameter(hidden_size)
        self.initial_values: dict[str, InitialValue] = {"weight": Constant(1.0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, local(self.weight), self.eps)


def build_norm(config: ModelConfig, tensor: TensorParallel) -> LayerNorm | RMSNorm:
    """The normalisation that the configuration names."""
    if config.normalization == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps, tensor=tensor)
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias, tensor=tensor)
