"""Muon: hidden matrices move along their orthogonalised momentum, all else by AdamW."""

import math
from typing import Any

import torch

from parallel.matrix_exchange import MatrixExchange
from parallel.tensor import local
from settings.config import OptimizerConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that, repeated, drives singular values towards one: steepest at zero, so that five steps do."""
EPS = 1e-7
"""Least norm that a matrix is divided by."""


def orthogonalize(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Replace the singular values of `[rows, columns]` by ones, roughly: between 0.7 and 1.2.

    The quintic Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T, from X = matrix / |matrix|, on the
    short side (https://kellerjordan.github.io/posts/muon/), in the matrix's dtype.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def rate_factor(adjust_lr: str, rows: int, columns: int) -> float:
    """What the learning rate of a matrix is multiplied by, as its update's size depends on its shape.

    `original`: sqrt(max(1, rows / columns)). `match_rms_adamw`: 0.2 sqrt(max(rows, columns)), which gives the update
    the root mean square that AdamW's has, so that its learning rate and weight decay fit (arXiv:2502.16982).
    """
    return math.sqrt(max(1, rows / columns)) if adjust_lr == "original" else 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """What torch.optim.Muon and, for other parameters, AdamW compute in one process, computed alike in every layout.

    The momentum is sharded as the weights are. Only to be made orthogonal are matrices put together, in bfloat16 (in
    float64 for float64 weights), by `MatrixExchange`.

    Args:
        matrices: parameter groups of two-dimensional parameters.
        others: moves all other parameters; its groups become groups of this optimizer too.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        super().__init__([*matrices, *others.param_groups], {"lr": config.lr})
        self.state.update(others.state)
        others.state = self.state
        self._others = others
        self._config = config
        self._matrices = [(parameter, group) for group in matrices for parameter in group["params"]]
        parameters = [parameter for parameter, _ in self._matrices]
        self._exchange = MatrixExchange(parameters)
        for parameter in parameters:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        self.found_inf = torch.zeros((), device=parameters[0].device)
        """Where it is 1 on the device, a step moves nothing."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Move every parameter by its `grad`. Collective."""
        skip = self.found_inf > 0
        steps = self._config.newton_schulz_steps
        for turn in self._exchange.turns:
            directions = [self._direction(self._matrices[index][0], skip) for index in turn.indices]
            updates = self._exchange.apply(turn, directions, lambda matrix: orthogonalize(matrix, steps))
            for index, update in zip(turn.indices, updates, strict=True):
                self._move(*self._matrices[index], update, skip)
        self._others.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._others.step()

    def _direction(self, parameter: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Take the gradient into this rank's shard of the momentum; what is to be orthogonalised."""
        if parameter.grad is None:
            raise RuntimeError("a parameter of Muon has no gradient, which the other ranks would wait for")
        gradient, momentum = local(parameter.grad), local(self.state[parameter]["momentum_buffer"])
        momentum.copy_(torch.where(skip, momentum, momentum.lerp(gradient, 1 - self._config.momentum)))
        direction = gradient.lerp(momentum, self._config.momentum) if self._config.nesterov else momentum
        return direction.to(torch.float64 if direction.dtype == torch.float64 else torch.bfloat16)

    def _move(self, parameter: torch.Tensor, group: dict[str, Any], update: torch.Tensor, skip: torch.Tensor) -> None:
        rate = group["lr"] * rate_factor(self._config.adjust_lr, *parameter.shape)
        weight = local(parameter)
        moved = (weight * (1 - group["lr"] * group["weight_decay"])).add_(update, alpha=-rate)
        weight.copy_(torch.where(skip, weight, moved))
