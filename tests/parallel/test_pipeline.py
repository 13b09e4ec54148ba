"""Pipelines beside what the parity matrix holds: evaluation, and that a put-off gradient is computed once."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.initialization import materialize
from parallel.mesh import ParallelMesh
from tests.parity.layouts import SCHEDULES, configuration
from training.build import assemble
from training.train_step import batch_to_device
from verification.local_ranks import run_ranks
from verification.parity import ragged_batches

CPU = torch.device("cpu")
USUAL = {"dp_replicate": 1, "dp_shard": 1, "tied": True, "recompute": "none", "dropout": 0.0, "optimizer": "adamw",
         "layers": "uneven", "micro_batches": "more"}  # fmt: skip


def build(pp, schedule, **case):
    return configuration("gpt2", USUAL | {"pp": pp, "pp_schedule": schedule, "tp": 1} | case)


def micro_batches(config):
    (batch,) = ragged_batches(config, 1)
    inputs, others = batch_to_device(batch, CPU)
    size = config.micro_batch_size
    names = ("labels", "sample_indices")
    return [
        (inputs[start : start + size], {name: others[name][start : start + size] for name in names})
        for start in range(0, len(inputs), size)
    ]


def materialized(config):
    data_parallel = assemble(config, ParallelMesh(config.parallel, "cpu"), CPU)
    materialize(data_parallel.model, config.seed, CPU)
    return data_parallel


def both_losses(rank, world_size, config):
    """What evaluation and training find on the same weights, on the rank that knows; then an odd number of batches."""
    pipeline, batches = materialized(config), micro_batches(config)
    evaluated = pipeline.evaluate(batches)
    trained = pipeline.forward_backward(batches, lambda loss: loss)
    return evaluated, trained, pipeline.evaluate(batches[:3])


@pytest.mark.parametrize(
    ("pp", "schedule"), [(2, schedule) for schedule in SCHEDULES] + [(3, "interleaved"), (3, "zbv")]
)
def test_an_evaluation_finds_the_losses_of_training(pp, schedule):
    found = run_ranks(pp, both_losses, build(pp, schedule))
    known = [losses for losses in found if losses[0].any()]
    assert len(known) == 1
    evaluated, trained, first = known[0]
    assert torch.equal(evaluated, trained)
    assert torch.equal(evaluated[:3], first)


def messages_of_an_evaluation(rank, world_size, config):
    """What a rank sends and receives, in its order: (whether it sends, the other rank)."""
    order, receive, send = [], dist.recv, dist.isend

    def recording_receive(tensor, group, group_src):
        order.append((False, group_src))
        return receive(tensor, group=group, group_src=group_src)

    def recording_send(tensor, group, group_dst):
        order.append((True, group_dst))
        return send(tensor, group=group, group_dst=group_dst)

    dist.recv, dist.isend = recording_receive, recording_send
    materialized(config).evaluate(micro_batches(config))
    return order


def finishes_with_one_queue_per_pair(orders):
    """Whether ranks get to the end of their messages where NCCL buffers nothing.

    A pair of ranks has one queue for both directions. A rank's message is begun once those before it in its queue are
    over, and all that the rank received before: what it sends is computed from that. It is over once the other rank has
    begun the same message.
    """
    waiting = [list(enumerate(order)) for order in orders]

    def begun(rank, peer):
        """The next message with a peer, as (whether it is sent, number); None where it cannot begin yet."""
        for number, (sends, other) in waiting[rank]:
            if other == peer:
                return sends, number
            if not sends:
                return None
        return None

    progress = True
    while progress:
        progress = False
        for rank in range(len(orders)):
            for peer in range(rank):
                ours, theirs = begun(rank, peer), begun(peer, rank)
                if ours is not None and theirs is not None and ours[0] != theirs[0]:
                    waiting[rank] = [entry for entry in waiting[rank] if entry[0] != ours[1]]
                    waiting[peer] = [entry for entry in waiting[peer] if entry[0] != theirs[1]]
                    progress = True
    return not any(waiting)


def test_a_rank_that_sends_between_receives_would_hang():
    """As evaluations of two ranks with two stages each did until each group of micro-batches was received as one."""
    first, second = ([(letter == "S", peer) for letter in word] for word, peer in (("SSRSRS", 1), ("RSRSRR", 0)))
    assert not finishes_with_one_queue_per_pair([first, second])
    first, second = ([(letter == "S", peer) for letter in word] for word, peer in (("SSRRSS", 1), ("RRSSRR", 0)))
    assert finishes_with_one_queue_per_pair([first, second])


@pytest.mark.parametrize(
    ("pp", "schedule", "virtual_stages"),
    [(2, "1f1b", 1), (2, "interleaved", 2), (2, "zb", 2), (2, "zbv", 2), (3, "interleaved", 2), (4, "zb", 2)],
)
def test_an_evaluation_needs_no_buffer_between_ranks(pp, schedule, virtual_stages):
    config = build(pp, schedule, layers="even", virtual_stages=virtual_stages)
    orders = run_ranks(pp, messages_of_an_evaluation, config)
    messages = len(micro_batches(config)) * (config.parallel.stages - 1)
    crossing = (
        messages if schedule != "zbv" else messages * (config.parallel.stages - 2) // (config.parallel.stages - 1)
    )
    assert sum(map(len, orders)) == 2 * crossing
    assert finishes_with_one_queue_per_pair(orders)


class Operators(TorchDispatchMode):
    """Counts matrix products and collectives."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name not in ("send", "recv_"):
            self.counts[name] += 1
        elif name in ("mm", "addmm", "addmm_"):
            self.counts["product"] += 1
        return func(*args, **(kwargs or {}))


def count_operators(rank, world_size, config):
    pipeline, batches = materialized(config), micro_batches(config)
    pipeline.forward_backward(batches, lambda loss: loss)
    with Operators() as operators:
        pipeline.forward_backward(batches, lambda loss: loss)
    return operators.counts


def test_zero_decides_how_often_weights_are_gathered_and_gradients_reduced():
    counts = {}
    for zero in (1, 2, 3):
        config = build(2, "1f1b", dp_shard=2, layers="even", zero=zero)
        counts[zero] = run_ranks(4, count_operators, config)[3]
    units, layers, number = 2, 1, len(micro_batches(config))
    assert [counts[zero]["_reduce_scatter_base_"] for zero in (1, 2, 3)] == [
        units,
        units * number,
        units * number,
    ]
    gathered = [counts[zero]["_allgather_base_"] for zero in (1, 2, 3)]
    assert gathered[:2] == [units, units]
    assert gathered[2] >= 2 * layers * number


@pytest.mark.parametrize("sequence", [True, False])
def test_zero_bubble_schedules_compute_and_communicate_nothing_twice(sequence):
    case = {"tp": 2, "sequence": sequence}
    plain, split = (run_ranks(4, count_operators, build(2, schedule, **case)) for schedule in ("1f1b", "zb"))
    assert plain[0]["product"] > 100
    assert split == plain
