"""Which layers a pipeline stage has, which stages a rank has, what micro-batches a schedule takes; free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass

V_SHAPED = ("zbv", "dualpipev")
"""Schedules in which a rank has one stage on the way down and one on the way up, so that the first has the last."""
SPLIT_BACKWARD = ("zb", "zbv", "dualpipev")
"""Schedules that fill idle time with gradients of weights, put off until then (arXiv:2401.10241, arXiv:2412.19437)."""


@dataclass(frozen=True)
class Stage:
    """A part of the model that one rank computes."""

    index: int
    """From 0 on, in the order in which a micro-batch passes."""
    layers: range
    is_first: bool = True
    is_last: bool = True


def divide_layers(layers: int, stages: int, layer_cost: float, first_cost: float, last_cost: float) -> list[int]:
    """How many of equally costly layers each stage has, so that the costliest stage costs as little as it can.

    The first stage bears the cost of the embedding as well, the last that of the head. A layer more than others goes to
    a late stage: early ones hold more micro-batches. Raises ValueError for more stages than layers.
    """
    if stages > layers:
        raise ValueError(f"{stages} stages of {layers} layers")
    costs = [layer_cost] * stages
    costs[0] += first_cost
    costs[-1] += last_cost
    numbers = [1] * stages
    for _ in range(layers - stages):
        cheapest = min(range(stages), key=lambda stage: (costs[stage], -stage))
        numbers[cheapest] += 1
        costs[cheapest] += layer_cost
    return numbers


def build_stages(layers_per_stage: Sequence[int]) -> list[Stage]:
    """The stages of a model, first to last."""
    stages, start, last = [], 0, len(layers_per_stage) - 1
    for index, number in enumerate(layers_per_stage):
        stages.append(Stage(index, range(start, start + number), index == 0, index == last))
        start += number
    return stages


def stages_of_rank(rank: int, ranks: int, a_rank: int, schedule: str) -> list[int]:
    """The indices of a pipeline rank's stages, `a_rank` of them."""
    if schedule in V_SHAPED:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + turn * ranks for turn in range(a_rank)]


def rank_of_stage(stage: int, ranks: int, schedule: str) -> int:
    """The pipeline rank that has a stage."""
    return min(stage, 2 * ranks - 1 - stage) if schedule in V_SHAPED else stage % ranks


def default_stages_per_rank(schedule: str) -> int:
    """What a schedule needs, or is made for."""
    return 2 if schedule in (*V_SHAPED, "interleaved") else 1


def supports_micro_batches(schedule: str, ranks: int, micro_batches: int) -> bool:
    """Whether a schedule can run so many micro-batches.

    At least one a rank, so that all have work (DualPipeV: one a stage); interleaved ones go in rounds of equal length,
    as many as hold one a rank.
    """
    if micro_batches < (2 * ranks if schedule == "dualpipev" else ranks):
        return False
    return schedule not in ("interleaved", "zb") or micro_batches % (micro_batches // ranks) == 0
