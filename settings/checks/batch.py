"""What global batches and micro-batches must satisfy."""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.metadata import read_metadata
from parallel.stages import supports_micro_batches
from runtime.messages import counted, divisors, nearest
from settings.config import RunConfig

MOST_EPOCHS = 1000
"""Passes over the data that a single optimizer step may take."""
BYTES_OF_A_TOKEN = 24
"""A step keeps each as input, as label, and in the sample that both are from."""
BATCHES_WITH_READING_AHEAD = 3
"""The one that is trained on, the one that is ready, and the one that is being read."""


@dataclass(frozen=True)
class Limit:
    """How many samples a global batch may have."""

    samples: int
    why: str
    """Continues "a global batch of N samples", where N is too many."""


def physical_memory() -> int:
    """Bytes of this host's memory; where the system does not say, more than there can be."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def most_tokens(prefix: str) -> int | None:
    """Tokens of prepared data, or more, over all its splits; None where there is no data yet.

    Raises CorruptDataError where its description is broken.
    """
    metadata = read_metadata(prefix)
    if metadata is not None:
        return metadata.tokens
    try:
        # How wide a token is, the index says, which is not read here: it has a byte or more.
        return Path(f"{prefix}.bin").stat().st_size
    except OSError:
        return None


def check_batch_epochs(config: RunConfig, samples_per_epoch: int) -> Iterator[str]:
    """No step takes more than a thousand epochs of the data."""
    why = (
        f"is more than {MOST_EPOCHS} epochs of the data, which has {samples_per_epoch} samples of "
        f"data.seq_length={config.seq_length}"
    )
    yield from _too_large(config, Limit(MOST_EPOCHS * samples_per_epoch, why))


def check_batch_memory(config: RunConfig) -> Iterator[str]:
    """The token ids that a rank keeps for a step fit into the memory of a host."""
    yield from _too_large(config, _memory_limit(config))


def fits_into_memory(config: RunConfig) -> bool:
    """Whether `check_batch_memory` finds nothing: rules that try out numbers up to a size need an end."""
    return not list(check_batch_memory(config))


def _memory_limit(config: RunConfig) -> Limit:
    ranks, memory = max(config.parallel.dp, 1), physical_memory()
    batches = BATCHES_WITH_READING_AHEAD if config.data.num_workers else 1
    bytes_of_a_sample = BYTES_OF_A_TOKEN * config.seq_length * batches
    ahead = f", and data.num_workers={config.data.num_workers} reads ahead" if config.data.num_workers else ""
    why = (
        f"over {counted(ranks, 'data-parallel rank')} is more than fits into memory: token ids of a sample of "
        f"data.seq_length={config.seq_length} take {bytes_of_a_sample} bytes{ahead}, and this host has "
        f"{memory / 1e9:.1f} GB"
    )
    return Limit(memory // bytes_of_a_sample * ranks, why)


def _too_large(config: RunConfig, limit: Limit) -> Iterator[str]:
    schedule = config.train.batch_schedule
    try:
        sizes = config.batches.sizes
    except ValueError:
        return  # check_batch says why
    for size in sizes:
        if size <= limit.samples:
            continue
        stated = f"train.global_batch_size={size}" if schedule is None else f"train.batch_schedule={schedule!r}"
        key = "train.global_batch_size=" if schedule is None else "a size of "
        advice = _advice(config, limit.samples, key)
        yield f"{stated}: a global batch of {size} samples {limit.why}; try at most {advice}"


def _advice(config: RunConfig, most: int, key: str) -> str:
    """The largest global batch of up to `most` samples that ranks, micro-batches and pipeline can share."""
    layout = config.parallel
    for micro, also in ((config.train.micro_batch_size or 1, ""), (1, " with train.micro_batch_size=null")):
        unit = max(layout.dp, 1) * micro
        for count in range(most // unit, max(0, most // unit - 4 * layout.pp - 2), -1):
            if layout.pp == 1 or supports_micro_batches(layout.pp_schedule, layout.pp, count):
                return f"{key}{count * unit}{also}"
    return "a shorter data.seq_length, or more data"


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
        return layout.pp == 1 or supports_micro_batches(layout.pp_schedule, layout.pp, count)

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
