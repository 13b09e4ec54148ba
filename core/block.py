"""The transformer: a layer of attention and MLP with pre-normalisation, and the stack of layers."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from core.attention import KeyValueCache, SelfAttention
from core.config import ModelConfig
from core.dropout import DropoutKey, DropoutSite, dropout, dropout_site_hash
from core.mlp import build_mlp
from core.norm import build_norm
from core.rotary import RotaryTable, rotary_table
from parallel.tensor import TensorParallel

aten = torch.ops.aten
SAVED_BY_SELECTIVE = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
"""Operators whose outputs `recompute=selective` keeps: the products of all projections, and attention by every kernel
that holds no scores (with the sums of exponentials that their backward passes need)."""


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        index: of the layer in the whole model.
        recompute: what the backward pass computes again rather than keep: none, selective (all but SAVED_BY_SELECTIVE)
            or full.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel, index: int, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_place = dropout_site_hash(index, DropoutSite.ATTENTION)
        self.mlp_place = dropout_site_hash(index, DropoutSite.MLP)
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
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._compute(x, rotary, cache, key)
        # Nothing here draws from a generator, so there is no state of one to restore.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if self.recompute == "selective":
            again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, SAVED_BY_SELECTIVE))
        return cast(torch.Tensor, again(self._compute, x, rotary, cache, key))

    def _compute(
        self, x: torch.Tensor, rotary: RotaryTable | None, cache: KeyValueCache | None, key: DropoutKey | None
    ) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x), rotary, cache)
        x = x + dropout(attended, key, self.attention_place)
        return x + dropout(self.mlp(self.mlp_norm(x)), key, self.mlp_place)


class TransformerBlock(nn.Module):
    """Some of a model's layers, named by their global index so that a parameter's name is the same in every layout.

    Args:
        config: of the whole model.
        layer_indices: the layers that live here.
        recompute: what each layer computes again in the backward pass.
    """

    def __init__(
        self, config: ModelConfig, layer_indices: Sequence[int], tensor: TensorParallel, *, recompute: str
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict(
            {str(index): TransformerLayer(config, tensor, index, recompute) for index in layer_indices}
        )

    def compile_layers(self) -> None:
        """Compile each layer, at its first call; all of one kind share what is compiled.

        Only `forward`: the hooks by which FSDP gathers weights stay outside, and may be added afterwards.
        """
        for layer in self.layers.values():
            # Selective recomputation has to be in the graph, to choose there what is kept. Full recomputation must not:
            # torch 2.13 cannot keep the mesh of tensor-parallel parameters for a graph's backward pass.
            part = "forward" if layer.recompute == "selective" else "_compute"
            setattr(layer, part, torch.compile(getattr(layer, part)))
        # It would have every rank warn of operations in place, of which none here touches what is kept.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

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
            x = layer(x, rotary, None if caches is None else caches[index], key)
        return x
