"""Cross entropy fused with the output projection, chunk by chunk: the [tokens, vocabulary] matrix never exists."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from core.compilation import CompiledFunction, missing_compiler

IGNORED_LABEL = -100
"""Label of a token that has no part in the loss."""

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of the one buffer of logits by kind of device. Larger chunks feed the matrix units better and touch the weight's
gradient less often; smaller ones save memory."""

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
        """`chunk_bytes` is the most that the buffer takes; None: that of CHUNK_BYTES."""
        super().__init__()
        self.chunk_bytes = chunk_bytes
        self.may_compile = True
        """False keeps all eager, for comparison."""
        self._plain = _ElementWise(_softmax, _sums_and_targets, _exponentials)
        fused = _fused_softmax, _sums_and_targets, _exponentials
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
        chunk_bytes = CHUNK_BYTES[weight.device.type] if self.chunk_bytes is None else self.chunk_bytes
        most = max(1, chunk_bytes // (weight.shape[0] * weight.element_size()))
        # Chunks of equal size: the last is then hardly shorter, and little is lost where it is computed as a whole one.
        rows = -(-hidden.shape[0] // -(-hidden.shape[0] // most))
        buffer = weight.new_empty(rows, weight.shape[0])
        compiles = self.may_compile and compiles_loss(weight.shape[0], weight.dtype, weight.device.type)
        element_wise = self._compiled if compiles else self._plain
        return _LinearCrossEntropy.apply(hidden, weight, labels, buffer, shard, element_wise, torch.is_grad_enabled())


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
    sums_and_targets: Callable[..., torch.Tensor]
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
    if shard is None:
        own, is_own = targets, None
        losses = element_wise.softmax(logits, targets, with_gradients)
    else:
        logits[:, shard.tokens :] = -torch.inf
        maxima = logits.amax(1).to(wide)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
        own = targets - shard.first
        is_own = (own >= 0) & (own < shard.tokens)
        own = torch.where(is_own, own, 0)
        compiled = isinstance(element_wise.exponentials, CompiledFunction)
        blocks = [slice(None)] if compiled else _blocks(logits)
        parts = [element_wise.sums_and_targets(logits[rows], own[rows], maxima[rows]) for rows in blocks]
        sums, own_targets = torch.cat(parts, 1)
        totals = torch.stack([sums, torch.where(is_own, own_targets, 0.0)])
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


def _softmax(logits: torch.Tensor, targets: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    """Cross entropies `[rows]`; logits `[rows, vocabulary]` become probabilities in place, if gradients are wanted.

    By torch's one kernel for softmax, and on the same memory for each block: on a CPU the page faults of fresh memory
    cost more. The sum of exponentials is had from the largest probability, which cannot vanish.
    """
    blocks = _blocks(logits)
    wide = torch.promote_types(logits.dtype, torch.float32)
    narrow = logits.dtype != wide
    scratch = torch.empty(1 + narrow, len(logits[blocks[0]]), logits.shape[1], dtype=wide, device=logits.device)
    losses = torch.empty(len(logits), dtype=wide, device=logits.device)
    for rows in blocks:
        block = logits[rows]
        probabilities = scratch[0, : len(block)]
        values = scratch[1, : len(block)].copy_(block) if narrow else block
        torch.softmax(values, 1, out=probabilities)
        target_values = values.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        losses[rows] = values.amax(1) - probabilities.amax(1).log() - target_values
        if with_gradients:
            block.copy_(probabilities)
    return losses


def _fused_softmax(logits: torch.Tensor, targets: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    """The same in operations that a compiler fuses."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sums = wide.logsumexp(1)
    losses = log_sums - wide.gather(1, targets.unsqueeze(1)).squeeze(1)
    if with_gradients:
        logits.copy_((wide - log_sums.unsqueeze(1)).exp())
    return losses


def _sums_and_targets(logits: torch.Tensor, own: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """`[2, rows]`: sums of exp(logits - maximum), and logits of the tokens `own` `[rows]`, of `[rows, vocabulary]`."""
    sums = (logits.to(maxima.dtype) - maxima.unsqueeze(1)).exp_().sum(1)
    return torch.stack([sums, logits.gather(1, own.unsqueeze(1)).squeeze(1).to(maxima.dtype)])


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
    factor = FLOAT16_FACTOR if left.dtype == torch.float16 else 1.0
    right = right / factor
    for rows in _blocks(accumulator):
        accumulator[rows].add_(left[rows] @ right, alpha=factor)
