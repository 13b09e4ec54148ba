"""The MLP of a transformer layer: two projections around a non-linearity, or three where it is gated."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from core.config import ModelConfig
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh, as GPT-2 has it (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": squared_relu,
}


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = _wide_projection(config, tensor)
        self.down = _down_projection(config, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), known as SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.gate = _wide_projection(config, tensor)
        self.up = _wide_projection(config, tensor)
        self.down = _down_projection(config, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        gate, up = column_parallel(x, [self.gate, self.up])
        return self.down(F.silu(gate) * up)


def _wide_projection(config: ModelConfig, tensor: TensorParallel) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        config.hidden_size, config.ffn_size, bias=config.bias, init_std=config.init_std, tensor=tensor
    )


def _down_projection(config: ModelConfig, tensor: TensorParallel) -> RowParallelLinear:
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    return RowParallelLinear(
        config.ffn_size, config.hidden_size, bias=config.bias, init_std=residual_std, tensor=tensor
    )


def build_mlp(config: ModelConfig, tensor: TensorParallel) -> MLP | GatedMLP:
    """The MLP that the configuration's activation asks for."""
    return GatedMLP(config, tensor) if config.activation == "swiglu" else MLP(config, tensor)
