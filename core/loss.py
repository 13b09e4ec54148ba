"""Cross entropy fused with the output projection, chunk by chunk: the [tokens, vocabulary] matrix never exists."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from core.compilation import CompiledFunction, missing_compiler

IGNORED_LABEL = -100
"""Label of a token that has no part in the loss."""

CPU_CHUNK_BYTES = 64 * 2**20
"""Size of the one buffer of logits on a CPU."""

GPU_CHUNK_BYTES = 512 * 2**20, 2 * 2**30
"""Smallest and largest size of that buffer on a GPU. Larger chunks feed the matrix units better and touch the weight's
gradient less often; smaller ones save memory."""

MOST_ELEMENTS = 2**31 - 1
"""Of the buffer: kernels that index it with 32 bits then reach all of it."""

GPU_TILE = 128
"""Rows that a GPU's matrix product computes at once: chunks are multiples of it."""

GPU_ROW_ELEMENTS = 64
"""The rows of the buffer start at multiples of it on a GPU. Where they do not start at multiples of 16 bytes, as those
of GPT-2's 50,257 logits would not, matrix products read and write them two to four times more slowly."""

COMPILED_FROM = 16_384
"""Rows of a vocabulary from which on the element-wise part is worth seconds of a compiler's time."""

FLOAT16_FACTOR = 16.0
"""In float16 hidden states are divided by it before their product with a chunk's logit gradients, and the product is
multiplied in float32: summed over thousands of rows of one token, it would leave the range whatever the loss scale."""

BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 128 * 2**20}
"""Element-wise work that is not compiled goes by blocks of rows of this size in float32: so that they stay in a CPU's
cache, and take little of a GPU's memory."""


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the output weight that this rank has, where ranks share them."""

    first: int
    """Token of the first row."""
    tokens: int
    """Rows that stand for a token; those after them are padding."""
    group: dist.ProcessGroup
    """The ranks that share."""


class LinearCrossEntropy(nn.Module):
    """Sum of the cross entropies of softmax(hidden @ weight^T), with gradients computed in the forward pass.

    All chunks of a call share one buffer of logits: on a CPU the page faults of fresh ones cost more than arithmetic.
    """

    def __init__(self, chunk_bytes: int | None = None) -> None:
        """`chunk_bytes` is the most that the buffer takes; None: what `chunk_limit` says of the device."""
        super().__init__()
        self.chunk_bytes = chunk_bytes
        self.may_compile = True
        """False keeps all eager, for comparison."""
        self._plain = _ElementWise(_softmax, _sums, _exponentials)
        fused = _fused_softmax, _sums, _exponentials
        self._compiled = _ElementWise(*(CompiledFunction(function) for function in fused))

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, shard: VocabularyShard | None = None
    ) -> torch.Tensor:
        """The summed loss, a scalar in at least float32; with a `shard`, equal on all ranks that share.

        Args:
            hidden: `[tokens, hidden]`; with a shard, its gradient is a summand of the whole.
            weight: `[vocabulary, hidden]`, or this rank's rows of it.
            labels: `[tokens]`, IGNORED_LABEL where a token does not count.
            shard: says which rows; None: all.
        """
        if self.chunk_bytes is None:
            self.chunk_bytes = _agreed(chunk_limit(weight.device), weight.device, shard)
        columns, stride = weight.shape[0], row_stride(weight.shape[0], weight.device.type)
        multiple = 1 if weight.device.type == "cpu" else GPU_TILE
        rows = chunk_rows(hidden.shape[0], stride, self.chunk_bytes // weight.element_size(), multiple)
        buffer = weight.new_empty(rows, stride)[:, :columns]
        compiles = self.may_compile and compiles_loss(weight.shape[0], weight.dtype, weight.device.type)
        element_wise = self._compiled if compiles else self._plain
        return _LinearCrossEntropy.apply(hidden, weight, labels, buffer, shard, element_wise, torch.is_grad_enabled())


def chunk_limit(device: torch.device) -> int:
    """The most bytes that the buffer of logits takes on a device: on a GPU a thirty-second of all its memory, rounded
    down to a power of two so that devices of one kind agree, between the limits of GPU_CHUNK_BYTES."""
    if device.type == "cpu":
        return CPU_CHUNK_BYTES
    least, most = GPU_CHUNK_BYTES
    share: int = torch.cuda.get_device_properties(device).total_memory // 32
    return min(most, max(least, 1 << (share.bit_length() - 1)))


def _agreed(limit: int, device: torch.device, shard: VocabularyShard | None) -> int:
    """The smallest limit of the ranks that share a vocabulary. They must take equally many chunks, because each chunk
    has collectives. Collective where there is a shard and the device is no CPU."""
    if shard is None or device.type == "cpu":
        return limit
    limits = torch.tensor(limit, device=device)
    dist.all_reduce(limits, dist.ReduceOp.MIN, group=shard.group)
    return int(limits)


def row_stride(columns: int, device_type: str) -> int:
    """Elements from one row of the buffer to the next; what lies behind the columns is never read."""
    return columns if device_type == "cpu" else -(-columns // GPU_ROW_ELEMENTS) * GPU_ROW_ELEMENTS


def chunk_rows(tokens: int, stride: int, elements: int, multiple: int) -> int:
    """Rows of a buffer of at most `elements`, if that is one row or more, for so many tokens.

    All chunks have as many, so the last is hardly shorter, and little is lost where it is computed as a whole one; and
    they are a multiple of `multiple`, where the buffer has room for that.
    """
    most = max(1, min(elements, MOST_ELEMENTS) // stride)
    if most > multiple:
        most -= most % multiple
    equal = -(-tokens // -(-tokens // most))
    return min(most, -(-equal // multiple) * multiple)


@cache
def sums_in_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix product of this type on this device can be added to a float32 matrix before it is rounded, which
    torch has for CUDA alone."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _adds_in_product(device, dtype)


def _adds_in_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small product is added so, and rightly: versions of torch and of cuBLAS differ in what they take."""
    left, right = (torch.full(shape, 0.5, dtype=dtype, device=device) for shape in ((16, 24), (24, 8)))
    total = torch.ones(16, 8, device=device)
    try:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    if not torch.equal(total, torch.full_like(total, 1 + 24 / 4)):
        warnings.warn(f"torch.addmm with out_dtype is wrong for {dtype} on {device}: it is not used", stacklevel=2)
        return False
    return True


def compiles_loss(vocabulary: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether the loss compiles its element-wise part, for a weight of so many rows on this rank.

    Only where it pays and a compiler is found: not on a CPU, where blocks in the cache are as fast, and not in float64,
    which is for checking.
    """
    pays = vocabulary >= COMPILED_FROM and dtype != torch.float64 and device_type == "cuda"
    return pays and missing_compiler(device_type) is None


class _ElementWise(NamedTuple):
    """What is done to a chunk of logits between the products, plain or compiled."""

    softmax: Callable[..., torch.Tensor]
    sums: Callable[..., torch.Tensor]
    exponentials: Callable[..., None]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        buffer: torch.Tensor,
        shard: VocabularyShard | None,
        element_wise: _ElementWise,
        with_gradients: bool,
    ) -> torch.Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if with_gradients else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        step = buffer.shape[0]
        for start in range(0, hidden.shape[0], step):
            rows, chunk_labels = hidden[start : start + step], labels[start : start + step]
            logits = torch.mm(rows, weight.t(), out=buffer[: len(rows)])
            counted = chunk_labels != IGNORED_LABEL
            # The whole buffer, whose last rows may be of an earlier chunk: one shape, compiled once.
            targets = F.pad(torch.where(counted, chunk_labels, 0), (0, step - len(rows)))
            losses = _losses_and_logit_gradients(buffer, targets, shard, element_wise, with_gradients)
            loss += torch.where(counted, losses[: len(rows)], 0).sum()
            if hidden_gradient is not None and weight_gradient is not None:
                # Ignored rows are masked on the narrow sides of the products, not in the wide logits.
                mask = counted.unsqueeze(1).to(rows.dtype)
                torch.mm(logits, weight, out=hidden_gradient[start : start + step]).mul_(mask)
                _add_product(weight_gradient, logits.t(), rows * mask)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grad_outputs
        hidden_gradient, weight_gradient = ctx.saved_tensors
        # With dimensions it is multiplied in its own type; as a scalar it would be rounded to that of the gradient.
        hidden_gradient = hidden_gradient.mul_(scale.reshape(1, 1))
        weight_gradient = weight_gradient.mul_(scale).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None, None, None, None


def _losses_and_logit_gradients(
    logits: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabularyShard | None,
    element_wise: _ElementWise,
    with_gradients: bool,
) -> torch.Tensor:
    """Cross entropies `[rows]` in at least float32; logits `[rows, vocabulary]` become softmax - one_hot in place.

    With a `shard` the logits are those of its tokens, and two small sums over ranks are needed.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    own, is_own = (targets, None) if shard is None else _own_targets(targets, shard)
    # Before the softmax writes over them; and not in what is compiled, which would become two kernels instead of one.
    target_logits = logits.gather(1, own.unsqueeze(1)).squeeze(1).to(wide)
    if shard is None or is_own is None:
        losses = element_wise.softmax(logits, with_gradients) - target_logits
    else:
        logits[:, shard.tokens :] = -torch.inf
        maxima = logits.amax(1).to(wide)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
        compiled = isinstance(element_wise.exponentials, CompiledFunction)
        blocks = [slice(None)] if compiled else _blocks(logits)
        sums = torch.cat([element_wise.sums(logits[rows], maxima[rows]) for rows in blocks])
        totals = torch.stack([sums, torch.where(is_own, target_logits, 0.0)])
        dist.all_reduce(totals, group=shard.group)
        log_sums = totals[0].log() + maxima
        losses = log_sums - totals[1]
        if with_gradients:
            for rows in blocks:
                element_wise.exponentials(logits[rows], log_sums[rows])
    if with_gradients:
        # Of the target from its loss alone: p - 1 would lose what the narrow type drops of a p near 1.
        at_targets = torch.expm1(-losses).to(logits.dtype)
        places = torch.arange(len(logits), device=logits.device), own
        if is_own is not None:
            at_targets = torch.where(is_own, at_targets, logits[places])
        # Not scatter_, which on a CPU goes over all of a bfloat16 matrix.
        logits[places] = at_targets
    return losses


def _own_targets(targets: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this rank's weight that stand for the targets, and whether they do; elsewhere row 0."""
    own = targets - shard.first
    is_own = (own >= 0) & (own < shard.tokens)
    return torch.where(is_own, own, 0), is_own


def _softmax(logits: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    """Logarithms `[rows]` of the sums of exponentials; logits `[rows, vocabulary]` become probabilities in place, if
    gradients are wanted.

    By torch's one kernel for softmax, and on the same memory for each block: on a CPU the page faults of fresh memory
    cost more. The sum of exponentials is had from the largest probability, which cannot vanish.
    """
    blocks = _blocks(logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    narrow = logits.dtype != wide
    scratch = torch.empty(1 + narrow, len(logits[blocks[0]]), logits.shape[1], dtype=wide, device=logits.device)
    log_sums = torch.empty(len(logits), dtype=wide, device=logits.device)
    for rows in blocks:
        block = logits[rows]
        probabilities = scratch[0, : len(block)]
        values = scratch[1, : len(block)].copy_(block) if narrow else block
        torch.softmax(values, 1, out=probabilities)
        log_sums[rows] = values.amax(1) - probabilities.amax(1).log()
        if with_gradients:
            block.copy_(probabilities)
    return log_sums


def _fused_softmax(logits: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    """The same in operations that a compiler fuses to one kernel."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sums = wide.logsumexp(1)
    if with_gradients:
        logits.copy_((wide - log_sums.unsqueeze(1)).exp())
    return log_sums


def _sums(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """Sums `[rows]` of exp(logits - maximum) of logits `[rows, vocabulary]`."""
    return (logits.to(maxima.dtype) - maxima.unsqueeze(1)).exp_().sum(1)


def _exponentials(logits: torch.Tensor, log_sums: torch.Tensor) -> None:
    """Logits `[rows, vocabulary]` become exp(logits - log_sum) in place: probabilities."""
    logits.copy_((logits.to(log_sums.dtype) - log_sums.unsqueeze(1)).exp_())


def _blocks(matrix: torch.Tensor) -> list[slice]:
    """Rows of a matrix to take at once in element-wise work."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    rows = max(1, BLOCK_BYTES[matrix.device.type] // (matrix.shape[1] * wide.itemsize))
    return [slice(start, start + rows) for start in range(0, len(matrix), rows)]


def _add_product(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """accumulator += left @ right, where the accumulator may be wider than the factors."""
    if accumulator.dtype == left.dtype:
        accumulator.addmm_(left, right)
        return
    if sums_in_product(left.device, left.dtype):
        torch.addmm(accumulator, left, right, out_dtype=torch.float32, out=accumulator)
        return
    factor = FLOAT16_FACTOR if left.dtype == torch.float16 else 1.0
    right = right / factor
    for rows in _blocks(accumulator):
        accumulator[rows].add_(left[rows] @ right, alpha=factor)
