"""Rotary position embedding (arXiv:2104.09864), in the half-split convention of Llama."""

import math
from typing import NamedTuple

import torch

from core.config import ModelConfig


class RotaryTable(NamedTuple):
    """Cosines and sines of every position's angles, each `[seq, head_dim / 2]`, in at least float32."""

    cosine: torch.Tensor
    sine: torch.Tensor


def rotary_table(positions: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> RotaryTable:
    """Angles position * theta^(-2i / head_dim) for i < head_dim / 2, slowed where `rope_scaling` says so.

    Args:
        positions: `[seq]` integers.
        config: of the model; its heads have an even width.
        dtype: of the model; float64 keeps float64, anything narrower gives float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_size, 2, device=positions.device, dtype=wide) / config.head_size
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling == "llama3":
        frequencies = _slow_down(frequencies, config)
    angles = torch.outer(positions.to(wide), frequencies)
    return RotaryTable(angles.cos(), angles.sin())


def _slow_down(frequencies: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Llama 3.1's scaling (arXiv:2407.21783): low frequencies are divided by a factor and high ones kept, by the turns
    that each makes in the original length; between the two limits the divided and the kept are blended linearly."""
    turns = frequencies * (config.rope_original_length / (2 * math.pi))
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling_factor)


def apply_rotary(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of `[batch, seq, heads, head_dim]` by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = table.cosine.unsqueeze(1), table.sine.unsqueeze(1)
    rotated = (
        first * cosine - second * sine,
        second * cosine + first * sine,
    )
    return torch.cat(rotated, dim=-1).to(x.dtype)
