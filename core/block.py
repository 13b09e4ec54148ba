"""The transformer: a layer of attention and MLP with pre-normalisation, and the stack of layers."""

from collections.abc import Sequence

import torch
from torch import nn

from core.attention import KeyValueCache, SelfAttention
from core.config import ModelConfig
from core.mlp import build_mlp
from core.norm import build_norm
from core.rotary import RotaryTable, rotary_table


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = SelfAttention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = build_mlp(config)

    def forward(
        self, x: torch.Tensor, rotary: RotaryTable | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotary, cache)
        return x + self.mlp(self.mlp_norm(x))


class TransformerBlock(nn.Module):
    """Some of a model's layers, named by their global index so that a parameter's name is the same in every layout.

    Args:
        config: of the whole model.
        layer_indices: the layers that live here.
    """

    def __init__(self, config: ModelConfig, layer_indices: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({str(index): TransformerLayer(config) for index in layer_indices})

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, caches: Sequence[KeyValueCache] | None = None
    ) -> torch.Tensor:
        """`[batch, seq, hidden]` at `positions` `[seq]` to the same shape; `caches` holds one cache a layer."""
        rotary = None
        if self.config.position_embedding == "rope":
            rotary = rotary_table(positions, self.config.head_size, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers.values()):
            x = layer(x, rotary, None if caches is None else caches[index])
        return x
