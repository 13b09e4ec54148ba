"""Taking a run up again: which checkpoint is meant, whether it is of this very run, and going back to an older one."""

from pathlib import Path
from typing import Any

from data.files import write_whole
from training.checkpoint import DIRECTORY, candidates
from training.checkpoint_storage import set_aside, step_directories, step_name
from training.config import RunConfig
from training.errors import ConfigError, StorageError
from training.manifest import LEFT, Manifest
from training.stored_config import difference, refuse_another_run

GONE_BACK_TO = "gone_back_to"
"""File beside the checkpoints that names the one to which the run has gone back."""


def what_to_resume(run_dir: Path, resume: str) -> str:
    """What `checkpoint.resume` means at this start: a step to which the run has gone back already is `auto`, or a job
    that is started again with the same command would go back each time.

    Raises StorageError where a step is meant of which there is no checkpoint.
    """
    if resume in ("auto", "never"):
        return resume
    directory = run_dir / DIRECTORY
    try:
        if (directory / GONE_BACK_TO).read_text(encoding="utf-8").strip() == step_name(int(resume)):
            return "auto"
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{directory / GONE_BACK_TO} cannot be read: {error}; remove it to go back anew") from error
    candidates(directory, resume)
    return resume


def go_back(directory: Path, step: int) -> list[str]:
    """Leave the course that a run took after the checkpoint of `step`; returns as what those after it are set aside.

    Raises StorageError.
    """
    aside = [set_aside(path, LEFT).name for other, path in step_directories(directory) if other > step]
    try:
        write_whole(directory / "latest", f"{step_name(step)}\n".encode())
        # Last: who is interrupted before this goes back once more.
        write_whole(directory / GONE_BACK_TO, f"{step_name(step)}\n".encode())
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
    differences += [
        f"data {key}: was {value}, now {data.get(key)}"
        for key, value in state["data"].items()
        if value != data.get(key)
    ]
    refuse_another_run(str(path), differences, config.name)
