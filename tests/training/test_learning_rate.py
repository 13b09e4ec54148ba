"""Learning rates: exact at the points that matter, within bounds everywhere."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from training.learning_rate import learning_rate


def build(name, steps=100, warmup=10, min_lr=0.1, **options):
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, min_lr=min_lr, **options)
    return RunConfig(optimizer=OptimizerConfig(lr=1.0), schedule=schedule, train=TrainConfig(steps=steps))


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(name):
    config = build(name)
    assert [learning_rate(config, step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_passes_its_middle_and_ends_at_the_minimum_where_it_stays():
    config = build("cosine")
    assert learning_rate(config, 56) == pytest.approx(0.55)
    assert learning_rate(config, 33) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert [learning_rate(config, step) for step in (101, 150)] == pytest.approx([0.1, 0.1])
    assert learning_rate(config, 100) > 0.1, "the last step is not wasted"


def test_wsd_is_stable_then_decays_linearly_over_its_last_steps():
    config = build("wsd", decay_steps=20)
    assert [learning_rate(config, step) for step in (11, 50, 81)] == pytest.approx([1.0, 1.0, 1.0])
    assert [learning_rate(config, step) for step in (91, 101, 120)] == pytest.approx([0.55, 0.1, 0.1])
    by_default = build("wsd")
    assert [learning_rate(by_default, step) for step in (91, 96, 101)] == pytest.approx([1.0, 0.55, 0.1])


def test_constant_stays():
    assert {learning_rate(build("constant"), step) for step in range(10, 200)} == {1.0}


def test_a_schedule_of_its_own_length_does_not_follow_the_run():
    assert learning_rate(build("cosine", steps=500), 55) > 0.9
    schedule = ScheduleConfig(name="cosine", warmup_steps=10, min_lr=0.1, steps=100)
    config = RunConfig(optimizer=OptimizerConfig(lr=1.0), schedule=schedule, train=TrainConfig(steps=500))
    assert learning_rate(config, 56) == pytest.approx(0.55)


@given(
    name=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(2, 500),
    warmup=st.integers(0, 499),
    step=st.integers(1, 1000),
)
def test_never_outside_zero_and_the_peak_and_never_rising_after_the_warm_up(name, steps, warmup, step):
    config = build(name, steps, min(warmup, steps - 1))
    now, later = learning_rate(config, step), learning_rate(config, step + 1)
    assert 0 < now <= 1
    if step >= config.schedule.warmup_steps:
        assert 0.1 - 1e-12 <= later <= now + 1e-12
