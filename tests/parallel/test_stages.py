"""Layers over stages and stages over ranks: each once, in order, as balanced as can be."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.stages import V_SHAPED, build_stages, divide_layers, rank_of_stage, stages_of_rank, supports_micro_batches

COSTS = st.tuples(*[st.floats(0.1, 10), st.floats(0, 30), st.floats(0, 30)])


def costliest(numbers, costs):
    layer, first, last = costs
    totals = [layer * number for number in numbers]
    totals[0] += first
    totals[-1] += last
    return max(totals)


@given(st.integers(1, 12), st.integers(1, 6), COSTS)
def test_no_other_division_has_a_cheaper_costliest_stage(layers, stages, costs):
    if stages > layers:
        with pytest.raises(ValueError, match=f"{stages} stages of {layers} layers"):
            divide_layers(layers, stages, *costs)
        return
    numbers = divide_layers(layers, stages, *costs)
    cuts = [(0, *cut, layers) for cut in combinations(range(1, layers), stages - 1)]
    every = [[after - before for before, after in pairwise(cut)] for cut in cuts]
    assert numbers in every
    assert costliest(numbers, costs) <= min(costliest(other, costs) for other in every) * (1 + 1e-9)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9))
def test_stages_have_every_layer_once_in_order(numbers):
    stages = build_stages(numbers)
    assert [layer for stage in stages for layer in stage.layers] == list(range(sum(numbers)))
    assert [len(stage.layers) for stage in stages] == numbers
    assert [stage.is_first for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [stage.is_last for stage in stages] == [False] * (len(stages) - 1) + [True]


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from(["1f1b", "interleaved", "zb", "zbv", "dualpipev"]))
def test_every_stage_has_one_rank(ranks, a_rank, schedule):
    a_rank = 2 if schedule in V_SHAPED else a_rank
    found = {stage: rank for rank in range(ranks) for stage in stages_of_rank(rank, ranks, a_rank, schedule)}
    assert found == {stage: rank_of_stage(stage, ranks, schedule) for stage in range(ranks * a_rank)}


def test_a_schedule_takes_a_micro_batch_a_rank_and_rounds_of_equal_length():
    assert [count for count in range(1, 13) if supports_micro_batches("1f1b", 3, count)] == list(range(3, 13))
    assert [count for count in range(1, 13) if supports_micro_batches("zb", 3, count)] == [3, 4, 5, 6, 8, 9, 12]
    assert [count for count in range(1, 9) if supports_micro_batches("dualpipev", 3, count)] == [6, 7, 8]
