"""What metrics are repeated to: Weights & Biases and TensorBoard, whose failures never end a run."""

import importlib
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from monitoring.metrics import EvaluationMetrics, StepMetrics
from runtime.files import write_atomically
from runtime.messages import first_line


class Service(Protocol):
    """A program that shows metrics; its methods may raise anything."""

    def write(self, values: dict[str, Any]) -> None:
        """Takes what is known after `values["step"]` steps, by the names of metrics.jsonl; None is unknown."""

    def close(self, failed: bool, /) -> None:
        """Hands over what is left; `failed` is how the run ended."""


class Mirror:
    """Repeats the metrics of a run in a service until that fails. For rank 0 only; raises nothing."""

    def __init__(self, name: str, starts: Mapping[str, Callable[[], Service]], note: Callable[[str], None]) -> None:
        """Takes the first of `starts` that works, by what it would start; `note` prints a line."""
        self._name, self._note = name, note
        self._service: Service | None = None
        failed: list[str] = []
        for what, start in starts.items():
            try:
                self._service = start()
            except Exception as error:
                failed.append(f"{name}: no {what} ({first_line(error)})")
            else:
                failed = [f"{'; '.join(failed)}; recording an {what} instead"] if failed else []
                break
        for line in failed:
            note(line)

    def log_step(self, metrics: StepMetrics) -> None:
        """Repeats a training step."""
        self._attempt(lambda service: service.write(asdict(metrics)))

    def log_evaluation(self, metrics: EvaluationMetrics) -> None:
        """Repeats an evaluation."""
        values = {"step": metrics.step, "eval_loss": metrics.loss, "perplexity": metrics.perplexity}
        self._attempt(lambda service: service.write(values))

    def close(self, failed: bool) -> None:
        """Hands over what is left and ends."""
        self._attempt(lambda service: service.close(failed))
        self._service = None

    def _attempt(self, action: Callable[[Service], None]) -> None:
        if self._service is None:
            return
        try:
            action(self._service)
        except Exception as error:
            self._service = None
            self._note(f"{self._name}: turned off ({first_line(error)}); metrics.jsonl goes on")


LIMIT_SECONDS = 30
"""Longest that signing in, and handing over the last records, may each hold up a run."""
CONNECT_SECONDS = 5
"""Longest that a server may take to answer at all."""


class WandbRun:
    """A run of wandb; metrics carry their own step, as wandb's would drop those that a resume takes again."""

    def __init__(self, mode: str, project: str, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        """`mode` is offline or online. Raises whatever keeps wandb from starting."""
        self._run = _start(mode, project, run_dir, name, config)
        self._run.define_metric("*", step_metric="step")

    def write(self, values: dict[str, Any]) -> None:
        """Reports values, which hold their step."""
        self._run.log(values)

    def close(self, failed: bool, /) -> None:
        """Ends the run as successful or failed."""
        self._run.finish(exit_code=int(failed))


def open_wandb(
    mode: str, project: str, run_dir: Path, name: str, config: dict[str, Any], note: Callable[[str], None]
) -> Mirror:
    """Mirrors metrics to Weights & Biases; `mode` is off, offline or online. With `off`, wandb is not even imported.

    `online` without a key or a connection goes on as `offline`, whose records `wandb sync` sends later.
    """
    modes = {"off": (), "offline": ("offline",), "online": ("online", "offline")}[mode]
    starts = {
        f"{choice} run": lambda choice=choice: WandbRun(choice, project, run_dir, name, config) for choice in modes
    }
    return Mirror("wandb", starts, note)


def _start(mode: str, project: str, run_dir: Path, name: str, config: dict[str, Any]) -> Any:
    wandb = importlib.import_module("wandb")
    # The service behind a start that failed would still hold the run's id.
    wandb.teardown()
    # Silent, it cannot stop at a prompt for a key on a terminal.
    session = wandb.setup(wandb.Settings(silent=True))
    if mode == "online":
        _require_connection(session.settings.base_url)
    return wandb.init(
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


def _run_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id.txt"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8").strip()


def _require_connection(address: str) -> None:
    """Raises OSError where nobody answers: wandb would try for LIMIT_SECONDS. A proxy is left to wandb."""
    server = urlsplit(address)
    if server.scheme not in getproxies():
        default = 80 if server.scheme == "http" else 443
        socket.create_connection((server.hostname, server.port or default), timeout=CONNECT_SECONDS).close()


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
