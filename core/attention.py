"""Causal self-attention: multi-head, grouped-query and multi-query, with a key/value cache for decoding."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.config import ModelConfig
from core.norm import RMSNorm
from core.rotary import RotaryTable, apply_rotary
from parallel.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


class KeyValueCache:
    """Keys and values of the positions one layer has seen, so that decoding computes only the new ones.

    Args:
        batch_size: sequences decoded together.
        query_groups: key/value heads.
        max_length: positions there is room for.
        head_dim: width of a head.
    """

    def __init__(
        self,
        batch_size: int,
        query_groups: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, query_groups, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new positions, each `[batch, groups, new, head_dim]`; returns those of all positions so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V over earlier positions, or the window of them (arXiv:1706.03762, 2310.06825).

    Query heads share keys and values in groups (arXiv:2305.13245): one group a head is multi-head attention, one group
    in all is multi-query attention.
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel) -> None:
        super().__init__()
        self.head_dim = config.head_size
        heads, groups = config.num_attention_heads, config.query_groups
        self.query = self._input_projection(config, heads, tensor)
        self.key = self._input_projection(config, groups, tensor)
        self.value = self._input_projection(config, groups, tensor)
        residual_std = config.init_std / math.sqrt(2 * config.num_layers)
        self.output = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, bias=config.bias, init_std=residual_std, tensor=tensor
        )
        self.query_norm = self._head_norm(config, tensor)
        self.key_norm = self._head_norm(config, tensor)
        self.window = config.sliding_window
        self.local_groups = max(1, groups // tensor.size)
        self.grouped = heads // tensor.size != self.local_groups

    @staticmethod
    def _input_projection(config: ModelConfig, heads: int, tensor: TensorParallel) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            config.hidden_size,
            heads * config.head_size,
            bias=config.bias,
            init_std=config.init_std,
            tensor=tensor,
            parts=heads,
        )

    @staticmethod
    def _head_norm(config: ModelConfig, tensor: TensorParallel) -> RMSNorm | None:
        return RMSNorm(config.head_size, config.norm_eps, tensor=tensor, per_head=True) if config.qk_norm else None

    def forward(
        self, x: torch.Tensor, rotary: RotaryTable | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """`[batch, seq, hidden]` to the same shape; with a cache, `x` holds the positions after the cached.

        A tensor-parallel rank works on its heads; with sequence parallelism `x` is its shard of the sequence.
        """
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim))
            for projected in column_parallel(x, [self.query, self.key, self.value])
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            if self.query_norm is not None and x.device.type == "cpu":
                query, key = _GradientByHeads.apply(query), _GradientByHeads.apply(key)
            # Before heads and positions change places: what is rotated afterwards would lie in memory by heads, and so
            # would the output, which the next product takes by positions.
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if cache is not None:
            key, value = cache.append(key, value)
        mask = self._mask(query.shape[2], key.shape[2], x.device)
        grouped = self.grouped
        if grouped and (mask is not None or (query.is_cuda and query.dtype == torch.float32)):
            # No fused kernel of CUDA takes groups together with a mask or with float32: attention would store the
            # scores of all heads.
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
            grouped = False
        with only_kernels(allowed_kernels(query.device.type, masked=mask is not None, cached=cache is not None)):
            attended = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None and query.shape[2] > 1,
                enable_gqa=grouped,
            )
        return self.output(attended.transpose(1, 2).flatten(2))

    def _mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """`[queries, keys]`, true where the last `queries` of `keys` positions look; None where `is_causal` says it, or
        one query sees all."""
        window, before = min(self.window or keys, keys), keys - queries
        if window == keys and queries in (1, keys):
            return None
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before).triu(before - window + 1)


class _GradientByHeads(torch.autograd.Function):
    """`[batch, seq, heads, head_dim]` as it is, whose gradient lies in memory by heads and then positions.

    The gradient of the weight of a head's norm is a sum in the order of memory: with it, runs on a CPU that began when
    heads were rotated after the transpose go on with the same bits.
    """

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return grad_outputs[0].transpose(1, 2).contiguous().transpose(1, 2)


def allowed_kernels(device_type: str, *, masked: bool, cached: bool) -> Sequence[SDPBackend]:
    """The kernels of attention that torch may choose from; none: all of them.

    cuDNN's is the fastest on recent GPUs and the first choice there. But with a mask it has returned gradients that are
    NaN (pytorch#196678, in torch 2.11), and for every length of cached keys it makes a new plan, which takes tens of
    milliseconds per token.
    """
    if device_type != "cuda" or not (masked or cached):
        return ()
    by_length = () if masked else (SDPBackend.FLASH_ATTENTION,)
    return *by_length, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def only_kernels(kernels: Sequence[SDPBackend]) -> AbstractContextManager[None]:
    """Lets attention use these kernels alone; without any, it may use all."""
    return sdpa_kernel(list(kernels)) if kernels else nullcontext()
