"""`kilotron export`: a run's model as a Hugging Face directory, written tensor by tensor."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from checkpoint.manifest import Manifest
    from models.hugging_face import TensorRule
    from settings.config import RunConfig

DTYPES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
DTYPES |= {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron export`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, such as outputs/pretrain")
    parser.add_argument("output", type=Path, metavar="HF_DIR", help="directory to make")
    parser.add_argument("--step", default="auto", help="checkpoint to take (default: the newest valid one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights (default: as the checkpoint has them)")
    limit = "bytes of a file at most, such as 500MB (default: 5GB)"
    parser.add_argument("--max-shard-size", type=_size, default=5 * UNITS["GB"], metavar="SIZE", help=limit)


def _size(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)(KB|MB|GB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return int(match[1]) * UNITS[match[2]]


def run(arguments: argparse.Namespace) -> int:
    """Writes the directory, whole or not at all. Raises ConfigError, StorageError or HuggingFaceError."""
    from functools import partial

    from parallel.process_group import process_group
    from runtime.errors import ConfigError
    from tools.reading import read_run

    if arguments.output.exists():
        raise ConfigError(f"{arguments.output} is there already; name a new directory")
    with process_group(timedelta(minutes=1), {}):
        print(read_run(arguments.run_dir, arguments.step, partial(_export, arguments)))
    return 0


def _export(arguments: argparse.Namespace, path: Path, manifest: "Manifest") -> str:
    """Writes the checkpoint at `path` as a Hugging Face directory; returns what to say."""
    import torch

    from checkpoint.load import load_checkpoint
    from checkpoint.tensor_files import TORCH_DTYPES
    from models.families import family_for, family_of
    from models.hugging_face import HEAD, WORDS
    from runtime.files import naming, publish_directory, temporary_directory
    from settings.stored import config_of

    config = config_of(path, manifest)
    # What an import found; a run that was trained has the family's own forms.
    origin = manifest.state.get("hugging_face", {})
    family = family_of(origin["config"]) if origin else family_for(config.model)
    base = origin.get("base", family.base)
    entries = {name.removeprefix("model."): e for name, e in manifest.tensors.items() if name.startswith("model.")}
    rules = family.tensor_rules(entries, config.model.num_layers, base)
    if origin.get("repeats_head"):
        rules += [rule._replace(ours=(WORDS,)) for rule in family.tensor_rules([HEAD], 1, base)]

    def load(name: str) -> torch.Tensor:
        value = torch.empty(entries[name].shape, dtype=TORCH_DTYPES[entries[name].dtype])
        load_checkpoint(path, manifest, {f"model.{name}": value})
        return value

    shapes = {name: entry.shape for name, entry in entries.items()}
    dtypes = {rule: TORCH_DTYPES[DTYPES.get(arguments.dtype, entries[rule.ours[0]].dtype)] for rule in rules}
    layout = {rule: (dtypes[rule], rule.shape(shapes)) for rule in rules}
    with naming(arguments.output), temporary_directory(beside=arguments.output) as folder:
        write_weights(folder, layout, arguments.max_shard_size, load)
        end = _write_tokenizer(arguments.run_dir, config, folder, manifest.state.get("tokenizer_sha256"))
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), end)
        described = origin.get("config") or family.config_json(config.model) | ids
        if arguments.dtype or not origin:
            described["dtype" if "dtype" in described else "torch_dtype"] = str(dtypes[rules[0]]).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        publish_directory(folder, arguments.output)
    return f"wrote {arguments.output}: {family.architecture} of {path}"


def write_weights(
    folder: Path,
    layout: "Mapping[TensorRule, tuple[torch.dtype, tuple[int, ...]]]",
    limit: int,
    load: Callable[[str], "torch.Tensor"],
) -> None:
    """Writes safetensors files of at most `limit` bytes, or one tensor, and their index where there are several."""
    import torch

    from checkpoint.tensor_files import safetensors_layout
    from models.hugging_face_weights import join
    from runtime.errors import ConfigError

    sizes = {rule: math.prod(shape) * dtype.itemsize for rule, (dtype, shape) in layout.items()}
    shards: list[list[TensorRule]] = [[]]
    # Widest numbers first: then each tensor starts at a multiple of its own item size.
    for rule in sorted(layout, key=lambda rule: -layout[rule][0].itemsize):
        if shards[-1] and sum(map(sizes.__getitem__, shards[-1])) + sizes[rule] > limit:
            shards.append([])
        shards[-1].append(rule)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= {rule.theirs: name for rule in shard}
        with (folder / name).open("xb") as file:
            file.write(safetensors_layout([(rule.theirs, *layout[rule]) for rule in shard])[0])
            for rule in shard:
                wide = join(rule, [load(ours) for ours in rule.ours])
                value = wide.to(layout[rule][0])
                if not value.isfinite().all() and wide.isfinite().all():
                    raise ConfigError(f"{rule.theirs} holds numbers beyond {value.dtype}; choose another --dtype")
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_tokenizer(run_dir: Path, config: "RunConfig", folder: Path, digest: object) -> int | None:
    """Writes what the run knows of its tokenizer; returns the token that ends a document, if that is known.

    Raises ConfigError where the tokenizer's file is not that of the `digest`.
    """
    from data.hugging_face_tokenizer import tokenizer_json
    from data.tokenizer import END_OF_DOCUMENT, TiktokenTokenizer, load_tokenizer
    from data.vocabulary import tokenizer_files
    from models.hugging_face import copy_others
    from monitoring.run_directory import RunDirectory
    from runtime.errors import CorruptDataError, DataPathError, TokenizerError

    copy_others(run_dir, folder)
    try:
        tokenizer = load_tokenizer(RunDirectory(run_dir).tokenizer(config.data, config.out_dir, digest))
    except (CorruptDataError, DataPathError, TokenizerError) as error:
        print(f"no tokenizer: {error}", file=sys.stderr)
        return None
    if isinstance(tokenizer, TiktokenTokenizer):
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        described |= {"eos_token": END_OF_DOCUMENT, "model_max_length": config.model.max_position_embeddings}
        (folder / "tokenizer.json").write_bytes(tokenizer_json(tokenizer.encoding))
        (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        text = tokenizer.decode(range(min(tokenizer.vocab_size, 10_000)))
        if load_tokenizer(str(folder / "tokenizer.json")).encode(text) != tokenizer.encode(text):
            print(f"tokenizer.json encodes some text in other tokens than {tokenizer.name}", file=sys.stderr)
        return tokenizer.end_of_document
    for ending, content in tokenizer_files(tokenizer.name).items():
        if not (folder / f"tokenizer{ending}").exists():
            (folder / f"tokenizer{ending}").write_bytes(content)
    return tokenizer.end_of_document
