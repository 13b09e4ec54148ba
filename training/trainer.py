"""The trainer: builds what a run needs, takes up where it stood, and loops over steps."""

import math
import os
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.batches import BatchReader
from data.gpt_dataset import GPTDataset, unigram_entropy
from data.sample_corpus import prepare_sample
from data.splits import Splits, open_splits
from models.gpt import build_meta_model
from parallel.data_parallel import shard_data_parallel
from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from parallel.process_group import ProcessInfo, on_rank_zero, process_group
from training.checkpoint import choose_checkpoint, load_checkpoint, read_manifest, save_checkpoint, verify
from training.config import RunConfig
from training.errors import ConfigError, NonFiniteError, StorageError
from training.metrics import StepMetrics
from training.optimizer import build_optimizer, training_tensors
from training.precision import choose_precision
from training.recorder import Recorder
from training.run_directory import RunDirectory, difference
from training.samples import describe_non_finite, gather_samples
from training.schedule import learning_rate
from training.timing import StepTimer, peak_memory_gb
from training.train_step import StepResult, TrainStep, batch_to_device, count_tokens

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
PREEMPTED = 75
SECONDS_FOR_LAST_WORDS = 1.0


def train(config: RunConfig, overrides: list[str]) -> int:
    """Run a resolved configuration to its end on the ranks that torchrun started; returns the exit code.

    Raises errors that carry an `exit_code` of the contract, the same on every rank.
    """
    with process_group(COLLECTIVE_TIMEOUT) as process:
        standing = on_rank_zero(lambda: check_run_directory(config))
        if standing is not None:
            if process.rank == 0:
                print(standing)
            return 0
        recorder = Recorder(config, overrides) if process.rank == 0 else None
        trainer = None
        try:
            trainer = Trainer(config, process, recorder)
            completed = trainer.run()
        except BaseException as error:
            if recorder is None:
                # torchrun ends all ranks once one has ended, and rank 0 still has to put down why.
                time.sleep(SECONDS_FOR_LAST_WORDS)
            else:
                with suppress(StorageError):  # the first error tells more
                    recorder.close("failed", trainer.step if trainer else 0, f"{type(error).__name__}: {error}")
            raise
        if recorder is not None:
            reason = f"reached train.steps={config.train.steps}" if completed else "train.exit_after"
            recorder.close("completed" if completed else "preempted", trainer.step, reason)
        # torchrun takes every other code for a failure, and restarts.
        return 0 if completed or "TORCHELASTIC_RUN_ID" in os.environ else PREEMPTED


def check_run_directory(config: RunConfig) -> str | None:
    """What to say where the run directory holds this very run, completed; None where there is something to do.

    Raises ConfigError where it holds another run, or this one and `checkpoint.resume=never`.
    """
    directory = RunDirectory(Path(config.run_dir))
    saved, status = directory.saved_config(), directory.read_status()
    metrics = directory.path / "metrics.jsonl"
    holds_run = (directory.path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)
    if not holds_run:
        return None
    differences = [] if saved is None else difference(saved, asdict(config))
    if differences:
        raise ConfigError(
            f"{directory.path} holds another run; choose another name, such as name={config.name}-2, or remove it\n  "
            + "\n  ".join(differences)
        )
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume=never, but {directory.path} holds a run already and the two would mix; choose another "
            f"name, such as name={config.name}-2, or remove it"
        )
    if status is not None and status.state == "completed" and status.step >= config.train.steps:
        return f"{directory.path}: completed at step {status.step}; raise train.steps to continue, or choose a new name"
    return None


class Trainer:
    """One run: model, optimizer, data and where it stands in them."""

    def __init__(self, config: RunConfig, process: ProcessInfo, recorder: Recorder | None) -> None:
        """Collective. Builds or restores everything; `recorder` is there on rank 0 alone."""
        self.config, self.device, self.recorder = config, process.device, recorder
        self.step = 0
        self.consumed_samples = 0
        self.mesh = ParallelMesh(config.parallel, process.device.type)
        self.splits = self._open_data()
        precision = choose_precision(config.train.precision)
        model = build_meta_model(config.model, precision.master)
        self.parameter_count = sum(parameter.numel() for parameter in model.parameters())
        self.data_parallel = shard_data_parallel(
            model, model.sharding_units(), self.mesh, config.parallel.zero, precision.compute
        )
        self._restore_or_initialize()
        self.train_step = TrainStep(
            self.data_parallel, self.optimizer, self.mesh, config.optimizer.clip_grad, self.device
        )
        self.timer = StepTimer()

    def run(self) -> bool:
        """Train until `train.steps`, then True; or until `train.exit_after`, then False."""
        config = self.config
        if self.recorder:
            self.recorder.console.start(config, self.parameter_count, self._device_name())
            self.recorder.running(self.step)
        first_step = self.step
        reader = self._reader(self.splits.train)
        unchecked: StepResult | None = None
        while self.step < config.train.steps and self.step - first_step != config.train.exit_after:
            with self.timer.step():
                with self.timer.waiting_for_data():
                    micro_batches = reader.read(self.consumed_samples)
                result = self.train_step(self.step + 1, micro_batches, learning_rate(config, self.step + 1))
                # The device is busy with this step while the host looks at the one before.
                self._check(unchecked)
                unchecked = result
                if self._log_is_due(self.step + 1):
                    self._check(result)
            self.step += 1
            self.consumed_samples += config.train.global_batch_size
            self._report(result)
            if self._is_due(config.train.eval_interval):
                self._evaluate()
            if self._is_due(config.checkpoint.interval) and self.step < config.train.steps:
                self._check(result)
                self._save()
        self._check(unchecked)
        reader.close()
        return self._finish(first_step)

    def _finish(self, first_step: int) -> bool:
        """Save and sum up; True where the run is complete."""
        completed = self.step >= self.config.train.steps
        if self.step > first_step:
            self._save()
        validation = self.splits.validation
        if completed and self.recorder and validation:
            self.recorder.summarise(lambda: unigram_entropy(validation, self.config.model.vocabulary))
        return completed

    def _open_data(self) -> Splits:
        config = self.config
        if config.data.path is None:
            on_rank_zero(lambda: prepare_sample(config.data, config.out_dir))
        splits = open_splits(config.data, config.out_dir, config.seed, config.seq_length, config.model.vocabulary)
        if config.train.eval_interval and splits.validation is None:
            raise ConfigError(f"train.eval_interval={config.train.eval_interval}, but {splits.absent['validation']}")
        return splits

    def _reader(self, dataset: GPTDataset) -> BatchReader:
        return BatchReader(
            dataset,
            self.config.train.global_batch_size,
            self.config.micro_batch_size,
            self.mesh.dp_rank,
            self.mesh.dp_size,
            self.config.data.num_workers,
        )

    def _restore_or_initialize(self) -> None:
        """Give the model and optimizer their values: of the run's checkpoint, of `checkpoint.load`, or initial ones."""
        config = self.config
        model = self.data_parallel.model
        run_dir, resume = Path(config.run_dir), config.checkpoint.resume
        chosen = None if resume == "never" else choose_checkpoint(run_dir, resume, config.checkpoint.verify)
        if chosen is not None:
            model.to_empty(device=self.device)
        else:
            init_device = torch.device(config.train.init_device or self.device.type)
            materialize(model, config.seed, self.device, init_device)
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(model, config.optimizer)
        if chosen is not None:
            path, manifest = chosen
            self._check_same_run(path, manifest.state)
            load_checkpoint(path, manifest, training_tensors(self.parameters, self.optimizer))
            self.step, self.consumed_samples = manifest.step, manifest.state["consumed_samples"]
            self._note(f"resumed from {path}")
        elif config.checkpoint.load is not None:
            path = Path(config.checkpoint.load)
            manifest = on_rank_zero(lambda: read_manifest(path))
            on_rank_zero(lambda: verify(path, manifest, config.checkpoint.verify))
            weights = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
            load_checkpoint(path, manifest, weights)
            self._note(f"weights from {path}")

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        """Raise ConfigError where a checkpoint is of another model or other data."""
        differences = difference(state["config"], asdict(self.config))
        current = self.splits.fingerprint
        differences += [
            f"data {key}: was {value}, now {current.get(key)}"
            for key, value in state["data"].items()
            if value != current.get(key)
        ]
        if differences:
            raise ConfigError(
                f"{path} is of another run; choose another name, such as name={self.config.name}-2\n  "
                + "\n  ".join(differences)
            )

    def _save(self) -> None:
        state = {
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_samples * self.config.seq_length,
            "config": asdict(self.config),
            "data": self.splits.fingerprint,
            "torch": torch.__version__,
        }
        tensors = training_tensors(self.parameters, self.optimizer)
        save_checkpoint(Path(self.config.run_dir), self.step, tensors, state, self.config.checkpoint.keep)
        if self.recorder:
            self.recorder.running(self.step)

    def _check(self, result: StepResult | None) -> None:
        """Raise NonFiniteError where a step had no finite loss or gradient; all ranks decide alike."""
        if result is None or all(map(math.isfinite, result.numbers.read())):
            return
        raise NonFiniteError(describe_non_finite(result.step, result.local_losses.tolist(), result.micro_batches))

    def _report(self, result: StepResult) -> None:
        config = self.config
        if config.log.sample_ids:
            fed = gather_samples(result.micro_batches)
            if self.recorder and fed:
                self.recorder.samples(self.step, fed)
        if self.recorder is None:
            return
        if not self._log_is_due(self.step):
            self.recorder.console.progress(self.step)
            return
        loss, gradient_norm = result.numbers.read()
        step_ms, data_ms = self.timer.take()
        self.recorder.step(
            StepMetrics(
                step=self.step,
                consumed_samples=self.consumed_samples,
                consumed_tokens=self.consumed_samples * config.seq_length,
                loss=loss,
                lr=learning_rate(config, self.step),
                grad_norm=gradient_norm,
                tokens_per_second=config.train.global_batch_size * config.seq_length / step_ms * 1000,
                step_ms=step_ms,
                data_ms=data_ms,
                mfu=None,
                memory_gb=peak_memory_gb(self.device),
            )
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over `train.eval_steps` global batches of the validation split, the same ones each time."""
        dataset = self.splits.validation
        if dataset is None:
            return
        batch_size = self.config.train.global_batch_size
        batches = min(self.config.train.eval_steps, max(1, dataset.samples_per_epoch // batch_size))
        reader = self._reader(dataset)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index in range(batches):
            on_device = [batch_to_device(batch, self.device) for batch in reader.read(index * batch_size)]
            losses = [self.data_parallel.model(input_ids, labels).double() for input_ids, labels in on_device]
            loss = torch.stack(losses).sum()
            dist.all_reduce(loss, group=self.mesh.data_group)
            totals += torch.stack([loss, count_tokens([labels for _, labels in on_device], self.mesh)])
        self.data_parallel.reshard()
        reader.close()
        loss, tokens = totals.tolist()
        if self.recorder:
            self.recorder.evaluation(self.step, loss / tokens)

    def _is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps and after the last does so now; 0 is never."""
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.train.steps)

    def _log_is_due(self, step: int) -> bool:
        return step % self.config.train.log_interval == 0 or step in (1, self.config.train.steps)

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def _note(self, text: str) -> None:
        if self.recorder:
            self.recorder.console.note(text)
