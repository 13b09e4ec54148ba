"""Dropout as a pure function: a hash of where an element stands decides whether it is kept."""

import enum
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

GOLDEN = 0x9E3779B97F
"""2^40 / golden ratio, odd: coordinates enter the hash as its multiples, which spread them over many bits."""

ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
"""Shift and multiplier of each round of SplitMix64's finaliser, as signed numbers, which is what int64 tensors take."""

CPU_BLOCK_BYTES = 2 * 2**20
"""Size of an int64 temporary on a CPU, where it stays in the cache; elsewhere GPU_BLOCK_BYTES, little beside memory."""

GPU_BLOCK_BYTES = 32 * 2**20

Bits = TypeVar("Bits", int, torch.Tensor)


class DropoutSite(enum.IntEnum):
    """Where in a layer dropout stands. The numbers enter the hash: changing one changes every later run."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2


@dataclass(frozen=True)
class DropoutKey:
    """What all the dropout of one forward pass shares."""

    rate: float
    """Probability of dropping an element, in [0, 1)."""
    rows: torch.Tensor
    """int64 `[batch, seq]`, a hash of seed, sample and position."""
    channels: torch.Tensor
    """int64 `[hidden]`, each channel's multiple of GOLDEN. They are computed here, outside of layers that are compiled:
    torch.compile would make the channel an index of its loop, whose multiples leave the 32 bits that a GPU gives it."""

    @classmethod
    def build(
        cls, rate: float, seed: int, sample_indices: torch.Tensor, positions: torch.Tensor, hidden_size: int
    ) -> "DropoutKey":
        """The key of these rows; a rank that holds part of a sequence or batch passes that part's global numbers.

        Args:
            rate: probability of dropping an element, in [0, 1).
            seed: of the run.
            sample_indices: int64 `[batch]`, each sample's index in the run.
            positions: int64 `[seq]`, each token's place in its sample (not in its document: no two may be equal).
            hidden_size: channels of what is dropped out.
        """
        # From seed + 1, because zero is a fixed point of the hash.
        samples = _mix(sample_indices * GOLDEN + _signed(_mix((seed + 1) * GOLDEN)))
        channels = torch.arange(hidden_size, device=positions.device) * GOLDEN
        return cls(rate, _mix(samples.unsqueeze(1) + positions * GOLDEN), channels)


def dropout_site_hash(layer: int, site: DropoutSite) -> torch.Tensor:
    """Where in the model a dropout stands, hashed: an int64 scalar on the CPU.

    A tensor rather than a number, so that layers which are compiled share one compiled function.

    Args:
        layer: index in the whole model; any constant where there is no layer.
        site: which of the layer's dropouts this is.
    """
    return torch.tensor(_signed(_mix(_mix((layer + 1) * GOLDEN) + site * GOLDEN)), device="cpu")


def dropout(x: torch.Tensor, key: DropoutKey | None, place: torch.Tensor) -> torch.Tensor:
    """Each element of `x` `[batch, seq, hidden]` is 0 with probability `key.rate`, else multiplied by 1 / (1 - rate).

    An element is dropped if its hash of (seed, sample, position; layer, site; channel) lies in the lowest `rate` of the
    range of int64. So every layout, every kind of device and every recomputation drops the same ones, and nothing is
    saved for backward but one number per row, beside the key's channels, which all layers share.

    Args:
        x: the whole hidden dimension of the rows that `key` names.
        key: None where nothing is dropped, as in evaluation; then, and with rate 0, the result is `x` itself.
        place: what `dropout_site_hash` says of where this stands.

    Raises ValueError if `key` is not one of these rows and channels.
    """
    if key is None or key.rate == 0.0:
        return x
    covered = *key.rows.shape, *key.channels.shape
    if covered != tuple(x.shape):
        raise ValueError(f"dropout of {tuple(x.shape)} takes a key of its rows and channels, not one of {covered}")
    return _Dropout.apply(x, _mix(key.rows + place), key.channels, key.rate)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, channels: torch.Tensor, rate: float) -> torch.Tensor:
        ctx.save_for_backward(rows, channels)
        ctx.rate = rate
        return _drop(x, rows, channels, rate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, channels = ctx.saved_tensors
        return _drop(grad_outputs[0], rows, channels, ctx.rate), None, None, None


def _drop(x: torch.Tensor, rows: torch.Tensor, channels: torch.Tensor, rate: float) -> torch.Tensor:
    """`x` `[batch, seq, hidden]` / (1 - rate), but 0 where the hash of row and channel says so."""
    hidden = x.shape[-1]
    # Multiplied, because CUDA divides by a scalar by multiplying with its reciprocal, and a CPU does not.
    result = (x * (1 / (1 - rate))).contiguous()
    threshold = int(rate * 2**64) - 2**63
    if torch.compiler.is_compiling():
        # Fused, so that no hash reaches memory; not in place, of which torch 2.11 loses the gradient.
        return torch.where(_mix(rows.unsqueeze(-1) + channels) < threshold, 0, result)
    # By blocks of rows: the hashes of all elements at once would take eight times the memory of a bfloat16 `x`.
    block_bytes = CPU_BLOCK_BYTES if x.device.type == "cpu" else GPU_BLOCK_BYTES
    block_rows = max(1, block_bytes // (8 * hidden))
    for block, keys in zip(result.view(-1, hidden).split(block_rows), rows.view(-1, 1).split(block_rows), strict=True):
        block.masked_fill_(_mix(keys + channels) < threshold, 0)
    return result


def _mix(bits: Bits) -> Bits:
    """A bijection of 64 bits that changes a fresh tensor in place; of an int the low 64 bits count, in and out.

    SplitMix64's finaliser (doi:10.1145/2660193.2660195) without its last shift, which would leave the 31 high bits as
    they are: the last hash is only compared, and those before it are hashed again.
    """
    for shift, multiplier in ROUNDS:
        high = bits >> shift
        # An int64's shift copies the sign bit downwards: off with the copies.
        high &= 2 ** (64 - shift) - 1
        bits ^= high
        bits *= multiplier
    return bits


def _signed(bits: int) -> int:
    """The low 64 bits as an int64."""
    return (bits + 2**63) % 2**64 - 2**63
