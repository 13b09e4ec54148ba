"""Exceptions for parameters by name: what an entry of `optimizer.groups` says."""

import math

from runtime.messages import closest

SETTINGS = ("lr_scale", "weight_decay")


def parse_group(text: str) -> tuple[str, dict[str, float]]:
    """Pattern and settings of `PATTERN:lr_scale=0.5,weight_decay=0.0`. Raises ValueError saying what is wrong."""
    pattern, _, assignments = text.rpartition(":")
    if not pattern:
        raise ValueError("it is written PATTERN:lr_scale=0.5,weight_decay=0.0, with either setting or both")
    settings: dict[str, float] = {}
    for assignment in assignments.split(","):
        name, _, value = (part.strip() for part in assignment.partition("="))
        if name not in SETTINGS:
            guess = closest(name, SETTINGS) or next((known for known in SETTINGS if known.startswith(name)), None)
            hint = f"did you mean {guess}? " if name and guess else ""
            raise ValueError(f"a group has no {name or 'setting'}; {hint}known: {', '.join(SETTINGS)}")
        try:
            settings[name] = float(value)
        except ValueError:
            settings[name] = math.nan
        if not 0 <= settings[name] < math.inf:
            raise ValueError(f"{name}={value}: must be a finite number of at least 0")
    return pattern, settings
