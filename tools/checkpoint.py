"""`kilotron checkpoint`: lists the checkpoints of a run, shows what is in one, compares files with their manifests."""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint.manifest import CORRUPT, LEFT, MANIFEST_NAME, TEMPORARY, Manifest, read_manifest, verify
from runtime.errors import ConfigError, DamageError, StorageError
from runtime.messages import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the tool's arguments."""
    parser.add_argument("action", choices=("list", "show", "verify"), help="what to do")
    parser.add_argument("path", type=Path, metavar="PATH", help="a run directory, or one checkpoint of it")


def run(arguments: argparse.Namespace) -> int:
    """Prints what was asked for. Raises ConfigError where there is no checkpoint, StorageError for damage."""
    found = find(arguments.path)
    actions = {"list": list_all, "show": show, "verify": verify_all}
    for line in actions[arguments.action](found):
        print(line)
    return 0


def find(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those of the run there, damaged ones included, the newest first."""
    if (path / MANIFEST_NAME).is_file() or path.name.startswith("step_"):
        found = [path] if path.is_dir() else []
    else:
        folders = [path / "checkpoints", path] if path.name != "checkpoints" else [path]
        folder = next((folder for folder in folders if folder.is_dir()), path)
        # What an interrupted save left is none, and the next one removes it.
        whole = [each for each in folder.glob("step_*") if each.is_dir() and TEMPORARY not in each.name]
        found = sorted(whole, reverse=True)
    if not found:
        raise ConfigError(f"{path} holds no checkpoint; say a run directory, such as outputs/run")
    return found


def list_all(found: list[Path]) -> Iterator[str]:
    """A line per checkpoint: step, size, when it was saved, validation loss, and whether its files are all there."""
    yield f"{'checkpoint':28} {'GB':>8} {'files':>6}  {'saved':19} {'eval loss':>9}  state"
    for path in found:
        try:
            manifest = read_manifest(path)
        except StorageError as error:
            if path.exists():  # else its run has removed it meanwhile
                yield f"{path.name:28} {'':>8} {'':>6}  {'':19} {'':>9}  {error}"
            continue
        saved, loss = _at(manifest.state, "saved"), _at(manifest.state, "eval_loss")
        shown = f"{loss:.3f}" if isinstance(loss, float) else ""
        yield (
            f"{path.name:28} {_size(manifest) / 1e9:8.3f} {len(manifest.files):6}  {saved or ''!s:19} {shown:>9}  "
            f"{_damage(path, manifest, 'sizes') or 'sizes match'}"
        )


def show(found: list[Path]) -> Iterator[str]:
    """What the newest of them says of itself."""
    path = next((each for each in found if not _is_aside(each)), found[0])
    try:
        manifest = read_manifest(path)
    except DamageError as error:
        others = ", ".join(str(each) for each in found if each != path) or "none"
        raise DamageError(f"{error}; other checkpoints: {others}") from error
    state, data = manifest.state, _at(manifest.state, "data")
    model = {name: entry for name, entry in manifest.tensors.items() if name.startswith("model.")}
    parallel = {key: _at(state, "config", "parallel", key) for key in ("pp", "dp_replicate", "dp_shard", "tp")}
    layout = [f"{key}={size}" for key, size in parallel.items() if size not in (1, None)]
    dtypes = Counter(entry.dtype for entry in manifest.tensors.values())
    rows = {
        "checkpoint": path,
        "step": manifest.step,
        "saved": _at(state, "saved"),
        "consumed": f"{_at(state, 'consumed_samples')} samples, {_at(state, 'consumed_tokens')} tokens",
        "parameters": f"{sum(math.prod(entry.shape) for entry in model.values()):,} in {len(model)} tensors",
        "other tensors": len(manifest.tensors) - len(model),
        "dtypes": ", ".join(f"{dtype} in {count} tensors" for dtype, count in dtypes.items()),
        "files": f"{len(manifest.files)}, {_size(manifest) / 1e9:.3f} GB",
        "validation loss": _at(state, "eval_loss"),
        "saved by": " ".join(layout) or "one rank",
        "optimizer": _at(state, "config", "optimizer", "name"),
        "precision": _at(state, "config", "train", "precision"),
        "data": ", ".join(f"{key} {value}" for key, value in data.items()) if isinstance(data, dict) else None,
        "torch": _at(state, "torch"),
    }
    yield from (f"{key:16} {value}" for key, value in rows.items() if value not in (None, ""))


def verify_all(found: list[Path]) -> Iterator[str]:
    """Hashes every file of every checkpoint. Raises DamageError at the end where one is not what was written."""
    damaged = []
    for path in found:
        if len(found) > 1 and _is_aside(path):
            yield f"{path.name}: set aside, none of the run's any more; say its path to verify it"
            continue
        try:
            manifest = read_manifest(path)
            verify(path, manifest, "full")
        except DamageError as error:
            if not path.exists():
                yield f"{path.name}: removed meanwhile by its run"
                continue
            damaged.append(path.name)
            yield f"{path.name}: {error}"
        else:
            files = f"{counted(len(manifest.files), 'file')}, {_size(manifest) / 1e9:.3f} GB"
            yield f"{path.name}: {files}, all as they were written"
    if damaged:
        advice = "; a run that goes on takes the newest that is whole" if len(found) > 1 else ""
        raise DamageError(f"damaged: {', '.join(damaged)}{advice}")


def _is_aside(path: Path) -> bool:
    return any(mark in path.name for mark in (CORRUPT, LEFT))


def _at(state: Any, *keys: str) -> Any:
    """What a state says under keys, one within the other; None where it is silent, as it is anybody's JSON."""
    for key in keys:
        state = state.get(key) if isinstance(state, dict) else None
    return state


def _size(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files.values())


def _damage(path: Path, manifest: Manifest, mode: str) -> str | None:
    try:
        verify(path, manifest, mode)
    except StorageError as error:
        return str(error)
    return None
