"""What the names of a run, and the checkpoints that it starts from, must satisfy."""

import re
from collections.abc import Iterator
from pathlib import Path

from checkpoint.manifest import CORRUPT, MANIFEST_NAME, TEMPORARY
from models.families import HUGGING_FACE_PREFIX, open_directory
from models.hugging_face import identity
from runtime.errors import HuggingFaceError
from runtime.messages import closest
from settings.config import RunConfig
from settings.keys import show

LONGEST_NAME = 200
"""Bytes; file systems allow 255, and what belongs to a run adds to its name."""


def check_checkpoint(config: RunConfig) -> Iterator[str]:
    """What a start takes up is well-formed, and is there."""
    resume, load = config.checkpoint.resume, config.checkpoint.load
    if config.checkpoint.keep_best and not config.train.eval_interval:
        yield (
            "checkpoint.keep_best=true, but train.eval_interval=0: nothing says which is best; try "
            f"train.eval_interval={config.checkpoint.interval or config.train.steps}"
        )
    if resume not in ("auto", "never") and not resume.isdecimal():
        guess = closest(resume, ("auto", "never"))
        meant = f"did you mean {guess}? " if guess else ""
        yield f"checkpoint.resume={resume}: {meant}known: auto, never, or the number of a step"
    # Who goes on from a checkpoint of its own reads no other, which may be gone by now.
    if load is None or any(Path(config.run_dir).glob("checkpoints/step_*[0-9]")):
        return
    if load.startswith(HUGGING_FACE_PREFIX):
        yield from _hugging_face_problems(config, load)
    else:
        yield from _load_problems(load)


def _hugging_face_problems(config: RunConfig, load: str) -> Iterator[str]:
    try:
        there = identity(open_directory(Path(load.removeprefix(HUGGING_FACE_PREFIX))).model)
    except HuggingFaceError as error:
        yield f"checkpoint.load={load}: {error}"
        return
    here = config.model.resolved()
    unknown = {"vocab_size"} if here["vocab_size"] is None else set()
    other = {key: value for key, value in there.items() if here[key] != value and key not in unknown}
    if other:
        found = ", ".join(f"{key} {show(value)} rather than {show(here[key])}" for key, value in other.items())
        words = " ".join(f"model.{key}={show(value)}" for key, value in other.items())
        yield f"checkpoint.load={load} is of another model: it has {found}; what fits: {words}"


def _load_problems(stated_path: str) -> Iterator[str]:
    load, stated = Path(stated_path), f"checkpoint.load={stated_path}"
    example = "say a directory like RUN_DIR/checkpoints/step_00000100"
    if load.is_file():
        advice = f"try {load.parent}" if (load.parent / MANIFEST_NAME).is_file() else example
        yield f"{stated} is a file, and a checkpoint is a directory; {advice}"
    elif not load.is_dir():
        near = closest(load.name, _folders(load.parent))
        yield f"{stated}: there is no such directory; {f'nearest: {load.parent / near}' if near else example}"
    elif any(mark in load.name for mark in (TEMPORARY, CORRUPT)):
        yield f"{stated} was {'not finished' if TEMPORARY in load.name else 'found damaged'}; say one that is whole"
    elif not (load / MANIFEST_NAME).is_file():
        found = [*load.glob("step_*"), *load.glob("checkpoints/step_*")]
        steps = sorted(path for path in found if re.fullmatch(r"step_\d+", path.name))
        runs = sorted(path.parent.name for path in load.glob("*/checkpoints"))
        inside = f"it holds the runs {', '.join(runs)}; {example}" if runs else example
        yield f"{stated} is no checkpoint; {f'try {steps[-1]}' if steps else inside}"


def _folders(parent: Path) -> list[str]:
    found = [item.name for item in parent.iterdir() if item.is_dir()] if parent.is_dir() else []
    return [name for name in found if TEMPORARY not in name]


def check_name(config: RunConfig) -> Iterator[str]:
    """The run directory lies directly in out_dir."""
    name = config.name
    if not name.strip() or name in (".", "..") or "/" in name or "\0" in name:
        plain = name.replace("/", "-").strip("-. ") or "run"
        yield f"name={name!r}: must be the name of one directory inside out_dir={config.out_dir}; try name={plain}"
    elif not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        plain = "".join(character if character.isprintable() else "-" for character in name)[:40]
        yield f"name={name!r}: must be at most {LONGEST_NAME} bytes long and on one line; try name={plain}"
    if name == "sample_corpus":
        yield "name=sample_corpus: the prepared sample corpus lies there; try name=sample_run"
    if not config.out_dir.isprintable():
        yield f"out_dir={config.out_dir!r}: must be on one line and printable; try out_dir=outputs"
    elif not config.out_dir.strip():
        yield "out_dir is empty; try out_dir=outputs, or out_dir=. for the current directory"
