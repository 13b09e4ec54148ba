"""Which rank writes what of a checkpoint: every part of a tensor once, and all ranks about as much."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from checkpoint.manifest import TensorEntry
from checkpoint.tensor_files import DTYPE_NAMES
from parallel.sharding import Box, TensorPart


class Claim(NamedTuple):
    """A rank's part of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    nbytes: int


def claims(parts: Mapping[str, TensorPart]) -> list[Claim]:
    """What this rank has. Raises TypeError for a dtype that safetensors files cannot hold."""
    for name, part in parts.items():
        if part.values.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name} is no tensor of a dtype that a checkpoint can hold")
    return [
        Claim(name, DTYPE_NAMES[part.values.dtype], part.shape, part.box, part.values.nbytes)
        for name, part in parts.items()
    ]


def share_out(claimed: Sequence[Sequence[Claim]]) -> list[list[str]]:
    """Which tensors each rank writes its part of, so that every box is written once and all write about as much.

    Empty parts are written by none.
    """
    holders: dict[Claim, list[int]] = defaultdict(list)
    for rank, own in enumerate(claimed):
        for claim in own:
            if claim.box.size:
                holders[claim].append(rank)
    shares: list[list[str]] = [[] for _ in claimed]
    load = [0] * len(claimed)
    # What few ranks have first, and the largest of it: the rest evens out what they got.
    for claim in sorted(holders, key=lambda claim: (len(holders[claim]), -claim.nbytes)):
        writer = min(holders[claim], key=load.__getitem__)
        shares[writer].append(claim.name)
        load[writer] += claim.nbytes
    return shares


@dataclass(frozen=True)
class Plan:
    """Who writes what: the same at every save of a run."""

    names: list[str]
    """Of the tensors whose parts this rank writes."""
    entries: dict[str, TensorEntry]
    """All tensors, without chunks; on rank 0, which writes the manifest."""
    size: int
    """Bytes of a checkpoint."""
