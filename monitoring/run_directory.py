"""The directory of a run: its configuration, the environment of its last start, and how it stands."""

import contextlib
import json
import os
import shlex
import socket
import stat
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from data.config import DataConfig
from data.vocabulary import find_tokenizer, is_tokenizer_file, same_tokenizer, tokenizer_digest, tokenizer_files
from monitoring.metrics import is_count, last_attempt
from runtime.directory_lock import Ownership
from runtime.errors import ConfigError, StorageError
from runtime.files import is_there, write_atomically
from runtime.run_files import require_regular
from settings.config import RunConfig

KEPT_TOKENIZERS = ("tokenizer.tiktoken", "tokenizer.json")
"""Copy of the data's tokenizer file in the run directory, so that the run can be moved and read anywhere."""
LARGEST_CONFIG = 2**16
"""Bytes of a config.yaml up to which it is read."""
APPENDED_TO = ("metrics.jsonl", "samples.jsonl")
"""Files that a start goes on with."""
LOGS = "logs"
"""Folder of a run directory for what ranks leave of failures, time-outs and profiles."""
State = Literal["running", "completed", "preempted", "failed"]


@dataclass(frozen=True)
class Status:
    """How a run stands; job scripts read it from status.json."""

    state: State
    step: int
    """Optimizer steps taken."""
    reason: str
    """Why it stands so, in words."""
    attempt: int
    """Starts in this directory before this one."""
    saved_step: int = 0
    """Of the newest checkpoint that was saved on this course; 0: none."""

    def __post_init__(self) -> None:
        """Raises TypeError for what is no status: it may be read from a file that others have written."""
        sound = {part.name: is_count(getattr(self, part.name)) for part in fields(self)}
        sound |= {"state": self.state in get_args(State), "reason": isinstance(self.reason, str)}
        if wrong := [name for name, is_sound in sound.items() if not is_sound]:
            raise TypeError(f"{', '.join(wrong)} cannot be what it says")


class RunDirectory:
    """Everything a run leaves behind lies in here. Made once a start, on rank 0."""

    def __init__(self, path: Path) -> None:
        """Writes nothing. Raises StorageError where an earlier start's status.json cannot be read."""
        self.path = path
        self.previous = self.read_status()
        self.ownership = Ownership(path)
        self._last_logged = -1
        self._made = False
        self.saved_step = self.previous.saved_step if self.previous else 0
        """What `write_status` puts down as such."""
        self._environment: dict[str, Any] = {}

    @property
    def attempt(self) -> int:
        """Starts in this directory before this one, also where status.json was removed."""
        return 1 + max(self._last_logged, -1 if self.previous is None else self.previous.attempt)

    def own(self) -> None:
        """Makes the directory and owns it until `ownership.release` or the end of the process.

        Raises RunDirectoryError where a living process owns it, ConfigError where a file stands in the way, and
        StorageError where the directory cannot be written, its status read, or a file appended to.
        """
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            for name in APPENDED_TO:
                require_regular(self.path / name)
            self.ownership.take()
            self.previous = self.read_status()  # of whoever owned it until now
            self._last_logged = last_attempt(self.path / "metrics.jsonl")
            self.saved_step = self.previous.saved_step if self.previous else 0
        except (FileExistsError, NotADirectoryError) as error:
            in_the_way = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
            raise ConfigError(
                f"run directory {self.path}: {in_the_way} is no directory; choose another out_dir or name"
            ) from error
        except OSError as error:
            raise StorageError(
                f"cannot write in run directory {self.path}: {error.strerror}; choose an out_dir you may write to"
            ) from error

    def leave(self) -> None:
        """Gives the directory back after a start that is refused; removes one that was made for it."""
        self.ownership.release()
        if self._made:
            self.ownership.clear()
            with contextlib.suppress(OSError):  # somebody else's by now
                self.path.rmdir()

    def record_start(self, config: RunConfig, overrides: list[str]) -> None:
        """Records what is started: config.yaml, overrides.txt and environment.json; makes logs/. Raises StorageError.

        An earlier start's record is replaced: its checkpoints carry their own.
        """
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))).encode())
        write_atomically(self.path / "overrides.txt", "".join(f"{line}\n" for line in overrides).encode())
        self.record_environment({"attempt": self.attempt, **_environment()})
        (self.path / LOGS).mkdir(exist_ok=True)

    def record_environment(self, facts: Mapping[str, Any]) -> None:
        """Adds to what environment.json says of this start. Raises StorageError."""
        self._environment |= facts
        write_atomically(self.path / "environment.json", _json(self._environment))

    @property
    def has_begun(self) -> bool:
        """Whether steps were taken here: checkpoints were made, or lines of metrics written."""
        metrics = self.path / "metrics.jsonl"
        return (
            self.saved_step > 0
            or (self.path / "checkpoints").exists()
            or (metrics.exists() and metrics.stat().st_size > 0)
        )

    def keep_tokenizer(self, tokenizer: str) -> None:
        """Copies the file of the data's `tokenizer` here, if it is one. Once the run has begun, the copy stays.

        Raises ConfigError where it is of another tokenizer, and StorageError.
        """
        kept = self._kept_tokenizer()
        if kept is not None and self.has_begun:
            if not same_tokenizer(str(kept), tokenizer):
                raise ConfigError(
                    f"{kept}, the tokenizer with which this run began, and {tokenizer}, which its data has now, "
                    f"differ: restore the one that was changed, or choose another name, such as name={self.path.name}-2"
                )
            return
        files = tokenizer_files(tokenizer) if is_tokenizer_file(tokenizer) else {}
        for name in KEPT_TOKENIZERS:
            (self.path / name).unlink(missing_ok=True)  # of a start that came to nothing
        for ending, content in files.items():
            write_atomically(self.path / f"tokenizer{ending}", content)

    def tokenizer(self, data: DataConfig, out_dir: str, digest: object = None) -> str:
        """The tokenizer as `load_tokenizer` takes it: the file kept here, else the one of the data.

        Raises DataPathError, TokenizerError or CorruptDataError; and ConfigError where it is not the file of a
        checkpoint's `digest` (SHA-256), if that says so.
        """
        kept = self._kept_tokenizer()
        tokenizer = str(kept) if kept else find_tokenizer(data, out_dir)
        if digest is not None and digest != tokenizer_digest(tokenizer):
            raise ConfigError(
                f"{tokenizer} is not the tokenizer's file with which the checkpoint was made (SHA-256 {digest}): it "
                f"was cut or replaced; restore it"
            )
        return tokenizer

    def _kept_tokenizer(self) -> Path | None:
        return next((self.path / name for name in KEPT_TOKENIZERS if is_there(self.path / name)), None)

    def saved_config(self) -> dict[str, Any] | None:
        """The config.yaml of the last start, as plain values: what OmegaConf would resolve, such as `${oc.env:HOME}`,
        stays text. None where there is none. Raises StorageError where it is no mapping."""
        path = self.path / "config.yaml"
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_CONFIG:
                raise ValueError(f"it is no regular file of up to {LARGEST_CONFIG} bytes")
            values = yaml.safe_load(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error}") from error
        except (RecursionError, ValueError, yaml.YAMLError) as error:
            raise StorageError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict) or not values:
            raise StorageError(f"{path} holds no configuration; restore it or choose another name")
        return cast(dict[str, Any], values)

    def write_status(self, state: State, step: int, reason: str) -> None:
        """Replaces status.json. Raises StorageError, RunDirectoryError where another process has taken over."""
        self.ownership.check()
        status = Status(state, step, reason, self.attempt, self.saved_step)
        write_atomically(self.path / "status.json", _json(asdict(status)))

    def write_rank_failure(self, rank: int, attempt: int | None, error: BaseException) -> None:
        """Puts down why a rank other than 0 fails on its own, in status.json and, in full, in logs/. Best effort.

        `attempt` is that of the start which the rank belongs to, None where it does not know yet. A rank that was
        stopped may outlive its start: what the status says of another start stays, and so does the log of its rank.
        """
        status = self.previous
        is_of_this_start = status is not None and status.attempt == attempt
        start = "" if is_of_this_start else f".attempt_{'unknown' if attempt is None else attempt}"
        with contextlib.suppress(OSError, StorageError):
            logs = self.path / LOGS
            logs.mkdir(exist_ok=True)
            said = "".join(traceback.format_exception(error)).encode(errors="backslashreplace")
            write_atomically(logs / f"rank_{rank:05d}{start}.log", said)
            if status is not None and is_of_this_start:
                status = replace(status, state="failed", reason=f"rank {rank}: {type(error).__name__}: {error}")
                write_atomically(self.path / "status.json", _json(asdict(status)))

    def read_status(self) -> Status | None:
        """How the last start stands, None where there was none. Raises StorageError where it cannot be read."""
        path = self.path / "status.json"
        require_regular(path)
        try:
            # An older version put down no saved step.
            values = {"saved_step": 0} | json.loads(path.read_bytes())
            return Status(**{part.name: values[part.name] for part in fields(Status)})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise StorageError(f"{path} is not a status: {error!r}; remove it to go on from the checkpoints") from error


def _environment() -> dict[str, Any]:
    packages = {}
    for package in ("kilotron", "torch", "numpy", "hydra-core"):
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    changes = _git("status", "--porcelain")
    return {
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "packages": packages,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the checkout this file lies in; None without git, a repository or a commit."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"
