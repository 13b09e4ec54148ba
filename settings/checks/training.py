"""What the settings of the optimizer, its schedule, the loop and the data's split must satisfy."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields

from runtime.cublas_workspace import CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES
from settings.config import RunConfig
from settings.parameter_groups import parse_group

LARGEST_FLOAT32 = 3.4028234663852886e38
SMALLEST_FLOAT32 = 1.1754943508222875e-38
"""Of the normal numbers: devices take what is smaller for 0."""
LARGEST_MUON_FACTOR = 1e4
"""Muon multiplies a matrix's rate by at most 0.2 times the root of its longer side."""


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
    largest_rate = LARGEST_FLOAT32 / (LARGEST_MUON_FACTOR if optimizer.name == "muon" else 1)
    for name, largest in (("lr", largest_rate), ("weight_decay", LARGEST_FLOAT32)):
        if (value := getattr(optimizer, name)) > largest:
            default = next(item.default for item in fields(optimizer) if item.name == name)
            yield f"optimizer.{name}={value}: is infinite {why}; the default is {default}"
    if optimizer.eps < SMALLEST_FLOAT32:
        yield f"optimizer.eps={optimizer.eps}: is 0 {why}, and a gradient of 0 would give NaN; try optimizer.eps=1e-8"
    for text in optimizer.groups:
        with suppress(ValueError):  # which check_parameter_groups says
            settings = parse_group(text)[1]
            if max(settings.get("lr_scale", 0.0) * optimizer.lr, *settings.values()) > largest_rate:
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
