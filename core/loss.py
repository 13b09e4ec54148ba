"""Cross entropy fused with the output projection, chunk by chunk: the [tokens, vocabulary] matrix never exists."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

IGNORED_LABEL = -100
"""Label of a token that has no part in the loss."""

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of the one buffer of logits by kind of device. Larger chunks feed the matrix units better and touch the weight's
gradient less often; smaller ones save memory."""

CPU_BLOCK_BYTES = 2 * 2**20
"""Element-wise work on a CPU goes by blocks of rows that stay in its cache; a GPU takes a chunk at once."""


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

    Holds the buffer of logits, which every call reuses: on a CPU the page faults of fresh logits cost more than the
    arithmetic.
    """

    def __init__(self, chunk_bytes: int | None = None) -> None:
        """`chunk_bytes` is the size of the buffer; None: that of CHUNK_BYTES."""
        super().__init__()
        self.chunk_bytes = chunk_bytes
        self._buffer: torch.Tensor | None = None

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
        rows = min(hidden.shape[0], max(1, chunk_bytes // (weight.shape[0] * weight.element_size())))
        shape = (rows, weight.shape[0])
        buffer = self._buffer
        if buffer is None or buffer.shape != shape or buffer.dtype != weight.dtype or buffer.device != weight.device:
            buffer = self._buffer = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        return _LinearCrossEntropy.apply(hidden, weight, labels, buffer, shard, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        buffer: torch.Tensor,
        shard: VocabularyShard | None,
        with_gradients: bool,
    ) -> torch.Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if with_gradients else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        for start in range(0, hidden.shape[0], buffer.shape[0]):
            chunk = slice(start, min(start + buffer.shape[0], hidden.shape[0]))
            rows = hidden[chunk]
            counted = labels[chunk] != IGNORED_LABEL
            targets = torch.where(counted, labels[chunk], 0)
            logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
            if shard is None:
                losses = _losses_and_logit_gradients(logits, targets, with_gradients)
            else:
                losses = _shared_losses_and_logit_gradients(logits, targets, shard, with_gradients)
            loss += torch.where(counted, losses, 0).sum()
            if hidden_gradient is not None and weight_gradient is not None:
                # Ignored rows are masked on the narrow sides of the products, not in the wide logits.
                mask = counted.unsqueeze(1).to(rows.dtype)
                torch.mm(logits, weight, out=hidden_gradient[chunk]).mul_(mask)
                _add_product(weight_gradient, logits.t(), rows * mask)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grad_outputs
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_gradient = hidden_gradient.mul_(scale)
        weight_gradient = weight_gradient.mul_(scale).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None, None, None


def _losses_and_logit_gradients(logits: torch.Tensor, targets: torch.Tensor, with_gradients: bool) -> torch.Tensor:
    """Cross entropies `[rows]` in at least float32; logits `[rows, vocabulary]` become softmax - one_hot in place."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(logits), dtype=wide, device=logits.device)
    for rows in _blocks(logits):
        block, target, out = logits[rows], targets[rows], losses[rows]
        log_probabilities = torch.log_softmax(block, dim=-1, dtype=wide)
        torch.neg(log_probabilities.gather(1, target.unsqueeze(1)).squeeze(1), out=out)
        if with_gradients:
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, target.unsqueeze(1), gradient.new_full((len(target), 1), -1.0))
            block.copy_(gradient)
    return losses


def _shared_losses_and_logit_gradients(
    logits: torch.Tensor, targets: torch.Tensor, shard: VocabularyShard, with_gradients: bool
) -> torch.Tensor:
    """The same where `logits` `[rows, vocabulary / ranks]` are of this rank's tokens: two small sums over ranks."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits[:, shard.tokens :] = -torch.inf
    maxima = logits.amax(1).to(wide)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
    own = targets - shard.first
    is_own = (own >= 0) & (own < shard.tokens)
    own = torch.where(is_own, own, 0).unsqueeze(1)
    sums_and_targets = torch.empty(2, len(logits), dtype=wide, device=logits.device)
    for rows in _blocks(logits):
        torch.sum((logits[rows].to(wide) - maxima[rows, None]).exp_(), 1, out=sums_and_targets[0, rows])
        target_logits = logits[rows].gather(1, own[rows]).squeeze(1).to(wide)
        sums_and_targets[1, rows] = torch.where(is_own[rows], target_logits, 0.0)
    dist.all_reduce(sums_and_targets, group=shard.group)
    log_sums = sums_and_targets[0].log() + maxima
    if with_gradients:
        for rows in _blocks(logits):
            gradient = (logits[rows].to(wide) - log_sums[rows, None]).exp_()
            gradient.scatter_add_(1, own[rows], -is_own[rows, None].to(wide))
            logits[rows] = gradient
    return log_sums - sums_and_targets[1]


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Rows of `[rows, vocabulary]` to take at once in element-wise work."""
    rows = len(logits)
    if logits.device.type == "cpu":
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = max(1, CPU_BLOCK_BYTES // (logits.shape[1] * wide.itemsize))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _add_product(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """accumulator += left @ right, where the accumulator may be wider than the factors."""
    if accumulator.dtype == left.dtype:
        accumulator.addmm_(left, right)
    else:
        accumulator += left @ right
