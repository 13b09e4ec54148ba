"""A run from its start to its end: who owns its directory, what it may continue, and how its end is put down."""

import math
import os
import shutil
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from checkpoint.directory import DIRECTORY, step_directories, step_name
from checkpoint.manifest import read_manifest, verify
from monitoring.recorder import Recorder
from monitoring.run_directory import LOGS, RunDirectory
from parallel.agreement import on_rank_zero
from parallel.process_group import process_group
from runtime.determinism import make_deterministic, translate_nondeterminism_errors
from runtime.errors import (
    ConfigError,
    DamageError,
    StorageError,
)
from runtime.fault_injection import Faults
from runtime.files import wait_until_visible
from runtime.heartbeat import FOLDER, Heartbeat, watchdog
from runtime.run_files import require_folder, require_writable
from runtime.stop import STOP_FILE, StopRequest, stoppable
from runtime.streams import tell
from settings.config import RunConfig
from settings.stored import difference, refuse_another_run, restore_config
from training.failures import as_peer_error, end_from_thread, flight_records, peer_error, record_failure
from training.resume import GONE_BACK_TO, what_to_resume, why_not_back
from training.trainer import Trainer

PREEMPTED = 75


def train(config: RunConfig, overrides: list[str], began: float) -> int:
    """Run a resolved configuration to its end on the ranks that torchrun started; returns the exit code.

    `began` is when the process did, in seconds of `time.monotonic`: `train.max_minutes` counts from then. Raises errors
    that carry an `exit_code` of the contract. A RunError is the same on every rank, but for PeerError, which the other
    ranks raise when one fails on its own.
    """
    recorder: Recorder | None = None
    logs = Path(config.run_dir) / LOGS

    attempt: int | None = None

    def begin() -> tuple[str | None, int | None]:
        nonlocal recorder
        recorder, standing = _take_directory(config, overrides)
        return standing, recorder.directory.attempt if recorder else None

    if config.train.deterministic:
        make_deterministic(os.environ)
    deadline = math.inf if config.train.max_minutes is None else began + 60 * config.train.max_minutes
    timeout = timedelta(minutes=config.parallel.startup_minutes)
    stopping = stoppable(Path(config.run_dir, STOP_FILE), deadline, says=os.environ.get("RANK", "0") == "0")
    with stopping as stop, process_group(timeout, logs=logs, run=config.run_dir) as process:
        trainer = None
        try:
            faults = Faults(process.rank, os.environ)
            standing, attempt = on_rank_zero(begin)
            if standing is not None:
                if process.rank == 0:
                    tell(standing, sys.stdout)
                    stop.settle(completed=True)
                return 0
            wait_until_visible(logs / FOLDER)
            with Heartbeat(logs, process.rank, timeout.total_seconds()) as heartbeat, translate_nondeterminism_errors():

                def give_up(named: dict[int, str]) -> None:
                    failure = peer_error(named, logs, f"waited for {heartbeat.timeout:.0f} s")
                    end_from_thread(failure, config, process, recorder, trainer.step if trainer else None, attempt)

                with watchdog(heartbeat, give_up):
                    trainer = Trainer(config, process, recorder, stop, heartbeat, faults)
                    completed = trainer.run()
        except BaseException as error:
            patience = 60 * min(config.parallel.startup_minutes, config.parallel.timeout_minutes)
            failure = as_peer_error(error, logs, patience)
            record_failure(failure, config, process, recorder, trainer.step if trainer else None, attempt)
            if failure is error:
                raise
            raise failure from error
        if recorder is not None:
            _close(recorder, stop, trainer.step, completed=completed)
        # torchrun takes every other code for a failure, and restarts.
        return 0 if completed or "TORCHELASTIC_RUN_ID" in os.environ else PREEMPTED


def _close(recorder: Recorder, stop: StopRequest, step: int, *, completed: bool) -> None:
    """Put down that the run is complete, or what stopped it."""
    stop.settle(completed=completed)
    if completed:
        recorder.close("completed", step, f"reached train.steps={step}")
        return
    reason = stop.reason or "a signal to another rank"
    recorder.console.note(f"stopped by {reason} and saved at step {step}: start again to continue")
    recorder.close("preempted", step, reason)


def _take_directory(config: RunConfig, overrides: list[str]) -> tuple[Recorder | None, str | None]:
    """Own the run directory and record the start there; or what to say of a run that is complete."""
    directory = RunDirectory(Path(config.run_dir))
    logs = directory.path / LOGS
    directory.own()
    with ExitStack() as refused:
        refused.callback(directory.leave)
        for folder in (logs, directory.path / DIRECTORY):
            require_folder(folder)
        standing = check_run_directory(directory, config)
        if standing is not None:
            return None, standing
        for folder in (logs, directory.path / DIRECTORY):
            require_writable(folder)
        directory.record_start(config, overrides)
        shutil.rmtree(logs / FOLDER, ignore_errors=True)
        (logs / FOLDER).mkdir(exist_ok=True)
        recorder = Recorder(config, directory)
        refused.pop_all()
    if directory.previous is not None and directory.previous.state == "running" and flight_records(logs):
        recorder.console.note(f"the last start ended without a word; {flight_records(logs)}")
    return recorder, None


def check_run_directory(directory: RunDirectory, config: RunConfig) -> str | None:
    """What to say where the run directory holds this very run, completed; None where there is something to do.

    Raises ConfigError where it holds another run, or this one and `checkpoint.resume=never`; StorageError where its
    checkpoints are gone, or the one wanted is.
    """
    status, resume = directory.previous, config.checkpoint.resume
    checkpoints = directory.path / DIRECTORY
    # Going back, the checkpoint knows of which run it is, and the last start may have been another.
    going_back = what_to_resume(directory.path, resume) not in ("auto", "never")
    if not directory.has_begun:
        return None
    saved = directory.saved_config()
    if saved is not None and not going_back:
        refuse_another_run(str(directory.path), _differences(restore_config(saved), config, checkpoints), config.name)
    if resume == "never":
        raise ConfigError(
            f"checkpoint.resume=never, but {directory.path} holds a run already and the two would mix; choose another "
            f"name, such as name={config.name}-2, or remove it"
        )
    if going_back:
        return None
    if status is not None and status.state == "completed" and status.step >= config.train.steps:
        if step_directories(checkpoints):
            _refuse_a_damaged_end(checkpoints, status.step, config.checkpoint.verify)
        also = f"; {why_not_back(directory.path, resume)}" if resume != "auto" else ""
        said = f"completed at step {status.step}; raise train.steps to continue, or choose a new name"
        return f"{directory.path}: {said}{also}"
    if (directory.saved_step or (checkpoints / "latest").exists()) and not step_directories(checkpoints):
        raise StorageError(
            f"the checkpoints of {directory.path} are gone; restore them, choose another name, or remove the whole "
            "directory to begin again"
        )
    if status is not None and status.state != "completed" and status.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps}, but {directory.path} has taken {status.step} steps already; say as "
            "many as it was started with, or more"
        )
    return None


def _differences(saved: RunConfig, config: RunConfig, checkpoints: Path) -> list[str]:
    """Between the last start and this one."""
    lines = difference(saved, config)
    if step_directories(checkpoints):
        # A checkpoint knows its data by content, wherever that lies.
        return [line for line in lines if not line.startswith("data.path:")]
    before, now = saved.checkpoint.load, config.checkpoint.load
    return lines + ([f"checkpoint.load: was {before or 'null'}, now {now or 'null'}"] if before != now else [])


def _refuse_a_damaged_end(checkpoints: Path, step: int, verify_mode: str) -> None:
    """Raise StorageError where what a completed run was for is not what was written; hashed where that is asked for."""
    path = checkpoints / step_name(step)
    try:
        verify(path, read_manifest(path), "sizes" if verify_mode == "auto" else verify_mode)
    except DamageError as error:
        again = "choose a new name"
        for earlier, _ in [pair for pair in step_directories(checkpoints) if pair[0] < step][:1]:
            again = f"take the last steps again with checkpoint.resume={earlier}"
            if what_to_resume(checkpoints.parent, str(earlier)) == "auto":
                again += f", after you removed {checkpoints / GONE_BACK_TO}"
        raise StorageError(
            f"{checkpoints.parent}: completed at step {step}, but its last checkpoint is damaged: {error}; restore the "
            f"file, or {again}"
        ) from error
