"""Times how long saving a checkpoint holds training up, written beside it and not, on this machine's disk.

    python -m benchmarks.checkpoint [--gigabytes 1.2] [--saves 5] [--folder FOLDER]

Turn by turn, in one process: a save that training waits for, and one beside it, of which training waits for the copy.
What was saved last is loaded and compared. Memory is the most that the process held beyond its state.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch

from checkpoint.directory import Retention
from checkpoint.load import choose_checkpoint, load_checkpoint
from checkpoint.save import CheckpointSaver
from parallel.process_group import process_group

ROWS, COLUMNS = 1024, 4096


def held() -> float:
    """Most memory that this process held so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def save(saver: CheckpointSaver, step: int, tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds until training may go on, and until the checkpoint is on disk. Raises what went wrong."""
    begin = time.perf_counter()
    saver.save(step, tensors, {})
    stall = time.perf_counter() - begin
    ended = saver.ended(wait=True)
    if ended is not None and ended.error is not None:
        raise ended.error
    return stall, time.perf_counter() - begin


def main() -> int:
    """Prints the medians and their ratio; returns 1 where what was loaded is not what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of state")
    parser.add_argument("--saves", type=int, default=5, help="of each kind, beside one that is not counted")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files are")
    arguments = parser.parse_args()
    count = max(1, round(arguments.gigabytes * 1e9 / (ROWS * COLUMNS * 4)))
    tensors = {f"layers.{index}": torch.randn(ROWS, COLUMNS) for index in range(count)}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    stalls: dict[bool, list[float]] = {False: [], True: []}
    wholes: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, process_group(timedelta(minutes=10), {}):
        savers = {kind: CheckpointSaver(Path(folder), Retention(1), asynchronous=kind) for kind in (False, True)}
        before = held()
        extra: dict[bool, float] = {}
        for step in range(arguments.saves + 1):
            for kind, saver in savers.items():
                stall, whole = save(saver, 2 * step + kind, tensors)
                extra.setdefault(kind, held() - before)
                if step:
                    stalls[kind].append(stall)
                    wholes[kind].append(whole)
        chosen = choose_checkpoint(Path(folder), "auto", "full")
        assert chosen is not None
        found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        load_checkpoint(*chosen, found)
    equal = all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    waiting, beside = (statistics.median(stalls[kind]) for kind in (False, True))
    print(f"{size:.2f} GB of state, {arguments.saves} saves of each kind, medians")
    print(f"training waits for the save   {waiting:.3f} s; memory beyond the state {extra[False]:.2f} GB")
    print(
        f"the save goes on beside it    {beside:.3f} s of {statistics.median(wholes[True]):.3f} s; memory beyond the "
        f"state {extra[True]:.2f} GB"
    )
    print(f"stall                         {beside / waiting:.1%} of that of a save that training waits for")
    print(f"what was saved last loads {'equal' if equal else 'DIFFERENT'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
