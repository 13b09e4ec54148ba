"""How a run fails: what its ranks say, who is named, and what is left in its directory."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from monitoring.recorder import Recorder
from monitoring.run_directory import RunDirectory, State
from parallel.agreement import is_peer_failure
from parallel.process_group import FLIGHT_RECORD, ProcessInfo
from runtime.errors import (
    RANK_ZERO_REPORT_GRACE_SECONDS,
    PeerError,
    RunDirectoryError,
    RunError,
    StorageError,
)
from runtime.heartbeat import find_unresponsive_ranks
from runtime.messages import first_line
from runtime.streams import tell
from settings.config import RunConfig


def as_peer_error(error: BaseException, logs: Path, timeout: float) -> BaseException:
    """The error itself, or where it says that another rank failed, a PeerError that names those that hold the run up:
    `logs` has their heartbeats, and `timeout` is in seconds."""
    if not is_peer_failure(error):
        return error
    return peer_error(find_unresponsive_ranks(logs, timeout), logs, first_line(error))


def peer_error(named: dict[int, str], logs: Path, noticed: str) -> PeerError:
    """An error that says which ranks hold the run up, by what that was noticed, and where more is written."""
    held_up = ", ".join(named.values()) or "another rank left or did not answer"
    clues = "; ".join(["its own message, or logs/, says why", *filter(None, [flight_records(logs)])])
    return PeerError(f"{held_up}; {clues} ({noticed})")


def end_from_thread(
    failure: PeerError,
    config: RunConfig,
    process: ProcessInfo,
    recorder: Recorder | None,
    step: int | None,
    attempt: int | None,
) -> NoReturn:
    """End the process while its main thread waits for what will never come."""
    record_failure(failure, config, process, recorder, step, attempt)
    if process.rank == 0:
        tell(f"error: {failure}")
    else:
        time.sleep(RANK_ZERO_REPORT_GRACE_SECONDS)
    os._exit(failure.exit_code)


def flight_records(logs: Path) -> str:
    """What ranks put down of their communication before NCCL's time-out ended them, in words; "" where none did."""
    count = len([*logs.glob(f"{FLIGHT_RECORD}*")])
    reader = f"torchfrtrace {logs} --prefix {FLIGHT_RECORD}"
    return f"{count} ranks left what they had communicated before a time-out, for `{reader}`" if count else ""


def record_failure(
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
