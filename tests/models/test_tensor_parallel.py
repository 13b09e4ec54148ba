"""A model whose matrices are shared out generates as the whole one does."""

import torch

from core.config import ModelConfig
from models.generation import Sampling, generate
from models.gpt import build_meta_model
from parallel.config import ParallelConfig
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from verification.local_ranks import run_ranks

CPU = torch.device("cpu")
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=8, num_query_groups=2, vocab_size=101, max_position_embeddings=24,
    tie_embeddings=False, dropout=0.1, init_std=0.2,
)  # fmt: skip


def continuation(rank, world_size):
    mesh = ParallelMesh(ParallelConfig(tp=world_size, dp_shard=1), "cpu")
    model = build_meta_model(MODEL, torch.float64, mesh.tensor)
    materialize(model, 0, CPU)
    cached, computed = (
        list(generate(model, [3, 100, 7], 15, Sampling(temperature=0.8, seed=5), use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert mesh.tensor.sequence == (world_size > 1), "as it was before"
    return cached, computed


def test_generation_is_the_same_on_shared_matrices():
    ((expected, _),) = run_ranks(1, continuation)
    assert len(set(expected)) > 5
    for ranks in (2, 4, 8):
        assert run_ranks(ranks, continuation) == [(expected, expected)] * ranks
