"""One optimizer step: forward and backward over micro-batches, reduce, clip, update; the host waits for nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from core.loss import IGNORED_LABEL
from data.batches import MicroBatch
from parallel.data_parallel import DataParallel
from parallel.gradients import local_gradients, scale_gradients, square_sum
from parallel.mesh import ParallelMesh


class StepNumbers:
    """What a step computed, on its way from the device to the host while the device goes on."""

    def __init__(self, numbers: torch.Tensor) -> None:
        on_gpu = numbers.is_cuda
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        self._host.copy_(numbers, non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event() if on_gpu else None

    def read(self) -> tuple[float, float]:
        """(loss a token, gradient norm before clipping), once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, gradient_norm = self._host.tolist()
        return loss, gradient_norm


@dataclass(frozen=True)
class StepResult:
    """A step that was started: its global numbers, and what this rank fed, to name the culprit of a NaN."""

    step: int
    numbers: StepNumbers
    local_losses: torch.Tensor
    micro_batches: Sequence[MicroBatch]


def batch_to_device(batch: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, each `[micro_batch, seq]`, on the device."""
    host = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    if device.type != "cuda":
        return host
    input_ids, labels = (tensor.pin_memory().to(device, non_blocking=True) for tensor in host)
    return input_ids, labels


def count_tokens(labels: Sequence[torch.Tensor], mesh: ParallelMesh) -> torch.Tensor:
    """Tokens that count in the loss of a global batch, a float64 scalar on the device, equal on all ranks."""
    count = torch.stack([(part != IGNORED_LABEL).sum() for part in labels]).sum().double()
    dist.all_reduce(count, group=mesh.data_group)
    return count


class TrainStep:
    """Takes steps with a model and its optimizer.

    A non-finite loss or gradient norm on any rank keeps the optimizer from moving on every rank, in this step and in
    all later ones, because the host notices only afterwards.
    """

    def __init__(
        self,
        data_parallel: DataParallel,
        optimizer: torch.optim.Optimizer,
        mesh: ParallelMesh,
        clip_grad: float,
        device: torch.device,
    ) -> None:
        self.data_parallel = data_parallel
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.mesh = mesh
        self.clip_grad = clip_grad
        self.device = device
        self._non_finite = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self, step: int, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Start step `step` on this rank's micro-batches of the global batch."""
        local_losses, tokens = self._forward_backward(micro_batches)
        gradients = local_gradients(self.parameters)
        totals = torch.stack([local_losses.sum(), square_sum(gradients, self.mesh)])
        dist.all_reduce(totals, group=self.mesh.data_group)
        loss, gradient_norm = totals[0] / tokens, totals[1].sqrt()
        self._update(gradients, loss, gradient_norm, learning_rate)
        return StepResult(step, StepNumbers(torch.stack([loss, gradient_norm])), local_losses, micro_batches)

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Accumulate gradients of the mean loss over the global batch.

        Returns this rank's summed losses `[micro_batches]` and the tokens of the global batch, both float64.
        """
        batches = [batch_to_device(batch, self.device) for batch in micro_batches]
        tokens = count_tokens([labels for _, labels in batches], self.mesh)
        losses = []
        for index, (input_ids, labels) in enumerate(batches):
            self.data_parallel.before_micro_batch(last=index == len(batches) - 1)
            loss = self.data_parallel.model(input_ids, labels)
            losses.append(loss.detach().double())
            (loss / tokens.to(loss.dtype)).backward()
        return torch.stack(losses), tokens

    def _update(
        self, gradients: list[torch.Tensor], loss: torch.Tensor, gradient_norm: torch.Tensor, learning_rate: float
    ) -> None:
        """Clip and step on the device; fused optimizers skip the step where `found_inf` is 1."""
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        self._non_finite = torch.maximum(self._non_finite, (~finite).float())
        if self.clip_grad:
            scale_gradients(gradients, (self.clip_grad / (gradient_norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.found_inf = self._non_finite  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
