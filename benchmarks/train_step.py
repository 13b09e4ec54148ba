"""Times a training step of Kilotron beside Hugging Face transformers: same shapes, turn by turn, one process each.

    python -m benchmarks.train_step [--steps 7] [--threads 2]

Prints, a case a line, the median of the pairwise ratios of times (transformers / Kilotron, above 1: Kilotron is faster)
and the ratio of the processes' peak memory (Kilotron / transformers, below 1: Kilotron needs less).
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from core.config import ModelConfig
from data.batches import MicroBatch
from models.gpt import build_meta_model
from parallel.config import ParallelConfig
from parallel.data_parallel import shard_data_parallel
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from parallel.process_group import process_group
from training.config import OptimizerConfig
from training.optimizer import build_optimizer
from training.precision import choose_precision
from training.train_step import TrainStep

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


def batches() -> Callable[[], MicroBatch]:
    """A source of the same random batches in every process."""
    generator = np.random.default_rng(0)

    def next_batch() -> MicroBatch:
        tokens = generator.integers(0, VOCABULARY, (BATCH, SEQ + 1))
        return MicroBatch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), [], np.arange(BATCH))

    return next_batch


def kilotron_step(family: str, precision_name: str) -> Callable[[], float]:
    """A training step as the trainer takes it; returns its loss."""
    precision = choose_precision(precision_name)
    device = torch.device("cpu")
    mesh = ParallelMesh(ParallelConfig(dp_shard=1), "cpu")
    model = build_meta_model(FAMILIES[family], precision.master)
    data_parallel = shard_data_parallel(model, model.sharding_units(), mesh, 3, precision.compute)
    materialize(model, 0, device)
    config = OptimizerConfig()
    step = TrainStep(data_parallel, build_optimizer(model, config), mesh, config.clip_grad, device)
    next_batch = batches()
    return lambda: step(1, [next_batch()], config.lr).numbers.read()[0]


def transformers_step(family: str, precision_name: str) -> Callable[[], float]:
    """The same with transformers: SDPA attention, fused AdamW, clipping; in bf16 its weights are bfloat16."""
    import transformers

    config = FAMILIES[family]
    model: Any
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=SEQ,
                n_embd=config.hidden_size,
                n_layer=config.num_layers,
                n_head=config.num_attention_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=SEQ,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.query_groups,
                tie_word_embeddings=False,
            )
        )
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision_name]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OptimizerConfig().lr, fused=True)
    next_batch = batches()

    def step() -> float:
        batch = next_batch()
        # transformers shifts labels itself; giving it shifted ones is only a matter of which tokens are compared.
        output = model(
            input_ids=torch.from_numpy(batch.input_ids), labels=torch.from_numpy(batch.labels), use_cache=False
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(output.loss.detach())

    return step


BUILDERS = {"kilotron": kilotron_step, "transformers": transformers_step}


def worker(connection: Connection, peer: str, family: str, precision: str, threads: int) -> None:
    """Take a step whenever told to; answer its seconds, and at the end the process's peak memory in bytes."""
    torch.set_num_threads(threads)
    with process_group(timedelta(minutes=1)):
        step = BUILDERS[peer](family, precision)
        while connection.recv() == "step":
            begin = time.perf_counter()
            step()
            connection.send(time.perf_counter() - begin)
        connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def compare(family: str, precision: str, steps: int, threads: int) -> str:
    """One case, as a row of the table."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    for peer in BUILDERS:
        ends[peer], far_end = context.Pipe()
        context.Process(target=worker, args=(far_end, peer, family, precision, threads), daemon=True).start()
    seconds: dict[str, list[float]] = {peer: [] for peer in BUILDERS}
    for turn in range(steps + 2):
        for peer, end in ends.items():
            end.send("step")
            taken = end.recv()
            if turn >= 2:  # the first steps allocate
                seconds[peer].append(taken)
    memory = {}
    for peer, end in ends.items():
        end.send("stop")
        memory[peer] = end.recv()
    ratios = [theirs / ours for ours, theirs in zip(seconds["kilotron"], seconds["transformers"], strict=True)]
    return (
        f"{family:6} {precision:5} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        f"   {memory['kilotron'] / memory['transformers']:5.2f}"
        f"   {statistics.median(seconds['kilotron']):.3f} s, {memory['kilotron'] / 1e9:.2f} GB"
        f" | {statistics.median(seconds['transformers']):.3f} s, {memory['transformers'] / 1e9:.2f} GB"
    )


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed pairs of steps a case")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each process")
    arguments = parser.parse_args()
    print("model  dtype speed (range)          memory  kilotron | transformers", flush=True)
    for family in FAMILIES:
        for precision in ("fp32", "bf16"):
            print(compare(family, precision, arguments.steps, arguments.threads), flush=True)


if __name__ == "__main__":
    main()
