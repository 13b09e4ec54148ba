"""Everything a run tells the world, in one place: console, metrics, wandb, status and the loss curve. Rank 0 only."""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from training.config import RunConfig
from training.console import Console
from training.metrics import EvaluationMetrics, MetricsLog, StepMetrics, read_metrics
from training.plot import plot_loss
from training.run_directory import RunDirectory, State
from training.samples import FedSamples
from training.wandb_log import WandbLog


class Recorder:
    """Writes into the run directory and onto the console what the trainer reports."""

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        """Marks the run as running in its directory, which this process owns. Raises StorageError."""
        self.config = config
        self.directory = directory
        self.running(directory.previous.step if directory.previous else 0)
        self.metrics = MetricsLog(directory.path, directory.attempt)
        self.console = Console(config.train.steps, interactive=sys.stdout.isatty())
        log = config.log
        self.wandb = WandbLog(
            log.wandb, log.wandb_project, directory.path, config.name, asdict(config), self.console.note
        )

    def running(self, step: int) -> None:
        """Put down in status.json that the run stands at `step` and goes on."""
        self.directory.write_status("running", step, "training")

    def step(self, metrics: StepMetrics) -> None:
        """Report a logged step."""
        self.console.step(metrics)
        self.metrics.log_step(metrics)
        self.wandb.log_step(metrics)

    def evaluation(self, step: int, loss: float) -> None:
        """Report an evaluation after `step`."""
        metrics = EvaluationMetrics(step, loss)
        self.console.evaluation(metrics)
        self.metrics.log_evaluation(metrics)
        self.wandb.log_evaluation(metrics)

    def samples(self, step: int, fed: FedSamples) -> None:
        """Record what a step was fed."""
        self.metrics.log_samples(step, fed.ids, fed.crc)

    def summarise(self, unigram_entropy: Callable[[], float] | None) -> None:
        """Say how far the run came, against what knowing nothing and knowing only word frequencies give."""
        records = read_metrics(self.directory.path / "metrics.jsonl")
        losses = [record["loss"] for record in records if "loss" in record]
        evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
        uniform = math.log(self.config.model.vocabulary)
        references = {"ln(vocabulary)": uniform}
        if losses:
            self.console.note(
                f"first loss {losses[0]:.3f}, where guessing blindly gives ln(vocabulary) = {uniform:.3f}"
            )
        if evaluations and unigram_entropy is not None:
            entropy = unigram_entropy()
            references["unigram entropy"] = entropy
            self.console.note(
                f"validation loss {evaluations[-1]:.3f}, {entropy - evaluations[-1]:.3f} nats below the unigram "
                f"entropy of the validation tokens = {entropy:.3f}"
            )
        self._plot(references)

    def close(self, state: State, step: int | None, reason: str) -> None:
        """Write the final status and close what is open; `step` None: where the run stood before this start."""
        if step is None:
            step = self.directory.previous.step if self.directory.previous else 0
        with ExitStack() as stack:
            # Whatever fails here, a full disk say, the others are closed all the same.
            stack.callback(self.directory.release)
            stack.callback(self.wandb.close, exit_code=1 if state == "failed" else 0)
            stack.callback(self.metrics.close)
            stack.callback(self.console.close)
            if state != "completed":
                stack.callback(self._plot, {})
            # Called first, for whoever ends us may not wait for a picture.
            stack.callback(self.directory.write_status, state, step, reason)

    def _plot(self, references: dict[str, float]) -> None:
        """Draw the loss curve; a picture is never worth a run."""
        try:
            picture = plot_loss(self.directory.path, references)
        except Exception as error:
            self.console.note(f"no loss curve: {type(error).__name__}: {error}")
        else:
            if picture is not None:
                self.console.note(f"loss curve: {picture}")
