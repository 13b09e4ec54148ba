"""What only a GPU can tell: the CPU's numbers in each precision, resuming, profiles, the memory of the fused loss."""

import gzip
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pretrain_gpt
from core.config import ModelConfig
from core.loss import LinearCrossEntropy, compiles_loss
from models.gpt import build_meta_model
from parallel.initialization import materialize
from parallel.local_ranks import run_ranks

pytestmark = pytest.mark.gpu
SMALL = ["model=tiny", "model.num_layers=3", "data=sample", "data.seq_length=48", "train.global_batch_size=8",
         "train.micro_batch_size=4", "train.init_device=cpu", "log.sample_ids=true", "optimizer.lr=1e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def out_dir(runs_folder):
    return runs_folder("runs")


def one_rank(rank, world_size, words, visible):
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    # NCCL refuses two ranks on one GPU unless they seem to be of two hosts.
    os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
    return pretrain_gpt.main(words, os.environ)


def train(out_dir, name, *words, device="cuda", ranks=1):
    words = [*SMALL, f"out_dir={out_dir}", f"name={name}", *words]
    visible = "0" if device == "cuda" else ""
    return run_ranks(ranks, one_rank, words, visible, initialize=False, timeout=300)[0]


def numbers(out_dir, name):
    records = [json.loads(line) for line in (out_dir / name / "metrics.jsonl").read_text().splitlines()]
    return [[record["loss"], record["grad_norm"]] for record in records if "loss" in record]


def test_float64_equals_the_cpu(out_dir):
    words = ["train.precision=fp64", "train.steps=5"]
    assert train(out_dir, "on-cpu", *words, device="cpu") == 0
    assert train(out_dir, "on-gpu", *words) == 0
    np.testing.assert_allclose(numbers(out_dir, "on-gpu"), numbers(out_dir, "on-cpu"), rtol=1e-9)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 1e-2), ("bf16", 5e-2), ("fp16", 1e-2)])
def test_other_precisions_stay_close_to_the_cpu(out_dir, precision, tolerance):
    words = ["train.steps=5"]
    assert train(out_dir, f"exact-{precision}", "train.precision=fp64", *words, device="cpu") == 0
    assert train(out_dir, precision, f"train.precision={precision}", *words) == 0
    np.testing.assert_allclose(numbers(out_dir, precision), numbers(out_dir, f"exact-{precision}"), rtol=tolerance)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_layers_equal_eager_ones(out_dir, recompute):
    words = ["train.precision=fp64", "train.steps=3", "model.dropout=0.1", f"train.recompute={recompute}"]
    assert train(out_dir, f"eager-{recompute}", *words) == 0
    assert train(out_dir, f"compiled-{recompute}", *words, "train.compile=true") == 0
    np.testing.assert_allclose(
        numbers(out_dir, f"compiled-{recompute}"), numbers(out_dir, f"eager-{recompute}"), rtol=1e-9
    )


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_two_deterministic_runs_are_equal_bit_for_bit(out_dir, compiled):
    # A vocabulary for which the loss is compiled, too.
    words = ["train.deterministic=true", "train.precision=bf16", "train.steps=5", "model.vocab_size=16384"]
    for name in (f"once-{compiled}", f"twice-{compiled}"):
        assert train(out_dir, name, *words, f"train.compile={compiled}") == 0
    assert numbers(out_dir, f"once-{compiled}") == numbers(out_dir, f"twice-{compiled}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_recomputation_keeps_less_and_selective_runs_no_attention_again(dtype):
    config = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=4, vocab_size=512)
    ids = torch.randint(0, 512, (4, 513), device="cuda")
    held, attention = {}, {}
    for recompute in ("none", "selective", "full"):
        model = build_meta_model(config, dtype, recompute=recompute)
        materialize(model, 0, torch.device("cuda"))
        before = torch.cuda.memory_allocated()
        loss = model(ids[:, :-1], ids[:, 1:])
        held[recompute] = torch.cuda.memory_allocated() - before
        with torch.profiler.profile() as profile:
            loss.backward()
        attention[recompute] = sum(
            event.count
            for event in profile.key_averages()
            if event.key.startswith("aten::_scaled_dot_product") and not event.key.endswith("backward")
        )
    assert held["full"] < 0.7 * held["selective"]
    assert held["selective"] < 0.85 * held["none"]
    assert attention["none"] == attention["selective"] == 0 < attention["full"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_that_is_compiled_equals_the_plain_one(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(3000, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(20_000, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 20_000, (3000,), device="cuda", generator=generator)
    assert compiles_loss(20_000, dtype, "cuda")
    found = []
    for may_compile in (True, False):
        loss_function = LinearCrossEntropy(chunk_bytes=1000 * 20_000 * hidden.element_size())
        loss_function.may_compile = may_compile
        loss = loss_function(hidden, weight, labels)
        found.append((loss.detach(), *torch.autograd.grad(loss / 3000, (hidden, weight))))
    for compiled, plain in zip(*found, strict=True):
        scale = plain.float().abs().max()
        assert (compiled.float() - plain.float()).abs().max() <= scale * (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_resuming_on_a_gpu_loses_nothing(out_dir, precision):
    words = [f"train.precision={precision}", "train.steps=6"]
    assert train(out_dir, f"whole-{precision}", *words) == 0
    assert train(out_dir, f"halves-{precision}", *words, "train.exit_after=3") == 75
    assert train(out_dir, f"halves-{precision}", *words) == 0
    np.testing.assert_allclose(
        numbers(out_dir, f"halves-{precision}"),
        numbers(out_dir, f"whole-{precision}"),
        rtol=1e-9 if precision == "fp64" else 1e-2,
    )


def test_the_fused_loss_equals_the_plain_one_and_holds_no_logits():
    tokens, hidden_size, vocabulary = 4096, 64, 20_000
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, device="cuda", dtype=torch.float64, generator=generator)
    weight.requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
    labels[::5] = -100
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = LinearCrossEntropy()(hidden, weight, labels)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < tokens * vocabulary * 8 / 2
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    plain = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), rtol=1e-9, atol=1e-9)


EVALUATED = ["model.num_layers=8", "train.precision=fp64", "train.steps=4", "train.eval_interval=2",
             "train.eval_steps=1", "train.micro_batch_size=1", "model.dropout=0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(out_dir):
    assert train(out_dir, "one-process", *EVALUATED) == 0
    return numbers(out_dir, "one-process"), validation_losses(out_dir, "one-process")


def validation_losses(out_dir, name):
    records = [json.loads(line) for line in (out_dir / name / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "dp_shard=2"),
        (2, "dp_replicate=2"),
        (2, "tp=2"),
        (2, "tp=2 sequence=false"),
        (2, "pp=2 pp_schedule=gpipe"),
        (2, "pp=2 pp_schedule=1f1b"),
        (2, "pp=2 pp_schedule=interleaved virtual_stages=2"),
        (2, "pp=2 pp_schedule=zb"),
        (2, "pp=2 pp_schedule=zbv"),
        (2, "pp=2 pp_schedule=dualpipev"),
        (4, "pp=4 pp_schedule=1f1b"),
        (4, "pp=2 pp_schedule=zbv tp=2"),
        (4, "dp_shard=2 dp_replicate=2 zero=2"),
        (8, "pp=2 pp_schedule=zb tp=2 dp_shard=2"),
    ],
)
def test_ranks_that_nccl_connects_equal_one_process(out_dir, one_process, ranks, layout):
    """All on one GPU: slow, but with the ordering of NCCL, which hangs where pairs of ranks do not agree on it."""
    words = [f"parallel.{word}" for word in layout.split()]
    name = layout.replace(" ", "-").replace("=", "-")
    assert train(out_dir, name, *EVALUATED, *words, ranks=ranks) == 0
    losses, validation = one_process
    np.testing.assert_allclose(numbers(out_dir, name), losses, rtol=1e-9)
    np.testing.assert_allclose(validation_losses(out_dir, name), validation, rtol=1e-9)


def test_a_profile_holds_kernels_and_the_memory(out_dir):
    assert train(out_dir, "profiled", "train.steps=4", "train.profile=2-3") == 0
    folder = out_dir / "profiled" / "logs" / "profile"
    trace = json.loads(gzip.decompress((folder / "steps_2-3.trace.json.gz").read_bytes()))
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert "CUDA" in (folder / "steps_2-3.operators.txt").read_text()
    assert (folder / "steps_2-3.memory.html").stat().st_size > 10_000
