"""Everything a run tells the world, in one place: console, metrics, mirrors, status, the loss curve. Rank 0 only."""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from monitoring.console import Console
from monitoring.metrics import Curves, EvaluationMetrics, MetricsLog, StepMetrics, read_curves
from monitoring.plot import plot_loss
from monitoring.run_directory import RunDirectory, State
from monitoring.samples import FedSamples
from monitoring.trackers import Mirror, open_tensorboard, open_wandb
from runtime.errors import StorageError
from runtime.messages import humanise
from runtime.streams import LenientStream
from settings.config import RunConfig

DATA_WAIT_LIMIT = 0.05
"""Share of a step above which waiting for data is worth a warning."""


class Recorder:
    """Writes into the run directory and onto the console what the trainer reports."""

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        """Marks the run as running in its directory, which this process owns. Raises StorageError."""
        self.config = config
        self.directory = directory
        directory.write_status("running", directory.previous.step if directory.previous else 0, "starting")
        self.metrics = MetricsLog(directory.path, directory.attempt, self._note, directory.ownership)
        self.console = Console(config.train.steps, interactive=LenientStream(sys.stdout).isatty())
        self._status_fails = False
        self._mirrors: list[Mirror] = []
        self._intervals = 0
        self._data_is_late = False

    def start(self, step: int) -> None:
        """Put down that the run goes on from `step`, and open what its metrics are repeated to."""
        self.running(step)
        log, run_dir, note = self.config.log, self.directory.path, self.console.note
        train = self.config.train
        for key, last in ("profile", max(train.profile_steps, default=None)), ("timeline_step", train.timeline_step):
            if last is not None and last <= step:
                note(f"train.{key}={getattr(train, key)} records nothing: the run goes on from step {step}")
        self._mirrors = [open_wandb(log.wandb, log.wandb_project, run_dir, self.config.name, asdict(self.config), note)]
        if log.tensorboard:
            self._mirrors.append(open_tensorboard(run_dir, step, note))

    def running(self, step: int) -> None:
        """Put down in status.json that the run goes on from `step`, of which there is a checkpoint, or which is 0.

        Where that cannot be written it is said once, and tried again the next time. Raises RunDirectoryError.
        """
        self.directory.saved_step = step
        try:
            self.directory.write_status("running", step, "training")
        except StorageError as error:
            if not self._status_fails:
                self.console.note(f"{error}; training goes on")
            self._status_fails = True
        else:
            self._status_fails = False

    def step(self, metrics: StepMetrics) -> None:
        """Report a logged step."""
        self.console.step(metrics)
        self.metrics.log_step(metrics)
        for mirror in self._mirrors:
            mirror.log_step(metrics)
        self._intervals += 1
        if self._intervals > 1:  # the first one starts threads, compiles, and fills caches
            self._comment(metrics)

    def _comment(self, metrics: StepMetrics) -> None:
        """Say what the line of a step has no room for: once a start, or once until it gets better."""
        if self._intervals == 2 and metrics.tokens_per_second_per_gpu != metrics.tokens_per_second:
            self.console.note(f"speed  {humanise(metrics.tokens_per_second_per_gpu)} tok/s a rank")
        share = metrics.data_ms / metrics.step_ms
        if share > DATA_WAIT_LIMIT and not self._data_is_late:
            self._data_is_late = True
            self.console.note(
                f"slow data: rank 0 waited for its batches {share:.0%} of the time since the last line; "
                f"try data.num_workers={2 * self.config.data.num_workers or 1}, or faster storage for the data"
            )
        elif share < DATA_WAIT_LIMIT / 2:  # not at once below the limit, or it would be said at every other line
            self._data_is_late = False

    def evaluation(self, step: int, loss: float) -> None:
        """Report an evaluation after `step`."""
        metrics = EvaluationMetrics(step, loss)
        self.console.evaluation(metrics)
        self.metrics.log_evaluation(metrics)
        for mirror in self._mirrors:
            mirror.log_evaluation(metrics)

    def samples(self, step: int, fed: FedSamples) -> None:
        """Record what a step was fed."""
        self.metrics.log_samples(step, fed.ids, fed.crc)

    def summarise(self, unigram_entropy: Callable[[], float] | None) -> None:
        """Say how far the run came, against what knowing nothing and knowing only word frequencies give."""
        curves = self._read_curves()
        if curves is None:
            return
        losses, evaluations = curves.training.finite().values, curves.validation.finite()
        uniform = math.log(self.config.model.vocabulary)
        references = {"ln(vocabulary)": uniform}
        if losses:
            self.console.note(
                f"first loss {losses[0]:.3f}, where guessing blindly gives ln(vocabulary) = {uniform:.3f}"
            )
        if evaluations.steps and unigram_entropy is not None:
            entropy = unigram_entropy()
            references["unigram entropy"] = entropy
            step, loss = evaluations.steps[-1], evaluations.values[-1]
            side = "below" if loss <= entropy else "above"
            self.console.note(
                f"validation loss {loss:.3f} at step {step}, {abs(entropy - loss):.3f} nats {side} the unigram entropy "
                f"of the validation tokens = {entropy:.3f}"
            )
        self._plot(curves, references)

    def close(self, state: State, step: int | None, reason: str) -> None:
        """Write the final status and close what is open; `step` None: where the run stood before this start.

        Raises StorageError that says everything that could not be written, lines that had waited in memory too, and
        RunDirectoryError where the directory is another job's by now, or gone.
        """
        if step is None:
            step = self.directory.previous.step if self.directory.previous else 0
        failures: list[str] = []

        def attempt(action: Callable[..., None], *arguments: object) -> None:
            try:
                action(*arguments)
            except StorageError as error:
                failures.append(str(error))

        with ExitStack() as stack:
            # Whatever fails here, a full disk say, the others are closed all the same.
            stack.callback(self.directory.ownership.release)
            for mirror in self._mirrors:
                stack.callback(mirror.close, failed=state == "failed")
            stack.callback(attempt, self.metrics.close)
            if state != "completed" and self._intervals and not self.directory.ownership.lost:
                stack.callback(self._read_and_plot)
            # The status before the picture: a launcher whose other ranks have ended may not leave time for both.
            stack.callback(attempt, self.directory.write_status, state, step, reason)
            stack.callback(self.console.close)
        if failures:
            raise StorageError("\n".join(failures))

    def _note(self, text: str) -> None:
        self.console.note(text)

    def _read_and_plot(self) -> None:
        curves = self._read_curves()
        if curves is not None:
            self._plot(curves, {})

    def _read_curves(self) -> Curves | None:
        try:
            return read_curves(self.directory.path / "metrics.jsonl")
        except OSError as error:
            self.console.note(f"no loss curve: metrics.jsonl cannot be read: {error.strerror}")
            return None

    def _plot(self, curves: Curves, references: dict[str, float]) -> None:
        """Draw the loss curve; a picture is never worth a run."""
        try:
            picture = plot_loss(self.directory.path, curves, references)
        except Exception as error:
            self.console.note(f"no loss curve: {type(error).__name__}: {error}")
        else:
            if picture is not None:
                self.console.note(f"loss curve: {picture}")
