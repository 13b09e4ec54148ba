"""What `train.precision` means: the dtype of the master weights and the dtype that layers compute in."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`master` is what the optimizer updates and gradients are reduced in; `compute` is what layers see."""

    master: torch.dtype
    compute: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp64": Precision(torch.float64, torch.float64),
}


def choose_precision(name: str) -> Precision:
    """The dtypes of `train.precision`; fp32 means full float32 products, never tf32."""
    torch.set_float32_matmul_precision("highest")
    return PRECISIONS[name]
