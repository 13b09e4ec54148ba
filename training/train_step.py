"""One optimizer step: forward and backward over micro-batches, reduce, clip, update; the host waits for nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from core.loss import IGNORED_LABEL
from data.batches import MicroBatch
from monitoring.throughput import Moment
from parallel.data_parallel import Batch, DataParallel
from parallel.gradients import (
    local_gradients,
    partial_parameters,
    scale_gradients,
    square_sum,
    sum_partial_gradients,
)
from parallel.mesh import ParallelMesh
from runtime.fault_injection import Faults, Passing, no_faults
from training.precision import LossScale


class StepNumbers:
    """What a step computed, on its way from the device to the host while the device goes on."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        self.moment = Moment(numbers.device)
        """When they have arrived, which is when the device has taken the step."""

    def read(self) -> tuple[float, float]:
        """(loss a token, gradient norm before clipping), once they have arrived."""
        loss, gradient_norm, *_ = self._values()
        return loss, gradient_norm

    def stop_requested(self) -> bool:
        """Whether any rank had been asked to stop when it took the step, once that has arrived."""
        return self._values()[2] > 0

    def loss_scale(self) -> float | None:
        """What the loss of the step was multiplied by, None where it was not, once that has arrived."""
        return self._values()[3] or None

    def _values(self) -> list[float]:
        self.moment.wait()
        values: list[float] = self._host.tolist()
        return values


@dataclass(frozen=True)
class StepResult:
    """A step that was started: its global numbers, and what this rank fed, to name the rank and samples of a NaN."""

    step: int
    numbers: StepNumbers
    local_losses: torch.Tensor
    micro_batches: Sequence[MicroBatch]


@dataclass(frozen=True)
class Accumulated:
    """What the micro-batches of a step left behind, beside gradients."""

    local_losses: torch.Tensor
    """`[micro_batches]` float64: the summed loss of each on this rank."""
    tokens: torch.Tensor
    """Float64 scalar: tokens of the global batch that count in its loss."""


def batch_to_device(batch: MicroBatch, device: torch.device) -> Batch:
    """Input ids `[micro_batch, seq]`, and labels of that shape and sample indices `[micro_batch]`, on the device."""
    arrays = batch.input_ids, batch.labels, batch.sample_indices
    input_ids, labels, sample_indices = (
        tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
        for tensor in map(torch.from_numpy, arrays)
    )
    return input_ids, {"labels": labels, "sample_indices": sample_indices}


def count_tokens(batches: Sequence[Batch], mesh: ParallelMesh) -> torch.Tensor:
    """Tokens that count in the loss of a global batch, a float64 scalar on the device, equal on all ranks."""
    count = torch.stack([(others["labels"] != IGNORED_LABEL).sum() for _, others in batches]).sum().double()
    dist.all_reduce(count, group=mesh.data_group)
    return count


class TrainStep:
    """Takes steps with a model and its optimizer.

    A non-finite loss or gradient norm on any rank keeps the optimizer from moving on every rank, in this step and in
    all later ones, because the host notices only afterwards. With a loss scale it does so in this step alone: the next
    one has a smaller scale.
    """

    def __init__(
        self,
        data_parallel: DataParallel,
        optimizer: torch.optim.Optimizer,
        mesh: ParallelMesh,
        clip_grad: float,
        device: torch.device,
        loss_scale: LossScale | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.data_parallel = data_parallel
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.mesh = mesh
        self.clip_grad = clip_grad
        self.device = device
        self.loss_scale = loss_scale
        self.faults = faults or Faults()
        tied_duplicates = set(map(id, data_parallel.tied_duplicates))
        self._counted = [parameter for parameter in self.parameters if id(parameter) not in tied_duplicates]
        self._partial = partial_parameters(data_parallel.model, mesh.tensor)
        self._non_finite = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(
        self, step: int, micro_batches: Sequence[MicroBatch], learning_rate: float, *, stop: bool = False
    ) -> StepResult:
        """Start step `step` on this rank's micro-batches of the global batch; `stop` lets all ranks know of a wish."""
        accumulated = self.accumulate(micro_batches, self.faults.of_step(step))
        return self.update(step, accumulated, micro_batches, learning_rate, stop=stop)

    def accumulate(self, micro_batches: Sequence[MicroBatch], passing: Passing = no_faults) -> Accumulated:
        """Leave in every parameter's `grad` the gradient of the mean loss over the global batch, not yet clipped."""
        batches = [batch_to_device(batch, self.device) for batch in micro_batches]
        tokens = count_tokens(batches, self.mesh)

        nan_asked_for = passing("forward")

        def mean(loss: torch.Tensor) -> torch.Tensor:
            nonlocal nan_asked_for
            nan_asked_for = passing("backward") or nan_asked_for
            scaled = loss / tokens.to(loss.dtype)
            return scaled if self.loss_scale is None else scaled * self.loss_scale.scale

        losses = self.data_parallel.forward_backward(batches, mean)
        if passing("grad_sync") or nan_asked_for:
            self._fill_gradients_with_nan()
        sum_partial_gradients(self._partial, self.mesh.tensor)
        if self.loss_scale is not None:
            scale_gradients(local_gradients(self.parameters), 1 / self.loss_scale.scale)
        return Accumulated(losses, tokens)

    def update(
        self,
        step: int,
        accumulated: Accumulated,
        micro_batches: Sequence[MicroBatch],
        learning_rate: float,
        *,
        stop: bool = False,
    ) -> StepResult:
        """Sum loss, squared gradient norm and wishes to stop over all ranks in one collective, clip, and move."""
        if self.faults.at(step, "optimizer"):
            self._fill_gradients_with_nan()
        # Tensor-parallel ranks feed the same samples.
        own_loss = accumulated.local_losses.sum() * (self.mesh.tp_rank == 0)
        totals = torch.stack([own_loss, square_sum(self._counted, self.mesh), own_loss.new_full((), float(stop))])
        dist.all_reduce(totals)
        loss, gradient_norm = totals[0] / accumulated.tokens, totals[1].sqrt()
        scale = loss.new_zeros(()) if self.loss_scale is None else self.loss_scale.scale.double()
        self._move(loss, gradient_norm, learning_rate)
        numbers = StepNumbers(torch.stack([loss, gradient_norm, totals[2], scale]))
        return StepResult(step, numbers, accumulated.local_losses, micro_batches)

    def _fill_gradients_with_nan(self) -> None:
        for gradient in local_gradients(self.parameters):
            gradient.fill_(torch.nan)

    def _move(self, loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float) -> None:
        """Clip and step on the device; fused optimizers skip the step where `found_inf` is 1."""
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        if self.loss_scale is None:
            self._non_finite = torch.maximum(self._non_finite, (~finite).float())
        else:
            self._non_finite = (~finite).float()
            self.loss_scale.update(finite)
        if self.clip_grad:
            scale_gradients(local_gradients(self.parameters), (self.clip_grad / (gradient_norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self.optimizer.found_inf = self._non_finite  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
