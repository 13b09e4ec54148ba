"""Every variant of the GPU benchmark changes what it says, and trains as the base does, to rounding."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.steps
import core.loss
import training.train_step
from benchmarks.gpu_shapes import shapes
from benchmarks.gpu_variants import VARIANTS, softmax_and_losses, telling_shapes
from benchmarks.steps import kilotron_step, transformers_step
from core.compilation import CompiledFunction, missing_compiler
from core.loss import LinearCrossEntropy
from parallel.process_group import process_group
from parallel.tensor import local

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = {name: replace(shape.config, init_std=0.2) for name, shape in shapes(tiny=True).items()}
"""With weights that are large enough for gradients to be clipped."""


@pytest.fixture(scope="module", autouse=True)
def alone():
    with process_group(timedelta(minutes=1), {}):
        yield


def train(monkeypatch, variant, shape, steps=2, **how):
    """Losses of some steps, then first moments: weights would not do, as AdamW makes whole steps of the noise that the
    gradient of a bias of keys consists of."""
    built = []

    def build_and_keep(model, config):
        built.append(original(model, config))
        return built[0]

    original = benchmarks.steps.build_optimizer
    with VARIANTS[variant](SHAPES[shape]) as config, monkeypatch.context() as patches:
        patches.setattr(benchmarks.steps, "build_optimizer", build_and_keep)
        step = kilotron_step(config, 4, 16, "fp32", CPU, **{"compiled": False, **how})
        losses = [step()() for _ in range(steps)]
    return [torch.tensor(losses), *(local(state["exp_avg"]) for state in built[0].state.values())]


@pytest.mark.parametrize("shape", ["gpt2_50257", "llama_1b"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("base", "padded_vocabulary")])
def test_a_variant_trains_as_the_base_does(monkeypatch, variant, shape):
    expected = train(monkeypatch, "base", shape)
    found = train(monkeypatch, variant, shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_padded_vocabulary_has_a_multiple_of_64_tokens_and_trains(monkeypatch):
    losses, *_ = train(monkeypatch, "padded_vocabulary", "gpt2_50257")
    assert losses.isfinite().all()
    with VARIANTS["padded_vocabulary"](SHAPES["gpt2_50257"]) as config:
        assert (SHAPES["gpt2_50257"].vocabulary, config.vocabulary) == (503, 512)


def test_what_the_loss_did_formerly(monkeypatch):
    with VARIANTS["separate_add"](SHAPES["gpt2_small"]):
        assert not core.loss.sums_in_product(GPU, torch.bfloat16)
    with VARIANTS["small_chunks"](SHAPES["gpt2_small"]):
        assert core.loss.chunk_limit(GPU) == 512 * 2**20
    assert core.loss.row_stride(50_257, "cuda") == 50_304
    with VARIANTS["unaligned"](SHAPES["gpt2_small"]):
        assert core.loss.row_stride(50_257, "cuda") == 50_257


@pytest.mark.slow
def test_the_gather_is_compiled_with_the_softmax_and_changes_no_number(monkeypatch):
    if missing_compiler("cpu") is not None:
        pytest.fail(f"needs the {missing_compiler('cpu')}")
    compiled, original = [], CompiledFunction.__call__

    def call(self, *arguments):
        compiled.append(self._function)
        return original(self, *arguments)

    monkeypatch.setattr(CompiledFunction, "__call__", call)
    monkeypatch.setattr(core.loss, "compiles_loss", lambda *_: True)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels, found = torch.randint(0, 40, (6,)), {}
    for variant in ("base", "gather_inside"):
        with VARIANTS[variant](SHAPES["gpt2_small"]):
            loss = LinearCrossEntropy()(hidden, weight, labels)
            found[variant] = loss.detach(), *torch.autograd.grad(loss, (hidden, weight))
    assert compiled == [core.loss._fused_softmax, softmax_and_losses]
    torch.testing.assert_close(found["gather_inside"], found["base"])


def test_rotary_after_the_transpose_leaves_heads_before_positions_in_memory(monkeypatch):
    original, by_heads = F.scaled_dot_product_attention, {}

    def attend(query, key, value, **how):
        by_heads.setdefault(variant, set()).add(query.is_contiguous() and key.is_contiguous())
        return original(query, key, value, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for variant in ("base", "rotary_after_transpose"):
        train(monkeypatch, variant, "llama_1b", steps=1)
    assert by_heads == {"base": {False}, "rotary_after_transpose": {True}}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("shape", "fewer"), [("gpt2_small", 2), ("llama_1b", 3)])
def test_fused_projections_are_fewer_products(monkeypatch, shape, fewer):
    counts = {}
    for variant in ("base", "fused_qkv"):
        with Products() as products:
            train(monkeypatch, variant, shape, steps=1)
        counts[variant] = products.count
    layers, passes = SHAPES[shape].num_layers, 3
    assert counts["base"] - counts["fused_qkv"] == fewer * layers * passes


def test_clipping_in_the_optimizer_passes_over_no_gradient(monkeypatch):
    original, scaled = training.train_step.scale_gradients, []

    def scale(gradients, factor):
        scaled.append((variant, float(factor)))
        original(gradients, factor)

    monkeypatch.setattr(training.train_step, "scale_gradients", scale)
    for variant in ("base", "clip_in_optimizer"):
        train(monkeypatch, variant, "gpt2_small", steps=1)
    (used, factor), *more = scaled
    assert used == "base"
    assert factor < 0.5, "or nothing was clipped, and nothing is shown"
    assert not more


def test_the_kernel_of_attention_and_the_compiler_are_chosen(monkeypatch):
    with VARIANTS["flash_only"](SHAPES["gpt2_small"]):
        enabled = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    assert enabled == (True, False)
    assert torch.backends.cuda.math_sdp_enabled()
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: modes.append(how.get("mode")) or function)
    for variant in ("base", "max_autotune", "all"):
        with VARIANTS[variant](SHAPES["gpt2_small"]):
            torch.compile(train)
    assert modes == [None, "max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("build", [kilotron_step, transformers_step])
def test_micro_batches_add_up_to_a_batch(build):
    """Up to the order of sums, and for the step after the first as well."""
    found = []
    for rows, accumulate in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        step = build(SHAPES["gpt2_small"], rows, 16, "fp32", CPU, compiled=False, accumulate=accumulate)
        found.append([step()() for _ in range(2)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_shapes_and_variants_that_are_named_exist():
    full, telling = shapes(tiny=False), telling_shapes(list(VARIANTS))
    assert set(telling) == set(VARIANTS)
    assert set().union(*telling.values()) == set(telling["base"]) <= set(full)
    assert telling_shapes(["base", "all"]) == {"base": ["gpt2_small"], "all": ["gpt2_small"]}
    assert {variant for shape in full.values() for variant in shape.also} <= set(VARIANTS)
    assert full["gpt2_50257"].config.vocabulary == 50_257
    assert 1.1e9 < full["llama_1b"].config.parameter_count() < 1.4e9
