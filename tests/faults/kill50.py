"""One run that saves every step and keeps one checkpoint, killed at fifty random moments: `make kill50`.

After each kill what is on disk verifies, and the final weights, moments and losses are those of a run left alone.
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pretrain_gpt
from checkpoint.directory import step_directories
from checkpoint.manifest import read_manifest, verify
from tests.faults.harness import RANKS, Job, rank_processes
from verification.local_ranks import RankError, run_ranks

KILLS = 50
STEPS = 20_000
"""More than it will take."""
LONGEST = 4.0
"""Seconds that a rank lives at most once it has begun to build its model."""


def rank_that_dies(rank: int, world_size: int, words: list[str], job: Job, after: float | None) -> int:
    """Trains, and kills itself some seconds after it began."""

    def die() -> None:
        while rank_processes(job).get(rank) != os.getpid():
            time.sleep(0.01)
        time.sleep(after or 0)
        os.kill(os.getpid(), signal.SIGKILL)

    if after is not None:
        threading.Thread(target=die, daemon=True).start()
    return pretrain_gpt.main(words, os.environ)


def start(job: Job, steps: int, after: float | None) -> bool:
    """Whether the run got to its end."""
    words = [*job.command, f"train.steps={steps}", "schedule.steps=100000", "train.eval_interval=0",
             "checkpoint.interval=1", "checkpoint.keep=1", "log.sample_ids=false"]  # fmt: skip
    try:
        return run_ranks(RANKS, rank_that_dies, words, job, after, initialize=False) == [0] * RANKS
    except RankError:
        return False


def newest(job: Job) -> int:
    """The step of the newest checkpoint, all of whose files are what was written. Raises where there is none."""
    step, path = step_directories(job.path / "checkpoints")[0]
    verify(path, read_manifest(path), "full")
    return step


def contents(job: Job) -> list[tuple[str, bytes]]:
    """The files of the newest checkpoint."""
    (_, path), *_ = step_directories(job.path / "checkpoints")
    return [(file.name, file.read_bytes()) for file in sorted(path.glob("*.safetensors"))]


def main(seed: int) -> int:
    """Returns 0 where all holds."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        job, reference = (Job(Path(folder), name, "dp") for name in ("killed", "left-alone"))
        kills, step = 0, 0
        while kills < KILLS:
            if start(job, STEPS, generator.uniform(0, LONGEST)):
                raise RuntimeError(f"the run took {STEPS} steps before it could be killed {KILLS} times")
            kills += 1
            if step or (job.path / "checkpoints" / "latest").exists():
                before, step = step, newest(job)
                assert step >= before
            print(f"kill {kills}: step {step}", flush=True)
        last = step + 3
        assert start(job, last, None)
        assert start(reference, last, None)
        assert contents(job) == contents(reference), "weights or moments differ"
        assert job.numbers() == reference.numbers()
        print(f"{KILLS} kills (seed {seed}): {last} steps, and all is bit for bit that of a run left alone")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(10**6)))
