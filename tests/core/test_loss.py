"""The fused loss against the plain one, which exists only here."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import core.loss
from core.loss import (
    COMPILED_FROM,
    IGNORED_LABEL,
    MOST_ELEMENTS,
    LinearCrossEntropy,
    VocabularyShard,
    chunk_limit,
    chunk_rows,
    compiles_loss,
    row_stride,
    sums_in_product,
)
from verification.local_ranks import run_ranks

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


def padded_row(columns, device_type):
    return -(-columns // 64) * 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_buffer_with_aligned_rows_gives_the_same_bits(dtype, monkeypatch):
    plain_rows = run(LinearCrossEntropy(chunk_bytes=40 * VOCABULARY * 8), problem(dtype))
    monkeypatch.setattr(core.loss, "row_stride", padded_row)
    monkeypatch.setattr(core.loss, "chunk_rows", lambda *_: 40)
    aligned_rows = run(LinearCrossEntropy(), problem(dtype))
    monkeypatch.setattr(core.loss, "row_stride", lambda columns, _: columns)
    same_chunks = run(LinearCrossEntropy(), problem(dtype))
    for aligned, packed, other_chunks in zip(aligned_rows, same_chunks, plain_rows, strict=True):
        assert torch.equal(aligned, packed)
        torch.testing.assert_close(aligned, other_chunks, rtol=2e-2, atol=2e-2)


def loss_of_a_shard(rank, world_size, dtype):
    """What a rank finds with rows of the weight of its own, on a packed and on an aligned buffer."""
    rows = -(-VOCABULARY // world_size)
    hidden, weight, labels = problem(dtype)
    own = F.pad(weight.detach(), (0, 0, 0, rows * world_size - VOCABULARY))[rank * rows : (rank + 1) * rows]
    shard = VocabularyShard(rank * rows, min(rows, VOCABULARY - rank * rows), dist.group.WORLD)
    core.loss.chunk_rows = lambda *_: 40
    found = []
    for stride in (row_stride, padded_row):
        core.loss.row_stride = stride
        found.append(run(partial(LinearCrossEntropy(), shard=shard), (hidden, own, labels)))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ranks_that_share_a_vocabulary_find_the_same_bits_on_aligned_rows(dtype):
    for packed, aligned in run_ranks(2, loss_of_a_shard, dtype):
        for one, other in zip(packed, aligned, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("columns", "device_type", "stride"),
    [(50257, "cpu", 50257), (50257, "cuda", 50304), (25129, "cuda", 25152), (50304, "cuda", 50304)],
)
def test_rows_are_aligned_on_a_gpu(columns, device_type, stride):
    assert row_stride(columns, device_type) == stride


@given(
    tokens=st.integers(1, 2**20),
    stride=st.integers(1, 2**18),
    elements=st.integers(1, 2**32),
    multiple=st.sampled_from([1, 128]),
)
def test_chunks_fit_their_buffer_and_cover_all_tokens(tokens, stride, elements, multiple):
    rows = chunk_rows(tokens, stride, elements, multiple)
    room = min(elements, MOST_ELEMENTS) // stride
    assert 1 <= rows <= max(1, room)
    assert rows % multiple == 0 or rows == max(1, room) < multiple
    most = room - room % multiple if room > multiple else max(1, room)
    assert -(-tokens // rows) <= -(-tokens // most)


@pytest.mark.parametrize(
    ("gigabytes", "chunk_bytes"), [(15, 512), (23.5, 512), (39.4, 1024), (63, 1024), (79.1, 2048), (139, 2048)]
)
def test_the_buffer_of_a_gpu_grows_with_its_memory(gigabytes, chunk_bytes, monkeypatch):
    properties = SimpleNamespace(total_memory=int(gigabytes * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert chunk_limit(torch.device("cuda", 0)) == chunk_bytes * 2**20
    assert chunk_limit(torch.device("cpu")) == 64 * 2**20


def adds_in_float32(total, left, right, *, out_dtype, out):
    """What torch.addmm does on CUDA with an `out_dtype`."""
    assert out_dtype == out.dtype == torch.float32
    return out.copy_(total + left.float() @ right.float())


def test_products_are_added_in_float32_where_torch_can(monkeypatch):
    cpu = torch.device("cpu")
    assert not sums_in_product(cpu, torch.bfloat16)
    assert not core.loss._adds_in_product(cpu, torch.bfloat16)  # torch has none for a CPU
    monkeypatch.setattr(torch, "addmm", adds_in_float32)
    assert core.loss._adds_in_product(cpu, torch.bfloat16)
    monkeypatch.setattr(torch, "addmm", lambda total, *_, **__: total + 1)
    with pytest.warns(UserWarning, match="out_dtype is wrong for torch.bfloat16 on cpu: it is not used"):
        assert not core.loss._adds_in_product(cpu, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_added_in_a_product_is_not_rounded_before(dtype, monkeypatch):
    inputs = problem(dtype)
    chunk_bytes = 16 * VOCABULARY * 2
    *_, rounded = run(LinearCrossEntropy(chunk_bytes), inputs, scale=1.0)
    monkeypatch.setattr(core.loss, "sums_in_product", lambda *_: True)
    monkeypatch.setattr(torch, "addmm", adds_in_float32)
    *_, added = run(LinearCrossEntropy(chunk_bytes), inputs, scale=1.0)
    *_, exact = run(plain, [part.double() if part.is_floating_point() else part for part in inputs], scale=1.0)
    errors = [(gradient.double() - exact).abs().mean() for gradient in (added, rounded)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("columns", [VOCABULARY, padded_row(VOCABULARY, "")])
def test_the_compiled_softmax_is_one_kernel(columns):
    """It reads the logits and writes the probabilities once: two kernels would read them again in between."""
    kernels = []

    def count(nodes):
        kernels.append(len(nodes))
        return nodes

    logits = torch.randn(8, columns)[:, :VOCABULARY]
    expected = logits.softmax(1)
    torch._dynamo.reset()
    with torch._inductor.config.patch(_post_fusion_custom_pass=count, fx_graph_cache=False):
        torch.compile(core.loss._fused_softmax, dynamic=False)(logits, True)
    torch.testing.assert_close(logits, expected)
    assert kernels == [1]
