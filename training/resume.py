"""Taking a run up again: which checkpoint is meant, whether it is of this very run, and going back to an older one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.directory import DIRECTORY, set_aside, step_directories, step_name
from checkpoint.load import candidates
from checkpoint.manifest import LEFT, Manifest
from data.locations import data_prefix
from data.splits import FILES
from runtime.errors import ConfigError, StorageError
from runtime.files import write_whole
from runtime.run_files import require_regular
from settings.config import RunConfig
from settings.stored import difference, refuse_another_run

GONE_BACK_TO = "gone_back_to"
"""File beside the checkpoints that names those to which the run has gone back, one a line."""


def what_to_resume(run_dir: Path, resume: str) -> str:
    """What `checkpoint.resume` means at this start: a step to which the run has gone back already is `auto`, or a job
    that is started again with the same command would go back each time.

    Raises StorageError where a step is meant of which there is no checkpoint.
    """
    if resume in ("auto", "never"):
        return resume
    if step_name(int(resume)) in _gone_back_to(run_dir / DIRECTORY):
        return "auto"
    candidates(run_dir / DIRECTORY, resume)
    return resume


def why_not_back(run_dir: Path, step: str) -> str:
    """What to say where `what_to_resume` does not go back to a step once more."""
    said = f"checkpoint.resume={step}: the run has gone back to that step before"
    if not (run_dir / DIRECTORY / step_name(int(step))).is_dir():
        return f"{said}, whose checkpoint was not kept"
    return f"{said}; to go back once more, remove {run_dir / DIRECTORY / GONE_BACK_TO}"


def _gone_back_to(directory: Path) -> list[str]:
    file = directory / GONE_BACK_TO
    require_regular(file)
    try:
        return file.read_text(encoding="utf-8").split()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{file} cannot be read: {error}; remove it to go back anew") from error


def go_back(directory: Path, step: int) -> list[str]:
    """Leave the course that a run took after the checkpoint of `step`; returns as what those after it are set aside.

    Raises StorageError.
    """
    aside = [set_aside(path, LEFT).name for other, path in step_directories(directory) if other > step]
    try:
        write_whole(directory / "latest", f"{step_name(step)}\n".encode())
        # Last: who is interrupted before this goes back once more.
        steps = {*_gone_back_to(directory), step_name(step)}
        write_whole(directory / GONE_BACK_TO, "".join(f"{each}\n" for each in sorted(steps)).encode())
    except OSError as error:
        raise StorageError(f"cannot write in {directory}: {error.strerror}") from error
    return aside


def check_same_run(path: Path, manifest: Manifest, saved: RunConfig, config: RunConfig, data: dict[str, Any]) -> None:
    """Raise ConfigError where the checkpoint at `path`, of a run `saved`, is of another one than that of `config` on
    `data`, as its splits describe themselves, or of none that could go on."""
    state = manifest.state
    lacking = [key for key, kind in {"consumed_samples": int, "data": dict}.items() if type(state.get(key)) is not kind]
    lacking += [] if any(name.startswith("optimizer.") for name in manifest.tensors) else ["an optimizer's state"]
    if lacking:
        raise ConfigError(
            f"{path} lacks {', '.join(lacking)}, so there is no run to continue; start one of another name with "
            f"checkpoint.load={path}"
        )
    # A checkpoint knows its data by content, wherever that lies.
    differences = [line for line in difference(saved, config) if not line.startswith("data.path:")]
    differences += _of_data(state["data"], data, data_prefix(config.data, config.out_dir), manifest.step)
    refuse_another_run(str(path), differences, config.name)


def _of_data(saved: Mapping[str, Any], data: Mapping[str, Any], prefix: str, step: int) -> list[str]:
    """In what the data under `prefix` differs from that of step `step`, which an older version described by less."""
    changed = [key for key, value in saved.items() if value != data.get(key)]
    files = [key for key in FILES if key in changed]
    said = {*files, "content"} if files else set()
    lines = [f"{prefix}.{key} holds other {FILES[key]} than when step {step} was saved" for key in files]
    return lines + [f"data {key}: was {saved[key]}, now {data.get(key)}" for key in changed if key not in said]
