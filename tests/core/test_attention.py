"""Attention against its formula written out, and decoding with a cache against none."""

import math

import pytest
import torch

from core.attention import KeyValueCache, SelfAttention
from core.config import ModelConfig
from core.rotary import apply_rotary, rotary_table
from parallel.initialization import materialize
from parallel.tensor import TensorParallel

BATCH, SEQ, HIDDEN, HEADS = 2, 9, 48, 6


def build(groups, head_dim=None, bias=True):
    config = ModelConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=groups, head_dim=head_dim, bias=bias,
        init_std=0.3,
    )  # fmt: skip
    with torch.device("meta"):
        attention = SelfAttention(config, TensorParallel()).double()
    materialize(attention, 0, torch.device("cpu"))
    return attention


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
        if table is not None:
            q, k = (apply_rotary(part.unsqueeze(1), table).squeeze(1) for part in (q, k))
        for position in range(x.shape[1]):
            scores = (k[:, : position + 1] * q[:, position : position + 1]).sum(-1) / math.sqrt(head_dim)
            outputs[:, position, own] = (scores.softmax(-1).unsqueeze(-1) * v[:, : position + 1]).sum(1)
    return attention.output(outputs)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(("groups", "head_dim"), [(6, None), (3, None), (2, 12), (1, None)])
def test_equals_the_formula_for_every_grouping(groups, head_dim, rope):
    attention = build(groups, head_dim)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    table = rotary_table(torch.arange(SEQ), attention.head_dim, 10_000.0, x.dtype) if rope else None
    torch.testing.assert_close(attention(x, table), written_out(attention, x, table), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pieces", [[SEQ], [1] * SEQ, [4, 1, 3, 1], [1, 8]])
def test_a_cache_changes_nothing_however_the_sequence_arrives(pieces):
    attention = build(groups=2)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    whole = attention(x, rotary_table(torch.arange(SEQ), attention.head_dim, 10_000.0, x.dtype))
    cache = KeyValueCache(BATCH, 2, SEQ, attention.head_dim, x.dtype, x.device)
    outputs = []
    for piece in pieces:
        positions = torch.arange(cache.length, cache.length + piece)
        table = rotary_table(positions, attention.head_dim, 10_000.0, x.dtype)
        outputs.append(attention(x[:, cache.length : cache.length + piece], table, cache))
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)


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
        tables = (rotary_table(torch.tensor([p]), 16, 500.0, torch.float64) for p in (query_position, key_position))
        return (apply_rotary(query, next(tables)) * apply_rotary(key, next(tables))).sum()

    torch.testing.assert_close(score(3, 1), score(1003, 1001), rtol=1e-10, atol=1e-12)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3


def test_rotary_angles_keep_float64_and_never_fall_below_float32():
    assert rotary_table(torch.arange(3), 8, 1e4, torch.float64).sine.dtype == torch.float64
    assert rotary_table(torch.arange(3), 8, 1e4, torch.bfloat16).sine.dtype == torch.float32
    x = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16)
    assert apply_rotary(x, rotary_table(torch.arange(3), 8, 1e4, x.dtype)).dtype == torch.bfloat16
