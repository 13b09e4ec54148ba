"""Boxes of a tensor: what two share, and where it lies in each."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.sharding import Box

SHAPE = (5, 4, 3)


@st.composite
def boxes(draw):
    offsets = tuple(draw(st.integers(0, size)) for size in SHAPE)
    return Box(offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(SHAPE, offsets, strict=True)))


@given(boxes(), boxes())
def test_an_overlap_is_what_both_have_and_is_found_in_each(one, other):
    whole = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    shared = one.overlap(other)
    common = np.intersect1d(whole[one.slices], whole[other.slices])
    assert shared.size == len(common)
    if shared.size:
        for box in (one, other):
            assert np.array_equal(whole[box.slices][shared.within(box)].ravel(), common)


def test_a_scalar_is_a_box_of_one():
    assert Box((), ()).overlap(Box((), ())).size == 1
