"""`kilotron generate`: a trained model continues a prompt."""

import argparse
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoint.manifest import Manifest
    from data.tokenizer import Tokenizer
    from models.gpt import GPTModel
    from settings.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron generate`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, such as outputs/pretrain")
    parser.add_argument("--prompt", required=True, help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the likeliest that reach P together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--step", default="auto", help="checkpoint to take (default: the newest valid one)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the prompt and its continuation. Raises ConfigError, StorageError or TokenizerError."""
    from data.tokenizer import load_tokenizer
    from models.generation import Sampling, generate
    from monitoring.run_directory import RunDirectory
    from runtime.errors import ConfigError

    _check(arguments)
    config, model, origin, state = load_model(arguments.run_dir, arguments.step)
    digest = state.get("tokenizer_sha256")
    tokenizer = load_tokenizer(RunDirectory(arguments.run_dir).tokenizer(config.data, config.out_dir, digest))
    _warn_of_a_cut_file(tokenizer, config, state)
    prompt = tokenizer.encode(arguments.prompt) or [tokenizer.end_of_document]
    room = config.model.max_position_embeddings - len(prompt)
    if room < 1:
        raise ConfigError(
            f"--prompt has {len(prompt)} tokens, the model {config.model.max_position_embeddings} positions: shorten it"
        )
    new_tokens = min(arguments.max_new_tokens, room)
    if new_tokens < arguments.max_new_tokens:
        print(f"the model's positions leave room for {new_tokens} new tokens", file=sys.stderr)
    if len(prompt) + new_tokens > config.seq_length:
        print(
            f"the model was trained on {config.seq_length} tokens at a time; what follows those may be poor",
            file=sys.stderr,
        )
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    tokens = list(generate(model, prompt, new_tokens, sampling, tokenizer.end_of_document))
    print(f"--- {origin}, {len(tokens)} new tokens ---", file=sys.stderr, flush=True)
    # Some tokenizers write a space before a word only where another precedes it.
    print(arguments.prompt + tokenizer.decode([*prompt, *tokens]).removeprefix(tokenizer.decode(prompt)))
    return 0


def load_model(run_dir: Path, step: str) -> "tuple[RunConfig, GPTModel, Path, dict[str, Any]]":
    """The configuration, the whole model on this machine's device, the checkpoint they are from, and its state.

    Raises ConfigError where there is no run, StorageError where its checkpoints are damaged.
    """
    import torch

    from checkpoint.load import load_checkpoint
    from models.gpt import build_meta_model
    from parallel.initialization import allocate
    from parallel.process_group import process_group
    from settings.stored import config_of
    from tools.reading import read_run

    # An empty environment: whatever launcher started this, it stays alone.
    with process_group(timedelta(minutes=1), {}) as process:

        def load(path: Path, manifest: "Manifest") -> "tuple[RunConfig, GPTModel, Path, dict[str, Any]]":
            config = config_of(path, manifest)
            model = build_meta_model(config.model, torch.float32)
            allocate(model, process.device)
            load_checkpoint(path, manifest, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
            return config, model.eval(), path, manifest.state

        return read_run(run_dir, step, load)


def _warn_of_a_cut_file(tokenizer: "Tokenizer", config: "RunConfig", state: dict[str, Any]) -> None:
    """Checkpoints of older versions do not know their tokenizer's file, and a vocabulary may be larger on purpose."""
    from data.vocabulary import is_tokenizer_file

    tokens, rows = tokenizer.vocab_size, config.model.vocabulary
    known = not is_tokenizer_file(tokenizer.name) or bool({"tokenizer_sha256", "hugging_face"} & state.keys())
    if tokens < rows and not known:
        print(
            f"{tokenizer.name} has {tokens} tokens, the model {rows}: unless the model was given more on purpose, the "
            f"file was cut or replaced",
            file=sys.stderr,
        )


def _check(arguments: argparse.Namespace) -> None:
    from runtime.errors import ConfigError

    for name, legal, limits in (
        ("temperature", arguments.temperature == 0 or 1e-6 <= arguments.temperature < math.inf, "0, or 1e-06 or more"),
        ("max-new-tokens", arguments.max_new_tokens > 0, "1 or more"),
        ("top-k", arguments.top_k >= 0, "0 or more"),
        ("top-p", 0 < arguments.top_p <= 1, "above 0, at most 1"),
        ("seed", -(2**63) <= arguments.seed < 2**64, "from -2^63 to 2^64 - 1"),
        ("step", arguments.step == "auto" or arguments.step.isdecimal(), "auto or the number of a step"),
    ):
        if not legal:
            raise ConfigError(f"--{name}={getattr(arguments, name.replace('-', '_'))} must be {limits}")
