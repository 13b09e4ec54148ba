"""What a configuration must satisfy: each rule is a small function that says what is wrong, why, and what works."""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from models.families import HUGGING_FACE_PREFIX, open_directory
from models.hugging_face import HuggingFaceError, identity
from parallel.stages import takes
from training.advice import counted, divisors, multiples_near, near_divisors, nearest
from training.batch_checks import check_batch_memory, fits_into_memory
from training.config import RunConfig
from training.manifest import CORRUPT, MANIFEST_NAME, TEMPORARY
from training.optimizer_checks import check_float32, check_parameter_groups, check_schedule
from training.pipeline_checks import (
    check_pipeline_batch,
    check_pipeline_options,
    check_pipeline_settings,
    check_stages,
    check_virtual_stages,
)
from training.settings import closest

NOT_AVAILABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("model.num_experts", (None,)),
    ("model.moe_top_k", (2,)),
    ("data.blend", (None,)),
    ("parallel.cp", (1,)),
    ("parallel.cp_method", ("allgather",)),
    ("parallel.ep", (1,)),
)
"""Keys of features that this version lacks, with the values that work without them."""

LONGEST_NAME = 200
"""Bytes; file systems allow 255, and what belongs to a run adds to its name."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Values of that variable of the environment with which cuBLAS gives the same bits every time."""


def each_setting(config: Any, prefix: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Every key of a configuration with its field and its value."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from each_setting(value, f"{item.name}.")
        else:
            yield prefix + item.name, item, value


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check_ranges(config: RunConfig) -> Iterator[str]:
    """Numbers are finite and within the bounds that their field declares. The other rules divide by some of them."""
    bounds = (("min", "at least", operator.ge), ("above", "above", operator.gt), ("below", "below", operator.lt))
    for key, item, value in each_setting(config):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{key}={value}: must be a finite number"
            elif isinstance(number, dict | list):
                yield f"{key}={value}: entries must be plain values, not {number}"
            elif isinstance(number, (int, float)):
                for name, words, holds in bounds:
                    if name in item.metadata and not holds(number, item.metadata[name]):
                        yield f"{key}={value}: must be {words} {item.metadata[name]}"


def check_choices(config: RunConfig) -> Iterator[str]:
    """Words are among the choices that their field declares, and this version has what they ask for."""
    available = dict(NOT_AVAILABLE)
    for key, item, value in each_setting(config):
        choices = item.metadata.get("choices", ())
        works = available.get(key, choices)
        known = ", ".join(map(show, works))
        if choices and value not in choices and not (value is None and item.default is None):
            guess = closest(str(value).lower(), map(str, works))
            yield f"{key}={show(value)}: {f'did you mean {guess}? ' if guess else ''}known: {known}"
        elif key in available and value not in works:
            use = f"{key}={known}" if len(works) == 1 else f"one of {known}"
            yield f"{key}={show(value)} is not available in this version; use {use}"


def check_vocabulary(config: RunConfig, tokens: int, source: str) -> Iterator[str]:
    """The embedding has a row for every token of the data; `tokens` is how many `source` says there are."""
    rows = config.model.vocab_size
    if rows is not None and rows < tokens:
        yield f"model.vocab_size={rows} is less than the {tokens} tokens of {source}; use null or at least {tokens}"


def check_heads(config: RunConfig) -> Iterator[str]:
    """Heads cut the hidden size into equal widths, where no width is given, and groups of them are of equal size."""
    model = config.model
    heads, groups, hidden = model.num_attention_heads, model.query_groups, model.hidden_size
    if model.head_dim is None and hidden % heads:
        near = near_divisors(heads, hidden)
        yield f"model.num_attention_heads={heads} does not divide model.hidden_size={hidden}; try {near}"
    if heads % groups:
        near = near_divisors(groups, heads)
        yield f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}; try {near}"


def check_rotary(config: RunConfig) -> Iterator[str]:
    """Rotary embedding turns pairs of channels."""
    model, size = config.model, config.model.head_size
    heads, hidden = model.num_attention_heads, model.hidden_size
    if model.position_embedding != "rope" or size % 2 == 0:
        return
    if model.head_dim is not None:
        yield f"model.head_dim={size} is odd, but rope turns pairs of channels; try {multiples_near(size, 2)}"
    elif hidden % heads == 0:
        even = [number for number in divisors(hidden) if hidden // number % 2 == 0]
        advice = f"try model.num_attention_heads={nearest(heads, even)}" if even else "set model.head_dim"
        yield (
            f"model.hidden_size={hidden} / model.num_attention_heads={heads} gives heads of odd width {size}, "
            f"but rope turns pairs of channels; {advice}"
        )


def check_rotary_scaling(config: RunConfig) -> Iterator[str]:
    """Rotary scaling has frequencies to scale, and room to blend between low and high ones."""
    model = config.model
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    if model.rope_scaling is None:
        return
    stated = f"model.rope_scaling={model.rope_scaling}"
    if model.position_embedding != "rope":
        yield (
            f"{stated}: model.position_embedding={model.position_embedding} has no rotary frequencies to scale; "
            f"use model.position_embedding=rope or model.rope_scaling=null"
        )
    if high <= low:
        yield (
            f"{stated}: model.rope_high_frequency_factor={high} must be above model.rope_low_frequency_factor={low}, "
            f"as frequencies between the two are blended; try model.rope_high_frequency_factor={4 * low}"
        )


def check_positions(config: RunConfig) -> Iterator[str]:
    """A sample is no longer than the table of learned positions."""
    limit = config.model.max_position_embeddings
    if config.model.position_embedding == "learned" and config.seq_length > limit:
        yield (
            f"data.seq_length={config.seq_length} is more than the {limit} learned positions "
            f"(model.max_position_embeddings); try data.seq_length={limit} or model.position_embedding=rope"
        )


def check_world(config: RunConfig) -> Iterator[str]:
    """world_size = pp * dp_replicate * dp_shard * cp * tp."""
    world, layout = config.world_size, config.parallel
    if world is None:
        return
    if layout.dp_shard == 0:
        yield "parallel.dp_shard=0: use -1 for all ranks that remain, or at least 1"
        return
    remains = layout.dp_shard == -1
    sizes = {key: max(getattr(layout, key), 1) for key in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    product = math.prod(sizes.values())
    if world == product or (remains and world % product == 0):
        return
    fixed = {key: size for key, size in sizes.items() if size > 1 or (key == "dp_shard" and not remains)}
    legal = {key: _sizes_beside(config, key, product // size) for key, size in fixed.items()}
    stated = ", ".join(f"parallel.{key}={size}" for key, size in fixed.items())
    if len(fixed) == 1:
        key, choices = next(iter(legal.items()))
        rules = [f"{key} must divide {world}: {choices}" if remains else f"{key} must be {choices}"]
    else:
        rules = [f"{' * '.join(fixed)} = {product} must {'divide' if remains else 'equal'} {world}"]
        rules += [f"{key} may be {choices}" for key, choices in legal.items() if choices]
    rules.append(f"world_size={multiples_near(world, product) if remains else product} fits")
    if world == 1:
        rules.append(f"`torchrun --standalone --nproc-per-node={product} pretrain_gpt.py ...` starts as many")
    yield f"world_size={world} with {stated}: {'; '.join(rules)}"


def _sizes_beside(config: RunConfig, key: str, others: int) -> str:
    """The sizes of one dimension that fill the world beside the product of the others, as advice; "" for none."""
    world, remains = config.world_size or 1, config.parallel.dp_shard == -1
    if world % others:
        return ""
    sizes = divisors(world // others) if remains else [world // others]
    advice = ", ".join(map(str, sizes))
    if key == "dp_shard":
        return f"{advice} or -1"
    cut = [size for size in sizes if not _cut_unequally(config, size)] if key == "tp" else sizes
    if len(cut) not in (0, len(sizes)):
        advice += f" (the model allows {', '.join(map(str, cut))})"
    return advice if cut else ""


def _cut_unequally(config: RunConfig, tp: int) -> set[str]:
    """What of the model and its activations `tp` ranks cannot share equally."""
    model = config.model
    heads, groups = model.num_attention_heads, model.query_groups
    remainders = {
        "heads": heads % tp,
        "groups": groups % tp and tp % groups,
        "ffn": model.ffn_size % tp,
        "sequence": config.seq_length % tp if config.parallel.sequence is not False else 0,
    }
    return {part for part, remainder in remainders.items() if remainder}


def _near_tensor_sizes(config: RunConfig) -> str:
    """The nearest values of parallel.tp that the model can be cut by and that, where any do, divide the world."""
    layout = config.parallel
    legal = [tp for tp in divisors(config.model.num_attention_heads) if not _cut_unequally(config, tp)]
    beside = layout.pp * layout.dp_replicate * layout.cp
    fitting = [tp for tp in legal if (config.world_size or 0) % (tp * beside) == 0]
    return f"parallel.tp={nearest(layout.tp, fitting or legal)}"


def check_tensor_heads(config: RunConfig) -> Iterator[str]:
    """Each tensor-parallel rank computes equally many query heads."""
    tp, heads = config.parallel.tp, config.model.num_attention_heads
    if "heads" in _cut_unequally(config, tp):
        yield (
            f"parallel.tp={tp} does not divide model.num_attention_heads={heads}, but every rank computes equally "
            f"many whole heads; try {_near_tensor_sizes(config)}"
        )


def check_tensor_groups(config: RunConfig) -> Iterator[str]:
    """Each tensor-parallel rank has whole key/value heads, or shares one with its neighbours. Looked at where the query
    heads are cut equally."""
    tp, heads, groups = config.parallel.tp, config.model.num_attention_heads, config.model.query_groups
    if heads % tp == 0 and heads % groups == 0 and "groups" in _cut_unequally(config, tp):
        legal = [number for number in divisors(heads) if number % tp == 0 or tp % number == 0]
        yield (
            f"parallel.tp={tp} and model.num_query_groups={groups}: one must divide the other, so that a rank has "
            f"whole key/value heads or shares one; try {_near_tensor_sizes(config)}, "
            f"or model.num_query_groups={nearest(groups, legal)}"
        )


def check_tensor_ffn(config: RunConfig) -> Iterator[str]:
    """Each tensor-parallel rank computes an equal part of the MLP's width."""
    tp, width = config.parallel.tp, config.model.ffn_size
    if "ffn" in _cut_unequally(config, tp):
        derived = "" if config.model.ffn_hidden_size is not None else " (derived, as it is null)"
        yield (
            f"parallel.tp={tp} does not divide model.ffn_hidden_size={width}{derived}, which its ranks share equally; "
            f"try {_near_tensor_sizes(config)}, or model.ffn_hidden_size={multiples_near(width, tp)}"
        )


def check_tensor_sequence(config: RunConfig) -> Iterator[str]:
    """With sequence parallelism each tensor-parallel rank holds an equal part of every sequence."""
    tp, length, model = config.parallel.tp, config.seq_length, config.model
    if config.parallel.sequence_parallel and "sequence" in _cut_unequally(config, tp):
        limit = model.max_position_embeddings if model.position_embedding == "learned" else math.inf
        near = multiples_near(length, tp, limit)
        yield (
            f"parallel.tp={tp} does not divide data.seq_length={length}, but sequence parallelism gives every rank an "
            f"equal part; try {f'data.seq_length={near}, or ' if near else ''}parallel.sequence=false"
        )


def check_batch(config: RunConfig) -> Iterator[str]:
    """Every data-parallel rank takes the same whole number of micro-batches."""
    ranks, micro, schedule = config.parallel.dp, config.train.micro_batch_size, config.train.batch_schedule
    stated = "train.global_batch_size=" if schedule is None else f"train.batch_schedule={schedule!r}: "
    try:
        sizes = config.batches.sizes
    except ValueError as error:
        yield f"{stated}{error}"
        return
    layout, unit = config.parallel, ranks * (micro or 1)

    def fits(count: int) -> bool:
        return layout.pp == 1 or takes(layout.pp_schedule, layout.pp, count)

    why = counted(ranks, "data-parallel rank") + (f" * train.micro_batch_size={micro}" if micro else "")
    for size in sizes if ranks >= 1 and fits_into_memory(config) else []:
        if size % unit == 0:
            continue
        reach = 4 * layout.pp + 2
        counts = range(max(1, size // unit - reach), size // unit + reach)
        legal = [count * unit for count in counts if fits(count)]
        advice = (stated if schedule is None else "") + nearest(size, legal)
        if micro and not any(each % ranks for each in sizes):
            cuts = divisors(math.gcd(*sizes) // ranks)
            cuts = [cut for cut in cuts if all(fits(each // (ranks * cut)) for each in sizes)]
            advice += f", or train.micro_batch_size={nearest(micro, cuts)}" if cuts else ""
        yield f"{stated}{size} is not divisible by {why}; try {advice}"


def check_profile(config: RunConfig) -> Iterator[str]:
    """The steps to profile are a range of those that the run takes."""
    profile, end, steps = config.train.profile, config.train.steps, config.train.profile_steps
    if profile is None or (steps and steps[0] >= 1 and steps[-1] <= end):
        return
    numbers = re.findall(r"\d{1,9}", profile)[:2] or ["10", "12"]
    first, *last = sorted({min(max(int(number), 1), end) for number in numbers})
    near = "-".join(map(str, [first, *last]))
    yield (
        f"train.profile={profile}: not the number of a step, or of the first and the last as in 10-12, out of "
        f"train.steps={end}; try train.profile={near}"
    )


def check_deterministic(config: RunConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """What the environment says of cuBLAS, if anything, suits a deterministic run."""
    workspace = environment.get(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    if config.train.deterministic and workspace not in DETERMINISTIC_WORKSPACES:
        yield (
            f"train.deterministic=true, but with {CUBLAS_WORKSPACE}={workspace} in the environment cuBLAS may round "
            f"differently every time; unset it, or use {' or '.join(DETERMINISTIC_WORKSPACES)}"
        )


def check_split(config: RunConfig) -> Iterator[str]:
    """Three shares, some of them for training, and for validation where it is asked for."""
    shares, interval = config.data.split, config.train.eval_interval
    stated = f"data.split={shares}"
    if len(shares) != 3:
        yield f"{stated}: three shares are needed, for training, validation and test; try [98,1,1]"
    elif min(shares) < 0:
        yield f"{stated}: a share cannot be negative; use 0 for none"
    elif shares[0] == 0:
        yield f"{stated}: nothing is left to train on; try [98,1,1]"
    elif interval > 0 and shares[1] == 0:
        yield f"train.eval_interval={interval} with {stated}: no document is for validation; try train.eval_interval=0"


def check_checkpoint(config: RunConfig) -> Iterator[str]:
    """What a start takes up is well-formed, and is there."""
    resume, load = config.checkpoint.resume, config.checkpoint.load
    if config.checkpoint.keep_best and not config.train.eval_interval:
        yield (
            "checkpoint.keep_best=true, but train.eval_interval=0: nothing says which is best; try "
            f"train.eval_interval={config.checkpoint.interval or config.train.steps}"
        )
    if resume not in ("auto", "never") and not resume.isdecimal():
        guess = closest(resume, ("auto", "never"))
        meant = f"did you mean {guess}? " if guess else ""
        yield f"checkpoint.resume={resume}: {meant}known: auto, never, or the number of a step"
    # Who goes on from a checkpoint of its own reads no other, which may be gone by now.
    if load is None or any(Path(config.run_dir).glob("checkpoints/step_*[0-9]")):
        return
    if load.startswith(HUGGING_FACE_PREFIX):
        yield from _hugging_face_problems(config, load)
    else:
        yield from _load_problems(load)


def _hugging_face_problems(config: RunConfig, load: str) -> Iterator[str]:
    try:
        there = identity(open_directory(Path(load.removeprefix(HUGGING_FACE_PREFIX))).model)
    except HuggingFaceError as error:
        yield f"checkpoint.load={load}: {error}"
        return
    here = config.model.resolved()
    unknown = {"vocab_size"} if here["vocab_size"] is None else set()
    other = {key: value for key, value in there.items() if here[key] != value and key not in unknown}
    if other:
        found = ", ".join(f"{key} {show(value)} rather than {show(here[key])}" for key, value in other.items())
        words = " ".join(f"model.{key}={show(value)}" for key, value in other.items())
        yield f"checkpoint.load={load} is of another model: it has {found}; what fits: {words}"


def _load_problems(stated_path: str) -> Iterator[str]:
    load, stated = Path(stated_path), f"checkpoint.load={stated_path}"
    example = "say a directory like RUN_DIR/checkpoints/step_00000100"
    if load.is_file():
        advice = f"try {load.parent}" if (load.parent / MANIFEST_NAME).is_file() else example
        yield f"{stated} is a file, and a checkpoint is a directory; {advice}"
    elif not load.is_dir():
        near = closest(load.name, _folders(load.parent))
        yield f"{stated}: there is no such directory; {f'nearest: {load.parent / near}' if near else example}"
    elif any(mark in load.name for mark in (TEMPORARY, CORRUPT)):
        yield f"{stated} was {'not finished' if TEMPORARY in load.name else 'found damaged'}; say one that is whole"
    elif not (load / MANIFEST_NAME).is_file():
        found = [*load.glob("step_*"), *load.glob("checkpoints/step_*")]
        steps = sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))
        runs = sorted(path.parent.name for path in load.glob("*/checkpoints"))
        inside = f"it holds the runs {', '.join(runs)}; {example}" if runs else example
        yield f"{stated} is no checkpoint; {f'try {steps[-1]}' if steps else inside}"


def _folders(parent: Path) -> list[str]:
    found = [item.name for item in parent.iterdir() if item.is_dir()] if parent.is_dir() else []
    return [name for name in found if TEMPORARY not in name]


def check_name(config: RunConfig) -> Iterator[str]:
    """The run directory lies directly in out_dir."""
    name = config.name
    if not name.strip() or name in (".", "..") or "/" in name or "\0" in name:
        plain = name.replace("/", "-").strip("-. ") or "run"
        yield f"name={name!r}: must be the name of one directory inside out_dir={config.out_dir}; try name={plain}"
    elif not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        plain = "".join(character if character.isprintable() else "-" for character in name)[:40]
        yield f"name={name!r}: must be at most {LONGEST_NAME} bytes long and on one line; try name={plain}"
    if name == "sample_corpus":
        yield "name=sample_corpus: the prepared sample corpus lies there; try name=sample_run"
    if not config.out_dir.isprintable():
        yield f"out_dir={config.out_dir!r}: must be on one line and printable; try out_dir=outputs"
    elif not config.out_dir.strip():
        yield "out_dir is empty; try out_dir=outputs, or out_dir=. for the current directory"


RELATIONS: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    check_name,
    check_heads,
    check_rotary,
    check_rotary_scaling,
    check_positions,
    check_world,
    check_tensor_heads,
    check_tensor_groups,
    check_tensor_ffn,
    check_tensor_sequence,
    check_batch,
    check_batch_memory,
    check_pipeline_settings,
    check_virtual_stages,
    check_stages,
    check_pipeline_batch,
    check_pipeline_options,
    check_parameter_groups,
    check_float32,
    check_schedule,
    check_profile,
    check_split,
    check_checkpoint,
)
"""The rules between settings; they hold no meaning where `check_ranges` found something."""


def check_relations(config: RunConfig) -> Iterator[str]:
    """What every rule of RELATIONS finds."""
    return chain.from_iterable(rule(config) for rule in RELATIONS)
