"""Variants of a training step, each a small patch that a benchmark's process applies before it builds the model.

A variant takes a model's configuration and yields that which is to be built while it is applied. Some are what Kilotron
did before and show what a change brought; others are what it might do, and numbers decide.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

import core.attention
import core.loss
import core.mlp
import parallel.tensor
from core.compilation import CompiledFunction
from core.config import ModelConfig
from core.rotary import RotaryTable
from training.train_step import TrainStep

Variant = Callable[[ModelConfig], AbstractContextManager[ModelConfig]]
SMALL_CHUNK_BYTES = 512 * 2**20


@contextmanager
def base(config: ModelConfig) -> Iterator[ModelConfig]:
    """What is there."""
    yield config


@contextmanager
def separate_add(config: ModelConfig) -> Iterator[ModelConfig]:
    """Formerly: the output matrix's gradient of each chunk is rounded to bfloat16, then added to the float32 sum."""
    with patch.object(core.loss, "sums_in_product", lambda *_: False):
        yield config


@contextmanager
def small_chunks(config: ModelConfig) -> Iterator[ModelConfig]:
    """Formerly: the loss's buffer of logits takes 512 MiB."""
    with patch.object(core.loss, "chunk_limit", lambda _: SMALL_CHUNK_BYTES):
        yield config


@contextmanager
def unaligned(config: ModelConfig) -> Iterator[ModelConfig]:
    """Formerly: rows of logits follow each other without a gap, so that those of 50,257 begin at odd addresses."""
    with patch.object(core.loss, "row_stride", lambda columns, _: columns):
        yield config


def softmax_and_losses(
    logits: torch.Tensor, targets: torch.Tensor, with_gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of sums and cross entropies, each `[rows]`; logits `[rows, vocabulary]` become probabilities."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sums = wide.logsumexp(1)
    losses = log_sums - wide.gather(1, targets.unsqueeze(1)).squeeze(1)
    if with_gradients:
        logits.copy_((wide - log_sums.unsqueeze(1)).exp())
    return log_sums, losses


@contextmanager
def gather_inside(config: ModelConfig) -> Iterator[ModelConfig]:
    """Formerly: what is compiled of the loss looks the targets' logits up as well, and becomes two kernels."""
    original, compiled = core.loss._losses_and_logit_gradients, CompiledFunction(softmax_and_losses)

    def with_gather(
        logits: torch.Tensor, targets: torch.Tensor, shard: Any, element_wise: Any, with_gradients: bool
    ) -> torch.Tensor:
        if isinstance(element_wise.softmax, CompiledFunction):
            element_wise = element_wise._replace(softmax=lambda rows, wanted: compiled(rows, targets, wanted)[0])
        return original(logits, targets, shard, element_wise, with_gradients)

    with patch.object(core.loss, "_losses_and_logit_gradients", with_gather):
        yield config


def rotate_after_transpose(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """`[batch, seq, heads, head_dim]` to the same shape, whose memory is `[batch, heads, seq, head_dim]`."""
    first, second = x.transpose(1, 2).chunk(2, dim=-1)
    rotated = first * table.cosine - second * table.sine, second * table.cosine + first * table.sine
    return torch.cat(rotated, dim=-1).to(x.dtype).transpose(1, 2)


@contextmanager
def rotary_after_transpose(config: ModelConfig) -> Iterator[ModelConfig]:
    """Formerly: queries and keys are rotated with heads before positions, and attention's output is copied."""
    with patch.object(core.attention, "apply_rotary", rotate_after_transpose):
        yield config


def one_product(x: torch.Tensor, layers: Sequence[parallel.tensor.ColumnParallelLinear]) -> tuple[torch.Tensor, ...]:
    """`column_parallel` of one rank by one product: `[batch, seq, in]` to a `[batch, seq, out]` each."""
    weights, biases = zip(*(layer.own() for layer in layers), strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    widths = [len(weight) for weight in weights]
    return F.linear(x, torch.cat(weights), bias).split(widths, dim=-1)


@contextmanager
def fused_qkv(config: ModelConfig) -> Iterator[ModelConfig]:
    """Possible: query, key and value, and gate and up, are one product each, with weights copied beside each other."""
    in_mlp = patch.object(core.mlp, "column_parallel", one_product)
    with patch.object(core.attention, "column_parallel", one_product), in_mlp:
        yield config


@contextmanager
def padded_vocabulary(config: ModelConfig) -> Iterator[ModelConfig]:
    """Possible: the vocabulary itself is a multiple of 64, with tokens that no text has."""
    yield replace(config, vocab_size=-(-config.vocabulary // 64) * 64)


@contextmanager
def clip_in_optimizer(config: ModelConfig) -> Iterator[ModelConfig]:
    """Possible: fused AdamW divides gradients while it reads them, as for a loss scale, and no pass goes over them."""
    original = TrainStep._move

    def move(self: TrainStep, loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float) -> None:
        clip, self.clip_grad = self.clip_grad, 0.0
        if clip:
            divisor = ((gradient_norm + 1e-6) / clip).clamp(min=1.0).float()
            self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        original(self, loss, gradient_norm, learning_rate)
        self.clip_grad = clip

    with patch.object(TrainStep, "_move", move):
        yield config


@contextmanager
def flash_only(config: ModelConfig) -> Iterator[ModelConfig]:
    """Possible: attention by FlashAttention's kernel rather than cuDNN's."""
    # Its cache knows a graph before a kernel of attention is chosen for it, and would give that of another process.
    with functorch_config.patch(enable_autograd_cache=False), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield config


@contextmanager
def max_autotune(config: ModelConfig) -> Iterator[ModelConfig]:
    """Possible: the compiler measures several forms of each matrix product, cuBLAS's among them."""
    with patch.object(torch, "compile", partial(torch.compile, mode="max-autotune-no-cudagraphs")):
        yield config


@contextmanager
def everything(config: ModelConfig) -> Iterator[ModelConfig]:
    """Possible: all of that which changes neither the model nor its attention."""
    with ExitStack() as stack:
        for variant in (fused_qkv, clip_in_optimizer, max_autotune):
            config = stack.enter_context(variant(config))
        yield config


VARIANTS: dict[str, Variant] = {
    **{
        variant.__name__: variant
        for variant in (
            base,
            separate_add,
            small_chunks,
            gather_inside,
            rotary_after_transpose,
            unaligned,
            fused_qkv,
            padded_vocabulary,
            clip_in_optimizer,
            flash_only,
            max_autotune,
        )
    },
    "all": everything,
}

DEFAULT_VARIANTS = [name for name in VARIANTS if name not in ("unaligned", "padded_vocabulary")]
"""Those that the figures of the shapes themselves do not show already."""

SLOW_TO_COMPILE = ("max_autotune", "all")


def telling_shapes(variants: Sequence[str]) -> dict[str, list[str]]:
    """The shapes that tell most about each variant; the base is taken of all of them."""
    special = {
        "rotary_after_transpose": ["llama_1b"],
        "unaligned": ["gpt2_50257"],
        "padded_vocabulary": ["gpt2_50257"],
        "fused_qkv": ["gpt2_small", "llama_1b"],
    }
    found = {name: special.get(name, ["gpt2_small"]) for name in variants}
    if "base" in found:
        found["base"] = list(dict.fromkeys(shape for names in found.values() for shape in names))
    return found
