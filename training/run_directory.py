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
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from data.config import DataConfig
from data.files import write_whole
from data.vocabulary import find_tokenizer, tokenizer_files
from training.config import RunConfig
from training.errors import ConfigError, StorageError
from training.ownership import Ownership
from training.settings import describe_type

KEPT_TOKENIZERS = ("tokenizer.tiktoken", "tokenizer.json")
"""Copy of the data's tokenizer file in the run directory, so that the run can be moved and read anywhere."""

LARGEST_CONFIG = 2**16
"""Bytes of a config.yaml up to which it is read."""

LOGS = "logs"
"""Folder of a run directory for what ranks leave of failures, time-outs and profiles."""

ADVICE = {"optimizer.name": " (checkpoint.drop_moments=true goes on without the old one's state)"}
"""What lets a run go on in spite of a difference."""

State = Literal["running", "completed", "preempted", "failed"]
Config = TypeVar("Config")


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


class RunDirectory:
    """Everything a run leaves behind lies in here. Made once a start, on rank 0."""

    def __init__(self, path: Path) -> None:
        """Writes nothing. Raises StorageError where an earlier start's status.json cannot be read."""
        self.path = path
        self.previous = self.read_status()
        self.ownership = Ownership(path)

    @property
    def attempt(self) -> int:
        """Starts in this directory before this one."""
        return 0 if self.previous is None else self.previous.attempt + 1

    def own(self) -> None:
        """Makes the directory and owns it until `ownership.release` or the end of the process.

        Raises RunDirectoryError where a living process owns it, ConfigError where a file stands in the way, and
        StorageError where the directory cannot be written or its status read.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.ownership.take()
            self.previous = self.read_status()  # of whoever owned it until now
        except (FileExistsError, NotADirectoryError) as error:
            obstacle = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
            raise ConfigError(
                f"run directory {self.path}: {obstacle} is no directory; choose another out_dir or name"
            ) from error
        except OSError as error:
            raise StorageError(
                f"cannot write in run directory {self.path}: {error.strerror}; choose an out_dir you may write to"
            ) from error

    def record_start(self, config: RunConfig, overrides: list[str]) -> None:
        """Records what is started: config.yaml, overrides.txt and environment.json; makes logs/. Raises StorageError.

        An earlier start's record is replaced: its checkpoints carry their own.
        """
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))).encode())
        write_atomically(self.path / "overrides.txt", "".join(f"{line}\n" for line in overrides).encode())
        write_atomically(self.path / "environment.json", _json({"attempt": self.attempt, **_environment()}))
        (self.path / LOGS).mkdir(exist_ok=True)

    def keep_tokenizer(self, tokenizer: str) -> None:
        """Copies the data's tokenizer file here. Raises StorageError."""
        for ending, content in tokenizer_files(tokenizer).items():
            write_atomically(self.path / f"tokenizer{ending}", content)

    def tokenizer(self, data: DataConfig, out_dir: str) -> str:
        """The tokenizer as `load_tokenizer` takes it: the file kept here, else the one of the data. Raises
        DataPathError or CorruptDataError."""
        kept = [self.path / name for name in KEPT_TOKENIZERS if (self.path / name).is_file()]
        return str(kept[0]) if kept else find_tokenizer(data, out_dir)

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
        write_atomically(self.path / "status.json", _json(asdict(Status(state, step, reason, self.attempt))))

    def write_rank_failure(self, rank: int, error: BaseException) -> None:
        """Puts down why a rank other than 0 fails on its own, in status.json and, in full, in logs/. Best effort."""
        with contextlib.suppress(OSError, StorageError):
            logs = self.path / LOGS
            logs.mkdir(exist_ok=True)
            (logs / f"rank_{rank:05d}.log").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            step, attempt = (self.previous.step, self.previous.attempt) if self.previous else (0, 0)
            status = Status("failed", step, f"rank {rank}: {type(error).__name__}: {error}", attempt)
            write_atomically(self.path / "status.json", _json(asdict(status)))

    def read_status(self) -> Status | None:
        """How the last start stands, None where there was none. Raises StorageError where it cannot be read."""
        path = self.path / "status.json"
        try:
            values = json.loads(path.read_bytes())
            return Status(**{part.name: values[part.name] for part in fields(Status)})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path} is not a status: {error!r}; remove it to go on from the checkpoints") from error


def difference(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Where two configurations mean another model, optimizer, data or order of it: "model.num_layers: was 12, now 8".

    Takes configurations as nested dictionaries (`dataclasses.asdict`, config.yaml). A key that `saved` lacks, because
    an older version wrote it, has its default. Raises ConfigError where either holds a key that is not known.
    """
    config = restore_config(current)
    before, now = _identity(restore_config(saved)), _identity(config)
    if config.checkpoint.drop_moments:
        before["optimizer.name"] = now["optimizer.name"]
    return [
        f"{key}: was {_shown(before.get(key))}, now {_shown(now.get(key))}{ADVICE.get(key, '')}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]


def restore_config(values: dict[str, Any]) -> RunConfig:
    """The configuration that `dataclasses.asdict` turned into `values`, as config.yaml and checkpoints hold it.

    Raises ConfigError for a key that this version does not know, and for a value of another type than the key's.
    """
    return _restore(RunConfig, values, "")


def _restore(kind: type[Config], values: Any, prefix: str) -> Config:
    if not isinstance(values, dict):
        raise ConfigError(f"the saved configuration holds no keys under {prefix.rstrip('.') or 'its root'}")
    kinds = get_type_hints(kind)
    unknown = [f"{prefix}{name}" for name in values if name not in kinds]
    if unknown:
        raise ConfigError(
            f"the saved configuration holds {', '.join(unknown)}, which this version of Kilotron does not know"
        )
    groups = {
        name: _restore(kinds[name], value, f"{prefix}{name}.")
        for name, value in values.items()
        if is_dataclass(kinds[name])
    }
    plain = {name: value for name, value in values.items() if name not in groups}
    wrong = [
        f"{prefix}{name} is not {describe_type(kinds[name])}"
        for name, value in plain.items()
        if not _fits(value, kinds[name])
    ]
    if wrong:
        raise ConfigError(f"the saved configuration is not one: {', '.join(wrong)}")
    return kind(**plain, **groups)


def _fits(value: Any, declared: Any) -> bool:
    """Whether a plain value is of a setting's type."""
    kinds = get_args(declared)
    if get_origin(declared) is list:
        return isinstance(value, list) and all(_fits(item, kinds[0]) for item in value)
    return (
        any(_fits(value, kind) for kind in kinds)
        or type(value) is declared
        or (declared is float and type(value) is int)
    )


def _identity(config: RunConfig) -> dict[str, Any]:
    """What a run must keep to stay the same run; derived values are filled in, so null equals what it stands for."""
    model = {f"model.{key}": value for key, value in config.model.resolved().items()}
    data = {f"data.{part.name}": getattr(config.data, part.name) for part in fields(config.data)}
    data["data.seq_length"] = config.seq_length
    del data["data.num_workers"]
    if config.data.path is not None:
        del data["data.corpus"]  # which the path overrules
    return {**model, **data, "seed": config.seed, "optimizer.name": config.optimizer.name}


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


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


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that a crash at any moment leaves the old content or the new. Raises StorageError."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free space there or choose another out_dir"
        ) from error
