"""Timelines of pipeline schedules: recorded on every rank, gathered, and drawn."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from monitoring.plot import draw_timeline
from parallel.data_parallel import DataParallel
from parallel.mesh import ParallelMesh
from parallel.pipeline import Pipeline
from parallel.schedule_timeline import Action, Span
from runtime.files import write_atomically


@contextmanager
def recorded(pipeline: DataParallel, mesh: ParallelMesh) -> Iterator[list[Span]]:
    """Within the context every action of this rank's schedules is put down, in seconds since all ranks entered.

    Collective. On a GPU the host waits for each action, so that it is the action that is timed.
    """
    spans: list[Span] = []
    on_gpu = mesh.device_mesh.device_type == "cuda"

    @contextmanager
    def observe(action: Action) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        spans.append(Span(mesh.pp_rank, action, begin - entered, time.perf_counter() - entered))

    if not isinstance(pipeline, Pipeline):
        raise TypeError("there are no stages, and no schedule to record")
    dist.barrier()
    entered = time.perf_counter()
    before, pipeline.observer = pipeline.observer, observe
    try:
        yield spans
    finally:
        pipeline.observer = before


def draw_step(spans: Sequence[Span], mesh: ParallelMesh, title: str, path: Path) -> None:
    """Draw what the ranks of the first pipeline put down; rank 0 does. Collective."""
    gathered: list[list[Span]] | None = [[]] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(list(spans), gathered)
    if gathered is None:
        return
    first = gathered[:: len(gathered) // mesh.pp_size]
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, draw_timeline([span for own in first for span in own], mesh.pp_size, title, "seconds"))
