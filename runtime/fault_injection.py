"""Faults on purpose: KILOTRON_FAULT lets a rank fail at a place of a run, so that tests see what is left of it."""

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from runtime.errors import ConfigError
from runtime.messages import closest

VARIABLE = "KILOTRON_FAULT"
OF_A_STEP = ("forward", "backward", "grad_sync", "optimizer")
OF_A_CHECKPOINT = tuple(f"checkpoint.{part}" for part in ("stage", "write", "fsync", "manifest", "rename", "prune"))
PHASES = ("data", *OF_A_STEP, "log", *OF_A_CHECKPOINT)
ACTIONS = ("kill", "hang", "raise", "nan", "enospc", "eio", "sleep")
FOR_EVER = 1e6
"""Seconds that `hang` hangs."""
Passing = Callable[[str], bool]
"""Told the phase that begins; true where its numbers are to become NaN."""


def no_faults(_: str) -> bool:
    """Nothing fails."""
    return False


@dataclass(frozen=True)
class Fault:
    """What happens the first time that a rank comes to a phase of a step."""

    phase: str
    action: str
    rank: int | None = None
    """None: every rank."""
    step: int | None = None
    """The step that is taken, or that a checkpoint is of; None: any."""
    seconds: float = 1.0
    """How long `sleep` sleeps."""


def parse_fault(text: str) -> Fault:
    """The fault that a text such as "rank=1,step=7,phase=checkpoint.write,action=kill" asks for. Raises ConfigError."""
    kinds = {"phase": str, "action": str, "rank": int, "step": int, "seconds": float}
    words = [word.strip().partition("=") for word in text.split(",")]
    for key, _, _ in words:
        if key not in kinds:
            guess = closest(key, kinds)
            meant = f"did you mean {guess}?" if guess else f"known are {', '.join(kinds)}"
            raise ConfigError(f"{VARIABLE}={text}: {key or 'nothing'} is no word of it; {meant}")
    try:
        values = {key: kinds[key](value) for key, _, value in words}
    except ValueError as error:
        raise ConfigError(
            f"{VARIABLE}={text}: {error}; it is written like rank=1,step=7,phase=checkpoint.write,action=kill"
        ) from error
    for key, choices in {"phase": PHASES, "action": ACTIONS}.items():
        if values.get(key) not in choices:
            guess = closest(str(values[key]), choices) if key in values else None
            meant = f"did you mean {guess}? " if guess else ""
            raise ConfigError(f"{VARIABLE}={text}: {meant}{key} is one of {', '.join(choices)}")
    fault = Fault(**values)
    if not 0 <= fault.seconds <= FOR_EVER:
        raise ConfigError(f"{VARIABLE}={text}: seconds={fault.seconds:g} must be from 0 to {FOR_EVER:g}")
    if fault.action == "nan" and fault.phase not in OF_A_STEP:
        raise ConfigError(f"{VARIABLE}={text}: action=nan goes with the phases {', '.join(OF_A_STEP)}")
    return fault


class Faults:
    """Lets the fault happen that the environment asks for, once; when torchrun has restarted the ranks, no more."""

    def __init__(self, rank: int = 0, environment: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError where the environment asks for what there is not."""
        environment = environment or {}
        text = environment.get(VARIABLE)
        restarted = environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        self._fault = parse_fault(text) if text and not restarted else None
        if self._fault is not None and self._fault.rank not in (None, rank):
            self._fault = None

    def of_step(self, step: int) -> Passing:
        """`at` of one step."""
        return partial(self.at, step)

    def at(self, step: int, phase: str) -> bool:
        """Comes to a phase; true where its numbers are to become NaN. Raises what the fault raises."""
        fault = self._fault
        if fault is None or fault.phase != phase or fault.step not in (None, step):
            return False
        self._fault = None
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action in ("hang", "sleep"):
            time.sleep(FOR_EVER if fault.action == "hang" else fault.seconds)
        elif fault.action == "raise":
            raise RuntimeError(f"{VARIABLE} asks for an error in {phase}")
        elif fault.action != "nan":
            number = getattr(errno, fault.action.upper())
            raise OSError(number, os.strerror(number))
        return fault.action == "nan"
