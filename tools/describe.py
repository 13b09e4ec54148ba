"""`kilotron describe`: how large a model is, what a token costs, and what training it holds in memory."""

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from core.flops import flops_per_token
from parallel.config import ParallelConfig
from planning.layouts import without_missing_data
from planning.memory import number_bytes, optimizer_numbers
from settings.compose import compose
from settings.config import CheckpointConfig, RunConfig
from settings.resolve import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron describe`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings as pretrain_gpt.py takes them, such as model=llama3_8b; those of the layout change nothing",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")


def run(arguments: argparse.Namespace) -> int:
    """Prints the description. Raises ConfigError where the settings are wrong."""
    config, notes = without_missing_data(compose(arguments.overrides))
    alone = replace(config, world_size=1, parallel=ParallelConfig(), checkpoint=CheckpointConfig())
    resolved = resolve(alone, {})
    description = describe(resolved)
    print(json.dumps(description) if arguments.json else _table(resolved, description))
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def describe(config: RunConfig) -> dict[str, Any]:
    """What `--json` prints of a resolved configuration; bytes are those of all ranks together, without replicas.

    `embedding` are the tables of words and positions, and no untied head; `active` what a token meets; `weights` those
    that the optimizer moves, without the copies that layers compute with.
    """
    model = config.model
    total = model.parameter_count()
    weights = number_bytes(config) * total
    return {
        "parameters": {"total": total, "embedding": model.embedding_parameters, "active": total},
        "flops_per_token": flops_per_token(model, config.seq_length),
        "bytes": {
            "weights": weights,
            "gradients": weights,
            "optimizer": number_bytes(config) * optimizer_numbers(config),
        },
    }


def _table(config: RunConfig, description: dict[str, Any]) -> str:
    """The same for a person, with the shape."""
    model, parameters, held = config.model, description["parameters"], description["bytes"]
    window = f", {model.sliding_window:,} of them seen" if model.sliding_window else ""
    parts = [model.normalization, model.activation, f"{model.position_embedding} positions"]
    parts += ["biases" if model.bias else "no biases", "tied head" if model.tie_embeddings else "untied head"]
    parts += ["qk norm"] if model.qk_norm else []
    memory = ", ".join(f"{name} {size / 1e9:,.2f} GB" for name, size in held.items())
    number = "float64" if config.train.precision == "fp64" else "float32"
    rows = {
        "shape": f"{model.num_layers} layers, {model.hidden_size:,} wide, {model.num_attention_heads} heads of "
        f"{model.head_size}, {model.query_groups} key/value heads, MLP {model.ffn_size:,} wide",
        "": f"vocabulary {model.vocabulary:,}, {model.max_position_embeddings:,} positions{window}",
        "parts": ", ".join(parts),
        "parameters": f"{parameters['total']:,}: {parameters['embedding']:,} of embeddings, all active",
        "arithmetic": f"{description['flops_per_token']:,} FLOPs a token, forward and backward, "
        f"{config.seq_length:,} tokens at a time",
        "memory": f"{memory} over all ranks, {number} with {config.optimizer.name}; activations not counted",
    }
    return "\n".join(f"{name:12}{text}" for name, text in rows.items())
