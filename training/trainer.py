"""The trainer: builds what a run needs, takes up where it stood, and loops over steps."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.directory import Retention
from checkpoint.load import choose_checkpoint, files_needed, load_checkpoint
from checkpoint.manifest import Manifest
from checkpoint.save import CheckpointSaver
from data.batches import BatchReader, MicroBatch
from data.gpt_dataset import GPTDataset, unigram_entropy
from data.locations import data_prefix
from data.sample_corpus import prepare_sample
from data.splits import Splits, open_splits
from data.vocabulary import find_tokenizer, tokenizer_digest
from models.gpt import build_meta_model
from monitoring.profiler import StepProfiler
from monitoring.recorder import Recorder
from monitoring.run_directory import LOGS
from monitoring.throughput import StepTimer, device_name
from parallel.agreement import on_rank_zero
from parallel.communication_volume import Traffic
from parallel.initialization import allocate, materialize
from parallel.mesh import ParallelMesh
from parallel.process_group import ProcessInfo, set_timeout
from parallel.schedule_timeline import Action
from parallel.sharding import TensorPart, logical_shapes
from runtime.errors import ConfigError, StorageError
from runtime.fault_injection import Faults
from runtime.files import wait_until_visible
from runtime.garbage_collection import collection_every
from runtime.heartbeat import Heartbeat
from runtime.stop import StopRequest
from settings.checks.batch import check_batch_epochs
from settings.config import RunConfig
from settings.stored import changed_settings, config_of
from training.build import assemble, compiled_parts
from training.checkpointing import CheckpointManager
from training.compilation import decide_compilation
from training.initial_weights import load_weights
from training.learning_rate import learning_rate
from training.optimizer import build_optimizer, sync_tied_weights, training_tensors
from training.precision import build_loss_scale
from training.resume import check_same_run, go_back, what_to_resume, why_not_back
from training.step_log import StepLog
from training.train_step import StepNumbers, StepResult, TrainStep, batch_to_device, count_tokens


class Trainer:
    """One run: model, optimizer, data and where it stands in them."""

    def __init__(
        self,
        config: RunConfig,
        process: ProcessInfo,
        recorder: Recorder | None,
        stop: StopRequest,
        heartbeat: Heartbeat,
        faults: Faults,
    ) -> None:
        """Collective. Builds or restores everything; `recorder` is there on rank 0 alone."""
        self.heartbeat, self.faults = heartbeat, faults
        self.config, self.device, self.recorder, self.stop = config, process.device, recorder, stop
        self.step = 0
        self.evaluated_step, self.eval_loss = -1, math.nan
        self.consumed_samples = 0
        self.batches = config.batches
        self.evaluation_due = False
        self.mesh = ParallelMesh(config.parallel, process.device.type)
        self.splits = self._open_data()
        self.compilation = decide_compilation(config, process.device.type)
        on_rank_zero(self._record_compilation)
        self.data_parallel = assemble(config, self.mesh, process.device, compile_layers=self.compilation.layers)
        if config.parallel.pp > 1:
            self.data_parallel.observer = self._observe  # type: ignore[attr-defined]
        self.shapes = logical_shapes(build_meta_model(config.model, torch.float32))
        self.parameter_count = config.model.parameter_count()
        self._restore_or_initialize()
        how = config.checkpoint
        keep = Retention(how.keep, how.keep_every, how.keep_best)
        saver = CheckpointSaver(
            Path(config.run_dir),
            keep,
            asynchronous=how.asynchronous,
            faults=faults,
            require_owner=lambda: recorder.directory.ownership.check() if recorder else None,
        )
        saver.require_space(self._tensors())
        self.checkpoints = CheckpointManager(saver, how.max_failures, heartbeat, stop, recorder, self.step)
        self.train_step = TrainStep(
            self.data_parallel,
            self.optimizer,
            self.mesh,
            config.optimizer.clip_grad,
            self.device,
            self.loss_scale,
            faults,
        )
        self.timer = StepTimer(self.device)
        self.started_from = self.step

    def run(self) -> bool:
        """Train until `train.steps`, then True; or until all ranks stop for `stop.reason`, then False."""
        train = self.config.train
        if self.recorder:
            self.recorder.console.start(self.config, self.parameter_count, device_name(self.device))
            if train.compile is None and self.device.type == "cuda":
                self._note(f"compile  {self.compilation}")
            self.recorder.start(self.step)
        self.stop.graceful = True
        steps = train.profile_steps if self.recorder else range(0)
        folder = Path(self.config.run_dir) / LOGS / "profile"
        profiler = StepProfiler(steps, folder, self.device, self._note, self.timer.pause)
        with collection_every(train.gc_interval) as collect_garbage:
            if not (self.evaluation_due and self._evaluate()):
                self._loop(profiler, collect_garbage)
            completed = self._finish()
        profiler.close()  # not after an error: a device that hangs would be waited for
        return completed

    def _loop(self, profiler: StepProfiler, collect_garbage: Callable[[int], None]) -> None:
        train, stopping = self.config.train, False
        reader = self._reader(self.splits.train, self.batches.size_at)
        log = self._step_log()
        while self.step < train.steps and not stopping:
            step = self.step + 1
            profiler.begin(step)
            self.heartbeat.step = step
            with self.timer.waiting_for_data(), self.heartbeat.during("reading data"):
                self.faults.at(step, "data")
                micro_batches = reader.read(self.consumed_samples)
            with self._timeline(step):
                result = self._take_step(step, micro_batches)
                # The device is busy with this step while the host looks at the one before.
                stopping = log.look()
                self.step = step
                self.consumed_samples += self.batches.size_at(self.consumed_samples)
                log.put(result, self.consumed_samples)
            # Looking through all that the first step has left takes long, which is no part of the second one.
            with self.timer.pause() if step == self.started_from + 1 else nullcontext():
                collect_garbage(step)
            profiler.end(step)
            self.checkpoints.poll()
            self.evaluation_due = self._is_due(train.eval_interval)
            if self.evaluation_due and not stopping:
                stopping = log.look() or self._evaluate()
            if step - self.started_from == train.exit_after:
                self.stop.ask("train.exit_after")
                stopping = True
            if self._is_due(self.config.checkpoint.interval) and step < train.steps and not stopping:
                log.look()  # no checkpoint is made of a step whose numbers nobody knows
                with self.timer.pause():
                    self.checkpoints.save(step, self._tensors(), self._state())
                    stopping = self._any_wish_to_stop()
        log.look()
        reader.close()

    def _step_log(self) -> StepLog:
        return StepLog(
            self.config,
            self.mesh,
            self.device,
            self.recorder,
            self.faults,
            self.timer,
            self.checkpoints.pop_stall_ms,
            step=self.step,
            consumed_samples=self.consumed_samples,
        )

    def _take_step(self, step: int, micro_batches: Sequence[MicroBatch]) -> StepResult:
        stop, begin, first = self._wishes_to_stop(), time.perf_counter(), step == self.started_from + 1
        compiled = compiled_parts(self.config, self.mesh, compile_layers=self.compilation.layers) if first else None
        if compiled is not None:
            self._note(f"step {step} takes longer: it compiles {compiled}")
        counting = Traffic(self.mesh) if first and dist.get_world_size() > 1 else nullcontext()
        # Stages say themselves what they do, and wait in between.
        doing = None if self.config.parallel.pp > 1 else "forward and backward passes"
        with counting as traffic, self.heartbeat.during(doing):
            result = self.train_step(step, micro_batches, learning_rate(self.config, step), stop=stop)
        if self.recorder and traffic is not None:
            self.recorder.console.traffic(traffic.bytes)
        if first:
            timeout = timedelta(minutes=self.config.parallel.timeout_minutes)
            set_timeout(timeout, self.device.type)
            self.heartbeat.timeout = timeout.total_seconds()
        if compiled is not None:
            result.numbers.read()
            self._note(f"compiled in {time.perf_counter() - begin:.0f} s, the step itself included")
        return result

    def _observe(self, action: Action) -> AbstractContextManager[None]:
        if action.kind != "F":
            self.faults.at(self.step + 1, "backward")
        return self.heartbeat.during(str(action))

    @contextmanager
    def _timeline(self, step: int) -> Iterator[None]:
        """Draws the pipeline's schedule of the step within, if it is the one that was asked for."""
        if step != self.config.train.timeline_step:
            yield
            return
        from monitoring.pipeline_timeline import draw_step, recorded

        layout = self.config.parallel
        with recorded(self.data_parallel, self.mesh) as spans:
            yield
        path = Path(self.config.run_dir) / LOGS / f"timeline_step_{step}.png"
        title = f"step {step}, {layout.pp_schedule}, {layout.stages} stages"
        with self.timer.pause():
            try:
                draw_step(spans, self.mesh, title, path)
            except (OSError, StorageError) as error:  # on rank 0, once all have met
                self._note(f"no timeline of step {step}: {error}")
            else:
                self._note(f"timeline of step {step}: {path}")

    def _wishes_to_stop(self) -> bool:
        if self.recorder:
            self.stop.look()
            if self.recorder.directory.ownership.lost:
                self.stop.ask("the loss of its run directory")
            if self.recorder.metrics.lost:
                self.stop.ask("metrics that can neither be written nor kept in memory")
        return self.stop.reason is not None

    def _any_wish_to_stop(self) -> bool:
        """Collective, and the host waits for it: only for where ranks have just waited for each other anyway."""
        wish = torch.tensor(float(self._wishes_to_stop()))
        dist.all_reduce(wish)
        return wish.item() > 0

    def _finish(self) -> bool:
        """Save and sum up; True where the run is complete."""
        completed = self.step >= self.config.train.steps and not self.evaluation_due
        self.checkpoints.wait()
        if self.step > self.started_from and self.checkpoints.saved_step != self.step:
            self.checkpoints.save_last(self.step, self._tensors(), self._state())
        validation = self.splits.validation
        if completed and self.recorder:
            vocabulary = self.config.model.vocabulary
            self.recorder.summarise((lambda: unigram_entropy(validation, vocabulary)) if validation else None)
        return completed

    def _open_data(self) -> Splits:
        config = self.config
        if config.data.path is None:
            on_rank_zero(lambda: prepare_sample(config.data, config.out_dir))

        def open_all(digests: dict[str, str] | None = None) -> Splits:
            vocabulary = config.model.vocabulary
            return open_splits(config.data, config.out_dir, config.seed, config.seq_length, vocabulary, digests)

        # Rank 0 first: what is wrong with the data is then said once, by all ranks alike; and it hashes for all.
        digests = on_rank_zero(lambda: open_all().digests)
        wait_until_visible(Path(f"{data_prefix(config.data, config.out_dir)}.idx"))
        splits = open_all(digests)
        if problems := list(check_batch_epochs(config, splits.train.samples_per_epoch)):
            raise ConfigError(*problems)
        self.tokenizer_digest = on_rank_zero(self._keep_tokenizer)
        if config.train.eval_interval and splits.validation is None:
            raise ConfigError(f"train.eval_interval={config.train.eval_interval}, but {splits.absent['validation']}")
        return splits

    def _keep_tokenizer(self) -> str | None:
        """Keeps the data's tokenizer in the run directory; returns the digest of its file, if it is one."""
        tokenizer = find_tokenizer(self.config.data, self.config.out_dir)
        if self.recorder:
            self.recorder.directory.keep_tokenizer(tokenizer)
        return tokenizer_digest(tokenizer)

    def _record_compilation(self) -> None:
        if self.recorder:
            self.recorder.directory.record_environment({"compile": asdict(self.compilation)})

    def _reader(self, dataset: GPTDataset, batch_size: Callable[[int], int]) -> BatchReader:
        return BatchReader(
            dataset,
            batch_size,
            self.config.micro_batch_size,
            self.mesh.dp_rank,
            self.mesh.dp_size,
            self.config.data.num_workers,
        )

    def _restore_or_initialize(self) -> None:
        """Give the model and optimizer their values: of the run's checkpoint, of `checkpoint.load`, or initial ones."""
        config, model = self.config, self.data_parallel.model
        run_dir = Path(config.run_dir)
        resume = on_rank_zero(lambda: what_to_resume(run_dir, config.checkpoint.resume))
        chosen = None
        if resume != "never":
            parameters = dict(model.named_parameters())
            chosen = choose_checkpoint(
                run_dir,
                resume,
                config.checkpoint.verify,
                lambda manifest: files_needed(manifest, parameters, self.shapes),
                owned=True,
            )
        if chosen is not None:
            allocate(model, self.device)
        else:
            materialize(model, config.seed, self.device, self._init_device())
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(model, config.optimizer, self.shapes)
        self.loss_scale = build_loss_scale(config.train, self.device)
        if chosen is not None:
            self._resume(*chosen, going_back=resume != "auto")
        elif config.checkpoint.load is not None:
            load_weights(config.checkpoint.load, self.parameters, self.shapes, config)
            self._note(f"weights from {config.checkpoint.load}")
        sync_tied_weights(model, self.parameters, self.optimizer)
        if chosen is None and self.recorder and (run_dir / "metrics.jsonl").stat().st_size:
            self._note(f"{run_dir} was started before but holds no checkpoint: starting from step 0 again")

    def _resume(self, path: Path, manifest: Manifest, *, going_back: bool) -> None:
        """Go on from a checkpoint. Raises ConfigError where it is of another run."""
        saved = config_of(path, manifest)
        check_same_run(path, manifest, saved, self.config, self.splits.fingerprint)
        tensors = self._tensors()
        before, now = saved.optimizer.name, self.config.optimizer.name
        if before != now:
            tensors = {name: part for name, part in tensors.items() if name.startswith("model.")}
            self._note(f"the state of {before} is dropped, as checkpoint.drop_moments asks: {now} begins with none")
        verified = self.config.checkpoint.verify
        unseen = {"sizes": ", of whose files only the sizes were compared", "off": ", which was not verified"}
        try:
            load_checkpoint(path, manifest, tensors)
        except StorageError as error:
            if verified not in unseen:
                raise
            raise StorageError(f"{error}; checkpoint.verify=auto passes over what is damaged") from error
        self.step = manifest.step
        self.consumed_samples = manifest.state["consumed_samples"]
        if self.loss_scale and manifest.state.get("loss_scale"):
            self.loss_scale.restore(manifest.state["loss_scale"])
        # A run that was stopped before or in an evaluation makes up for it.
        pending = manifest.state.get("evaluation_due", False)
        self.evaluation_due = pending and self._is_due(self.config.train.eval_interval)
        self._note(f"resumed from {path}{unseen.get(verified, '')}")
        if changed := changed_settings(saved, self.config):
            self._note("\n  ".join([f"settings that were others when step {self.step} was saved:", *changed]))
        # Checkpoints of older versions do not say it: their configuration always did.
        self._say_what_compiling_changes(manifest.state.get("compiled_layers", saved.train.compile))
        self._warn_about_ignored_settings(saved, going_back=going_back)
        if going_back and (left := on_rank_zero(lambda: go_back(path.parent, self.step))):
            self._note(f"the course after step {self.step} is left: {', '.join(left)} may be removed")

    def _init_device(self) -> torch.device:
        kind = self.config.train.init_device or self.device.type
        if kind == "cuda" and self.device.type != "cuda":
            raise ConfigError("train.init_device=cuda, but there is no CUDA device; use train.init_device=cpu or null")
        return torch.device(kind)

    def _say_what_compiling_changes(self, before: object) -> None:
        now = self.compilation.layers
        if isinstance(before, bool) and before != now:
            self._note(
                f"up to step {self.step} layers were {'' if before else 'not '}compiled, from here on they are"
                f"{'' if now else ' not'} ({self.compilation.reason}): numbers differ in rounding from those of a run "
                f"that does not change; train.compile={str(before).lower()} keeps to what was"
            )

    def _warn_about_ignored_settings(self, saved: RunConfig, *, going_back: bool) -> None:
        wanted = self.config.checkpoint
        if wanted.resume != "auto" and not going_back:
            self._note(why_not_back(Path(self.config.run_dir), wanted.resume))
        saved_before = self.recorder.directory.saved_step if self.recorder else 0
        if saved_before > self.step and not going_back:
            self._note(f"the checkpoint of step {saved_before}, which was saved before, is gone or damaged")
        if wanted.load not in (None, saved.checkpoint.load):
            self._note(
                f"checkpoint.load={wanted.load} is not taken, as the run goes on from its own checkpoint; another "
                f"name, such as name={self.config.name}-2, starts with those weights"
            )

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        evaluated = self.evaluated_step == self.step and math.isfinite(self.eval_loss)
        return {
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_samples * self.config.seq_length,
            "evaluation_due": self.evaluation_due,
            "eval_loss": self.eval_loss if evaluated else None,
            "config": asdict(self.config),
            "data": self.splits.fingerprint,
            "tokenizer_sha256": self.tokenizer_digest,
            "loss_scale": self.loss_scale.state() if self.loss_scale else None,
            "compiled_layers": self.compilation.layers,
            "torch": torch.__version__,
            "saved": datetime.now().isoformat(" ", "seconds"),
        }

    def _tensors(self) -> dict[str, TensorPart]:
        return training_tensors(self.parameters, self.optimizer, self.shapes)

    def _evaluate(self) -> bool:
        with self.timer.pause(), self.heartbeat.during("evaluation"):
            return self._evaluate_validation()

    @torch.no_grad()
    def _evaluate_validation(self) -> bool:
        """Mean loss over `train.eval_steps` global batches of the validation split, the same ones each time.

        Returns whether a rank wishes to stop, which cuts the evaluation short; it then stays due.
        """
        dataset = self.splits.validation
        if dataset is None:
            return False
        batch_size = self.config.train.global_batch_size
        batches = min(self.config.train.eval_steps, max(1, dataset.samples_per_epoch // batch_size))
        reader = self._reader(dataset, lambda _: batch_size)
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        before = numbers = StepNumbers(totals)
        for index in range(batches):
            # As in training: the device is busy with the last batch while the host looks at the one before.
            if before.stop_requested():
                break
            on_device = [batch_to_device(batch, self.device) for batch in reader.read(index * batch_size)]
            losses = self.data_parallel.evaluate([(ids, {"labels": others["labels"]}) for ids, others in on_device])
            loss = losses.sum() * (self.mesh.tp_rank == 0)
            summed = torch.stack([loss, loss.new_full((), float(self._wishes_to_stop()))])
            dist.all_reduce(summed)
            tokens = count_tokens(on_device, self.mesh)
            totals += torch.stack([summed[0], tokens, summed[1]])
            before, numbers = numbers, StepNumbers(totals)
        else:
            self.evaluation_due = False
            total_loss, total_tokens = numbers.read()
            self.evaluated_step, self.eval_loss = self.step, total_loss / total_tokens
            if self.recorder:
                self.recorder.evaluation(self.step, self.eval_loss)
        self.data_parallel.reshard()
        reader.close()
        return numbers.stop_requested()

    def _is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps and after the last does so now; 0 is never."""
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.train.steps)

    def _note(self, text: str) -> None:
        if self.recorder:
            self.recorder.console.note(text)
