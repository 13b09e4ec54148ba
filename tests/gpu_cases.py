"""What the cases of test_gpu.py run: whole runs, parts of a step on connected ranks, and measures of memory."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import pretrain_gpt
from checkpoint.host_copy import HostCopy
from core.attention import SelfAttention
from core.config import ModelConfig
from core.rotary import rotary_table
from data.batches import MicroBatch
from data.preparation import prepare_documents
from models.gpt import build_meta_model
from monitoring.metrics import read_metrics
from parallel.gradients import local_gradients
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from parallel.process_group import ProcessInfo, process_group
from parallel.tensor import TensorParallel, local
from runtime.fault_injection import VARIABLE, Faults
from settings.compose import compose
from settings.config import RunConfig
from settings.resolve import resolve
from tests.core.test_block import Watch
from training.build import assemble
from training.optimizer import build_optimizer
from training.precision import PRECISIONS, build_loss_scale
from training.train_step import TrainStep, batch_to_device
from verification.local_ranks import run_ranks

ROOT = Path(pretrain_gpt.__file__).parent
SMALL = ["model=tiny", "model.num_layers=3", "data=files", "data.split=[90,5,5]", "data.seq_length=48",
         "train.global_batch_size=8", "train.micro_batch_size=4", "train.init_device=cpu", "train.compile=false",
         "log.sample_ids=true", "optimizer.lr=1e-2"]  # fmt: skip
SECONDS = 300
"""After which a rank that does not answer has failed."""
FRESH = """
import os, sys, pretrain_gpt
code = pretrain_gpt.main(sys.argv[1:], os.environ)
import torch._inductor.config as compiler
print(compiler.deterministic, flush=True)
os._exit(code)
"""


def place_rank(rank: int, device: str) -> None:
    """Let this process see the one GPU, or none, and take it for a host of its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0" if device == "cuda" else ""
    # NCCL refuses two ranks on one GPU unless they seem to be of two hosts.
    os.environ |= {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo"}


def run_rank(rank: int, world_size: int, words: list[str], device: str) -> tuple[int, bool]:
    """One rank of a run; its exit code, and whether the compiler is deterministic after it."""
    place_rank(rank, device)
    code = pretrain_gpt.main(words, os.environ)
    return code, torch._inductor.config.deterministic


def stopped_rank(rank: int, world_size: int, words: list[str], device: str, checkpoints: Path) -> tuple[int, bool]:
    """A run that gets SIGTERM while its first checkpoint is written, which takes seconds; its exit code, and whether
    the checkpoint was unfinished then."""
    os.environ[VARIABLE] = "step=2,phase=checkpoint.write,action=sleep,seconds=3"
    unfinished = []

    def stop() -> None:
        while not any(checkpoints.glob("*.tmp-*")):
            time.sleep(0.001)
        unfinished.append(not (checkpoints / "step_00000002").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    code, _ = run_rank(rank, world_size, words, device)
    return code, unfinished == [True]


@dataclass(frozen=True)
class Runs:
    """Runs of pretrain_gpt.py on one kind of device, on the text of the repository's pages."""

    folder: Path
    device: str

    def prepare(self) -> None:
        """Make the data."""
        pages = [page.read_text(encoding="utf-8") for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]
        paragraphs = [paragraph for page in pages for paragraph in page.split("\n\n")]
        prepare_documents(paragraphs, self.folder / "pages", "bytes", seed=0)

    def words(self, name: str, *words: str) -> list[str]:
        """The command line of a run."""
        return [*SMALL, f"data.path={self.folder / 'pages'}", f"out_dir={self.folder}", f"name={name}", *words]

    def train(self, name: str, *words: str, device: str | None = None, ranks: int = 1) -> int:
        """Start a run, or go on with it; its exit code."""
        return self._ranks(run_rank, ranks, self.words(name, *words), device or self.device)[0]

    def train_deterministically(self, name: str, *words: str, fresh: bool) -> tuple[int, bool]:
        """The exit code of a deterministic run, and whether the compiler took note; in a `fresh` process it had not
        been imported before, as in every process of a user."""
        words = self.words(name, "train.deterministic=true", *words)
        if not fresh:
            return self._ranks(run_rank, 1, words, self.device)
        visible = {"CUDA_VISIBLE_DEVICES": "0" if self.device == "cuda" else ""}
        command = [sys.executable, "-c", FRESH, *words]
        run = subprocess.run(
            command, cwd=ROOT, env=os.environ | visible, stdout=subprocess.PIPE, text=True, timeout=SECONDS
        )
        return run.returncode, run.stdout.splitlines()[-1:] == ["True"]

    def train_until_stopped(self, name: str, *words: str) -> tuple[int, bool]:
        """What `stopped_rank` says."""
        checkpoints = self.folder / name / "checkpoints"
        return self._ranks(stopped_rank, 1, self.words(name, *words), self.device, checkpoints)

    @staticmethod
    def _ranks(function, ranks, *arguments):
        return run_ranks(ranks, function, *arguments, initialize=False, timeout=SECONDS)[0]

    def numbers(self, name: str) -> list[list[float]]:
        """Loss and gradient norm of each step."""
        return [[line["loss"], line["grad_norm"]] for line in self._lines(name) if "loss" in line]

    def validation_losses(self, name: str) -> list[float]:
        """The loss of each evaluation."""
        return [line["eval_loss"] for line in self._lines(name) if "eval_loss" in line]

    def _lines(self, name: str) -> list[dict]:
        return read_metrics(self.folder / name / "metrics.jsonl")

    def status(self, name: str) -> dict:
        """status.json."""
        return json.loads((self.folder / name / "status.json").read_text())


@contextmanager
def joined(rank: int, device: str, words: Sequence[str]) -> Iterator[tuple[ProcessInfo, RunConfig]]:
    """This process as a rank of a group, and the configuration of the words."""
    place_rank(rank, device)
    with process_group(timedelta(seconds=SECONDS)) as process:
        yield process, resolve(compose([*words, "data.tokenizer=bytes", "train.compile=false"]), os.environ)


def random_batches(config: RunConfig) -> list[MicroBatch]:
    """The micro-batches of a global batch of random tokens, a third of which count in no loss."""
    generator = np.random.default_rng(config.seed)
    rows, size = config.train.global_batch_size, config.micro_batch_size
    tokens = generator.integers(0, config.model.vocabulary, (rows, config.seq_length + 1))
    labels = np.where(generator.random((rows, config.seq_length)) < 1 / 3, -100, tokens[:, 1:])
    parts = [slice(start, start + size) for start in range(0, rows, size)]
    return [MicroBatch(tokens[part, :-1].copy(), labels[part], [], np.arange(rows)[part]) for part in parts]


def whole_model(config: RunConfig, device: torch.device) -> torch.nn.Module:
    """The model as one process has it, in the type that layers compute in."""
    precision = PRECISIONS[config.train.precision]
    model = build_meta_model(config.model, precision.master, seed=config.seed)
    materialize(model, config.seed, device)
    return model.to(precision.compute)


def errors_of_replicas(rank: int, world_size: int, words: list[str], device: str, repetitions: int) -> list[float]:
    """How far the gradients that replicas sum are from those of one process: the largest difference of each repetition,
    on the scale of the parameter's largest gradient."""
    with joined(rank, device, words) as (process, config):
        batches = random_batches(config)
        alone = whole_model(config, process.device)
        tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
        for inputs, others in (batch_to_device(batch, process.device) for batch in batches):
            (alone(inputs, **others) / tokens).backward()
        expected = [parameter.grad for parameter in alone.parameters()]
        step, mesh = build_step(config, process)
        errors = []
        for _ in range(repetitions):
            step.accumulate(batches[mesh.dp_rank :: mesh.dp_size])
            found = local_gradients(step.data_parallel.model.parameters())
            errors.append(max(relative_error(*pair) for pair in zip(found, expected, strict=True)))
            step.optimizer.zero_grad(set_to_none=True)
        return errors


def build_step(config: RunConfig, process: ProcessInfo, faults: Faults | None = None) -> tuple[TrainStep, ParallelMesh]:
    """What takes the steps of a run, with initial weights."""
    mesh = ParallelMesh(config.parallel, process.device.type)
    data_parallel = assemble(config, mesh, process.device)
    materialize(data_parallel.model, config.seed, process.device)
    optimizer = build_optimizer(data_parallel.model, config.optimizer)
    loss_scale = build_loss_scale(config.train, process.device)
    clip = config.optimizer.clip_grad
    return TrainStep(data_parallel, optimizer, mesh, clip, process.device, loss_scale, faults), mesh


def moves_around_a_nan(rank: int, world_size: int, words: list[str], device: str) -> list[bool]:
    """Whether weights or the optimizer's state move in each of three steps, in the second of which the last rank's
    gradients are NaN. All that moves stays finite."""
    with joined(rank, device, words) as (process, config):
        fault = f"rank={world_size - 1},step=2,phase=grad_sync,action=nan"
        step, mesh = build_step(config, process, Faults(rank, {VARIABLE: fault}))
        own = random_batches(config)[mesh.dp_rank :: mesh.dp_size]
        moves, before = [], _state_of(step)
        for number in (1, 2, 3):
            step(number, own, learning_rate=1e-2).numbers.read()
            after = _state_of(step)
            assert all(value.isfinite().all() for value in after)
            moves.append(not all(map(torch.equal, before, after)))
            before = after
        return moves


def _state_of(step: TrainStep) -> list[torch.Tensor]:
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    return [local(value.detach()).clone() for value in (*step.parameters, *states)]


def losses_of_a_pipeline(rank: int, world_size: int, words: list[str], device: str) -> list[list[float]] | None:
    """The losses of micro-batches: of an evaluation, of a step, of another evaluation, and of the whole model; on the
    rank that has the loss."""
    with joined(rank, device, words) as (process, config):
        step, mesh = build_step(config, process)
        batches = [batch_to_device(batch, process.device) for batch in random_batches(config)]
        pipeline = step.data_parallel
        found = [
            pipeline.evaluate(batches),
            pipeline.forward_backward(batches, lambda loss: loss / config.seq_length),
            pipeline.evaluate(batches),
        ]
        if not mesh.has_loss:
            return None
        model = whole_model(config, process.device)
        with torch.no_grad():
            found.append(torch.stack([model(inputs, **others).double() for inputs, others in batches]))
        return [losses.tolist() for losses in found]


def copies_are_whole_and_locked(rank: int, world_size: int, device: str) -> bool:
    """Whether the copies of two checkpoints hold what the device held, in memory that it copies into by itself. On a
    rank, with which the memory goes."""
    place_rank(rank, device)
    host = HostCopy()
    right = []
    for _ in range(2):
        tensors = {str(size): torch.randn(size, 1000, device=device) for size in (1, 17, 3000)}
        copies = host.take(tensors)
        right += [copy.is_pinned() and copy.equal(tensors[name].cpu()) for name, copy in copies.items()]
    return all(right)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Their largest difference on the scale of the largest expected value; infinite where one is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return error if np.isfinite(error) else float("inf")


def build_attention(head_dim: int, *, window: int | None, device: str) -> tuple[SelfAttention, SelfAttention]:
    """Attention of 8 heads in 2 groups in bfloat16 on the device, and with the same weights in float64 on the CPU."""
    config = ModelConfig(
        hidden_size=256, num_attention_heads=8, num_query_groups=2, head_dim=head_dim, bias=False, init_std=0.06,
        position_embedding="rope", sliding_window=window,
    )  # fmt: skip
    pair = []
    for dtype, place in ((torch.bfloat16, device), (torch.float64, "cpu")):
        with torch.device("meta"):
            pair.append(SelfAttention(config, TensorParallel()).to(dtype))
        materialize(pair[-1], 0, torch.device(place), torch.device("cpu"))
    narrow, exact = pair
    with torch.no_grad():
        for weight, wide in zip(narrow.parameters(), exact.parameters(), strict=True):
            wide.copy_(weight)
    return narrow, exact


def attend(attention: torch.nn.Module, x: torch.Tensor, *, rotary: bool = True) -> list[torch.Tensor]:
    """What attention makes of `[batch, seq, hidden]`, and the gradients of the input and of every weight."""
    weight = next(attention.parameters())
    x = x.to(weight.device, weight.dtype, copy=True).requires_grad_()
    head_dim = attention.head_dim
    config = ModelConfig(hidden_size=head_dim, num_attention_heads=1, position_embedding="rope")
    table = rotary_table(torch.arange(x.shape[1], device=x.device), config, x.dtype) if rotary else None
    output = attention(x, table)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    output.backward(direction.to(output))
    return [output.detach(), x.grad, *(parameter.grad for parameter in attention.parameters())]


class Peak(Watch):
    """The most bytes that what was made under it has held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = super().__torch_dispatch__(function, types, arguments, keywords)
        self.bytes = max(self.bytes, self.held())
        return result


def peak_bytes(device: str, function, *arguments) -> tuple[int, object]:
    """The most memory that a call takes beyond what was there, and its result."""
    if device == "cpu":
        with Peak() as peak:
            result = function(*arguments)
        return peak.bytes, result
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*arguments)
    return torch.cuda.max_memory_allocated() - before, result
