"""Weights & Biases, with one run id across resumes."""

import importlib
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from training.mirror import Mirror
from training.run_directory import write_atomically

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
