"""Attention against its formula written out, and decoding with a cache against none."""

import math

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import core.attention
from core.attention import KeyValueCache, SelfAttention, allowed_kernels
from core.config import ModelConfig
from core.rotary import apply_rotary, rotary_table
from parallel.initialization import materialize
from parallel.tensor import TensorParallel

BATCH, SEQ, HIDDEN, HEADS = 2, 9, 48, 6


def build(groups, head_dim=None, bias=True, **more):
    config = ModelConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=groups, head_dim=head_dim, bias=bias,
        init_std=0.3, **more,
    )  # fmt: skip
    with torch.device("meta"):
        attention = SelfAttention(config, TensorParallel()).double()
    materialize(attention, 0, torch.device("cpu"))
    return attention


def table_of(positions, head_dim=8, dtype=torch.float64, **more):
    config = ModelConfig(hidden_size=head_dim, num_attention_heads=1, position_embedding="rope", **more)
    return rotary_table(torch.as_tensor(positions), config, dtype)


def written_out(attention, x, table):
    """softmax(Q K^T / sqrt(d)) V, head by head and position by position."""
    head_dim = attention.head_dim
    query, key, value = (layer(x) for layer in (attention.query, attention.key, attention.value))
    groups = key.shape[-1] // head_dim
    outputs = torch.zeros_like(query)
    for head in range(HEADS):
        own = slice(head * head_dim, (head + 1) * head_dim)
        group = head // (HEADS // groups)
        shared = slice(group * head_dim, (group + 1) * head_dim)
        q, k, v = query[..., own], key[..., shared], value[..., shared]
        if attention.query_norm is not None:
            q, k = (
                part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
                for part, norm in ((q, attention.query_norm), (k, attention.key_norm))
            )
        if table is not None:
            q, k = (apply_rotary(part.unsqueeze(2), table).squeeze(2) for part in (q, k))
        for position in range(x.shape[1]):
            seen = slice(max(0, position + 1 - (attention.window or SEQ)), position + 1)
            scores = (k[:, seen] * q[:, position : position + 1]).sum(-1) / math.sqrt(head_dim)
            outputs[:, position, own] = (scores.softmax(-1).unsqueeze(-1) * v[:, seen]).sum(1)
    return attention.output(outputs)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(("groups", "head_dim"), [(6, None), (3, None), (2, 12), (1, None)])
def test_equals_the_formula_for_every_grouping(groups, head_dim, rope):
    attention = build(groups, head_dim)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    table = table_of(range(SEQ), attention.head_dim) if rope else None
    torch.testing.assert_close(attention(x, table), written_out(attention, x, table), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("window", [None, 1, 4, SEQ - 1, SEQ, SEQ + 1])
def test_equals_the_formula_with_a_window_and_normalised_heads(groups, window):
    attention = build(groups, sliding_window=window, qk_norm=True)
    for norm in (attention.query_norm, attention.key_norm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    table = table_of(range(SEQ))
    torch.testing.assert_close(attention(x, table), written_out(attention, x, table), rtol=1e-12, atol=1e-12)


def test_a_window_as_long_as_the_sequence_takes_the_causal_path(monkeypatch):
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask, is_causal, **more):
        masks.append((attn_mask, is_causal))
        return attend(*arguments, attn_mask=attn_mask, is_causal=is_causal, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    for window in (SEQ, SEQ + 5, None):
        build(2, sliding_window=window)(x)
    assert masks == [(None, True)] * 3
    build(2, sliding_window=SEQ - 1)(x)
    assert masks[-1][0].shape == (SEQ, SEQ)


@pytest.mark.parametrize("window", [None, 1, 3, SEQ])
@pytest.mark.parametrize("pieces", [[SEQ], [1] * SEQ, [4, 1, 3, 1], [1, 8], [5, 4]])
def test_a_cache_changes_nothing_however_the_sequence_arrives(pieces, window):
    attention = build(groups=2, sliding_window=window, qk_norm=True)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    whole = attention(x, table_of(range(SEQ)))
    cache = KeyValueCache(BATCH, 2, SEQ, attention.head_dim, x.dtype, x.device)
    outputs = []
    for piece in pieces:
        positions = torch.arange(cache.length, cache.length + piece)
        table = table_of(positions)
        outputs.append(attention(x[:, cache.length : cache.length + piece], table, cache))
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_sees_neither_masks_nor_caches(masked, cached):
    assert allowed_kernels("cpu", masked=masked, cached=cached) == ()
    allowed = allowed_kernels("cuda", masked=masked, cached=cached)
    if not masked and not cached:
        assert allowed == (), "cuDNN's kernel is the fastest where it may be used"
        return
    assert SDPBackend.CUDNN_ATTENTION not in allowed
    assert {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH} <= set(allowed)
    assert (SDPBackend.FLASH_ATTENTION in allowed) == (not masked), "flash attention takes no mask"


class Kernels(TorchDispatchMode):
    """Notes the kernels of attention that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.__name__:
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("window", "cached"), [(None, True), (4, False), (4, True), (None, False)])
def test_attention_uses_only_the_kernels_that_are_allowed(window, cached, monkeypatch):
    """On a CPU too: it has two kernels, and here only masks and caches may use the plain one."""
    asked = []

    def only_the_plain_one(device_type, *, masked, cached):
        asked.append((masked, cached))
        return (SDPBackend.MATH,) if masked or cached else ()

    monkeypatch.setattr(core.attention, "allowed_kernels", only_the_plain_one)
    attention = build(groups=HEADS, sliding_window=window)
    cache = KeyValueCache(BATCH, HEADS, SEQ, attention.head_dim, torch.float64, torch.device("cpu")) if cached else None
    with Kernels() as kernels, torch.no_grad():
        attention(torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64), None, cache)
    assert asked == [(window is not None, cached)]
    fused = "_scaled_dot_product_flash_attention_for_cpu.default" in kernels.names
    assert fused == (window is None and not cached)


def test_later_positions_do_not_reach_earlier_ones():
    attention = build(groups=3)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = attention(x), attention(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().min(-1).values.max() > 1e-6


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_position, key_position):
        tables = (table_of([position], 16, rope_theta=500.0) for position in (query_position, key_position))
        return (apply_rotary(query, next(tables)) * apply_rotary(key, next(tables))).sum()

    torch.testing.assert_close(score(3, 1), score(1003, 1001), rtol=1e-10, atol=1e-12)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3


def test_rotary_angles_keep_float64_and_never_fall_below_float32():
    assert table_of(range(3)).sine.dtype == torch.float64
    assert table_of(range(3), dtype=torch.bfloat16).sine.dtype == torch.float32
    x = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    assert apply_rotary(x, table_of(range(3), dtype=x.dtype)).dtype == torch.bfloat16


@pytest.mark.parametrize(("factor", "low", "high", "length"), [(8.0, 1.0, 4.0, 8192), (32.0, 0.5, 3.0, 700)])
@pytest.mark.parametrize("theta", [500_000.0, 10_000.0])
def test_llama3_scaling_is_that_of_transformers_and_leaves_no_frequency_out(theta, factor, low, high, length):
    reference = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
                         "high_freq_factor": high, "original_max_position_embeddings": length},
    )  # fmt: skip
    expected = LlamaRotaryEmbedding(reference).inv_freq
    scaled = {"rope_scaling": "llama3", "rope_scaling_factor": factor, "rope_low_frequency_factor": low,
              "rope_high_frequency_factor": high, "rope_original_length": length, "rope_theta": theta}  # fmt: skip
    # At position 1 the angle is the frequency, and below a quarter turn the arcsine finds it.
    found, plain = (table_of([1], 128, **settings).sine[0].asin() for settings in (scaled, {"rope_theta": theta}))
    torch.testing.assert_close(found[1:].float(), expected[1:], rtol=1e-6, atol=0)
    ratios = (plain / found)[1:]
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(factor)
    assert ((ratios > 1.01) & (ratios < factor - 0.01)).any()
