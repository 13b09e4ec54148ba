"""A step moves exactly the bytes that the published formulas of tensor and sequence parallelism and of FSDP say."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from core.config import ModelConfig
from data.batches import MicroBatch
from parallel.communication_volume import Traffic
from parallel.config import ParallelConfig
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from settings.config import RunConfig, TrainConfig
from training.build import assemble
from training.optimizer import build_optimizer
from training.train_step import TrainStep
from verification.local_ranks import run_ranks

SAMPLES, SEQ = 8, 12
ITEM = 8  # bytes of a float64
GPT2 = ModelConfig(
    num_layers=3, hidden_size=24, num_attention_heads=4, vocab_size=53, max_position_embeddings=SEQ, dropout=0.1
)
LLAMA = replace(
    GPT2, num_query_groups=2, ffn_hidden_size=40, normalization="rmsnorm", activation="swiglu",
    position_embedding="rope", bias=False, tie_embeddings=False,
)  # fmt: skip
MODELS = {"gpt2": GPT2, "llama": LLAMA}


def one_step(rank, world_size, config):
    mesh = ParallelMesh(config.parallel, "cpu")
    data_parallel = assemble(config, mesh, torch.device("cpu"))
    materialize(data_parallel.model, 0, torch.device("cpu"))
    optimizer = build_optimizer(data_parallel.model, config.optimizer)
    step = TrainStep(data_parallel, optimizer, mesh, 1.0, torch.device("cpu"))
    generator = np.random.default_rng(mesh.dp_rank)
    micro_batches = []
    for _ in range(config.accumulation_steps):
        tokens = generator.integers(0, 53, (config.micro_batch_size, SEQ + 1))
        indices = np.arange(config.micro_batch_size)
        micro_batches.append(MicroBatch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), [], indices))
    with Traffic(mesh) as traffic:
        step(1, micro_batches, 1e-3)
    return traffic.bytes


def formula(config: RunConfig) -> Counter[tuple[str, str]]:
    """Bytes of one step by (ranks, kind), from the shapes alone."""
    model, layout = config.model, config.parallel
    rows = config.micro_batch_size * SEQ
    bsh = rows * model.hidden_size * ITEM
    micro_batches, layers = config.accumulation_steps, model.num_layers
    recompute = config.train.recompute == "full"
    moved: Counter[tuple[str, str]] = Counter()

    def tensor(kind: str, count: int, size: int = bsh) -> None:
        moved["tp", kind] += micro_batches * count * size

    if layout.tp > 1:
        if layout.sequence_parallel:
            # A layer: inputs gathered (2), gathered again for weight gradients (2), output gradients gathered (2).
            tensor("all_gather", layers * 6 + (2 * layers if recompute else 0))
            tensor("reduce_scatter", layers * (2 + 2) + (2 * layers if recompute else 0))
            tensor("reduce_scatter", 1)  # embedding forward
            tensor("all_gather", 1)  # its gradient
            tensor("all_gather", 1)  # input of the loss
            tensor("reduce_scatter", 1)  # its gradient
        else:
            tensor("all_reduce", layers * (2 + 2) + (2 * layers if recompute else 0))
            tensor("all_reduce", 1)  # embedding forward
            tensor("all_reduce", 1)  # gradient of the loss's input
        tensor("all_reduce", 3, rows * ITEM)  # of the loss: maximum; sum and target
        moved["tp", "all_reduce"] += partial_gradients(config) * ITEM
    if layout.dp > 1:
        moved["dp_shard", "all_reduce"] += ITEM  # tokens that count
        gathers = {3: 2, 2: 1 / micro_batches, 1: 1 / micro_batches}[layout.zero]
        reductions = {3: 1, 2: 1, 1: 1 / micro_batches}[layout.zero]
        unpadded = -(-model.vocabulary // layout.tp)
        tables = 1 if model.tie_embeddings else 2
        local = model.parameter_count(layout.tp) + tables * (table_rows(config) - unpadded) * model.hidden_size
        root = root_parameters(config)
        of_layers = local - root
        root_gathers = {3: 1, 2: 1 / micro_batches, 1: 1 / micro_batches}[layout.zero]
        weights = of_layers * gathers + root * root_gathers
        moved["dp_shard", "all_gather"] += round(micro_batches * weights * ITEM)
        moved["dp_shard", "reduce_scatter"] += round(micro_batches * reductions * local * ITEM)
    elif layout.tp > 1:
        moved["dp", "all_reduce"] += ITEM
    # Loss, squared norm and stop flag.
    world = "tp" if layout.dp == 1 else "world" if layout.tp > 1 else "dp_shard"
    moved[world, "all_reduce"] += 3 * ITEM
    return moved


def partial_gradients(config: RunConfig) -> int:
    """Elements whose gradients are summed over tp once a step, on one data-parallel rank."""
    model, layout = config.model, config.parallel
    hidden, shards = model.hidden_size, layout.dp_shard
    vectors: list[int] = []
    if layout.sequence_parallel:
        norms = 2 * model.num_layers + 1
        vectors += [hidden] * norms * (2 if model.normalization == "layernorm" and model.bias else 1)
        vectors += [hidden] * 2 * model.num_layers if model.bias else []
    elements = sum(-(-size // shards) for size in vectors)
    if layout.sequence_parallel and model.position_embedding == "learned":
        elements += -(-model.max_position_embeddings // shards) * hidden
    if model.query_groups < layout.tp:
        rows = model.query_groups * model.head_size
        elements += 2 * model.num_layers * (-(-rows // shards)) * (hidden + model.bias)
    return elements


def table_rows(config: RunConfig) -> int:
    """Rows of the vocabulary on one tensor-parallel rank, padded so that each data-parallel rank has equally many."""
    rows, shards = -(-config.model.vocabulary // config.parallel.tp), config.parallel.dp_shard
    return -(-rows // shards) * shards


def root_parameters(config: RunConfig) -> int:
    """Elements that FSDP gathers with the root: the last norm, and the embedding or the head."""
    model = config.model
    table = table_rows(config) * model.hidden_size
    positions = model.max_position_embeddings * model.hidden_size if model.position_embedding == "learned" else 0
    norm = model.hidden_size * (2 if model.normalization == "layernorm" and model.bias else 1)
    return norm + table + (positions if model.tie_embeddings else 0)


@pytest.mark.parametrize(
    ("model", "tp", "dp_shard", "sequence", "zero", "micro_batch_size", "recompute"),
    [
        ("gpt2", 2, 1, True, 3, 4, "none"),
        ("gpt2", 2, 1, True, 3, 4, "full"),
        ("gpt2", 2, 1, False, 3, 8, "none"),
        ("gpt2", 2, 1, False, 3, 4, "full"),
        ("llama", 4, 1, True, 3, 4, "none"),
        ("llama", 4, 1, False, 3, 8, "none"),
        ("llama", 2, 2, True, 3, 2, "none"),
        ("llama", 2, 2, False, 2, 1, "none"),
        ("gpt2", 2, 2, True, 1, 2, "full"),
        ("llama", 1, 2, False, 3, 2, "none"),
        ("gpt2", 1, 2, False, 2, 1, "none"),
    ],
)
def test_a_step_moves_what_the_formula_says(model, tp, dp_shard, sequence, zero, micro_batch_size, recompute):
    config = RunConfig(
        model=MODELS[model],
        parallel=ParallelConfig(tp=tp, dp_shard=dp_shard, sequence=sequence, zero=zero),
        train=TrainConfig(
            global_batch_size=SAMPLES, micro_batch_size=micro_batch_size, recompute=recompute, precision="fp64"
        ),
    )
    for found in run_ranks(tp * dp_shard, one_step, config):
        assert dict(found) == dict(formula(config))


def test_stages_send_and_receive_what_lies_between_them():
    train = TrainConfig(global_batch_size=SAMPLES, micro_batch_size=2, precision="fp64")
    config = RunConfig(model=LLAMA, parallel=ParallelConfig(pp=2, dp_shard=1), train=train)
    activations = SAMPLES * SEQ * LLAMA.hidden_size * ITEM
    for found in run_ranks(2, one_step, config):
        sent_and_received = [found["pp", "send"], found["pp", "receive"]]
        assert sent_and_received == pytest.approx([activations] * 2, abs=8), "but for the opening of connections"
