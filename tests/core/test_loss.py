"""The fused loss against the plain one, which exists only here."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import core.loss
from core.loss import COMPILED_FROM, IGNORED_LABEL, LinearCrossEntropy, compiles_loss

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


def test_a_last_chunk_that_is_shorter_sees_nothing_of_the_one_before():
    chunk_bytes = 40 * VOCABULARY * 8  # 150 tokens: four chunks of 38, the last of 36
    with LargestTensor() as largest:
        fused = run(LinearCrossEntropy(chunk_bytes=chunk_bytes), problem())
    assert largest.elements == 38 * VOCABULARY
    for ours, theirs in zip(fused, run(plain, problem()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_float16_sums_of_many_rows_and_scales_beyond_its_range_stay_finite():
    rows = 9000
    hidden = torch.full((rows, 4), 30.0, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(VOCABULARY, 4, dtype=torch.float16).requires_grad_()
    labels = torch.zeros(rows, dtype=torch.int64)
    loss = LinearCrossEntropy()(hidden, weight, labels)
    (loss / rows).backward()
    # The sum before the division is 270,000; float16 ends at 65,504.
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -30.0 * (1 - 1 / VOCABULARY)).half(), rtol=1e-2, atol=0)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_scaled_before_they_are_rounded(dtype):
    """1e6 is beyond float16, and 1/3 is rounded by bfloat16 itself: what they scale is not to notice."""
    inputs = problem(dtype)
    for scale in (1e6, 1 / 3):
        hidden, weight, labels = inputs[0].detach().requires_grad_(), inputs[1].detach() / 1000, inputs[2]
        (once,) = torch.autograd.grad(LinearCrossEntropy()(hidden, weight, labels), hidden)
        (scaled,) = torch.autograd.grad(LinearCrossEntropy()(hidden, weight, labels) * scale, hidden)
        assert torch.equal(scaled, (once.double() * torch.tensor(scale).double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_part_is_one_graph_and_equals_the_plain_one(dtype, monkeypatch):
    monkeypatch.setattr(core.loss, "compiles_loss", lambda *_: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (LinearCrossEntropy(chunk_bytes=40 * VOCABULARY * 4) for _ in range(2))
    eager.may_compile = False
    for ours, theirs in zip(run(compiled, problem(dtype)), run(eager, problem(dtype)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "device_type", "missing", "compiled"),
    [
        (COMPILED_FROM, torch.float32, "cuda", None, True),
        (COMPILED_FROM, torch.float16, "cuda", None, True),
        (COMPILED_FROM - 1, torch.float32, "cuda", None, False),
        (COMPILED_FROM, torch.float64, "cuda", None, False),
        (COMPILED_FROM, torch.float32, "cpu", None, False),
        (COMPILED_FROM, torch.float32, "cuda", "a compiler", False),
    ],
)
def test_the_loss_is_compiled_where_it_pays_and_can_be(vocabulary, dtype, device_type, missing, compiled, monkeypatch):
    monkeypatch.setattr(core.loss, "missing_compiler", lambda _: missing)
    assert compiles_loss(vocabulary, dtype, device_type) == compiled


def test_a_loss_beyond_what_exponentials_hold_is_exact():
    """A probability of exp(-300) is zero in float32; its logarithm is not asked for."""
    hidden = torch.tensor([[300.0], [-300.0], [0.0]])
    losses = LinearCrossEntropy()(hidden, torch.tensor([[0.0], [-1.0]]), torch.tensor([1, 0, IGNORED_LABEL]))
    assert losses.item() == pytest.approx(600)
