from __future__ import annotations

import contextlib
import gc
import weakref

import pytest

from nanofed.training.gc_control import FrozenObjects, ManualCollection


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> None:
    """Undo what a command of another test has left: it freezes what it has imported."""
    gc.unfreeze()


def test_the_collector_rests_and_is_left_as_it_was() -> None:
    garbage = ManualCollection()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with garbage:
        with garbage:
            assert not gc.isenabled() and gc.get_freeze_count() > 0
            cycle: list[object] = []
            cycle.append(cycle)
            del cycle
            before = gc.get_stats()[2]["collected"]
            garbage.collect()
            assert gc.get_stats()[2]["collected"] > before
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    with pytest.raises(ZeroDivisionError), garbage:
        raise ZeroDivisionError
    assert not gc.isenabled()
    gc.enable()


class Knot:
    """Nothing but the cycle collector can tell that it is gone."""

    def __init__(self) -> None:
        self.knot = self


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_block_or_the_time_between_two_leaves_behind_goes_with_the_next(frozen: bool) -> None:
    """A trainer that lives for weeks is in a block for most of it, and not once as long out of it as Python waits to collect."""
    garbage, left = ManualCollection(), []
    with FrozenObjects() if frozen else contextlib.nullcontext():
        for _ in range(3):
            left.append(weakref.ref(Knot()))
            with garbage:
                left.append(weakref.ref(Knot()))
                with garbage:
                    left.append(weakref.ref(Knot()))
            assert [knot for knot in left if knot() is not None] == []
    assert gc.isenabled() and gc.get_freeze_count() == 0
