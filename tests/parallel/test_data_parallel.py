"""Every data-parallel layout against one process with the whole model and plain torch, in float64."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import training.train_step
from core.config import ModelConfig
from data.batches import MicroBatch
from models.gpt import build_meta_model
from parallel.config import ParallelConfig
from parallel.data_parallel import _ScatterToOneself, shard_data_parallel
from parallel.gradients import local_gradients
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from settings.config import OptimizerConfig
from training.optimizer import build_optimizer
from training.precision import PRECISIONS
from training.train_step import TrainStep
from verification.local_ranks import run_ranks

STEPS, SAMPLES, SEQ, VOCABULARY, SEED = 3, 12, 12, 67, 11
MODELS = {
    "gpt2": ModelConfig(num_layers=2, hidden_size=24, num_attention_heads=4, vocab_size=VOCABULARY,
                        max_position_embeddings=SEQ, activation="gelu_tanh", init_std=0.1),
    "llama": ModelConfig(num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=40,
                         vocab_size=VOCABULARY, max_position_embeddings=SEQ, normalization="rmsnorm",
                         activation="swiglu", position_embedding="rope", bias=False, tie_embeddings=False,
                         init_std=0.1),
}  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-2, clip_grad=0.3)
LAYOUTS = [  # (model, dp_replicate, dp_shard, zero, micro_batch_size)
    ("gpt2", 1, 1, 3, 2),
    ("gpt2", 1, 2, 3, 6),
    ("llama", 1, 2, 2, 1),
    ("gpt2", 1, 4, 1, 1),
    ("llama", 1, 4, 3, 3),
    ("llama", 2, 1, 3, 3),
    ("gpt2", 2, 1, 1, 2),
    ("llama", 2, 2, 3, 1),
    ("gpt2", 2, 2, 2, 3),
    ("llama", 2, 2, 1, 1),
    ("gpt2", 4, 1, 2, 1),
    ("gpt2", 1, 3, 3, 2),
]


def ragged_batch(step):
    """Tokens whose labels are masked very unevenly; of the first samples, which one rank may have, none counts."""
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, VOCABULARY, (SAMPLES, SEQ + 1))
    labels = tokens[:, 1:].copy()
    for row in range(SAMPLES):
        labels[row, : generator.integers(0, SEQ)] = -100
    labels[:3] = -100
    return tokens[:, :-1].copy(), labels


def one_process(model_name, precision="fp64"):
    """Losses, gradient norms and first gradients, and the weights in the end, by plain torch."""
    model = build_meta_model(MODELS[model_name], PRECISIONS[precision].master)
    materialize(model, SEED, torch.device("cpu"))
    no_decay = [p for name, p in model.named_parameters() if p.dim() < 2 or "embedding" in name]
    decay = [p for p in model.parameters() if not any(p is other for other in no_decay)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": OPTIMIZER.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps, foreach=False, fused=False,
    )  # fmt: skip
    numbers, gradients = [], {}
    for step in range(STEPS):
        input_ids, labels = map(torch.from_numpy, ragged_batch(step))
        optimizer.zero_grad()
        loss = model(input_ids, labels) / (labels != -100).sum()
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        numbers.append((loss.item(), norm.item()))
    return numbers, gradients, {name: p.detach() for name, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def layout_rank(rank, world_size, model_name, dp_replicate, dp_shard, zero, micro_batch_size, precision="fp64"):
    """The same in a layout, by Kilotron's own step; everything gathered."""
    mesh = ParallelMesh(ParallelConfig(dp_replicate=dp_replicate, dp_shard=dp_shard), "cpu")
    chosen = PRECISIONS[precision]
    model = build_meta_model(MODELS[model_name], chosen.master)
    data_parallel = shard_data_parallel(model, model.sharding_units(), mesh, zero, chosen.compute)
    materialize(model, SEED, torch.device("cpu"))
    parameters = dict(model.named_parameters())
    step = TrainStep(data_parallel, build_optimizer(model, OPTIMIZER), mesh, OPTIMIZER.clip_grad, torch.device("cpu"))

    def micro_batches(number):
        input_ids, labels = ragged_batch(number)
        starts = range(mesh.dp_rank * micro_batch_size, SAMPLES, world_size * micro_batch_size)
        parts = [slice(start, start + micro_batch_size) for start in starts]
        return [MicroBatch(input_ids[part], labels[part], [], np.arange(len(input_ids))[part]) for part in parts]

    step.accumulate(micro_batches(0))
    gradients = {name: whole(parameter.grad) for name, parameter in parameters.items()}
    step.optimizer.zero_grad()
    numbers = [step(index + 1, micro_batches(index), OPTIMIZER.lr).numbers.read() for index in range(STEPS)]
    return numbers, gradients, {name: whole(parameter.detach()) for name, parameter in parameters.items()}


@pytest.mark.parametrize(("model_name", "dp_replicate", "dp_shard", "zero", "micro_batch_size"), LAYOUTS)
def test_equals_one_process(model_name, dp_replicate, dp_shard, zero, micro_batch_size):
    world_size = dp_replicate * dp_shard
    layout = (model_name, dp_replicate, dp_shard, zero, micro_batch_size)
    expected_numbers, expected_gradients, expected_weights = one_process(model_name)
    for numbers, gradients, weights in run_ranks(world_size, layout_rank, *layout):
        np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-10)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            reference = expected_gradients[name]
            scale = max(reference.abs().max().item(), 1e-3 * expected_numbers[0][1])
            assert (gradient - reference).abs().max() <= 1e-10 * scale, name
        for name, weight in weights.items():
            reference = expected_weights[name]
            assert (weight - reference).abs().max() <= 1e-10 * max(1.0, reference.abs().max().item()), name


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_single_precision_and_bfloat16_stay_close(precision, tolerance):
    expected_numbers, _, _ = one_process("llama")
    for numbers, _, weights in run_ranks(4, layout_rank, "llama", 2, 2, 3, 1, precision):
        np.testing.assert_allclose(numbers, expected_numbers, rtol=tolerance)
        assert all(weight.dtype == torch.float32 for weight in weights.values())


def initial_weights(rank, world_size, dp_replicate, dp_shard):
    mesh = ParallelMesh(ParallelConfig(dp_replicate=dp_replicate, dp_shard=dp_shard), "cpu")
    model = build_meta_model(MODELS["gpt2"], torch.float32)
    shard_data_parallel(model, model.sharding_units(), mesh, 3, torch.bfloat16)
    materialize(model, SEED, torch.device("cpu"))
    assert dist.get_world_size() == world_size
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dp_replicate", "dp_shard"), [(1, 2), (1, 3), (2, 2), (1, 4)])
def test_initial_weights_are_bit_identical_in_every_layout(dp_replicate, dp_shard):
    expected = build_meta_model(MODELS["gpt2"], torch.float32)
    materialize(expected, SEED, torch.device("cpu"))
    for weights in run_ranks(dp_replicate * dp_shard, initial_weights, dp_replicate, dp_shard):
        for name, parameter in expected.named_parameters():
            assert torch.equal(weights[name], parameter), name


class Collectives(TorchDispatchMode):
    """Counts collective operations by kind."""

    KINDS = ("allgather", "reduce_scatter", "allreduce")

    def __init__(self):
        super().__init__()
        self.counts = dict.fromkeys(self.KINDS, 0)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            kind = next(kind for kind in self.KINDS if kind in str(function))
            self.counts[kind] += 1
        return function(*arguments, **(keywords or {}))


def collectives(rank, world_size, dp_replicate, dp_shard, zero, micro_batches):
    """Gathers, reduce-scatters and all-reduces of one step, and whether an evaluation leaves shards behind."""
    mesh = ParallelMesh(ParallelConfig(dp_replicate=dp_replicate, dp_shard=dp_shard), "cpu")
    model = build_meta_model(MODELS["llama"], torch.float32)
    data_parallel = shard_data_parallel(model, model.sharding_units(), mesh, zero, torch.float32)
    materialize(model, SEED, torch.device("cpu"))
    step = TrainStep(data_parallel, build_optimizer(model, OPTIMIZER), mesh, 1.0, torch.device("cpu"))
    input_ids, labels = ragged_batch(0)
    batches = [MicroBatch(input_ids[:2], labels[:2], [], np.arange(2))] * micro_batches
    with torch.no_grad():
        model(torch.from_numpy(input_ids[:2]), torch.from_numpy(labels[:2]))
    data_parallel.reshard()
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with Collectives() as counter:
        step.accumulate(batches)
    return list(counter.counts.values()), sharded


@pytest.mark.parametrize(("dp_replicate", "dp_shard"), [(1, 2), (2, 2)])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_says_how_often_weights_are_gathered_and_gradients_reduced(zero, dp_replicate, dp_shard):
    micro_batches = 3
    units = MODELS["llama"].num_layers + 2  # layers, embedding, and the rest, which stays gathered until its backward
    gathers = {1: units, 2: units, 3: micro_batches * (2 * units - 1)}[zero]
    scatters = {1: units, 2: micro_batches * units, 3: micro_batches * units}[zero]
    reduces = 1 + (units if dp_replicate > 1 else 0)  # the count of tokens, and replicas once a step
    for found, sharded in run_ranks(dp_replicate * dp_shard, collectives, dp_replicate, dp_shard, zero, micro_batches):
        assert found == [gathers, scatters, reduces]
        assert sharded


def accumulated(rank, world_size, layout, zero, precision):
    """Gradients of two micro-batches together, and the sum of each one's, in float32; both of this rank's shards."""
    mesh = ParallelMesh(ParallelConfig(**layout), "cpu")
    chosen = PRECISIONS[precision]
    model = build_meta_model(MODELS["llama"], chosen.master, mesh.tensor)
    data_parallel = shard_data_parallel(model, model.sharding_units(), mesh, zero, chosen.compute)
    materialize(model, SEED, torch.device("cpu"))
    step = TrainStep(data_parallel, build_optimizer(model, OPTIMIZER), mesh, 1.0, torch.device("cpu"))
    input_ids, labels = ragged_batch(0)
    parts = [slice(3, 6), slice(6, 9)] if mesh.dp_rank == 0 else [slice(9, 10), slice(10, 12)]
    batches = [MicroBatch(input_ids[part], labels[part], [], np.arange(SAMPLES)[part]) for part in parts]

    # The same divisor for all, so that they add up.
    training.train_step.count_tokens = lambda *_: torch.tensor(7.0, dtype=torch.float64)

    def gradients(micro_batches):
        step.accumulate(micro_batches)
        found = {name: local_gradients([parameter])[0].clone() for name, parameter in model.named_parameters()}
        step.optimizer.zero_grad()
        return found

    together, *each = (gradients(chunk) for chunk in (batches, batches[:1], batches[1:]))
    return together, {name: each[0][name] + each[1][name] for name in together}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("layout", "zero"),
    [({"dp_shard": 1}, 3), ({"dp_shard": 2}, 1), ({"dp_shard": 2}, 2), ({"dp_shard": 1, "tp": 2}, 3)],
)
def test_micro_batches_and_ranks_add_up_in_float32(layout, zero, precision):
    """Were a sum rounded to the type that layers compute in, it would be off by up to 2^-9 or 2^-12 of itself."""
    world_size = layout["dp_shard"] * layout.get("tp", 1)
    for together, expected in run_ranks(world_size, accumulated, layout, zero, precision):
        for name, gradient in together.items():
            assert gradient.dtype == torch.float32
            scale = expected[name].abs().max().clamp(min=1e-6)
            assert (gradient - expected[name]).abs().max() < 1e-5 * scale, name


class OnGpu:
    """A tensor as if on a GPU, that notes the streams which use it."""

    is_cuda = True

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


def test_the_buffer_of_a_rank_alone_outlives_the_stream_that_sums_into_it(monkeypatch):
    """FSDP asks for the input on the stream of layers, for the output on its own, and lets go of it there at once."""
    scatter, buffer = _ScatterToOneself(), OnGpu()
    monkeypatch.setattr(torch, "empty", lambda *_, **__: buffer)
    for stream in ("layers", "reductions"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: stream)
        assert scatter.allocate([4], dtype=torch.float32, device="cuda") is buffer
    assert buffer.streams == ["reductions"]
