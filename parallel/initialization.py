"""Initial weights, the same in every layout: each parameter is drawn whole from its own generator, then sliced."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from parallel.sharding import local_box, local_values, logical_shapes


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution around zero."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Every element the same."""

    value: float


InitialValue = Normal | Constant


def parameter_seed(seed: int, name: str) -> int:
    """The seed of one parameter's generator: a hash of the run's seed and the parameter's global name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model built on the meta device, sharded or not, memory on `device`, all zero.

    Who fills it fills no padding, and what memory happens to hold there may be NaN, which no zero takes back.
    """
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.zero_()


@torch.no_grad()
def materialize(model: nn.Module, seed: int, device: torch.device, init_device: torch.device | None = None) -> None:
    """Allocate a model built on the meta device, sharded or not, on `device` and fill it, one parameter at a time.

    Every module that owns parameters names their `initial_values`. Bit-identical in every layout on one kind of
    `init_device`, where they are drawn (default: `device`).
    """
    allocate(model, device)
    shapes = logical_shapes(model)
    origin = init_device or device
    for module_name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}"
            initial: InitialValue = module.initial_values[own_name]
            box = local_box(parameter, shapes[name])
            values = local_values(parameter, box)
            if isinstance(initial, Constant):
                values.fill_(initial.value)
            else:
                # In float32, whatever precision the run has, so that all precisions start alike.
                generator = torch.Generator(origin).manual_seed(parameter_seed(seed, name))
                whole = torch.empty(shapes[name], dtype=torch.float32, device=origin)
                values.copy_(whole.normal_(0.0, initial.std, generator=generator)[box.slices])
