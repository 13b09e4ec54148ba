"""A model whose matrices are shared out: it generates as the whole one does, replicas agree, and padding stays zero."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from core.config import ModelConfig
from data.batches import MicroBatch
from models.generation import Sampling, generate
from models.gpt import build_meta_model
from parallel.config import ParallelConfig
from parallel.initialization import materialize
from parallel.local_ranks import run_ranks
from parallel.mesh import ParallelMesh
from parallel.sharding import local_box, local_values, logical_shapes
from training.assembly import assemble
from training.config import OptimizerConfig, RunConfig, TrainConfig
from training.optimizer import build_optimizer
from training.train_step import TrainStep

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


def twenty_steps(rank, world_size, parallel):
    """Every shard after twenty steps in bfloat16, by name and place, as bytes; and the largest padding element."""
    config = RunConfig(
        model=MODEL, parallel=parallel, train=TrainConfig(precision="bf16", global_batch_size=8, micro_batch_size=2)
    )
    mesh = ParallelMesh(parallel, "cpu")
    model = assemble(config, mesh)
    materialize(model.model, 0, CPU)
    step = TrainStep(model, build_optimizer(model.model, OptimizerConfig(lr=1e-2)), mesh, 1.0, CPU)
    generator = np.random.default_rng(mesh.dp_rank)
    for number in range(20):
        batches = []
        for _ in range(config.accumulation_steps):
            tokens = generator.integers(0, 101, (2, 25))
            batches.append(MicroBatch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), [], np.arange(2)))
        step(number + 1, batches, 1e-2)
    shards, padding = {}, 0.0
    for name, parameter in model.model.named_parameters():
        box = local_box(parameter, logical_shapes(model.model)[name])
        shards[name, box] = local_values(parameter, box).contiguous().numpy().tobytes()
        whole = parameter.detach().to_local()
        padding = max(padding, whole[box.lengths[0] :].abs().sum().item())
    gathered = [None] * world_size
    dist.all_gather_object(gathered, shards)
    return gathered, padding


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tp=4, dp_shard=1),
        ParallelConfig(tp=2, dp_replicate=2, dp_shard=1, sequence=False),
        ParallelConfig(tp=2, dp_replicate=2, dp_shard=2, zero=1),
    ],
    ids=["tp4", "tp2-replicate2", "tp2-replicate2-shard2"],
)
def test_replicas_agree_bit_for_bit_after_twenty_bf16_steps(parallel):
    results = run_ranks(parallel.tp * parallel.dp, twenty_steps, parallel)
    (gathered, _), held = results[0], {}
    for shards in gathered:
        for place, content in shards.items():
            held.setdefault(place, []).append(content)
    assert any(len(copies) > 1 for copies in held.values())
    assert [place for place, copies in held.items() if len(set(copies)) > 1] == []
    assert [padding for _, padding in results] == [0.0] * len(results)
