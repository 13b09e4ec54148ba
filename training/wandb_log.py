"""Weights & Biases, best effort: whatever goes wrong with it is said in one line and never reaches the run."""

import importlib
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.metrics import EvaluationMetrics, StepMetrics
from training.run_directory import write_atomically

LIMIT_SECONDS = 30
"""Longest that signing in, and handing over the last records, may each hold up a run."""


class WandbLog:
    """Mirrors the metrics of a run to Weights & Biases under one id across resumes. For rank 0 only; raises nothing.

    `online` without a key or a connection goes on as `offline`, whose records `wandb sync` sends later.
    """

    def __init__(
        self, mode: str, project: str, run_dir: Path, name: str, config: dict[str, Any], note: Callable[[str], None]
    ) -> None:
        """`mode` is off, offline or online; `note` prints a line. With `off`, wandb is not even imported."""
        self._note = note
        self._run: Any = None
        for choice in {"off": (), "offline": ("offline",), "online": ("online", "offline")}[mode]:
            try:
                self._run = _start(choice, project, run_dir, name, config)
            except Exception as error:
                note(f"wandb: no {choice} run ({_first_line(error)})")
            else:
                return

    def log_step(self, metrics: StepMetrics) -> None:
        """Reports a training step."""
        self._report(lambda run: run.log(asdict(metrics)))

    def log_evaluation(self, metrics: EvaluationMetrics) -> None:
        """Reports an evaluation."""
        values = {"step": metrics.step, "eval_loss": metrics.loss, "perplexity": metrics.perplexity}
        self._report(lambda run: run.log(values))

    def close(self, exit_code: int = 0) -> None:
        """Hands over what is left and ends the run as successful or, with an exit code other than 0, as failed."""
        self._report(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _report(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            self._note(f"wandb: turned off ({_first_line(error)}); metrics.jsonl goes on")


def _start(mode: str, project: str, run_dir: Path, name: str, config: dict[str, Any]) -> Any:
    wandb = importlib.import_module("wandb")
    # The service behind a start that failed would still hold the run's id.
    wandb.teardown()
    # Silent, it cannot stop at a prompt for a key on a terminal.
    wandb.setup(wandb.Settings(silent=True))
    run = wandb.init(
        mode=mode,
        project=project,
        name=name,
        id=_run_id(run_dir),
        resume="allow",
        dir=run_dir,
        config=config,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=LIMIT_SECONDS,
            login_timeout=LIMIT_SECONDS,
            finish_timeout=LIMIT_SECONDS,
        ),
    )
    # Own steps: wandb's would drop those that a resume takes again.
    run.define_metric("*", step_metric="step")
    return run


def _run_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8").strip()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
