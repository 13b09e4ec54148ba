"""What only a GPU can tell. Without one, `--device cpu` runs all but the cases that are marked `cuda_only`.

On a GPU, one process per case:      pytest tests/test_gpu.py -m "not nccl" -n 6 --dist loadgroup
On a GPU, several ranks share it:    pytest tests/test_gpu.py -m nccl
Without one, on two cores:           pytest tests/test_gpu.py --device cpu -n 2 --dist loadgroup
"""

import gzip
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import core.loss
from core.config import ModelConfig
from core.loss import LinearCrossEntropy, compiles_loss
from models.gpt import build_meta_model
from parallel.initialization import materialize
from tests.core.test_block import Watch
from tests.gpu_cases import (
    SECONDS,
    Runs,
    attend,
    build_attention,
    copies_are_whole_and_locked,
    errors_of_replicas,
    losses_of_a_pipeline,
    moves_around_a_nan,
    peak_bytes,
    relative_error,
)
from verification.local_ranks import run_ranks

pytestmark = pytest.mark.gpu
several_ranks = pytest.mark.nccl
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """One cache of what is compiled, for all runs of all workers of this session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, device):
    made = Runs(tmp_path_factory.mktemp("runs"), device)
    made.prepare()
    return made


@pytest.fixture(scope="module")
def on_the_cpu(runs):
    """The numbers of five steps in float64 on a CPU."""
    assert runs.train("on-the-cpu", "train.precision=fp64", "train.steps=5", device="cpu") == 0
    return runs.numbers("on-the-cpu")


@pytest.mark.xdist_group("precisions")
@pytest.mark.cuda_only("a GPU computes a CPU's numbers in float64")
def test_float64_equals_the_cpu(runs, on_the_cpu):
    assert runs.train("fp64", "train.precision=fp64", "train.steps=5") == 0
    np.testing.assert_allclose(runs.numbers("fp64"), on_the_cpu, rtol=1e-9)


@pytest.mark.xdist_group("precisions")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 1e-2), ("bf16", 5e-2), ("fp16", 1e-2)])
def test_other_precisions_stay_close_to_float64_on_the_cpu(runs, on_the_cpu, precision, tolerance):
    assert runs.train(precision, f"train.precision={precision}", "train.steps=5") == 0
    np.testing.assert_allclose(runs.numbers(precision), on_the_cpu, rtol=tolerance)


@pytest.fixture(scope="module")
def eager(runs):
    """Words of a run with dropout, and its numbers where nothing is compiled or computed again."""
    words = ["train.precision=fp64", "train.steps=3", "model.dropout=0.1"]
    assert runs.train("eager", *words) == 0
    return words, runs.numbers("eager")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_layers_equal_eager_ones(runs, eager, recompute):
    """Dropout too, whose hashes of 64 bits a compiler's index arithmetic must not shorten."""
    words, expected = eager
    name = f"compiled-{recompute}"
    assert runs.train(name, *words, f"train.recompute={recompute}", "train.compile=true") == 0
    np.testing.assert_allclose(runs.numbers(name), expected, rtol=1e-9)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_deterministic_runs_are_equal_bit_for_bit(runs, compiled):
    """The compiler, which would measure kernels to choose among them, was told in both: before it was imported, as it
    is in a user's process, and afterwards."""
    # A vocabulary for which a GPU compiles the loss, too.
    vocabulary = 16_384 if runs.device == "cuda" else 512
    words = ["train.precision=bf16", "train.steps=5", f"model.vocab_size={vocabulary}"]
    words.append(f"train.compile={str(compiled).lower()}")
    names = [f"once-{compiled}", f"twice-{compiled}"]
    for name in names:
        assert runs.train_deterministically(name, *words, fresh=compiled) == (0, True)
    assert runs.numbers(names[0]) == runs.numbers(names[1])


@DTYPES
def test_recomputation_keeps_less_and_selective_runs_no_attention_again(device, dtype):
    """What runs is seen below the cache of selective recomputation; a profiler counts what that answers as well."""
    config = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, vocab_size=512)
    ids = torch.randint(0, 512, (4, 513 if device == "cuda" else 129), device=device)
    held, attention = {}, {}
    for recompute in ("none", "selective", "full"):
        model = build_meta_model(config, dtype, recompute=recompute)
        materialize(model, 0, torch.device(device))
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        with Watch() as forward:
            loss = model(ids[:, :-1], ids[:, 1:])
        held[recompute] = torch.cuda.memory_allocated() - before if device == "cuda" else forward.held()
        with Watch() as backward:
            loss.backward()
        attention[recompute] = sum(
            count
            for name, count in backward.counts.items()
            if name.startswith("_scaled_dot_product") and "backward" not in name
        )
    assert held["full"] < 0.7 * held["selective"]
    assert held["selective"] < 0.85 * held["none"]
    assert attention == {"none": 0, "selective": 0, "full": config.num_layers}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("multiple", [True, False], ids=["tiles", "no-tiles"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_in_bf16_equals_float64(device, head_dim, multiple, compiled):
    """The kernels that real runs take, with grouped heads, and sequences that are a multiple of 128 or not."""
    whole, ragged = (1024, 1000) if device == "cuda" else (128, 104)
    x = torch.randn(2, whole if multiple else ragged, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    compare_attention(*build_attention(head_dim, window=None, device=device), x, compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_window_in_bf16_has_finite_gradients(device, compiled):
    """cuDNN's kernel has returned NaN where seq % 128 == 64, a mask is given and a row's log-sum-exp is below -88."""
    seq, window = (1088, 256) if device == "cuda" else (192, 48)
    narrow, exact = build_attention(64, window=window, device=device)
    with torch.no_grad():
        for attention in (narrow, exact):
            of_groups = attention.query.weight.unflatten(0, (2, -1))[:, :64]
            attention.key.weight.copy_(-of_groups.flatten(0, 1))
    x = torch.randn(2, seq, 256, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 5
    x = x.bfloat16()
    # The first position sees itself alone, so its log-sum-exp is its score: of the first head, -|query|^2 / sqrt(64).
    query = exact.query(x[:, 0].double())[:, :64]
    assert (-query.square().sum(1) / 8).max() < -88
    compare_attention(narrow, exact, x, compiled=compiled, rotary=False)


def compare_attention(narrow, exact, x, *, compiled, rotary=True):
    if compiled:
        torch._dynamo.reset()
        # On a CPU the graph alone: its C++ takes long to compile, and tells nothing of a GPU's kernels.
        backend = "inductor" if narrow.query.weight.device.type == "cuda" else "aot_eager"
        narrow.forward = torch.compile(narrow.forward, backend=backend)
    found, expected = attend(narrow, x, rotary=rotary), attend(exact, x, rotary=rotary)
    assert max(map(relative_error, found, expected)) < 0.03


@DTYPES
@pytest.mark.filterwarnings("error:.*is not compiled")
def test_the_loss_that_is_compiled_equals_the_plain_one_and_float64(device, dtype, monkeypatch):
    tokens, vocabulary = (3000, 20_001) if device == "cuda" else (300, 2001)
    if device == "cpu":  # which could compile it, but gains nothing by that
        monkeypatch.setattr(core.loss, "compiles_loss", lambda *_: True)
    else:
        assert compiles_loss(vocabulary, dtype, device)
    hidden, weight, labels = inputs_of_loss(device, dtype, tokens, vocabulary)
    found = []
    for may_compile in (True, False):
        loss_function = LinearCrossEntropy(chunk_bytes=tokens // 3 * vocabulary * hidden.element_size())
        loss_function.may_compile = may_compile
        loss = loss_function(hidden, weight, labels)
        found.append((loss.detach(), *torch.autograd.grad(loss / tokens, (hidden, weight))))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    expected = loss.detach(), *torch.autograd.grad(loss / tokens, exact)
    exactly, nearly = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 3e-2)
    assert max(map(relative_error, *found)) < exactly
    for case in found:
        assert max(map(relative_error, case, expected)) < nearly


def inputs_of_loss(device, dtype, tokens, vocabulary):
    """Hidden states and a weight of 64 channels, and labels, of which every fifth does not count."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, 64, device=device, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, device=device, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


def test_the_fused_loss_equals_the_plain_one_and_holds_no_logits(device):
    tokens, vocabulary = (4096, 20_000) if device == "cuda" else (2048, 4000)
    logits = tokens * vocabulary * 8
    hidden, weight, labels = inputs_of_loss(device, torch.float64, tokens, vocabulary)

    def gradients(loss_function):
        loss = loss_function(hidden, weight, labels)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    def plain(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")

    fused_bytes, fused = peak_bytes(device, gradients, LinearCrossEntropy(chunk_bytes=logits // 10))
    plain_bytes, expected = peak_bytes(device, gradients, plain)
    assert fused_bytes < logits / 2 < logits < plain_bytes
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_resuming_loses_nothing(runs, precision):
    words = [f"train.precision={precision}", "train.steps=6"]
    whole, halves = f"whole-{precision}", f"halves-{precision}"
    assert runs.train(whole, *words) == 0
    assert runs.train(halves, *words, "train.exit_after=3") == 75
    assert runs.train(halves, *words) == 0
    np.testing.assert_allclose(runs.numbers(halves), runs.numbers(whole), rtol=1e-9 if precision == "fp64" else 1e-2)


def test_a_signal_while_a_checkpoint_is_written_loses_nothing(runs):
    """The copy that is written aside is of its own step, though training went on; the run then stops, saved."""
    words = ["train.precision=fp64", "train.steps=8", "checkpoint.interval=2", "checkpoint.asynchronous=true"]
    assert runs.train("left-alone", *words) == 0
    assert runs.train_until_stopped("stopped", *words) == (75, True)
    assert (runs.status("stopped")["state"], runs.status("stopped")["reason"]) == ("preempted", "SIGTERM")
    assert 2 < runs.status("stopped")["step"] < 8
    assert runs.train("stopped", *words) == 0
    np.testing.assert_allclose(runs.numbers("stopped"), runs.numbers("left-alone"), rtol=1e-9)


@pytest.mark.cuda_only("a checkpoint's copy lies in locked host memory")
def test_the_copy_for_a_checkpoint_is_whole_and_in_locked_memory(device):
    assert run_ranks(1, copies_are_whole_and_locked, device, initialize=False, timeout=SECONDS) == [True]


@pytest.fixture(scope="module")
def muon_on_the_cpu(runs):
    """Words of a run with Muon, and its numbers in one process on a CPU."""
    words = ["optimizer=muon", "train.precision=fp64", "train.steps=4"]
    assert runs.train("muon", *words, device="cpu") == 0
    return words, runs.numbers("muon")


@pytest.mark.xdist_group("muon")
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "dp_shard=1"),
        pytest.param(2, "dp_shard=2", marks=several_ranks),
        pytest.param(2, "tp=2", marks=several_ranks),
    ],
)
def test_muon_equals_one_process_on_the_cpu(runs, muon_on_the_cpu, ranks, layout):
    """Stopped half-way, so that its momentum is saved and read, too."""
    words, expected = muon_on_the_cpu
    name = f"muon-{layout.replace('=', '-')}"
    assert runs.train(name, *words, f"parallel.{layout}", "train.exit_after=2", ranks=ranks) == 75
    assert runs.train(name, *words, f"parallel.{layout}", ranks=ranks) == 0
    np.testing.assert_allclose(runs.numbers(name), expected, rtol=1e-9)


def test_a_profile_holds_kernels_and_the_memory(runs):
    assert runs.train("profiled", "train.steps=4", "train.profile=2-3") == 0
    folder = runs.folder / "profiled" / "logs" / "profile"
    trace = json.loads(gzip.decompress((folder / "steps_2-3.trace.json.gz").read_bytes()))
    kinds = {event.get("cat") for event in trace["traceEvents"]}
    table = (folder / "steps_2-3.operators.txt").read_text()
    assert "cpu_op" in kinds
    assert "Self CPU" in table
    if runs.device == "cuda":
        assert "kernel" in kinds
        assert "CUDA" in table
        assert (folder / "steps_2-3.memory.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("ranks", "precision", "optimizer"),
    [
        (1, "bf16", "adamw"),
        (1, "fp16", "muon"),
        pytest.param(2, "fp16", "adamw", marks=several_ranks),
        pytest.param(2, "bf16", "muon", marks=several_ranks),
    ],
)
def test_a_nan_of_one_rank_moves_nothing_anywhere(device, ranks, precision, optimizer):
    """The fused optimizer skips on the device, under FSDP. With a loss scale the step after moves again; without one
    none does, as the host, which ends the run, learns of it later."""
    words = ["model=tiny", "model.num_layers=2", "data.seq_length=16", "train.global_batch_size=4",
             "train.micro_batch_size=1", f"train.precision={precision}", "train.initial_loss_scale=1024",
             f"optimizer={optimizer}"]  # fmt: skip
    found = run_ranks(ranks, moves_around_a_nan, words, device, initialize=False, timeout=SECONDS)
    assert found == [[True, False, precision == "fp16"]] * ranks


@several_ranks
@pytest.mark.parametrize("zero", [2, 3])
def test_replicas_sum_the_gradients_of_many_micro_batches(device, zero):
    """Twenty times, because the buffer that is summed in, if freed early, is only sometimes written over by layers."""
    size, repetitions = (["model.hidden_size=768", "data.seq_length=192"], 20) if device == "cuda" else ([], 2)
    words = ["model=tiny", "model.num_layers=4", "data.seq_length=16", "train.global_batch_size=8",
             "train.micro_batch_size=1", "train.precision=fp64", "parallel.dp_replicate=2", f"parallel.zero={zero}",
             *size]  # fmt: skip
    errors = run_ranks(2, errors_of_replicas, words, device, repetitions, initialize=False, timeout=SECONDS)
    assert len(errors[0]) == repetitions
    assert max(map(max, errors)) < 1e-9


@several_ranks
@pytest.mark.parametrize("schedule", ["interleaved", "zb"])
def test_large_messages_of_a_pipeline_do_not_hang(device, schedule):
    """64 MB each on a GPU, more than NCCL holds of a message that nobody takes: a pair of ranks that do not agree on
    the order of their messages hangs, in training or in an evaluation, and the case fails by its time-out."""
    size = ["model.hidden_size=4096", "model.num_attention_heads=32", "model.ffn_hidden_size=1024",
            "model.max_position_embeddings=8192", "data.seq_length=8192"] if device == "cuda" else []  # fmt: skip
    words = ["model=tiny", "model.num_layers=4", "model.init_std=0.1", "data.seq_length=32", *size,
             "train.global_batch_size=4", "train.micro_batch_size=1", "train.precision=bf16", "parallel.pp=2",
             f"parallel.pp_schedule={schedule}", "parallel.virtual_stages=2"]  # fmt: skip
    found = run_ranks(2, losses_of_a_pipeline, words, device, initialize=False, timeout=120)
    (losses,) = [of_rank for of_rank in found if of_rank is not None]
    *in_stages, whole = losses
    for of_stages in in_stages:
        np.testing.assert_allclose(of_stages, whole, rtol=1e-3)


EVALUATED = ["model.num_layers=8", "train.precision=fp64", "train.steps=4", "train.eval_interval=2",
             "train.eval_steps=1", "train.micro_batch_size=1", "model.dropout=0.1"]  # fmt: skip
SMALLER = ["model.hidden_size=48", "model.ffn_hidden_size=96", "data.seq_length=24", "train.global_batch_size=4",
           "train.steps=2", "train.eval_interval=1"]  # fmt: skip
LAYOUTS = [  # the most used first
    (2, "dp_shard=2"),
    (2, "dp_replicate=2"),
    (2, "tp=2"),
    (2, "pp=2 pp_schedule=1f1b"),
    (4, "dp_shard=2 dp_replicate=2 zero=2"),
    (2, "pp=2 pp_schedule=interleaved virtual_stages=2"),
    (2, "pp=2 pp_schedule=zb"),
    (2, "pp=2 pp_schedule=zbv"),
    (8, "pp=2 pp_schedule=zb tp=2 dp_shard=2"),
    (2, "pp=2 pp_schedule=dualpipev"),
    (4, "pp=2 pp_schedule=zbv tp=2"),
    (4, "pp=4 pp_schedule=1f1b"),
    (2, "pp=2 pp_schedule=gpipe"),
    (2, "tp=2 sequence=false"),
]


@pytest.fixture(scope="module")
def one_process(runs):
    """Words of a run with evaluations, and what one process finds in it."""
    words = EVALUATED + (SMALLER if runs.device == "cpu" else [])
    assert runs.train("one-process", *words) == 0
    return words, runs.numbers("one-process"), runs.validation_losses("one-process")


@several_ranks
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(*layout, marks=pytest.mark.xdist_group(f"layouts-{number % 2}"), id=layout[1])
        for number, layout in enumerate(LAYOUTS)
    ],
)
def test_connected_ranks_equal_one_process(runs, one_process, ranks, layout):
    """All on one GPU: slow, but with the ordering of NCCL, which hangs where pairs of ranks do not agree on it."""
    words, numbers, validation_losses = one_process
    name = layout.replace(" ", "-").replace("=", "-")
    assert runs.train(name, *words, *(f"parallel.{word}" for word in layout.split()), ranks=ranks) == 0
    np.testing.assert_allclose(runs.numbers(name), numbers, rtol=1e-9)
    np.testing.assert_allclose(runs.validation_losses(name), validation_losses, rtol=1e-9)
