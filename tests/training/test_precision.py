"""The numbers of each precision, and the loss scale against a plain account of its rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from settings.config import TrainConfig
from training.precision import PRECISIONS, LossScale, build_loss_scale, choose_precision

CPU = torch.device("cpu")


def test_tf32_allows_short_products_and_every_other_precision_forbids_them():
    try:
        for name in PRECISIONS:
            choose_precision("tf32")
            assert torch.get_float32_matmul_precision() == "high"
            choose_precision(name)
            assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    finally:
        choose_precision("fp32")


@pytest.mark.parametrize("name", PRECISIONS)
def test_only_fp16_scales_its_loss(name):
    scale = build_loss_scale(TrainConfig(precision=name, initial_loss_scale=8.0, loss_scale_window=3), CPU)
    assert (scale is None) == (name != "fp16")
    assert scale is None or (scale.scale.item(), scale.window) == (8.0, 3)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4), st.integers(0, 40))
def test_the_scale_halves_at_once_and_doubles_after_a_window_of_finite_steps(outcomes, window, cut):
    scaled = LossScale(2.0**10, window, CPU)
    expected, good = 2.0**10, 0
    for index, finite in enumerate(outcomes):
        if index == cut:  # a checkpoint between two steps
            resumed = LossScale(1.0, window, CPU)
            resumed.restore(scaled.state())
            scaled = resumed
        scaled.update(torch.tensor(finite))
        good = good + 1 if finite else 0
        expected *= 1.0 if finite else 0.5
        if good == window:
            expected, good = 2 * expected, 0
        assert scaled.scale.item() == expected


def test_a_window_that_was_shortened_is_over_at_once_and_the_scale_has_an_end():
    scaled = LossScale(2.0**64, 3, CPU)
    scaled.restore({"scale": 2.0**63, "good_steps": 100.0})
    for _ in range(4):
        scaled.update(torch.tensor(True))
    assert scaled.state() == {"scale": 2.0**64, "good_steps": 0.0}
