"""Times whole runs of pretrain_gpt.py: with evaluations and saves beside training, stopped by SIGTERM, and resumed."""

import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_step import Row
from monitoring.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.02
"""Most that a loss of a resumed run may differ from that of a run left alone, relative to it; on a GPU sums of many
numbers are rounded differently each time."""
STOPPED = 75
TINY = ["model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4",
        "model.max_position_embeddings=32", "model.vocab_size=2048"]  # fmt: skip


@dataclass(frozen=True)
class TrainerCase:
    """Which runs to take."""

    out_dir: Path
    """Of the runs."""
    logs: Path
    """Where what they print and their metrics stay."""
    steps: int
    rows: int
    tiny: bool
    limit: float
    """Seconds that a start may take."""

    def words(self, name: str, log_interval: int) -> list[str]:
        """The run's settings."""
        quarter = max(1, self.steps // 4)
        settings: dict[str, Any] = {
            "name": name,
            "out_dir": self.out_dir,
            "model": "gpt2_small",
            "data": "sample",
            "train.precision": "bf16",
            "train.compile": "true",
            "train.global_batch_size": self.rows,
            "train.micro_batch_size": self.rows,
            "train.steps": self.steps,
            "train.log_interval": log_interval,
            "train.eval_interval": 2 * quarter,
            "train.eval_steps": 2,
            "train.max_minutes": self.limit / 60,
            "checkpoint.interval": quarter,
        }
        return [*(f"{key}={value}" for key, value in settings.items()), *(TINY if self.tiny else [])]


def measure_trainer(case: TrainerCase) -> Iterator[Row]:
    """A run left alone that logs rarely, then one that logs every step, is stopped half-way, and goes on.

    Raises RuntimeError where a start ends otherwise than it should, or the losses of the second run are not those of
    the first.
    """
    rarely = max(2, case.steps // 12)
    alone = start(case, "alone", rarely)
    yield _row(case, f"left alone, log_interval={rarely}", read(case, "alone"), *alone)
    stopped = start(case, "stopped", 1, stop_at=case.steps // 2)
    before = read(case, "stopped")
    yield _row(case, "log_interval=1, stopped by SIGTERM", before, *stopped)
    resumed = start(case, "stopped", 1)
    row = _row(case, "log_interval=1, resumed", [each for each in read(case, "stopped") if each["attempt"]], *resumed)
    expected = {each["step"]: each["loss"] for each in read(case, "alone")}
    again = {each["step"]: each["loss"] for each in read(case, "stopped")}
    stop_step = before[-1]["step"]
    differences = {step: abs(again[step] / loss - 1) for step, loss in expected.items() if step > stop_step}
    yield row | {"resumed_from": stop_step, "loss_difference": max(differences.values())}
    wrong = {step: difference for step, difference in differences.items() if not difference <= TOLERANCE}
    if wrong:
        raise RuntimeError(f"losses of the resumed run differ by a share of {wrong} (by step) from the run left alone")


def start(case: TrainerCase, name: str, log_interval: int, stop_at: int | None = None) -> tuple[float, float]:
    """Runs pretrain_gpt.py to its end, which SIGTERM brings about after `stop_at` steps.

    Returns the seconds until its first logged step, and all. Raises RuntimeError where it does not end as it should.
    """
    log = case.logs / f"trainer_{name}.log"
    known, begin, first = len(read(case, name)), time.monotonic(), 0.0
    command = [sys.executable, "pretrain_gpt.py", *case.words(name, log_interval)]
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                records = read(case, name)
                if not first and len(records) > known:
                    first = time.monotonic() - begin
                if stop_at is not None and records and records[-1]["step"] >= stop_at:
                    process.send_signal(signal.SIGTERM)
                    process.wait(case.limit)
                elif time.monotonic() - begin > case.limit:
                    raise RuntimeError(f"{name} was not done after {case.limit:.0f} s; {_tail(log)}")
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
            with suppress(FileNotFoundError):
                shutil.copy(metrics(case, name), case.logs / f"trainer_{name}_metrics.jsonl")
    if process.returncode != (0 if stop_at is None else STOPPED):
        raise RuntimeError(f"{name} ended with {process.returncode}; {_tail(log)}")
    return first, time.monotonic() - begin


def read(case: TrainerCase, name: str) -> list[Row]:
    """The logged training steps of a run so far."""
    return [each for each in read_metrics(metrics(case, name)) if "loss" in each]


def metrics(case: TrainerCase, name: str) -> Path:
    """The file that a run logs to."""
    return case.out_dir / name / "metrics.jsonl"


def _row(case: TrainerCase, title: str, records: list[Row], first: float, seconds: float) -> Row:
    # The first interval compiles.
    speeds = [each["tokens_per_second"] for each in records[1:]] or [each["tokens_per_second"] for each in records]
    stalls = [each["checkpoint_stall_ms"] for each in records if each["checkpoint_stall_ms"]]
    mfus = [each["mfu"] for each in records[1:] if each["mfu"] is not None]
    return {
        "part": "trainer",
        "title": title,
        "rows": case.rows,
        "steps": f"{records[0]['step']} to {records[-1]['step']}",
        "tokens_per_second": statistics.median(speeds),
        "mfu": statistics.median(mfus) if mfus else None,
        "stalls_ms": ", ".join(f"{stall:.0f}" for stall in stalls) or None,
        "seconds_to_first_log": first,
        "seconds": seconds,
        "loss": records[-1]["loss"],
    }


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"the end of {log}: {' | '.join(lines[-3:])}"
