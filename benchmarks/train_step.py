"""Times a training step of Kilotron beside Hugging Face transformers: same shapes, turn by turn, one process each.

    python -m benchmarks.train_step [--steps 7] [--threads 2]

Prints, a case a line, the median of the pairwise ratios of times (transformers / Kilotron, above 1: Kilotron is faster)
and the ratio of the processes' peak memory (Kilotron / transformers, below 1: Kilotron needs less). Eager is beside
eager, with nothing compiled, and compiled beside compiled: Kilotron's layers and loss, transformers' whole model.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.steps import kilotron_step, transformers_step
from core.compilation import missing_compiler
from core.config import ModelConfig
from parallel.process_group import process_group

BATCH, SEQ, VOCABULARY = 8, 256, 50_304
SHAPE: dict[str, Any] = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": SEQ}
FAMILIES = {
    "gpt2": ModelConfig(**SHAPE, vocab_size=VOCABULARY, activation="gelu_tanh"),
    "llama": ModelConfig(
        **SHAPE,
        vocab_size=VOCABULARY,
        num_query_groups=2,
        ffn_hidden_size=704,
        normalization="rmsnorm",
        activation="swiglu",
        position_embedding="rope",
        bias=False,
        tie_embeddings=False,
    ),
}
MODES = ("eager", "compiled")
BUILDERS = {"kilotron": kilotron_step, "transformers": transformers_step}
WARM_UP = 2
"""Steps that compile and allocate, and are not timed."""


@dataclass(frozen=True)
class Row:
    """What a case found, by peer."""

    title: str
    seconds: dict[str, list[float]]
    memory: dict[str, int]
    """Peak of the process in bytes."""

    def median(self, peer: str) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds[peer])

    def __str__(self) -> str:
        ratios = [
            theirs / ours for ours, theirs in zip(self.seconds["kilotron"], self.seconds["transformers"], strict=True)
        ]
        sides = [f"{self.median(peer):.3f} s, {self.memory[peer] / 1e9:.2f} GB" for peer in BUILDERS]
        return (
            f"{self.title:20} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"   {self.memory['kilotron'] / self.memory['transformers']:5.2f}   {' | '.join(sides)}"
        )


def worker(connection: Connection, peer: str, family: str, precision: str, mode: str, threads: int) -> None:
    """Take a step whenever told to; answer its seconds, and at the end the process's peak memory in bytes."""
    torch.set_num_threads(threads)
    with process_group(timedelta(minutes=1)):
        compiled = mode == "compiled"
        step = BUILDERS[peer](FAMILIES[family], BATCH, SEQ, precision, torch.device("cpu"), compiled=compiled)
        while connection.recv() == "step":
            begin = time.perf_counter()
            step()()
            connection.send(time.perf_counter() - begin)
        connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def compare(family: str, precision: str, mode: str, steps: int, threads: int) -> Row:
    """One case, turn by turn."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for peer in BUILDERS:
        ends[peer], far_end = context.Pipe()
        arguments = (far_end, peer, family, precision, mode, threads)
        context.Process(target=worker, args=arguments, daemon=True).start()
        far_end.close()
    seconds: dict[str, list[float]] = {peer: [] for peer in BUILDERS}
    for turn in range(steps + WARM_UP):
        for peer, end in ends.items():
            end.send("step")
            taken = end.recv()
            if turn >= WARM_UP:
                seconds[peer].append(taken)
    memory = {}
    for peer, end in ends.items():
        end.send("stop")
        memory[peer] = end.recv()
    return Row(f"{family} {precision} {mode}", seconds, memory)


def best(rows: list[Row], peer: str) -> str:
    """A peer's fastest case."""
    row = min(rows, key=lambda row: row.median(peer))
    return f"{row.median(peer):.3f} s ({row.title})"


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed pairs of steps a case")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each process")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="shapes to time")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    missing = missing_compiler("cpu")
    if missing is not None and "compiled" in arguments.modes:
        parser.error(f"compiled steps need the {missing}, which is not here; use --modes eager")
    print(f"{'case':20} speed (range)          memory  kilotron | transformers", flush=True)
    for family in arguments.families:
        rows = []
        for precision in arguments.precisions:
            for mode in arguments.modes:
                rows.append(compare(family, precision, mode, arguments.steps, arguments.threads))
                print(rows[-1], flush=True)
        print(f"{family}, best of any: kilotron {best(rows, 'kilotron')}, transformers {best(rows, 'transformers')}")


if __name__ == "__main__":
    main()
