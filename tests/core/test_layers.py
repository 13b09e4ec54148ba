"""Norms, MLP and embedding against their formulas."""

import pytest
import torch

from core.config import ModelConfig
from core.embedding import LanguageModelEmbedding
from core.mlp import build_mlp
from core.norm import LayerNorm, RMSNorm
from parallel.initialization import materialize
from parallel.tensor import TensorParallel

EPS = 1e-5


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def rms_norm(x, weight, bias):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def filled(module):
    module.to(torch.float64)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return module


@pytest.mark.parametrize(
    ("norm", "formula"),
    [
        (LayerNorm(64, EPS, bias=True, tensor=TensorParallel()), layer_norm),
        (RMSNorm(64, EPS, tensor=TensorParallel()), rms_norm),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_compute_in_at_least_float32(norm, formula, dtype):
    norm = filled(norm).to(dtype)
    x = (torch.randn(200, 64, dtype=torch.float64) * 30 + 100).to(dtype)
    exact = formula(x.double(), norm.weight.double(), getattr(norm, "bias", torch.zeros(1)).double())
    # What remains is the rounding of the result; sums in bfloat16 would be off by many roundings.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "swiglu"])
def test_mlp_is_its_formula(activation, bias):
    config = ModelConfig(hidden_size=16, num_attention_heads=2, ffn_hidden_size=40, activation=activation, bias=bias)
    mlp = filled(build_mlp(config, TensorParallel()))
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    up = mlp.up(x)
    inner = {
        "gelu": lambda: up * 0.5 * (1 + torch.erf(up / 2**0.5)),
        "gelu_tanh": lambda: up * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3))),
        "relu2": lambda: torch.where(up > 0, up**2, 0.0),
        "swiglu": lambda: mlp.gate(x) * torch.sigmoid(mlp.gate(x)) * up,
    }[activation]()
    torch.testing.assert_close(mlp(x), mlp.down(inner), rtol=1e-12, atol=1e-12)
    assert (mlp.down.bias is not None) == bias


def test_learned_positions_are_added_at_the_positions_given():
    config = ModelConfig(vocab_size=11, hidden_size=4, num_attention_heads=1, max_position_embeddings=7)
    with torch.device("meta"):
        embedding = LanguageModelEmbedding(config, TensorParallel())
    materialize(embedding, 0, torch.device("cpu"))
    ids, positions = torch.tensor([[3, 9]]), torch.tensor([5, 6])
    expected = embedding.word.weight[ids] + embedding.position.weight[positions]
    assert torch.equal(embedding(ids, positions), expected)
