"""What a run measures: one JSON object a line in metrics.jsonl and samples.jsonl, appended, and their reader."""

import json
import math
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from monitoring.line_file import LineFile
from runtime.directory_lock import Ownership
from runtime.errors import StorageError

TAIL_BYTES = 65_536
"""End of metrics.jsonl in which its last whole line is looked for."""
LARGEST_COUNT = 2**62
LARGEST_FLOAT = sys.float_info.max
Place = tuple[int, bool]
"""Of a line: its step, and whether it is of an evaluation after it."""


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

    All lines but the last survive a kill at any moment. Lines that cannot be written wait in memory, as LineFile says.
    Numbers that are not finite are written as null, as JSON knows neither NaN nor infinity. Methods that write raise
    RunDirectoryError where the directory is another job's by now, or gone.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        note: Callable[[str], None] = lambda _: None,
        ownership: Ownership | None = None,
    ) -> None:
        """Opens metrics.jsonl, or raises StorageError; `attempt` counts the starts in this directory before this one.
        `note` prints a line. `ownership` is asked before each line is written."""
        self._attempt = attempt
        self._ownership = ownership or Ownership(run_dir)
        self._files = {
            name: LineFile(run_dir / name, note, self._ownership.check) for name in ("metrics.jsonl", "samples.jsonl")
        }
        try:
            self._files["metrics.jsonl"].open()
        except OSError as error:
            raise StorageError(
                f"cannot append to {run_dir / 'metrics.jsonl'}: {error.strerror}; choose another out_dir or name"
            ) from error

    @property
    def lost(self) -> int:
        """Lines for which there was no room in memory either."""
        return sum(file.lost for file in self._files.values())

    def log_step(self, metrics: StepMetrics) -> None:
        """Appends a training step."""
        self._append("metrics.jsonl", metrics.step, asdict(metrics))

    def log_evaluation(self, metrics: EvaluationMetrics) -> None:
        """Appends an evaluation."""
        self._append("metrics.jsonl", metrics.step, {"eval_loss": metrics.loss, "perplexity": metrics.perplexity})

    def log_samples(self, step: int, samples: Sequence[Sequence[int]], crc: int) -> None:
        """Appends what a step was fed: (dataset, epoch, window) a sample, in global order, and its tokens' crc32."""
        self._append("samples.jsonl", step, {"samples": samples, "crc": crc})

    def retry(self) -> int:
        """Tries to write the lines that wait; returns how many still do."""
        for file in self._files.values():
            file.write()
        return sum(file.waiting for file in self._files.values())

    def close(self) -> None:
        """Closes both files. Raises StorageError where lines are lost."""
        said = [file.close() for file in self._files.values()]
        if any(said):
            raise StorageError("\n".join(filter(None, said)))

    def _append(self, name: str, step: int, values: dict[str, Any]) -> None:
        record = {"step": step, "attempt": self._attempt} | values
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[key] = None
        self._ownership.check_after_a_pause()
        self._files[name].append(json.dumps(record, allow_nan=False).encode() + b"\n")


@dataclass(frozen=True)
class Series:
    """A number by steps that ascend, eight bytes each."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))
    """NaN where it is not known."""

    def leave(self, step: int) -> None:
        """Forgets what came from `step` on."""
        if self.steps and self.steps[-1] >= step:
            first = bisect_left(self.steps, step)
            del self.steps[first:], self.values[first:]

    def append(self, step: int, value: object) -> None:
        """Adds what a line says, which may be no number."""
        self.steps.append(step)
        is_number = type(value) in (int, float) and abs(value) <= LARGEST_FLOAT  # type: ignore[arg-type]
        self.values.append(value if is_number else math.nan)  # type: ignore[arg-type]

    def finite(self) -> "Series":
        """Where the number is known and finite."""
        if all(map(math.isfinite, self.values)):
            return self
        known = [place for place, value in enumerate(self.values) if math.isfinite(value)]
        return Series(array("q", [self.steps[n] for n in known]), array("d", [self.values[n] for n in known]))


@dataclass(frozen=True)
class Curves:
    """What a picture and a summary need of a metrics.jsonl, of which a long run has a million lines."""

    training: Series
    """Losses of training steps."""
    validation: Series
    """Losses of evaluations."""
    tokens: Series
    """Consumed tokens by training step."""


def read_curves(path: Path) -> Curves:
    """What `read_metrics` finds in a metrics.jsonl, of which nothing is kept but the numbers that are drawn."""
    curves = Curves(Series(), Series(), Series())
    for (step, is_evaluation), record in _lines(path):
        curves.validation.leave(step)
        for series in (curves.training, curves.tokens):
            series.leave(step + is_evaluation)
        if is_evaluation:
            curves.validation.append(step, record["eval_loss"])
        else:
            curves.training.append(step, record.get("loss"))
            curves.tokens.append(step, record.get("consumed_tokens"))
    return curves


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl or samples.jsonl: by step, a training step before the evaluation that followed it.

    Where lines go back in steps the run did, and what it had logged from there on was abandoned. A line of an earlier
    start among those of a later one is of a process that did not know yet that it had been succeeded: it is skipped. So
    is a torn or foreign line; a file that does not exist is empty.
    """
    kept: list[tuple[Place, dict[str, Any]]] = []
    for place, record in _lines(path):
        while kept and kept[-1][0] >= place:
            kept.pop()
        kept.append((place, record))
    return [record for _, record in kept]


def _lines(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The lines of a file in their order, but for those that `read_metrics` skips."""
    latest = 0
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as lines:
        for line in lines:
            record = _record(line)
            if record is not None and record["attempt"] >= latest:
                latest = record["attempt"]
                yield (record["step"], "eval_loss" in record), record


def last_attempt(path: Path) -> int:
    """The start that wrote the last whole line of metrics.jsonl; -1 where there is none."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            if (record := _record(line)) is not None:
                return int(record["attempt"])
    return -1


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says, with the counts `step` and `attempt`; None for one that is torn or of something else."""
    try:
        record = json.loads(line)
    except (RecursionError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    record.setdefault("attempt", 0)
    return record if is_count(record.get("step")) and is_count(record["attempt"]) else None


def is_count(value: object) -> bool:
    """Whether what a JSON file says is a number of steps, starts or the like."""
    return type(value) is int and 0 <= value <= LARGEST_COUNT
