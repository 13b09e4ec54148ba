"""The transformer: a layer of attention and MLP with pre-normalisation, and the stack of layers."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.attention import KeyValueCache, SelfAttention
from core.config import ModelConfig
from core.dropout import DropoutKey, DropoutSite, dropout
from core.mlp import build_mlp
from core.norm import build_norm
from core.rotary import RotaryTable, rotary_table
from parallel.tensor import TensorParallel


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        index: of the layer in the whole model.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = build_norm(config, tensor)
        self.attention = SelfAttention(config, tensor)
        self.mlp_norm = build_norm(config, tensor)
        self.mlp = build_mlp(config, tensor)

    def forward(
        self,
        x: torch.Tensor,
        rotary: RotaryTable | None = None,
        cache: KeyValueCache | None = None,
        key: DropoutKey | None = None,
    ) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape; a `key` drops out elements of both branches."""
        attended = self.attention(self.attention_norm(x), rotary, cache)
        x = x + dropout(attended, key, self.index, DropoutSite.ATTENTION)
        return x + dropout(self.mlp(self.mlp_norm(x)), key, self.index, DropoutSite.MLP)


class TransformerBlock(nn.Module):
    """Some of a model's layers, named by their global index so that a parameter's name is the same in every layout.

    Args:
        config: of the whole model.
        layer_indices: the layers that live here.
        recompute: whether the backward pass computes each layer again rather than keep what it needs.
    """

    def __init__(
        self, config: ModelConfig, layer_indices: Sequence[int], tensor: TensorParallel, *, recompute: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.layers = nn.ModuleDict({str(index): TransformerLayer(config, tensor, index) for index in layer_indices})

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[KeyValueCache] | None = None,
        key: DropoutKey | None = None,
    ) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape; `caches` holds one cache a layer.

        With sequence parallelism `x` is a shard of the sequence; `positions` `[seq]` are those of the whole.
        """
        rotary = None
        if self.config.position_embedding == "rope":
            rotary = rotary_table(positions, self.config, x.dtype)
        for index, layer in enumerate(self.layers.values()):
            if self.recompute and torch.is_grad_enabled():
                # Nothing here draws from a generator, so there is no state of one to restore.
                x = checkpoint(layer, x, rotary, None, key, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotary, None if caches is None else caches[index], key)
        return x
