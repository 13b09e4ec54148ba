"""Trains a GPT: `python pretrain_gpt.py` on one process, `torchrun ... pretrain_gpt.py` on many. `--help` says more."""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from runtime.errors import RANK_ZERO_REPORT_GRACE_SECONDS, ConfigError
from runtime.streams import flush_streams, open_missing_streams, tell
from settings.command_line import read_command_line
from settings.compose import compose, compose_sweep, to_yaml
from settings.config import RunConfig
from settings.help_page import help_page
from settings.resolve import resolve
from settings.summary import summary


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """One run, or what was asked for in its place; returns the exit code. Raises errors that carry an `exit_code`."""
    try:
        return start(words, environment)
    except Exception as error:
        if environment.get("RANK", "0") != "0" and hasattr(error, "exit_code"):
            time.sleep(RANK_ZERO_REPORT_GRACE_SECONDS)
        raise


def start(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """What `main` does, on this rank."""
    began = time.monotonic()
    command = read_command_line(words)
    if command.show_help:
        return say(help_page(), environment)
    if command.sweep:
        return sweep(command.overrides, environment)
    config = compose(command.overrides)
    if command.show_config:
        return say(to_yaml(config).rstrip(), environment)
    config = resolve(config, environment)
    if config.check:
        return say(summary(config), environment)
    require_ranks(config, environment)

    # Only now, so that a configuration is refused before torch takes its seconds to load.
    from training.run import train

    return train(config, command.overrides, began)


def sweep(overrides: Sequence[str], environment: Mapping[str, str]) -> int:
    """Starts the runs of a sweep one after another, each in its own process; returns the first failing exit code."""
    if "TORCHELASTIC_RUN_ID" in environment or environment.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("-m starts several runs and works without torchrun only; start one run a torchrun")
    runs = compose_sweep(overrides)
    for run in runs:
        resolve(compose(run), environment)
    codes = []
    for number, run in enumerate(runs, start=1):
        tell(f"run {number}/{len(runs)}: {' '.join(run)}", sys.stdout)
        codes.append(subprocess.run([sys.executable, __file__, *run], check=False).returncode)
    return next((code for code in codes if code != 0), 0)


def require_ranks(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Raises ConfigError where the configuration asks for other ranks than a launcher started."""
    ranks, port = int(environment.get("WORLD_SIZE") or 1), environment.get("MASTER_PORT", "")
    if ranks > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} is set, but not RANK, MASTER_ADDR, MASTER_PORT: start the ranks "
            f"with torchrun, or unset it"
        )
    for key in ("RANK", "LOCAL_RANK") if environment.get("WORLD_SIZE") else ():
        value = environment.get(key, "0")
        if not value.isdecimal() or int(value) >= ranks:
            raise ConfigError(f"the environment says {key}={value}, which is no number below WORLD_SIZE={ranks}")
    if ranks > 1 and not (port.isdecimal() and 0 < int(port) < 65_536):
        raise ConfigError(f"the environment says MASTER_PORT={port}, which is no number from 1 to 65535")
    if config.world_size != 1 and not environment.get("WORLD_SIZE"):
        raise ConfigError(
            f"world_size={config.world_size}, but one process was started: use `torchrun --standalone "
            f"--nproc-per-node={config.world_size} pretrain_gpt.py ...`, or check=true to look at the layout only"
        )


def say(text: str, environment: Mapping[str, str]) -> int:
    """Prints what was asked for, on rank 0 only; returns the exit code of a process that has nothing more to do, 0 also
    where nobody reads any more (`| head`). Raises OSError where it cannot be written."""
    if environment.get("RANK", "0") == "0":
        with suppress(BrokenPipeError):
            print(text, flush=True)
    return 0


def run() -> int:
    """The process: prints what ends it, errors that a user can mend as one message; returns the exit code."""
    open_missing_streams()
    try:
        return main(sys.argv[1:], os.environ)
    except KeyboardInterrupt:
        return 130
    except SystemExit as request:
        return int(request.code or 0)
    except BaseException as error:
        exit_code = getattr(error, "exit_code", 74 if isinstance(error, OSError) else None)
        if exit_code is None:
            tell(traceback.format_exc().rstrip())
            return 1
        # What rank 0 cannot say for all ranks, because it is not there, this rank says itself.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "unheard", False):
            tell(f"error: {error}".replace("\n", "\n       "))
        return int(exit_code)


def end(exit_code: int) -> NoReturn:
    """Ends the process without taking the interpreter down: threads of gloo that still want it would abort, and
    connections to ranks that have failed would be waited for."""
    flush_streams()
    os._exit(exit_code)


if __name__ == "__main__":
    end(run())
