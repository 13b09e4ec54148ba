"""The fused loss against the plain one, which exists only here."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.loss import IGNORED_LABEL, LinearCrossEntropy

TOKENS, HIDDEN, VOCABULARY = 150, 24, 301


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def problem(dtype=torch.float64, ignored="some"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    if ignored == "some":
        labels[::7] = IGNORED_LABEL
        labels[40:90] = IGNORED_LABEL
    elif ignored == "all":
        labels[:] = IGNORED_LABEL
    return hidden, weight, labels


def plain(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORED_LABEL, reduction="sum")


def run(loss_function, inputs, scale=1 / 97):
    hidden, weight, labels = (part.detach().clone() for part in inputs)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = loss_function(hidden, weight, labels)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("rows", [1, 32, 50, TOKENS, 10 * TOKENS])
def test_equals_the_plain_loss_in_float64(rows, ignored):
    inputs = problem(ignored=ignored)
    fused = run(LinearCrossEntropy(chunk_bytes=rows * VOCABULARY * 8), inputs)
    for ours, theirs in zip(fused, run(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_buffer_is_reused_and_leaves_no_trace_between_calls():
    loss_function = LinearCrossEntropy(chunk_bytes=32 * VOCABULARY * 8)
    first = run(loss_function, problem())
    pointer = loss_function._buffer.data_ptr()
    run(loss_function, problem(ignored="none"))
    again = run(loss_function, problem())
    assert loss_function._buffer.data_ptr() == pointer
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_no_tensor_as_large_as_the_logits_is_made():
    inputs = problem()
    with LargestTensor() as largest:
        run(LinearCrossEntropy(chunk_bytes=16 * VOCABULARY * 8), inputs)
    assert largest.elements < TOKENS * VOCABULARY / 4
    with LargestTensor() as largest:
        run(plain, inputs)
    assert largest.elements >= TOKENS * VOCABULARY


def test_without_gradients_only_the_loss_is_computed():
    inputs = problem()
    with torch.no_grad(), LargestTensor() as largest:
        loss = LinearCrossEntropy(chunk_bytes=16 * VOCABULARY * 8)(*inputs)
    torch.testing.assert_close(loss, plain(*inputs).detach(), rtol=1e-12, atol=0)
    assert largest.elements < VOCABULARY * HIDDEN * 1.01


def test_bfloat16_gradients_are_rounded_once_a_product_and_the_loss_is_float32():
    inputs = problem(torch.bfloat16)
    loss, *gradients = run(LinearCrossEntropy(chunk_bytes=16 * VOCABULARY * 2), inputs)
    exact_loss, *exact = run(plain, [part.double() if part.is_floating_point() else part for part in inputs])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-3, atol=0)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).abs().max() < 0.02 * theirs.abs().max()
