"""When pipeline ranks do what: orders of actions put on a clock, their idle time, and what they keep; free of torch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parallel.stages import V_SHAPED

WORDS = {"F": "forward pass", "B": "backward pass", "I": "gradient of inputs", "W": "gradient of weights"}
COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""Forward; whole backward; of the backward pass the input's and the weights' gradients, where they are apart."""


class Action(NamedTuple):
    """What a rank does in one piece."""

    kind: str
    """One of COSTS."""
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{WORDS[self.kind]} of micro-batch {self.micro_batch} on stage {self.stage}"


class Span(NamedTuple):
    """An action on a clock."""

    rank: int
    action: Action
    start: float
    end: float


def simulate(orders: Sequence[Sequence[Action]], stages: int, costs: Mapping[str, float] = COSTS) -> list[Span]:
    """Run every rank's actions in their order, each as soon as the rank is free and its inputs are there.

    `costs` are of a rank's part of the model for one micro-batch, so an action of one of several stages a rank costs as
    much less. Sending takes no time. Raises ValueError where ranks wait for each other in a circle.
    """
    share = stages / len(orders)
    spans: list[Span] = []
    ready: dict[tuple[bool, int, int], float] = {}
    free, place = [0.0] * len(orders), [0] * len(orders)
    while any(place[rank] < len(order) for rank, order in enumerate(orders)):
        progress = False
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                action = order[place[rank]]
                needs = _inputs(action, stages)
                if any(need not in ready for need in needs):
                    break
                start = max([free[rank], *(ready[need] for need in needs)])
                free[rank] = start + costs[action.kind] / share
                spans.append(Span(rank, action, start, free[rank]))
                if action.kind != "W":
                    ready[action.kind != "F", action.stage, action.micro_batch] = free[rank]
                place[rank] += 1
                progress = True
        if not progress:
            stuck = [order[at] for order, at in zip(orders, place, strict=True) if at < len(order)]
            raise ValueError(f"actions wait for each other: {stuck}")
    return spans


def _inputs(action: Action, stages: int) -> list[tuple[bool, int, int]]:
    """What must have been computed: (is a backward pass, stage, micro-batch) of each."""
    kind, stage, micro_batch = action
    if kind == "F":
        return [(False, stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [(True, stage, micro_batch)]
    return [(False, stage, micro_batch), *([(True, stage + 1, micro_batch)] if stage < stages - 1 else [])]


def bubble(spans: Sequence[Span], ranks: int) -> float:
    """Idle time of all ranks, from the first action to the last, by the time that they work."""
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    busy = sum(span.end - span.start for span in spans)
    return ranks * (end - begin) / busy - 1


def ideal_bubble(schedule: str, ranks: int, a_rank: int, micro_batches: int) -> float | None:
    """The same in theory, for stages of equal cost whose backward pass is twice a forward one; None: without a formula.

    (p - 1) / m of gpipe and 1f1b and, with v stages a rank, (p - 1) / (v m) of interleaved (arXiv:2104.04473); a third
    of it where gradients of weights fill in (ZB-H1, arXiv:2401.10241); a sixth, the wait for the first micro-batch, of
    V shapes once there are two micro-batches a rank.
    """
    if schedule in V_SHAPED and micro_batches < 2 * ranks:
        return None
    share = 1.0 if schedule in ("gpipe", "1f1b") else 1 / a_rank if schedule == "interleaved" else 1 / (3 * a_rank)
    return share * (ranks - 1) / micro_batches


def peak_in_flight(spans: Sequence[Span], rank: int) -> int:
    """The most micro-batches whose activations a rank keeps at once, over its stages: each until the last gradient is
    taken of it."""
    held: dict[int, int] = {}
    most = 0
    for span in sorted((span for span in spans if span.rank == rank), key=lambda span: span.start):
        kind, stage, _ = span.action
        held[stage] = held.get(stage, 0) + {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
        most = max(most, sum(held.values()))
    return most


def most_in_flight(schedule: str, ranks: int, rank: int, a_rank: int, micro_batches: int) -> int:
    """How many the schedule promises to keep at most, over all stages of a rank."""
    if schedule == "gpipe":
        return micro_batches
    if schedule in V_SHAPED:
        return min(2 * ranks + (schedule == "dualpipev"), 2 * micro_batches)
    if a_rank == 1:
        return min(ranks if schedule == "zb" else ranks - rank, micro_batches)
    a_round = micro_batches // (micro_batches // ranks)
    return min((a_rank - 1) * a_round + 2 * (ranks - rank - 1) + 1, a_rank * micro_batches)


def as_text(spans: Sequence[Span], ranks: int, stages: int) -> str:
    """A line a rank: an action's letter and micro-batch, then = for as long as it lasts, and dots for idle time.

    Letters of every other stage of a rank are small.
    """
    unit = min(span.end - span.start for span in spans)
    width = len(f"{max(span.action.micro_batch for span in spans)}") + 1
    columns = round(max(span.end for span in spans) / unit)
    lines = [["." * width] * columns for _ in range(ranks)]
    for span in spans:
        kind, stage, micro_batch = span.action
        is_odd = (stage >= ranks) if stages == 2 * ranks else stage // ranks % 2 == 1
        first, last = round(span.start / unit), round(span.end / unit)
        lines[span.rank][first:last] = ["=" * width] * (last - first)
        lines[span.rank][first] = f"{kind.lower() if is_odd else kind}{micro_batch}".ljust(width, "=")
    return "\n".join(f"rank {rank} {''.join(line)}" for rank, line in enumerate(lines))
