"""Each value by itself: its type, its range, and the choices that this version has."""

import math
import operator
from collections.abc import Iterator
from typing import Any

from runtime.messages import closest
from settings.config import RunConfig
from settings.keys import each_setting, show

NOT_AVAILABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("model.num_experts", (None,)),
    ("model.moe_top_k", (2,)),
    ("data.blend", (None,)),
    ("parallel.cp", (1,)),
    ("parallel.cp_method", ("allgather",)),
    ("parallel.ep", (1,)),
)
"""Keys of features that this version lacks, with the values that work without them."""


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
