"""Training steps that benchmarks time: Kilotron's as its trainer takes it, and Hugging Face transformers'."""

from collections.abc import Callable
from importlib.util import find_spec
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
from settings.config import OptimizerConfig
from training.optimizer import build_optimizer
from training.precision import choose_precision
from training.train_step import TrainStep

Step = Callable[[], Callable[[], float]]
"""Starts a step; what it returns waits for the step's loss."""


def batches(config: ModelConfig, rows: int, seq_length: int) -> Callable[[], MicroBatch]:
    """A source of the same random batches in every process."""
    generator = np.random.default_rng(0)

    def next_batch() -> MicroBatch:
        tokens = generator.integers(0, config.vocabulary, (rows, seq_length + 1))
        return MicroBatch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), [], np.arange(rows))

    return next_batch


def kilotron_step(
    config: ModelConfig,
    rows: int,
    seq_length: int,
    precision_name: str,
    device: torch.device,
    *,
    compiled: bool,
    wrapped: bool = True,
    accumulate: int = 1,
) -> Step:
    """A training step as the trainer takes it, in a process group of one rank; eager, its loss is eager too.

    A step takes `accumulate` micro-batches of `rows`. Without `wrapped` the weights themselves are of the type that
    layers compute in, and FSDP has nothing to cast.
    """
    precision = choose_precision(precision_name)
    mesh = ParallelMesh(ParallelConfig(dp_shard=1), device.type)
    model = build_meta_model(config, precision.master if wrapped else precision.compute)
    model.cross_entropy.may_compile = compiled
    if compiled:
        model.block.compile_layers()
    data_parallel = shard_data_parallel(model, model.sharding_units(), mesh, 3, precision.compute)
    materialize(model, 0, device)
    optimizer = OptimizerConfig()
    step = TrainStep(data_parallel, build_optimizer(model, optimizer), mesh, optimizer.clip_grad, device)
    next_batch = batches(config, rows, seq_length)

    def take() -> Callable[[], float]:
        result = step(1, [next_batch() for _ in range(accumulate)], optimizer.lr)
        return lambda: result.numbers.read()[0]

    return take


def transformers_step(
    config: ModelConfig,
    rows: int,
    seq_length: int,
    precision_name: str,
    device: torch.device,
    *,
    compiled: bool,
    accumulate: int = 1,
) -> Step:
    """The same with transformers: its best attention, fused AdamW, clipping; in bf16 its weights are bfloat16."""
    choose_precision(precision_name)
    with device:
        model = transformers_model(config)
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision_name]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OptimizerConfig().lr, fused=True)
    next_batch = batches(config, rows, seq_length)
    forward = torch.compile(model) if compiled else model

    def take() -> Callable[[], float]:
        total = torch.zeros((), device=device)
        for _ in range(accumulate):
            batch = next_batch()
            # transformers shifts labels itself; giving it shifted ones is only a matter of which tokens are compared.
            ids, labels = (torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.labels))
            loss = forward(input_ids=ids, labels=labels, use_cache=False).loss / accumulate
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return lambda: float(total)

    return take


def transformers_model(config: ModelConfig) -> Any:
    """GPT2LMHeadModel or LlamaForCausalLM of the same shape. Raises ImportError where transformers is not installed."""
    import transformers

    flash = torch.cuda.is_available() and find_spec("flash_attn") is not None
    attention: dict[str, Any] = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    if config.position_embedding == "learned":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocabulary,
                n_positions=config.max_position_embeddings,
                n_embd=config.hidden_size,
                n_layer=config.num_layers,
                n_head=config.num_attention_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **attention,
            )
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocabulary,
            max_position_embeddings=config.max_position_embeddings,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.query_groups,
            tie_word_embeddings=config.tie_embeddings,
            **attention,
        )
    )
