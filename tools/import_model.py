"""`kilotron import`: a Hugging Face model as a run directory that holds a checkpoint of step 0."""

import argparse
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron import`."""
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="directory with config.json and safetensors files")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory to make")


def run(arguments: argparse.Namespace) -> int:
    """Writes the directory, whole or not at all. Raises ConfigError or HuggingFaceError."""
    import torch

    from checkpoint.save import save_checkpoint
    from models.families import open_directory
    from models.gpt import build_meta_model
    from models.hugging_face import copy_others
    from models.hugging_face_weights import HuggingFaceWeights
    from monitoring.run_directory import RunDirectory
    from parallel.process_group import process_group
    from parallel.sharding import logical_shapes
    from runtime.errors import ConfigError
    from runtime.files import publish_directory, sha256_of, temporary_directory
    from settings.checks.rules import check_relations
    from settings.checks.values import check_choices, check_ranges
    from settings.config import RunConfig

    source, output = open_directory(arguments.source), arguments.output
    config = RunConfig(name=output.name, out_dir=str(output.parent), model=source.model)
    problems = [*check_ranges(config), *check_choices(config)] or list(check_relations(config))
    problems += [f"{output} is there already; name a new directory"] if output.exists() else []
    if problems:
        raise ConfigError(*problems)
    shapes = logical_shapes(build_meta_model(config.model, torch.float32))
    weights = HuggingFaceWeights(source, shapes)
    origin = {"config": source.config, "base": weights.base, "repeats_head": weights.repeats_head}
    tokenizer = source.path / "tokenizer.json"
    state = {"consumed_samples": 0, "consumed_tokens": 0, "config": asdict(config), "data": {}, "hugging_face": origin}
    state["tokenizer_sha256"] = sha256_of(tokenizer) if tokenizer.is_file() else None
    with temporary_directory(beside=output) as folder:
        with process_group(timedelta(minutes=1), {}):
            # Views of mapped files, so that saving them holds one at a time.
            tensors = {f"model.{name}": weights[name] for name in shapes}
            checkpoint = save_checkpoint(folder, 0, tensors, state, keep=1)
        copy_others(source.path, folder)
        RunDirectory(folder).record_start(config, [])
        publish_directory(folder, output)
    print(f"wrote {output}: {source.family.model_type}, {config.model.parameter_count():,} parameters")
    if not (output / "tokenizer.json").exists():
        print(f"{source.path} has no tokenizer.json, so `kilotron generate` has no tokenizer")
    print(f"next: kilotron generate {output} --prompt ..., or checkpoint.load={output}/checkpoints/{checkpoint.name}")
    return 0
