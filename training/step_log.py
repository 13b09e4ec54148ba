"""What becomes of a step's numbers: the host looks at them while the device takes the next step, then logs them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from monitoring.metrics import StepMetrics
from monitoring.recorder import Recorder
from monitoring.samples import describe_non_finite, gather_samples
from monitoring.throughput import Moment, StepTimer, device_name, model_flops_utilization, peak_memory_gb
from parallel.mesh import ParallelMesh
from runtime.errors import NonFiniteError
from runtime.fault_injection import Faults
from settings.config import RunConfig
from training.learning_rate import learning_rate
from training.train_step import StepResult


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device was given, and what the host knew of it then."""

    result: StepResult
    consumed_samples: int
    """After the step."""
    memory_gb: float


class StepLog:
    """Holds back the numbers of the last step until they are asked for, which should be once the next one is launched.

    Numbers are looked at in the order of steps. Before an evaluation, a checkpoint or the end of a run somebody has to
    call `look`, so that the line of a step comes before what follows it, and nothing is made of a step whose numbers
    nobody knows.

    Args:
        recorder: on rank 0 alone.
        checkpoint_stall: milliseconds that saves held training up since it was last asked.
        step: that the run goes on from, with the samples consumed until then.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: ParallelMesh,
        device: torch.device,
        recorder: Recorder | None,
        faults: Faults,
        timer: StepTimer,
        checkpoint_stall: Callable[[], float],
        *,
        step: int,
        consumed_samples: int,
    ) -> None:
        self._config, self._mesh, self._device = config, mesh, device
        self._recorder, self._faults, self._timer = recorder, faults, timer
        self._checkpoint_stall = checkpoint_stall
        self._launched: LaunchedStep | None = None
        self._logged_step, self._logged_samples, self._logged_moment = step, consumed_samples, Moment(device)
        self._goes_on_from = step
        self._waited, self._paused = 0.0, 0.0
        timer.take()  # of what was before this moment

    def put(self, result: StepResult, consumed_samples: int) -> None:
        """Keep a step that was just launched, once the one before was looked at."""
        if self._launched is not None:
            raise RuntimeError(f"step {self._launched.result.step} was not looked at before step {result.step} came")
        waited, paused = self._timer.take()
        self._waited, self._paused = self._waited + waited, self._paused + paused
        self._launched = LaunchedStep(result, consumed_samples, peak_memory_gb(self._device))

    def look(self) -> bool:
        """Wait for the numbers of the step that was put last, unless they were looked at already, and log the step.

        Returns whether any rank wished to stop when it launched the step. Collective. Raises NonFiniteError on all
        ranks where the step had no finite loss or gradient.
        """
        launched, self._launched = self._launched, None
        if launched is None:
            return False
        result = launched.result
        self._check(result)
        self._faults.at(result.step, "log")
        if self._config.log.sample_ids:
            fed = gather_samples(result.micro_batches, self._mesh)
            if self._recorder and fed:
                self._recorder.samples(result.step, fed)
        if self._recorder and not self._is_due(result.step):
            self._recorder.console.progress(result.step)
        elif self._recorder:
            self._recorder.step(self._metrics(launched))
        return result.numbers.stop_requested()

    def _check(self, result: StepResult) -> None:
        """Raise NonFiniteError where a step had no finite loss or gradient; all ranks decide alike.

        With a loss scale such a step was skipped, and it is an error once the scale is as small as 1.
        """
        if all(map(math.isfinite, result.numbers.read())):
            return
        scale = result.numbers.loss_scale()
        if scale is not None and scale > 1:
            if self._recorder:
                self._recorder.console.note(
                    f"step {result.step} is skipped: float16 overflows at loss scale {scale:.0f}, which is halved"
                )
            return
        losses = result.local_losses.tolist()
        reason = describe_non_finite(result.step, losses, result.micro_batches, self._mesh)
        if scale is not None:
            reason = f"float16 overflows even at a loss scale of {scale:g}, try train.precision=bf16; {reason}"
        if 0 < result.step - 1 == self._goes_on_from:
            reason += (
                f"; no step was taken since step {self._goes_on_from}, so its weights may be too large for any rate: "
                "checkpoint.resume=STEP goes back to an older checkpoint"
            )
        raise NonFiniteError(reason)

    def _metrics(self, launched: LaunchedStep) -> StepMetrics:
        """The line of a step; rates are of the steps since the last line."""
        config, numbers, step = self._config, launched.result.numbers, launched.result.step
        steps, samples = step - self._logged_step, launched.consumed_samples - self._logged_samples
        seconds = numbers.moment.seconds_since(self._logged_moment) - self._paused
        data_ms = 1000 * self._waited / steps
        self._logged_step, self._logged_samples = step, launched.consumed_samples
        self._logged_moment, self._waited, self._paused = numbers.moment, 0.0, 0.0
        loss, gradient_norm = numbers.read()
        tokens_per_second = samples * config.seq_length / seconds
        return StepMetrics(
            step=step,
            consumed_samples=launched.consumed_samples,
            consumed_tokens=launched.consumed_samples * config.seq_length,
            loss=loss,
            lr=learning_rate(config, step),
            grad_norm=gradient_norm,
            tokens_per_second=tokens_per_second,
            tokens_per_second_per_gpu=tokens_per_second / (config.world_size or 1),
            step_ms=1000 * seconds / steps,
            data_ms=data_ms,
            mfu=model_flops_utilization(config, tokens_per_second, device_name(self._device)),
            memory_gb=launched.memory_gb,
            loss_scale=numbers.loss_scale(),
            checkpoint_stall_ms=self._checkpoint_stall(),
        )

    def _is_due(self, step: int) -> bool:
        return step % self._config.train.log_interval == 0 or step in (1, self._config.train.steps)
