"""Garbage is collected when it is said to be, and Python is as it was afterwards."""

import gc
import weakref

import pytest

from runtime.garbage_collection import collection_every


class Cycle:
    def __init__(self):
        self.own = self


def lost():
    return weakref.ref(Cycle())


def test_cycles_go_after_the_first_step_and_every_interval_and_never_between():
    with collection_every(3) as collect:
        assert not gc.isenabled()
        found = []
        for step in range(5, 11):
            cycle = lost()
            collect(step)
            found.append(cycle() is None)
        assert found == [True, True, False, False, True, False]
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_was_off_stays_off_and_an_error_passes_through():
    gc.disable()
    try:
        with pytest.raises(ValueError, match="a step"), collection_every(2):
            raise ValueError("a step")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_zero_leaves_it_to_python():
    with collection_every(0) as collect:
        assert gc.isenabled()
        collect(1)
        assert gc.get_freeze_count() == 0
