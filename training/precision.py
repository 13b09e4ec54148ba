"""What `train.precision` means: dtypes of master weights and of computation, and the loss scale of float16."""

from dataclasses import dataclass

import torch

from settings.config import TrainConfig


@dataclass(frozen=True)
class Precision:
    """`master` is what the optimizer updates and gradients are reduced in; `compute` is what layers see."""

    master: torch.dtype
    compute: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "tf32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp16": Precision(torch.float32, torch.float16),
    "fp64": Precision(torch.float64, torch.float64),
}

LARGEST_SCALE = 2.0**64
"""Far beyond what any gradient but zero allows; without an end the scale itself would overflow."""


def choose_precision(name: str) -> Precision:
    """The dtypes of `train.precision`; fp32 means full float32 products, tf32 those of 10 bits where a GPU has them."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return PRECISIONS[name]


class LossScale:
    """What the loss is multiplied by so that float16 gradients do not underflow (arXiv:1710.03740).

    Doubles after `window` finite steps in a row, halves after one that is not; decided on the device, from numbers that
    all ranks have in common.
    """

    def __init__(self, initial: float, window: int, device: torch.device) -> None:
        self.window = window
        self.scale = torch.tensor(initial, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, finite: torch.Tensor) -> None:
        """Take note of whether a step's numbers were finite, a bool scalar."""
        self.good_steps = torch.where(finite, self.good_steps + 1, 0.0)
        grows = self.good_steps >= self.window
        self.good_steps = torch.where(grows, 0.0, self.good_steps)
        factor = torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(max=LARGEST_SCALE)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; waits for the device."""
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what `state` gave."""
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])


def build_loss_scale(config: TrainConfig, device: torch.device) -> LossScale | None:
    """The loss scale of fp16, None for other precisions."""
    if config.precision != "fp16":
        return None
    return LossScale(config.initial_loss_scale, config.loss_scale_window, device)
