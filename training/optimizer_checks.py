"""What settings of the optimizer and its schedule must satisfy: a rule says what is wrong, why, and what works."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields

from training.config import RunConfig
from training.parameter_groups import parse_group

LARGEST_FLOAT32 = 3.4028234663852886e38
SMALLEST_FLOAT32 = 1.1754943508222875e-38
"""Of the normal numbers: devices take what is smaller for 0."""


def check_parameter_groups(config: RunConfig) -> Iterator[str]:
    """Every exception for parameters can be read; whether names match is known once the model is."""
    for text in config.optimizer.groups:
        try:
            parse_group(text)
        except ValueError as error:
            yield f"optimizer.groups: {text!r}: {error}"


def check_float32(config: RunConfig) -> Iterator[str]:
    """What weights are updated with stays finite, and no divisor becomes 0, in float32, which all precisions but fp64
    update them in."""
    optimizer = config.optimizer
    if config.train.precision == "fp64":
        return
    why = "in float32, in which weights are updated"
    for name in ("lr", "weight_decay"):
        if (value := getattr(optimizer, name)) > LARGEST_FLOAT32:
            default = next(item.default for item in fields(optimizer) if item.name == name)
            yield f"optimizer.{name}={value}: is infinite {why}; the default is {default}"
    if optimizer.eps < SMALLEST_FLOAT32:
        yield f"optimizer.eps={optimizer.eps}: is 0 {why}, and a gradient of 0 would give NaN; try optimizer.eps=1e-8"
    for text in optimizer.groups:
        with suppress(ValueError):  # which check_parameter_groups says
            settings = parse_group(text)[1]
            if max(settings.get("lr_scale", 0.0) * optimizer.lr, *settings.values()) > LARGEST_FLOAT32:
                yield f"optimizer.groups: {text!r} with optimizer.lr={optimizer.lr}: is infinite {why}; use less"


def check_schedule(config: RunConfig) -> Iterator[str]:
    """Warm-up and decay fit into the schedule, and the rate does not end above its peak."""
    schedule, steps = config.schedule, config.schedule_steps
    length = "schedule.steps" if schedule.steps is not None else "train.steps"
    if schedule.warmup_steps >= steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} leaves nothing of {length}={steps}; "
            f"use at most {steps - 1}, or more steps"
        )
    elif schedule.name == "wsd" and schedule.warmup_steps + config.decay_steps > steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} + schedule.decay_steps={config.decay_steps} is more than "
            f"{length}={steps}; try schedule.decay_steps={steps - schedule.warmup_steps}"
        )
    if schedule.min_lr > config.optimizer.lr:
        yield (
            f"schedule.min_lr={schedule.min_lr} is above optimizer.lr={config.optimizer.lr}, the peak; "
            f"try at most {config.optimizer.lr}"
        )
