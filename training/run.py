"""A run from its start to its end: who owns its directory, what it may continue, and how its end is put down."""

import math
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from data.files import wait_until_visible
from parallel.process_group import FLIGHT_RECORD, ProcessInfo, is_peer_failure, on_rank_zero, process_group
from training.checkpoint import DIRECTORY
from training.checkpoint_storage import step_directories, step_name
from training.config import RunConfig
from training.determinism import make_deterministic, refusing_by_name
from training.errors import (
    SECONDS_FOR_LAST_WORDS,
    ConfigError,
    DamageError,
    PeerError,
    RunDirectoryError,
    RunError,
    StorageError,
)
from training.faults import Faults
from training.heartbeat import FOLDER, Heartbeat, culprits, giving_up
from training.manifest import read_manifest, verify
from training.mirror import first_line
from training.recorder import Recorder
from training.resume import GONE_BACK_TO, what_to_resume, why_not_back
from training.run_directory import LOGS, RunDirectory, State
from training.run_files import require_folder, require_writable
from training.stop import STOP_FILE, StopRequest, stoppable
from training.stored_config import difference, refuse_another_run, restore_config
from training.streams import tell
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
            with Heartbeat(logs, process.rank, timeout.total_seconds()) as heartbeat, refusing_by_name():

                def give_up(named: dict[int, str]) -> None:
                    failure = _peer_error(named, logs, f"waited for {heartbeat.patience:.0f} s")
                    _end_from_thread(failure, config, process, recorder, trainer.step if trainer else None, attempt)

                with giving_up(heartbeat, give_up):
                    trainer = Trainer(config, process, recorder, stop, heartbeat, faults)
                    completed = trainer.run()
        except BaseException as error:
            patience = 60 * min(config.parallel.startup_minutes, config.parallel.timeout_minutes)
            failure = _as_peer_error(error, logs, patience)
            _put_down(failure, config, process, recorder, trainer.step if trainer else None, attempt)
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


def _as_peer_error(error: BaseException, logs: Path, timeout: float) -> BaseException:
    if not is_peer_failure(error):
        return error
    return _peer_error(culprits(logs, timeout), logs, first_line(error))


def _peer_error(named: dict[int, str], logs: Path, noticed: str) -> PeerError:
    held_up = ", ".join(named.values()) or "another rank left or did not answer"
    clues = "; ".join(["its own message, or logs/, says why", *filter(None, [flight_records(logs)])])
    return PeerError(f"{held_up}; {clues} ({noticed})")


def _end_from_thread(
    failure: PeerError,
    config: RunConfig,
    process: ProcessInfo,
    recorder: Recorder | None,
    step: int | None,
    attempt: int | None,
) -> NoReturn:
    """End the process while its main thread waits for what will never come."""
    _put_down(failure, config, process, recorder, step, attempt)
    if process.rank == 0:
        tell(f"error: {failure}")
    else:
        time.sleep(SECONDS_FOR_LAST_WORDS)
    os._exit(failure.exit_code)


def flight_records(logs: Path) -> str:
    """What ranks put down of their communication before NCCL's time-out ended them, in words; "" where none did."""
    count = len([*logs.glob(f"{FLIGHT_RECORD}*")])
    reader = f"torchfrtrace {logs} --prefix {FLIGHT_RECORD}"
    return f"{count} ranks left what they had communicated before a time-out, for `{reader}`" if count else ""


def _put_down(
    error: BaseException,
    config: RunConfig,
    process: ProcessInfo,
    recorder: Recorder | None,
    step: int | None,
    attempt: int | None,
) -> None:
    """Record why a run fails: rank 0 closes the run, another rank speaks up where it fails on its own. `attempt` is
    that of this start, None where rank 0 has not said it yet."""
    if recorder is not None:
        try:
            recorder.close(*_last_status(error, recorder.directory, step))
        except StorageError as more:  # beside the first error, which tells more
            tell(f"error: {more}")
        except RunDirectoryError:  # as the first error says, or will be seen by whoever has it now
            pass
    elif isinstance(error, PeerError) and "rank 0 " in str(error):
        # Rank 0 can neither say nor put down anything.
        tell(f"error on rank {process.rank}: {error}")
        with suppress(StorageError):  # of a status.json that somebody else wrote
            RunDirectory(Path(config.run_dir)).write_rank_failure(process.rank, attempt, error)
    elif process.rank > 0 and isinstance(error, Exception) and not isinstance(error, RunError):
        tell(f"error on rank {process.rank}: {type(error).__name__}: {error}")
        with suppress(StorageError):  # of a status.json that somebody else wrote
            RunDirectory(Path(config.run_dir)).write_rank_failure(process.rank, attempt, error)


def _last_status(error: BaseException, directory: RunDirectory, step: int | None) -> tuple[State, int | None, str]:
    before, status = directory.previous, None
    with suppress(StorageError):  # what somebody else wrote there says nothing of this run
        status = directory.read_status()
    if step is None and before is not None and before.state == "completed":
        return before.state, before.step, before.reason  # a start that is refused takes nothing away
    if isinstance(error, PeerError | SystemExit) and status is not None and status.state == "failed":
        return "failed", step, status.reason  # the rank that failed on its own knows better
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        # Before training began, nothing was lost: whoever starts it again wants it to go on.
        state: State = "preempted" if step is None else "failed"
        return state, step, f"ended by {signal.Signals(error.code - 128).name}"
    return "failed", step, f"{type(error).__name__}: {error}"


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
