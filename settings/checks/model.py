"""What the settings of a model must satisfy."""

from collections.abc import Iterator

from runtime.messages import divisors, multiples_near, near_divisors, nearest
from settings.config import RunConfig


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
