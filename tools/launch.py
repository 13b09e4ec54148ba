"""`kilotron launch`: a batch script for SLURM, made of slurm/pretrain.sbatch, for a configuration that was checked."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from runtime.errors import ConfigError
from runtime.files import write_atomically
from settings.compose import compose
from settings.resolve import resolve
from settings.summary import summary

CHECKOUT = Path(__file__).resolve().parent.parent
TEMPLATE = CHECKOUT / "slurm" / "pretrain.sbatch"
SUBMIT = "sbatch"
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron launch`."""
    parser.add_argument("--nodes", type=_count, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=_count, required=True, metavar="N", help="and ranks")
    parser.add_argument("--time", type=_time, required=True, help="limit of the job, such as 4:00:00 or 2-12:00")
    parser.add_argument("--partition", type=_line)
    parser.add_argument("--account", type=_line)
    parser.add_argument("--job-name", type=_line, help="default: the run's")
    parser.add_argument("--dir", type=_line, help="where the script and the job's log go (default: the run directory)")
    parser.add_argument("--submit", action="store_true", help="hand the script to sbatch")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings as pretrain_gpt.py takes them")


def run(arguments: argparse.Namespace) -> int:
    """Checks, writes and shows the script, and submits it where asked to; returns 0, or the exit code of sbatch.

    Raises ConfigError where the configuration is not legal on so many ranks, or there is no sbatch to submit with, and
    StorageError where the script cannot be written.
    """
    ranks = arguments.nodes * arguments.gpus_per_node
    config = compose(arguments.overrides)
    if config.world_size not in (None, ranks):
        raise ConfigError(
            f"world_size={config.world_size}, but {arguments.nodes} nodes of {arguments.gpus_per_node} GPUs have "
            f"{ranks} ranks; leave world_size out"
        )
    config = resolve(replace(config, world_size=ranks), {})
    folder = Path(arguments.dir or config.run_dir).absolute()
    options = {
        "job-name": arguments.job_name or config.name,
        "partition": arguments.partition,
        "account": arguments.account,
        "nodes": arguments.nodes,
        "gpus-per-node": arguments.gpus_per_node,
        "time": arguments.time,
        "chdir": Path.cwd(),
        "output": str(folder).replace("%", "%%") + "/slurm-%j.log",
    }
    script = fill(TEMPLATE.read_text(encoding="utf-8"), options, arguments.overrides)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TEMPLATE.name
    write_atomically(path, script.encode())
    print(script, summary(config), f"wrote {path}", sep="\n", flush=True)
    if not arguments.submit:
        print(f"next: {SUBMIT} {shlex.quote(str(path))}")
        return 0
    if shutil.which(SUBMIT) is None:
        raise ConfigError(f"--submit: there is no {SUBMIT} on this machine; submit {path} where SLURM is")
    return subprocess.run([SUBMIT, path], check=False).returncode


def fill(template: str, options: Mapping[str, object], overrides: Sequence[str]) -> str:
    """The batch script with its #SBATCH `options` (None: not given), this checkout, this Python and the overrides."""
    for name, value in options.items():
        if not str(value).isprintable():
            raise ConfigError(f"--{name}={value!r} must be on one line of the batch script and printable")
    given = {f"#SBATCH --{name}": shlex.quote(str(value)) for name, value in options.items() if value is not None}
    variables = {
        "checkout": shlex.quote(str(CHECKOUT)),
        "python": f"${{PYTHON:-{shlex.quote(sys.executable)}}}",
        "overrides": f'({shlex.join(overrides)} "$@")',
    }
    before = template.splitlines()
    first = next(number for number, line in enumerate(before) if line.startswith("#SBATCH"))
    lines = []
    for line in before:
        name = line.partition("=")[0]
        if name not in given:
            lines.append(f"{name}={variables[name]}" if name in variables else line)
    lines[first:first] = [f"{option}={value}" for option, value in given.items()]
    return "\n".join(lines) + "\n"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def _time(text: str) -> str:
    if not TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} is no time; write minutes, hours:minutes:seconds or days-hours")
    return text


def _line(text: str) -> str:
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError("must be words on one line")
    return text
