"""Batch sizes by consumed tokens: the switch falls on the first step at or after its threshold, and sums agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batch_schedule import BatchSchedule, parse_batch_schedule
from runtime.messages import either


def test_thresholds_are_read_to_the_token():
    schedule = parse_batch_schedule(" 0:32 0.5k:40  1.25M:48 1B:64 2.000000001T:96 ", 10)
    assert schedule.phases == ((0, 32), (500, 40), (1_250_000, 48), (10**9, 64), (2_000_000_001_000, 96))
    assert schedule.sizes == [32, 40, 48, 64, 96]
    assert parse_batch_schedule("0:4 1k:8 2k:4", 10).sizes == [4, 8]


@pytest.mark.parametrize(
    "text", ["", "32", "0", "0:", "0:x", "0:0", "0:-4", "5:32", "0:32,1k:64", "0:32 1k:64 1000:96", "0:1 2k:2 1k:3",
             "0:1 1e3:2", "0:1 .5k:2", "0:1 -1k:2", "0:1.5", "0:1 1kk:2", "0:1 0:2"]
)  # fmt: skip
def test_what_is_malformed_is_refused(text):
    with pytest.raises(ValueError, match=r"TOKENS:SAMPLES|begin at 0|ascend"):
        parse_batch_schedule(text, 1)


def test_a_switch_happens_at_the_first_step_at_or_after_its_threshold():
    schedule = parse_batch_schedule("0:4 100:8 200:2", 10)
    found = {consumed: schedule.size_at(consumed) for consumed in (0, 4, 8, 9, 10, 12, 19, 20, 1000)}
    assert found == {0: 4, 4: 4, 8: 4, 9: 4, 10: 8, 12: 8, 19: 8, 20: 2, 1000: 2}
    # steps start at 0, 4, 8, 12 (120 tokens), 20
    assert [schedule.consumed_after(steps) for steps in range(7)] == [0, 4, 8, 12, 20, 22, 24]


@st.composite
def schedules(draw):
    tokens = sorted(draw(st.sets(st.integers(1, 400), max_size=4)))
    sizes = draw(st.lists(st.integers(1, 9), min_size=len(tokens) + 1, max_size=len(tokens) + 1))
    return BatchSchedule(tuple(zip([0, *tokens], sizes, strict=True)), draw(st.integers(1, 7)))


@given(schedules(), st.integers(0, 60), st.integers(0, 90))
def test_what_steps_consume_is_the_sum_of_their_batches(schedule, steps, start):
    consumed = start
    for _ in range(steps):
        consumed += schedule.size_at(consumed)
    assert schedule.consumed_after(steps, start) == consumed


def test_numbers_in_words():
    assert either([1024]) == "1,024"
    assert either(size for size in (8, 1024)) == "8 or 1,024"
