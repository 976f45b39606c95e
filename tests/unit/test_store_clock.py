"""The clock of the embedded stores: what leases and quarantines are counted by."""

from __future__ import annotations

import pytest

from greenroom.store.clock import SteadyClock
from greenroom.store.memory import MemoryStore

START = 1_800_000_000.0


class Machine:
    """A machine whose wall clock somebody sets."""

    def __init__(self) -> None:
        self.wall, self.monotonic = START, 42.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def clock(self) -> SteadyClock:
        return SteadyClock(wall=lambda: self.wall, monotonic=lambda: self.monotonic)


def test_it_tells_the_time_that_the_machine_told_at_first_and_what_has_passed_since() -> None:
    machine = Machine()
    clock = machine.clock()
    assert clock() == START
    machine.passes(12.5)
    assert clock() == START + 12.5 == machine.wall


@pytest.mark.parametrize("jump_s", [1.0, 86_400.0, -1.0, -86_400.0, -START])
def test_a_machine_whose_clock_is_set_moves_it_neither_forward_nor_back(jump_s: float) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.passes(10.0)
    machine.wall += jump_s
    assert clock() == START + 10.0
    machine.passes(5.0)
    assert clock() == START + 15.0


def test_a_slewed_clock_is_not_followed() -> None:
    """A machine that is brought to the right time slowly: what passes here is what passes on the monotonic clock."""
    machine = Machine()
    clock = machine.clock()
    for _ in range(1000):
        machine.monotonic += 1.0
        machine.wall += 0.9995
    assert clock() == START + 1000.0


def test_one_that_is_made_after_the_jump_knows_the_new_time() -> None:
    machine = Machine()
    old = machine.clock()
    machine.wall += 3600.0
    assert (old(), machine.clock()()) == (START, START + 3600.0)


def test_a_store_may_be_given_another_clock() -> None:
    """As the simulation does."""
    machine = Machine()
    store = MemoryStore(clock=lambda: machine.monotonic)
    assert store.clock() == 42.0
