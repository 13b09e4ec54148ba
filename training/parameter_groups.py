"""Exceptions for parameters by name: what an entry of `optimizer.groups` says."""

import math
from dataclasses import dataclass

from training.settings import closest

SETTINGS = ("lr_scale", "weight_decay")


@dataclass(frozen=True)
class GroupRule:
    """Settings of the parameters whose global name a shell pattern matches."""

    pattern: str
    settings: dict[str, float]


def parse_rule(text: str) -> GroupRule:
    """Read `PATTERN:lr_scale=0.5,weight_decay=0.0`, either setting or both. Raises ValueError saying what is wrong."""
    pattern, _, assignments = text.rpartition(":")
    if not pattern:
        raise ValueError("it is written PATTERN:lr_scale=0.5,weight_decay=0.0, with either setting or both")
    settings: dict[str, float] = {}
    for assignment in assignments.split(","):
        name, _, value = (part.strip() for part in assignment.partition("="))
        if name not in SETTINGS:
            guess = closest(name, SETTINGS)
            raise ValueError(f"{name!r}: {f'did you mean {guess}? ' if guess else ''}known: {', '.join(SETTINGS)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError(f"{name}={value}: must be a finite number of at least 0")
        settings[name] = number
    return GroupRule(pattern.strip(), settings)
