"""Rotary position embedding (arXiv:2104.09864), in the half-split convention of Llama."""

from typing import NamedTuple

import torch


class RotaryTable(NamedTuple):
    """Cosines and sines of every position's angles, each `[seq, head_dim / 2]`, in at least float32."""

    cosine: torch.Tensor
    sine: torch.Tensor


def rotary_table(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> RotaryTable:
    """Angles position * theta^(-2i / head_dim) for i < head_dim / 2.

    Args:
        positions: `[seq]` integers.
        head_dim: even width of a head.
        theta: base of the frequencies.
        dtype: of the model; float64 keeps float64, anything narrower gives float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = torch.outer(positions.to(wide), theta**-exponents)
    return RotaryTable(angles.cos(), angles.sin())


def apply_rotary(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of `[batch, heads, seq, head_dim]` by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    rotated = (
        first * table.cosine - second * table.sine,
        second * table.cosine + first * table.sine,
    )
    return torch.cat(rotated, dim=-1).to(x.dtype)
