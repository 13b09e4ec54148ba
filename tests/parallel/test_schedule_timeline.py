"""Executed orders on a clock: idle time and activations in flight are what theory says, and zero bubbles beat 1F1B."""

import pytest

from parallel.schedule_timeline import Action, as_text, bubble, ideal_bubble, most_in_flight, peak_in_flight, simulate
from parallel.stages import supports_micro_batches
from settings.compose import compose
from tests.parity.layouts import SCHEDULES
from tools.timeline import executed_order, small_run
from verification.local_ranks import run_ranks

CASES = [(2, 4), (4, 8)]


@pytest.fixture(scope="module")
def timelines():
    """(schedule, ranks, micro-batches) -> configuration and spans of what was executed."""
    found = {}
    for schedule in SCHEDULES:
        for ranks, micro_batches in CASES:
            if supports_micro_batches(schedule, ranks, micro_batches):
                words = [f"parallel.pp={ranks}", f"parallel.pp_schedule={schedule}"]
                config = small_run(compose(words), micro_batches)
                orders = run_ranks(ranks, executed_order, config)
                found[schedule, ranks, micro_batches] = config.parallel, simulate(orders, config.parallel.stages)
    return found


def test_every_micro_batch_passes_every_stage_once(timelines):
    for (_, _, micro_batches), (layout, spans) in timelines.items():
        done = [span.action for span in spans]
        expected = {(stage, number) for stage in range(layout.stages) for number in range(micro_batches)}
        forward = [(stage, number) for kind, stage, number in done if kind == "F"]
        backward = [(stage, number) for kind, stage, number in done if kind in "BI"]
        weights = [(stage, number) for kind, stage, number in done if kind in "BW"]
        for passes in (forward, backward, weights):
            assert len(passes) == len(expected)
            assert set(passes) == expected


def test_idle_time_is_that_of_theory(timelines):
    for (schedule, ranks, micro_batches), (layout, spans) in timelines.items():
        theory = ideal_bubble(schedule, ranks, layout.stages_per_rank, micro_batches)
        assert bubble(spans, ranks) == pytest.approx(theory), (schedule, ranks, micro_batches)


def test_zero_bubbles_are_faster_than_1f1b(timelines):
    for ranks, micro_batches in CASES:
        ends = {
            schedule: max(span.end for span in timelines[schedule, ranks, micro_batches][1])
            for schedule in ("1f1b", "zb", "zbv")
        }
        assert max(ends["zb"], ends["zbv"]) < ends["1f1b"]


def test_no_rank_keeps_more_than_its_schedule_promises(timelines):
    for (schedule, ranks, micro_batches), (layout, spans) in timelines.items():
        for rank in range(ranks):
            bound = most_in_flight(schedule, ranks, rank, layout.stages_per_rank, micro_batches)
            assert 0 < peak_in_flight(spans, rank) <= bound, (schedule, ranks, micro_batches, rank)


def test_text_shows_who_does_what_when():
    forward, backward = (lambda stage, n: Action("F", stage, n)), (lambda stage, n: Action("B", stage, n))
    orders = [[forward(0, 0), backward(0, 0)], [forward(1, 0), backward(1, 0)]]
    assert as_text(simulate(orders, 2), 2, 2) == "rank 0 F0......B0==\nrank 1 ..F0B0==...."


def test_a_circle_is_named():
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[Action("B", 0, 0), Action("F", 0, 0)]], 1)


@pytest.mark.parametrize(
    ("schedule", "a_rank", "micro_batches", "kept"),
    [
        ("interleaved", 2, 6, [12, 11, 9, 7]),
        ("interleaved", 2, 7, [14, 12, 10, 8]),
        ("interleaved", 3, 10, [17, 15, 13, 11]),
        ("zb", 1, 8, [4, 4, 4, 4]),
    ],
)
def test_a_promise_is_what_executed_orders_of_four_ranks_keep(schedule, a_rank, micro_batches, kept):
    """Seen in orders that were executed, with rounds longer than there are ranks, and gradients of weights put off."""
    assert [most_in_flight(schedule, 4, rank, a_rank, micro_batches) for rank in range(4)] == kept
