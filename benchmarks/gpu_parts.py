"""Figures of the GPU benchmark beside training steps: versions, the loss's memory, and generation."""

import platform
import statistics
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

from benchmarks.gpu_clock import ask_nvidia_smi, mark, seconds_between
from benchmarks.gpu_shapes import Shape
from benchmarks.gpu_step import Row
from core.loss import LinearCrossEntropy
from models.generation import Sampling, generate
from models.gpt import build_meta_model
from parallel.initialization import materialize


def describe_machine(command: str) -> list[Row]:
    """Device and versions."""
    row: Row = {"part": "machine", "title": "machine", "command": command, "python": platform.python_version()}
    row |= {name: _version(name) for name in ("torch", "triton", "transformers")}
    row |= {"device": platform.processor() or platform.machine(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        row["device"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
        row["cudnn"] = torch.backends.cudnn.version()
        row["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    answer = ask_nvidia_smi("driver_version", "clocks.max.sm", "power.limit")
    row |= dict(zip(("driver", "highest_clock_mhz", "power_limit_watts"), answer or (), strict=False))
    return [row]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure_loss(fused: bool, tokens: int, hidden_size: int, vocabulary: int) -> list[Row]:
    """What the loss and its gradients take beyond hidden states and weight: the second call's memory and time.

    The first compiles, and measures kernels on copies of the buffer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    cross_entropy = LinearCrossEntropy()

    def take() -> None:
        if fused:
            loss = cross_entropy(hidden, weight, labels)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
        loss.backward()
        hidden.grad = weight.grad = None

    take()
    row: Row = {"part": "loss", "title": f"{tokens:,} tokens, {hidden_size} wide, vocabulary {vocabulary:,}"}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = mark(device)
    take()
    row |= {"loss": "fused" if fused else "plain", "milliseconds": 1000 * seconds_between(begin, mark(device))}
    row["extra_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9 if device.type == "cuda" else None
    return [row]


def measure_generation(shape: Shape, prompt: int, new_tokens: int) -> list[Row]:
    """Milliseconds a new token takes with the key/value cache, twice: what a kernel prepares for a number of keys, it
    prepares in the first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(
        shape.config, max_position_embeddings=max(shape.config.max_position_embeddings, prompt + new_tokens)
    )
    found: list[Row] = []
    for dtype in (torch.bfloat16, torch.float32):
        model = build_meta_model(config, dtype)
        materialize(model, 0, device)
        model.eval()
        times = []
        for _ in range(2):
            tokens = generate(model, list(range(prompt)), new_tokens, Sampling(temperature=0))
            next(tokens)  # of the whole prompt
            begin = time.perf_counter()
            for _ in tokens:
                times.append(time.perf_counter() - begin)
                begin = time.perf_counter()
        first, second = times[: new_tokens - 1], times[new_tokens - 1 :]
        numbers = str(dtype).removeprefix("torch.")
        found.append(
            {
                "part": "generation",
                "title": f"{shape.name}, {numbers}, {new_tokens} tokens after {prompt}",
                "first_ms": 1000 * statistics.median(first),
                "second_ms": 1000 * statistics.median(second),
            }
        )
    return found
