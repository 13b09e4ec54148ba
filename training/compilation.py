"""Whether a run's layers are compiled: decided once for all ranks, with the reason in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from core.compilation import missing_compiler
from runtime.errors import ConfigError
from settings.checks.pipeline import compile_refusal
from settings.config import RunConfig


@dataclass(frozen=True)
class CompileDecision:
    """What `train.compile` comes to on the machines of a run."""

    layers: bool
    """Layers are compiled, on every rank."""
    reason: str
    """Why they are, or are not, in words."""

    def __str__(self) -> str:
        return f"layers are {'' if self.layers else 'not '}compiled: {self.reason}"


def decide(
    wanted: bool | None, device_type: str, missing: Sequence[str | None], refusal: str | None
) -> CompileDecision:
    """What `train.compile=wanted` comes to.

    Args:
        device_type: `cuda` or `cpu`, the same on all ranks.
        missing: what torch.compile lacks on each rank, in words; None: nothing.
        refusal: what in the configuration compiled layers do not go with; None: nothing.

    Raises ConfigError where layers are to be compiled and a rank lacks something.
    """
    lacking = {rank: what for rank, what in enumerate(missing) if what is not None}
    rank, what = next(iter(lacking.items()), (None, ""))
    if wanted and lacking:
        where = "here" if len(lacking) == len(missing) else f"on rank {rank}"
        raise ConfigError(
            f"train.compile=true: torch.compile needs the {what}, which is not {where}; install it, or use "
            "train.compile=false"
        )
    if wanted is not None:
        return CompileDecision(wanted, f"train.compile={str(wanted).lower()}")
    if device_type != "cuda":
        return CompileDecision(False, "train.compile=null compiles them on CUDA alone")
    if refusal is not None:
        return CompileDecision(False, refusal)
    if lacking:
        return CompileDecision(False, f"rank {rank} lacks the {what}")
    return CompileDecision(True, "train.compile=null, and every rank has CUDA and a compiler")


def decide_compilation(config: RunConfig, device_type: str) -> CompileDecision:
    """The decision for the ranks of this run, the same on all of them. Collective.

    Raises ConfigError on all ranks where `train.compile=true` and one of them lacks a compiler.
    """
    wanted = config.train.compile
    missing: list[str | None] = [None] * dist.get_world_size()
    if wanted or (wanted is None and device_type == "cuda"):
        dist.all_gather_object(missing, missing_compiler(device_type))
    return decide(wanted, device_type, missing, compile_refusal(config.parallel))
