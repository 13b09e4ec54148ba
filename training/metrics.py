"""What a run measures: one JSON object a line in metrics.jsonl and samples.jsonl, appended, and their reader."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from training.errors import StorageError

TAIL_BYTES = 65_536
"""End of metrics.jsonl in which its last whole line is looked for."""


@dataclass(frozen=True)
class StepMetrics:
    """What is known after an optimizer step, averaged over the steps since the last logged one where it is a rate."""

    step: int
    """Optimizer steps taken."""
    consumed_samples: int
    """Samples trained on since the run began."""
    consumed_tokens: int
    """Tokens trained on since the run began."""
    loss: float
    """Mean cross entropy over the valid tokens of the global batch, in nats."""
    lr: float
    """Learning rate of the step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens_per_second: float
    """Tokens over all ranks."""
    tokens_per_second_per_gpu: float
    """Tokens over all ranks, divided by their number (on a CPU too)."""
    step_ms: float
    """Milliseconds a step took."""
    data_ms: float
    """Milliseconds of a step that rank 0 spent waiting for its batch."""
    mfu: float | None
    """Share of the device's peak arithmetic that the model used, 0 to 1; None where the peak is unknown."""
    memory_gb: float
    """Largest memory held so far, in GB of 1e9 bytes."""
    checkpoint_stall_ms: float = 0.0
    """Milliseconds that saving held training up since the last logged step."""
    loss_scale: float | None = None
    """What fp16 multiplied the loss by; None in other precisions."""


@dataclass(frozen=True)
class EvaluationMetrics:
    """What an evaluation on the validation split found."""

    step: int
    """Optimizer steps taken before it."""
    loss: float
    """Mean cross entropy in nats."""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else self.loss * math.inf


class MetricsLog:
    """Appends to the metrics.jsonl and samples.jsonl of a run directory. For rank 0 only.

    All lines but the last survive a kill at any moment. Numbers that are not finite are written as null, as JSON knows
    neither NaN nor infinity. Every method raises StorageError where it cannot write.
    """

    def __init__(self, run_dir: Path, attempt: int, require_owner: Callable[[], None] = lambda: None) -> None:
        """Opens metrics.jsonl; `attempt` counts the starts in this directory before this one. `require_owner` is asked
        before each line, and raises RunDirectoryError where the directory is another job's by now."""
        self._run_dir = run_dir
        self._attempt = attempt
        self._require_owner = require_owner
        self._files = {"metrics.jsonl": _open(run_dir / "metrics.jsonl")}

    def log_step(self, metrics: StepMetrics) -> None:
        """Appends a training step."""
        self._append("metrics.jsonl", metrics.step, asdict(metrics))

    def log_evaluation(self, metrics: EvaluationMetrics) -> None:
        """Appends an evaluation."""
        self._append("metrics.jsonl", metrics.step, {"eval_loss": metrics.loss, "perplexity": metrics.perplexity})

    def log_samples(self, step: int, samples: Sequence[Sequence[int]], crc: int) -> None:
        """Appends what a step was fed: (dataset, epoch, window) a sample, in global order, and its tokens' crc32."""
        if "samples.jsonl" not in self._files:
            self._files["samples.jsonl"] = _open(self._run_dir / "samples.jsonl")
        self._append("samples.jsonl", step, {"samples": samples, "crc": crc})

    def _append(self, name: str, step: int, values: dict[str, Any]) -> None:
        record = {"step": step, "attempt": self._attempt} | values
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[key] = None
        self._require_owner()
        with _appending_to(self._run_dir / name):
            self._files[name].write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._files[name].flush()

    def close(self) -> None:
        """Closes both files."""
        for name, file in self._files.items():
            with _appending_to(self._run_dir / name):
                file.close()


@contextmanager
def _appending_to(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot append to {path}: {error.strerror}; free space there or choose another out_dir"
        ) from error


def _open(path: Path) -> BinaryIO:
    with _appending_to(path):
        file = path.open("a+b")
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                # A killed writer left half a line: end it, or the next line would be lost with it.
                file.write(b"\n")
        return file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl or samples.jsonl: by step, a training step before the evaluation that followed it.

    Where lines go back in steps the run did, and what it had logged from there on was abandoned. A line of an earlier
    start among those of a later one is of a process that did not know yet that it had been succeeded: it is skipped. So
    is a torn line; a file that does not exist is empty.
    """
    if not path.exists():
        return []
    kept: list[tuple[tuple[int, bool], dict[str, Any]]] = []
    latest = 0
    with path.open("rb") as lines:
        for line in lines:
            record = _record(line)
            if record is None or record["attempt"] < latest:
                continue
            latest = record["attempt"]
            place = record["step"], "eval_loss" in record
            while kept and kept[-1][0] >= place:
                kept.pop()
            kept.append((place, record))
    return [record for _, record in kept]


def last_attempt(path: Path) -> int:
    """The start that wrote the last whole line of metrics.jsonl; -1 where there is none."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            if (record := _record(line)) is not None:
                return int(record["attempt"])
    return -1


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says, with the numbers `step` and `attempt`; None for one that is torn or of something else."""
    try:
        record = json.loads(line)
    except (RecursionError, ValueError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    record.setdefault("attempt", 0)
    return record if isinstance(record["attempt"], int) else None
