"""The keyed permutation is a bijection that looks shuffled, at every size."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.permutation import KeyedPermutation, derive_key


@settings(deadline=None)
@given(size=st.integers(0, 600), key=st.integers(0, 2**64 - 1))
def test_is_a_bijection(size: int, key: int) -> None:
    permutation = KeyedPermutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [4**6 - 1, 4**6, 4**6 + 1, 10_007])
def test_is_a_bijection_around_powers_of_four(size: int) -> None:
    assert len({KeyedPermutation(size, 7)(index) for index in range(size)}) == size


@settings(deadline=None)
@given(size=st.integers(2**33, 2**62), index=st.integers(0, 2**33 - 1), key=st.integers(0, 2**64 - 1))
def test_stays_in_range_beyond_32_bits(size: int, index: int, key: int) -> None:
    assert 0 <= KeyedPermutation(size, key)(index) < size


@pytest.mark.parametrize(("size", "index"), [(0, 0), (1, 1), (10, 10), (10, -1)])
def test_outside_is_refused(size: int, index: int) -> None:
    with pytest.raises(IndexError, match=f"permutation of {size}"):
        KeyedPermutation(size, 0)(index)


def test_different_keys_give_different_orders() -> None:
    orders = {tuple(map(KeyedPermutation(50, key), range(50))) for key in range(100)}
    assert len(orders) == 100


def test_small_orders_are_all_reached() -> None:
    orders = [tuple(map(KeyedPermutation(3, derive_key(key)), range(3))) for key in range(600)]
    assert len(set(orders)) == 6
    assert all(50 < orders.count(order) < 150 for order in set(orders))


def test_order_looks_shuffled() -> None:
    size = 5_000
    order = list(map(KeyedPermutation(size, 3), range(size)))
    displacement = sum(abs(place - index) for index, place in enumerate(order)) / size
    assert 0.31 * size < displacement < 0.36 * size  # a third, for a uniform order
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 12  # 2 are expected
    rising = sum(a < b for a, b in pairwise(order)) / (size - 1)
    assert 0.47 < rising < 0.53


def test_known_order_never_changes() -> None:
    # a resume years later must find the same samples
    assert list(map(KeyedPermutation(10, derive_key(1234, 0, 0)), range(10))) == [0, 8, 7, 9, 1, 3, 5, 2, 6, 4]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=4, unique=True))
def test_key_depends_on_the_order_of_its_parts(parts: list[int]) -> None:
    assert derive_key(*parts) != derive_key(*reversed(parts))
    assert derive_key(*parts) != derive_key(*parts[:-1])
