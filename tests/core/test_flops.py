"""FLOPs a token: exactly those that torch counts, where it sees all products."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.config import ModelConfig
from core.flops import flops_per_token
from models.gpt import build_meta_model
from parallel.initialization import materialize
from settings.compose import compose

DENSE = ModelConfig(num_layers=2, hidden_size=24, num_attention_heads=3, vocab_size=53, max_position_embeddings=16)
MODELS = {
    "dense": DENSE,
    "untied": replace(DENSE, tie_embeddings=False, num_layers=1, ffn_hidden_size=40),
    "grouped": replace(DENSE, num_attention_heads=6, num_query_groups=2, position_embedding="rope", bias=False),
    "wide heads": replace(DENSE, head_dim=10, qk_norm=True, activation="relu2"),
    "swiglu": replace(DENSE, activation="swiglu", normalization="rmsnorm", ffn_hidden_size=72),
}
BATCH, SEQ = 3, 16


def in_place_product(_, left, right, **__):
    return 2 * left[0] * left[1] * right[1]


def counted(model, ids, *, backward):
    # The loss accumulates the weight's gradient by an in-place product, which torch does not count by itself. Attention
    # goes by its products: the fused kernels' backward computes the scores again, and that is recomputation.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product})
    with sdpa_kernel(SDPBackend.MATH), counter, torch.set_grad_enabled(backward):
        loss = model(ids, ids)
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_they_are_what_torch_counts_forward_and_backward(name):
    config = MODELS[name]
    model = build_meta_model(config, torch.float32)
    materialize(model, 0, torch.device("cpu"))
    ids = torch.randint(0, 53, (BATCH, SEQ))
    expected = BATCH * SEQ * flops_per_token(config, SEQ)
    assert counted(model, ids, backward=False) * 3 == expected
    assert counted(model, ids, backward=True) == expected


def test_a_window_counts_in_place_of_a_longer_sequence():
    windowed = replace(DENSE, sliding_window=5)
    assert flops_per_token(windowed, 16) == flops_per_token(DENSE, 5) < flops_per_token(DENSE, 16)
    assert flops_per_token(windowed, 4) == flops_per_token(DENSE, 4)


def test_gpt2_and_gpt3_take_what_is_published():
    small, large = (compose([f"model={name}"]).model for name in ("gpt2_small", "gpt3_175b"))
    # six a parameter (arXiv:2001.08361), positions and vectors apart, and attention
    matrices = small.parameter_count() - 1024 * 768 - 12 * 13 * 768 - 2 * 768
    assert flops_per_token(small, 1024) == 6 * matrices + 12 * 12 * 768 * 1024
    # arXiv:2005.14165, table D.1: 3.14e23 for 300 billion tokens, without attention
    assert flops_per_token(large, 1) * 300e9 == pytest.approx(3.14e23, rel=0.01)
