"""Reading the checkpoint of a run that others may be training, and whose checkpoints come and go."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from checkpoint.load import choose_checkpoint, was_replaced
from checkpoint.manifest import Manifest
from parallel.agreement import on_rank_zero
from runtime.errors import ConfigError, RemovedError, StorageError
from runtime.messages import closest

MOST_READS = 20
"""How often a checkpoint is read anew that was removed meanwhile."""

Read = TypeVar("Read")


def read_run(run_dir: Path, step: str, read: Callable[[Path, Manifest], Read]) -> Read:
    """What `read` makes of the newest valid checkpoint of a run, or of that of a step.

    Where the run removes the checkpoint meanwhile, `read` is called again with the one that is the newest by then.
    Collective. Raises ConfigError where there is no checkpoint, StorageError where one is damaged, and what `read`
    raises.
    """
    for _ in range(MOST_READS):
        try:
            chosen = choose_checkpoint(run_dir, step, "auto")
        except RemovedError:
            continue
        if chosen is None:
            raise ConfigError(_no_checkpoint(run_dir))
        path, manifest = chosen
        try:
            return read(path, manifest)
        except StorageError:
            if not on_rank_zero(partial(was_replaced, path, manifest)):
                raise
    raise StorageError(
        f"{run_dir} removes its checkpoints faster than they can be read; a larger checkpoint.keep or "
        "checkpoint.interval leaves time for it"
    )


def _no_checkpoint(run_dir: Path) -> str:
    if run_dir.parent.name == "checkpoints":
        return f"{run_dir} is a checkpoint; name its run and say --step: {run_dir.parent.parent}"
    others = [path.parent.name for path in run_dir.parent.glob("*/checkpoints")]
    near = closest(run_dir.name, others)
    what = "holds no checkpoint" if run_dir.is_dir() else "is no directory"
    nearest = f"nearest: {run_dir.parent / near}" if near else "name the directory of a run, such as outputs/pretrain"
    return f"{run_dir} {what}; {nearest}"
