"""What the sizes of a parallel layout must satisfy: the world is filled, and tensor-parallel ranks have equal parts."""

import math
from collections.abc import Iterator

from runtime.messages import divisors, multiples_near, nearest
from settings.config import RunConfig


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
    cut = [size for size in sizes if not cut_unequally(config, size)] if key == "tp" else sizes
    if len(cut) not in (0, len(sizes)):
        advice += f" (the model allows {', '.join(map(str, cut))})"
    return advice if cut else ""


def cut_unequally(config: RunConfig, tp: int) -> set[str]:
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
    legal = [tp for tp in divisors(config.model.num_attention_heads) if not cut_unequally(config, tp)]
    beside = layout.pp * layout.dp_replicate * layout.cp
    fitting = [tp for tp in legal if (config.world_size or 0) % (tp * beside) == 0]
    return f"parallel.tp={nearest(layout.tp, fitting or legal)}"


def check_tensor_heads(config: RunConfig) -> Iterator[str]:
    """Each tensor-parallel rank computes equally many query heads."""
    tp, heads = config.parallel.tp, config.model.num_attention_heads
    if "heads" in cut_unequally(config, tp):
        yield (
            f"parallel.tp={tp} does not divide model.num_attention_heads={heads}, but every rank computes equally "
            f"many whole heads; try {_near_tensor_sizes(config)}"
        )


def check_tensor_groups(config: RunConfig) -> Iterator[str]:
    """Each tensor-parallel rank has whole key/value heads, or shares one with its neighbours. Looked at where the query
    heads are cut equally."""
    tp, heads, groups = config.parallel.tp, config.model.num_attention_heads, config.model.query_groups
    if heads % tp == 0 and heads % groups == 0 and "groups" in cut_unequally(config, tp):
        legal = [number for number in divisors(heads) if number % tp == 0 or tp % number == 0]
        yield (
            f"parallel.tp={tp} and model.num_query_groups={groups}: one must divide the other, so that a rank has "
            f"whole key/value heads or shares one; try {_near_tensor_sizes(config)}, "
            f"or model.num_query_groups={nearest(groups, legal)}"
        )


def check_tensor_ffn(config: RunConfig) -> Iterator[str]:
    """Each tensor-parallel rank computes an equal part of the MLP's width."""
    tp, width = config.parallel.tp, config.model.ffn_size
    if "ffn" in cut_unequally(config, tp):
        derived = "" if config.model.ffn_hidden_size is not None else " (derived, as it is null)"
        yield (
            f"parallel.tp={tp} does not divide model.ffn_hidden_size={width}{derived}, which its ranks share equally; "
            f"try {_near_tensor_sizes(config)}, or model.ffn_hidden_size={multiples_near(width, tp)}"
        )


def check_tensor_sequence(config: RunConfig) -> Iterator[str]:
    """With sequence parallelism each tensor-parallel rank holds an equal part of every sequence."""
    tp, length, model = config.parallel.tp, config.seq_length, config.model
    if config.parallel.sequence_parallel and "sequence" in cut_unequally(config, tp):
        limit = model.max_position_embeddings if model.position_embedding == "learned" else math.inf
        near = multiples_near(length, tp, limit)
        yield (
            f"parallel.tp={tp} does not divide data.seq_length={length}, but sequence parallelism gives every rank an "
            f"equal part; try {f'data.seq_length={near}, or ' if near else ''}parallel.sequence=false"
        )
