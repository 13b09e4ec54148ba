"""Times training steps on one GPU, beside Hugging Face transformers where it is installed.

    python -m benchmarks.gpu [--steps 10] [--parts shapes wrapping loss]

shapes: GPT-2 small with the batch that fills the memory, a Llama of 1B parameters, and as many layers of Llama 3 8B as
fit, in bf16, eager and compiled. wrapping: weights that FSDP casts, in a NCCL group of one rank, beside weights that
are bfloat16 themselves. loss: the memory of the fused loss beside that of a plain one. Each figure comes from a process
of its own. MFU is of the device's dense bfloat16 peak.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.steps import kilotron_step, transformers_step
from core.compilation import missing_compiler
from core.config import ModelConfig
from core.loss import LinearCrossEntropy
from parallel.process_group import process_group
from training.compose import compose

Result = TypeVar("Result")
PRECISION = "bf16"
WARM_UP = 3
"""Steps that compile and allocate, and are not timed."""


@dataclass(frozen=True)
class Figures:
    """What a step takes."""

    seconds: float
    memory: int
    """Most bytes that tensors held."""
    backend: str
    """Of the process group."""


@dataclass(frozen=True)
class Shape:
    """A model and its batches, the largest first: the first that fits is timed."""

    name: str
    seq_length: int
    candidates: tuple[tuple[ModelConfig, int], ...]
    """(model, rows) each."""


def shapes() -> list[Shape]:
    """What is timed."""
    gpt2 = replace(compose(["model=gpt2_small"]).model, vocab_size=50_304)
    llama = replace(compose(["model=llama3_8b"]).model, vocab_size=128_256)
    one_billion = replace(
        llama,
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        tie_embeddings=True,
    )
    return [
        Shape("gpt2_small", 1024, tuple((gpt2, rows) for rows in (128, 96, 64, 48, 32, 24, 16, 8, 4))),
        Shape("llama_1b", 2048, tuple((one_billion, rows) for rows in (16, 12, 8, 6, 4, 2, 1))),
        Shape("llama3_8b stack", 4096, tuple((replace(llama, num_layers=layers), 1) for layers in range(20, 0, -1))),
    ]


def measure(
    peer: str, config: ModelConfig, rows: int, seq_length: int, compiled: bool, wrapped: bool, steps: int
) -> Figures | None:
    """A peer's figures; None where the memory does not suffice."""
    with process_group(timedelta(minutes=10)) as process:
        device = process.device
        try:
            if peer == "kilotron":
                step = kilotron_step(config, rows, seq_length, PRECISION, device, compiled=compiled, wrapped=wrapped)
            else:
                step = transformers_step(config, rows, seq_length, PRECISION, device, compiled=compiled)
            for _ in range(WARM_UP):
                step()()
            begin = time.perf_counter()
            results = [step() for _ in range(steps)]
            losses = [finish() for finish in results]
            seconds = (time.perf_counter() - begin) / steps
        except torch.OutOfMemoryError:
            return None
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(f"{peer}: losses {losses}")
        backend = dist.get_backend_config()
        return Figures(seconds, torch.cuda.max_memory_allocated(device), str(backend))


def loss_memory(fused: bool, tokens: int, hidden_size: int, vocabulary: int) -> int | None:
    """Bytes that the loss and its gradients take beyond their inputs; None where the memory does not suffice."""
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    try:
        if fused:
            loss = LinearCrossEntropy()(hidden, weight, labels)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
        loss.backward()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def apart(function: Callable[..., Result], *arguments: Any) -> Result | None:
    """What a function returns in a process of its own; None where that dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def first_that_fits(
    peer: str, shape: Shape, compiled: bool, steps: int, candidates: Iterable[tuple[ModelConfig, int]]
) -> tuple[ModelConfig, int, Figures] | None:
    """The first candidate that fits, and its figures."""
    for config, rows in candidates:
        figures = apart(measure, peer, config, rows, shape.seq_length, compiled, True, steps)
        if figures is not None:
            return config, rows, figures
    return None


def show_shapes(device_name: str, modes: list[bool], peers: list[str], steps: int) -> None:
    """The first table; transformers gets the very model and batch that Kilotron had, or the next that fits it."""
    from core.flops import flops_per_token
    from training.hardware import peak_flops

    peak = peak_flops(device_name, PRECISION)
    print(
        f"{'shape':16} {'peer':12} {'mode':8} {'layers':>6} {'batch':>9} {'tokens/s':>9} {'MFU':>6} {'GB':>6}",
        flush=True,
    )
    for shape in shapes():
        for compiled in modes:
            candidates: tuple[tuple[ModelConfig, int], ...] = shape.candidates
            for peer in peers:
                mode = "compiled" if compiled else "eager"
                found = first_that_fits(peer, shape, compiled, steps, candidates)
                if found is None:
                    print(f"{shape.name:16} {peer:12} {mode:8} does not fit", flush=True)
                    continue
                config, rows, figures = found
                candidates = candidates[candidates.index((config, rows)) :]
                rate = rows * shape.seq_length / figures.seconds
                mfu = "n/a" if peak is None else f"{rate * flops_per_token(config, shape.seq_length) / peak:.1%}"
                print(
                    f"{shape.name:16} {peer:12} {mode:8} {config.num_layers:6} {f'{rows}x{shape.seq_length}':>9} "
                    f"{rate:9,.0f} {mfu:>6} {figures.memory / 1e9:6.1f}",
                    flush=True,
                )


def show_wrapping(modes: list[bool], steps: int) -> None:
    """What FSDP's cast costs on one GPU. Unwrapped, the optimizer has half the bytes to move as well."""
    shape = shapes()[0]
    for compiled in modes:
        found = first_that_fits("kilotron", shape, compiled, steps, shape.candidates)
        if found is None:
            print("wrapping: nothing fits")
            return
        config, rows, wrapped = found
        plain = apart(measure, "kilotron", config, rows, shape.seq_length, compiled, False, steps)
        if plain is not None:
            print(
                f"{shape.name} {'compiled' if compiled else 'eager'}, batch {rows}: FSDP cast from float32 on "
                f"{wrapped.backend} {wrapped.seconds:.4f} s, bfloat16 weights unwrapped {plain.seconds:.4f} s: "
                f"{wrapped.seconds / plain.seconds - 1:+.1%}",
                flush=True,
            )


def show_loss() -> None:
    """What the loss needs beside hidden states and weight."""
    for tokens, hidden_size, vocabulary in ((32_768, 768, 50_304), (8_192, 4_096, 128_256)):
        sizes = [apart(loss_memory, fused, tokens, hidden_size, vocabulary) for fused in (True, False)]
        fused, plain = ("does not fit" if size is None else f"{size / 1e9:.2f} GB" for size in sizes)
        print(f"loss of {tokens:,} tokens, {hidden_size} wide, vocabulary {vocabulary:,}: fused {fused}, plain {plain}")


def main() -> int:
    """Runs what is asked for; returns 0, or 1 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a figure")
    parts = ("shapes", "wrapping", "loss")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured", file=sys.stderr)
        return 1
    device_name = torch.cuda.get_device_name()
    print(f"{device_name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {PRECISION}, {arguments.steps} steps")
    missing, modes, peers = missing_compiler("cuda"), [False, True], ["kilotron", "transformers"]
    if missing is not None:
        print(f"nothing is compiled: torch.compile needs the {missing}")
        modes = [False]
    if find_spec("transformers") is None:
        print("transformers is not installed: Kilotron stands alone")
        peers = ["kilotron"]
    if "shapes" in arguments.parts:
        show_shapes(device_name, modes, peers, arguments.steps)
    if "wrapping" in arguments.parts:
        show_wrapping(modes, arguments.steps)
    if "loss" in arguments.parts:
        show_loss()
    return 0


if __name__ == "__main__":
    sys.exit(main())
