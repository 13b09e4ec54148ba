"""The record of what was fed: every rank's samples of a step, gathered and put into global order."""

import math
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
    own = [batch.samples for batch in micro_batches]
    gathered = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered)
    if gathered is None:
        return None
    # Ranks that share weights, and those of one pipeline, feed the same.
    gathered = gathered[: len(gathered) // mesh.pp_size : mesh.tp_size]
    ordered = [sample for same_index in zip(*gathered, strict=True) for samples in same_index for sample in samples]
    crc = 0
    for sample in ordered:
        crc = zlib.crc32(sample.tokens.astype(np.dtype("<i4")).tobytes(), crc)
    return FedSamples(_ids(ordered), crc)


def describe_non_finite(
    step: int, local_losses: list[float], micro_batches: Sequence[MicroBatch], mesh: ParallelMesh
) -> str:
    """Which rank and samples made a step non-finite. A collective call, with the same answer on every rank."""
    own = [
        (f"rank {dist.get_rank()}, samples [dataset, epoch, window] {_ids(batch.samples)}", math.isfinite(loss))
        for loss, batch in zip(local_losses, micro_batches, strict=True)
        if mesh.tp_rank == 0 and mesh.has_loss
    ]
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    fed = [part for parts in everyone for part in parts]
    failing = [words for words, finite in fed if not finite]
    if failing:
        return (
            f"step {step}: the loss is not finite; if it was high before, try a lower optimizer.lr or more "
            f"schedule.warmup_steps; it arose on {'; '.join(failing)}"
        )
    return (
        f"step {step}: every loss is finite but the gradient is not; try a lower optimizer.lr, more "
        f"schedule.warmup_steps or optimizer.clip_grad=1; fed were {'; '.join(words for words, _ in fed)}"
    )


def _ids(samples: Sequence[Sample]) -> list[list[int]]:
    return [[sample.dataset, sample.epoch, sample.window] for sample in samples]
