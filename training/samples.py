"""The record of what was fed: every rank's samples of a step, gathered and put into global order."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from data.batches import MicroBatch
from data.gpt_dataset import Sample
from parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class FedSamples:
    """The samples of one step in global order."""

    ids: list[list[int]]
    """[dataset, epoch, window] of each."""
    crc: int
    """CRC-32 of all their tokens as little-endian int32."""


def gather_samples(micro_batches: Sequence[MicroBatch], mesh: ParallelMesh) -> FedSamples | None:
    """What all ranks fed in this step; the answer is on rank 0 alone. A collective call."""
    rank = dist.get_rank()
    own = [batch.samples for batch in micro_batches]
    gathered: list[list[list[Sample]]] | None = [[] for _ in range(dist.get_world_size())] if rank == 0 else None
    dist.gather_object(own, gathered)
    if gathered is None:
        return None
    gathered = gathered[:: mesh.tp_size]  # ranks that share weights feed the same
    ordered = [sample for same_index in zip(*gathered, strict=True) for samples in same_index for sample in samples]
    crc = 0
    for sample in ordered:
        crc = zlib.crc32(sample.tokens.astype(np.dtype("<i4")).tobytes(), crc)
    return FedSamples([[sample.dataset, sample.epoch, sample.window] for sample in ordered], crc)


def describe_non_finite(
    step: int, local_losses: list[float], micro_batches: Sequence[MicroBatch], mesh: ParallelMesh
) -> str:
    """Which rank and samples made a step non-finite. A collective call, with the same answer on every rank."""
    bad = [
        [sample.dataset, sample.epoch, sample.window]
        for loss, batch in zip(local_losses, micro_batches, strict=True)
        if not np.isfinite(loss)
        for sample in batch.samples
    ]
    everyone: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, bad)
    culprits = [_fed_by(rank, ids) for rank, ids in enumerate(everyone) if ids and rank % mesh.tp_size == 0]
    if culprits:
        return (
            f"step {step}: the loss is not finite; if it was high before, try a lower optimizer.lr or more "
            f"schedule.warmup_steps; it arose on {'; '.join(culprits)}"
        )
    fed = [[sample.dataset, sample.epoch, sample.window] for batch in micro_batches for sample in batch.samples]
    everyone = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, fed)
    listed = "; ".join(_fed_by(rank, ids) for rank, ids in enumerate(everyone) if rank % mesh.tp_size == 0)
    return (
        f"step {step}: every loss is finite but the gradient is not; try a lower optimizer.lr, more "
        f"schedule.warmup_steps or optimizer.clip_grad=1; fed were {listed}"
    )


def _fed_by(rank: int, ids: list[list[int]]) -> str:
    return f"rank {rank}, samples [dataset, epoch, window] {ids}"
