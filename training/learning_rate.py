"""Learning rates as pure functions of the step: linear warm-up, then cosine, warm-up-stable-decay, or constant."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from settings.config import RunConfig


@dataclass(frozen=True)
class Decay:
    """What a shape needs to know: steps after the warm-up in all, and those of the final decay."""

    steps: int
    decay_steps: int


def cosine(step: int, decay: Decay) -> float:
    """Half a cosine from 1 to 0 (arXiv:1608.03983, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, decay.steps))))


def warmup_stable_decay(step: int, decay: Decay) -> float:
    """1, then linear to 0 over the last `decay_steps` (arXiv:2404.06395)."""
    return min(1.0, max(0.0, (decay.steps - step) / decay.decay_steps))


def constant(step: int, decay: Decay) -> float:  # noqa: ARG001
    """Always 1."""
    return 1.0


SHAPES: dict[str, Callable[[int, Decay], float]] = {
    "cosine": cosine,
    "wsd": warmup_stable_decay,
    "constant": constant,
}


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (the first is 1).

    Warm-up rises linearly and reaches the peak at step `warmup_steps`; the shape starts from the peak at the next step
    and comes to `min_lr` at the first step after `schedule_steps`, so that no step is wasted on a rate of zero.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    total = config.schedule_steps
    decay = Decay(steps=total - schedule.warmup_steps, decay_steps=config.decay_steps)
    share = SHAPES[schedule.name](max(0, step - 1 - schedule.warmup_steps), decay)
    return schedule.min_lr + (peak - schedule.min_lr) * share
