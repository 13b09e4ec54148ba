"""TensorBoard event files, under the names of metrics.jsonl."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.mirror import Mirror

FLUSH_SECONDS = 10
"""Longest that a point may wait in memory."""


class EventFiles:
    """Writes every number as a scalar of its step into a folder that TensorBoard reads."""

    def __init__(self, folder: Path, step: int) -> None:
        """TensorBoard drops what earlier files of the folder hold of steps after `step`. May raise anything."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"{error}; `pip install tensorboard` brings it") from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def write(self, values: dict[str, Any]) -> None:
        """Adds a point a value that is known."""
        for name, value in values.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, values["step"])

    def close(self, _failed: bool, /) -> None:
        """Ends the file."""
        self._writer.close()


def open_tensorboard(run_dir: Path, step: int, note: Callable[[str], None]) -> Mirror:
    """Mirrors metrics to `run_dir/tensorboard` for a start that goes on from `step`; `note` prints a line."""
    return Mirror("tensorboard", {"event files": lambda: EventFiles(run_dir / "tensorboard", step)}, note)
