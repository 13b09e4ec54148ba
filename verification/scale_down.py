"""A layout and model of the same kind, small enough to be compared with one process on a laptop."""

import itertools
import math
from dataclasses import replace

from core.config import ModelConfig
from data.config import DataConfig
from parallel.config import ParallelConfig
from parallel.stages import supports_micro_batches
from settings.config import CheckpointConfig, RunConfig

RANKS = 8
LAYERS = 2
HEAD_DIM = 4
SEQUENCE = 16
VOCABULARY = 67
"""Prime, so that no number of ranks divides it."""
ADAM_EPS = 1e-8
"""Below it, Adam would blow gradients that are zero but for rounding, of key biases for instance, up to whole steps."""


def without_data(config: RunConfig) -> RunConfig:
    """The configuration with nothing in it that this machine need not have: random tokens take the place of data."""
    return replace(
        config,
        data=DataConfig(corpus="sample", seq_length=config.data.seq_length),
        model=replace(config.model, vocab_size=None),
        checkpoint=CheckpointConfig(),
    )


def scale_down(config: RunConfig) -> RunConfig:
    """A resolved configuration of the same structure that a laptop runs in seconds, in float64.

    Heads, key/value heads and what they are shared by stay; the ratio of the MLP's width to the hidden size stays as
    near as ranks divide it. Worlds of more than RANKS ranks lose replicas, then shards; tensor parallelism and stages
    stay, with layers divided anew: of parallel.layers_per_stage, stages of more layers than the smallest one have two.
    The batch stays at its first size, and optimizer.groups go, as parameters that they name may.
    """
    layout = smaller_layout(config.parallel)
    micro_batch_size, accumulation = min(2, config.micro_batch_size), min(2, config.accumulation_steps)
    if layout.pp > 1:
        accumulation = next(
            count for count in itertools.count(1) if supports_micro_batches(layout.pp_schedule, layout.pp, count)
        )
    seq_length = min(config.seq_length, -(-SEQUENCE // layout.tp) * layout.tp)
    return replace(
        config,
        world_size=math.prod((layout.pp, layout.tp, layout.dp_replicate, layout.dp_shard)),
        model=smaller_model(config.model, layout, seq_length),
        data=replace(config.data, seq_length=seq_length),
        parallel=layout,
        optimizer=replace(config.optimizer, eps=max(ADAM_EPS, config.optimizer.eps), groups=[]),
        train=replace(
            config.train,
            precision="fp64",
            compile=False,
            batch_schedule=None,
            micro_batch_size=micro_batch_size,
            global_batch_size=layout.dp * micro_batch_size * accumulation,
        ),
    )


def smaller_layout(layout: ParallelConfig) -> ParallelConfig:
    """The layout on at most RANKS ranks, where tensor and pipeline parallelism alone do not take more.

    Fewer replicas, then fewer shards; as long as it can be, a dimension stays one.
    """
    replicate, shard, fixed = layout.dp_replicate, layout.dp_shard, layout.pp * layout.tp
    for least in (2, 1):
        replicate = min(replicate, max(least, RANKS // (fixed * shard)))
        shard = min(shard, max(least, RANKS // (fixed * replicate)))
    given = layout.layers_per_stage if layout.pp > 1 else None
    layers = given and [1 + (number > min(given)) for number in given]
    return replace(layout, dp_replicate=replicate, dp_shard=shard, layers_per_stage=layers)


def smaller_model(model: ModelConfig, layout: ParallelConfig, seq_length: int) -> ModelConfig:
    """The model with few narrow layers, and weights drawn wider so that activations keep their size."""
    head_dim = min(HEAD_DIM, model.head_size)
    hidden_size = model.num_attention_heads * head_dim
    if model.head_dim is not None:
        hidden_size = max(1, round(model.hidden_size * head_dim / model.head_size))
    ffn_size = max(1, round(model.ffn_size / model.hidden_size * hidden_size / layout.tp)) * layout.tp
    return replace(
        model,
        num_layers=sum(layout.layers_per_stage or [min(max(LAYERS, layout.stages), model.num_layers)]),
        hidden_size=min(hidden_size, model.hidden_size),
        head_dim=None if model.head_dim is None else head_dim,
        ffn_hidden_size=min(ffn_size, model.ffn_size),
        vocab_size=VOCABULARY,
        sliding_window=model.sliding_window and min(model.sliding_window, max(1, seq_length // 2)),
        max_position_embeddings=min(model.max_position_embeddings, seq_length + 3),
        init_std=float(f"{model.init_std * math.sqrt(model.hidden_size / hidden_size):.3g}"),
    )
