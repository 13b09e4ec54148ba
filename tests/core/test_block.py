"""Recomputation and compilation change what is kept and when it is computed, never what comes out."""

import dataclasses
import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import core.attention
from core.config import ModelConfig
from models.gpt import build_meta_model
from parallel.communication_volume import Traffic
from parallel.config import ParallelConfig
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from verification.local_ranks import run_ranks

CPU = torch.device("cpu")
GPT2 = ModelConfig(
    num_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=16, dropout=0.1
)
LLAMA = ModelConfig(
    num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, vocab_size=67, max_position_embeddings=16,
    normalization="rmsnorm", activation="swiglu", position_embedding="rope", bias=False, tie_embeddings=False,
)  # fmt: skip
MODELS = {"gpt2": GPT2, "llama": LLAMA}


class Watch(TorchDispatchMode):
    """Counts what runs, and holds what it makes by weak references, so that what is still there can be weighed."""

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.made = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is torch.Tensor and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def held(self):
        """Bytes of all that was made and is still there."""
        return sum(size for reference, size in self.made.values() if not reference.expired())

    def products(self):
        return sum(self.counts.get(name, 0) for name in ("mm", "addmm", "bmm"))


def build(config, dtype, recompute, tensor=None):
    model = build_meta_model(config, dtype, tensor, recompute=recompute)
    materialize(model, 0, CPU)
    return model


def batch(rows=2):
    ids = torch.randint(0, 67, (rows, 17), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:], torch.arange(rows)


def forward_and_backward(model):
    """Loss and gradients, what forward and backward ran, and the bytes held between them."""
    with Watch() as forward:
        loss = model(*batch())
    held = forward.held()
    with Watch() as backward:
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())], forward, backward, held


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_no_bit_and_saves_memory(name, dtype):
    found = {how: forward_and_backward(build(MODELS[name], dtype, how)) for how in ("none", "selective", "full")}
    values, forward, *_ = found["none"]
    layers = MODELS[name].num_layers
    for how in ("selective", "full"):
        for one, other in zip(found[how][0], values, strict=True):
            assert torch.equal(one, other)
        assert found[how][1].products() == forward.products()
    products = {how: run[2].products() for how, run in found.items()}
    attention = {how: run[2].counts.get("_scaled_dot_product_flash_attention_for_cpu", 0) for how, run in found.items()}
    assert products["selective"] == products["none"], "no product is computed again"
    assert (attention["none"], attention["selective"], attention["full"]) == (0, 0, layers)
    # The last of a layer's projections is left out where nothing after it, dropout for one, is to be run again.
    assert products["full"] - products["none"] == layers * {"gpt2": 6, "llama": 7 - 1}[name]
    norm = "native_layer_norm" if name == "gpt2" else "rsqrt"
    again = {how: run[2].counts.get(norm, 0) for how, run in found.items()}
    assert (again["none"], again["selective"], again["full"]) == (0, 2 * layers, 2 * layers)
    held = {how: run[3] for how, run in found.items()}
    assert held["full"] < 0.7 * held["selective"]
    assert held["selective"] < 0.85 * held["none"]


def tensor_parallel_products(rank, world_size, sequence, recompute):
    mesh = ParallelMesh(ParallelConfig(tp=world_size, dp_shard=1, sequence=sequence), "cpu")
    model = build(LLAMA, torch.float64, recompute, mesh.tensor)
    values, _, backward, _ = forward_and_backward(model)
    return [value.to_local() if hasattr(value, "to_local") else value for value in values], backward.products()


@pytest.mark.parametrize("sequence", [True, False])
def test_products_within_tensor_parallel_functions_are_kept_too(sequence):
    plain, selective, full = (
        run_ranks(2, tensor_parallel_products, sequence, how) for how in ("none", "selective", "full")
    )
    for rank in range(2):
        assert all(torch.equal(one, other) for one, other in zip(plain[rank][0], selective[rank][0], strict=True))
        assert plain[rank][1] == selective[rank][1] < full[rank][1]


def follow(monkeypatch, backend="aot_eager"):
    """Compile up to the graph that a compiler would get, and run that: the same arithmetic in little time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def graphs():
    """How many graphs there are, and where Python had to step in between."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def near(found, expected):
    return all((a - b).abs().max() <= 1e-10 * max(1, b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "recompute"), [("gpt2", "none"), ("llama", "selective"), ("gpt2", "full")])
def test_compiled_layers_share_one_graph_and_compute_the_same(monkeypatch, name, recompute):
    follow(monkeypatch)
    plain, compiled = (build(MODELS[name], torch.float64, how) for how in ("none", recompute))
    compiled.block.compile_layers()
    for model in (plain, compiled):
        model(*batch()).backward()
    assert graphs() == (1, 0)
    assert near([p.grad for p in compiled.parameters()], [p.grad for p in plain.parameters()])
    with torch.no_grad():
        assert near([compiled(*batch()[:2])], [plain(*batch()[:2])])
    assert graphs() == (2, 0), "evaluation, without dropout and gradients, is another"


@pytest.mark.parametrize("allowed", [(), (SDPBackend.MATH,)])
def test_a_compiled_layer_chooses_kernels_inside_its_graph(monkeypatch, allowed):
    operators = []

    def look(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    follow(monkeypatch, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    monkeypatch.setattr(core.attention, "allowed_kernels", lambda *_, **__: allowed)
    config = dataclasses.replace(LLAMA, sliding_window=5)
    plain, compiled = (build(config, torch.float64, "none") for _ in range(2))
    compiled.block.compile_layers()
    for model in (plain, compiled):
        model(*batch()).backward()
    assert graphs() == (1, 0)
    assert any("flash_attention" in name for name in operators) == (not allowed)
    assert near([p.grad for p in compiled.parameters()], [p.grad for p in plain.parameters()])


def compiled_rank(rank, world_size, name, sequence, recompute):
    mesh = ParallelMesh(ParallelConfig(tp=world_size, dp_shard=1, sequence=sequence), "cpu")
    found = []
    for compiled in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            follow(patch)
            model = build(MODELS[name], torch.float64, recompute, mesh.tensor)
            if compiled:
                model.block.compile_layers()
            with Traffic(mesh) as traffic:
                loss = model(*batch())
                loss.backward()
            local = [parameter.grad.to_local() for parameter in model.parameters()]
            found.append(([loss.detach(), *local], dict(traffic.bytes), graphs()))
    return found


@pytest.mark.parametrize(
    ("name", "sequence", "recompute"),
    [("llama", True, "selective"), ("gpt2", False, "full")],
)
def test_compiled_tensor_parallel_layers_communicate_inside_their_graph(name, sequence, recompute):
    for (expected, moved, none), (found, moved_compiled, seen) in run_ranks(
        2, compiled_rank, name, sequence, recompute
    ):
        assert (none, seen) == ((0, 0), (1, 0))
        assert near(found, expected)
        assert moved_compiled.keys() == moved.keys()
        assert all(moved_compiled[key] <= moved[key] for key in moved), "what is gathered may be kept"
