"""The MLP of a transformer layer: two projections around a non-linearity, or three where it is gated."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from core.config import ModelConfig
from parallel.layers import Linear


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh, as GPT-2 has it (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "gelu_tanh": gelu_tanh}


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.hidden_size, config.ffn_size, bias=config.bias, init_std=config.init_std)
        self.down = _down_projection(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), known as SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.ffn_size, bias=config.bias, init_std=config.init_std)
        self.up = Linear(config.hidden_size, config.ffn_size, bias=config.bias, init_std=config.init_std)
        self.down = _down_projection(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _down_projection(config: ModelConfig) -> Linear:
    residual_std = config.init_std / math.sqrt(2 * config.num_layers)
    return Linear(config.ffn_size, config.hidden_size, bias=config.bias, init_std=residual_std)


def build_mlp(config: ModelConfig) -> MLP | GatedMLP:
    """The MLP that the configuration's activation asks for."""
    return GatedMLP(config) if config.activation == "swiglu" else MLP(config)
