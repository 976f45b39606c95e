"""The clock of a shared database, as a process that asks it now and then reckons it."""

from __future__ import annotations

import time

import pytest

from greenroom.store.postgres_clock import CATCH_UP, DatabaseClock


class Monotonic:
    """Stands in for ``time.monotonic``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Monotonic:
    clock = Monotonic()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(time, "time", lambda: 5000.0)
    return clock


def test_before_the_database_is_asked_it_is_this_machines(machine: Monotonic) -> None:
    clock = DatabaseClock()
    assert clock.now() == 5000.0
    machine.now += 2.5
    assert clock.now() == 5002.5


def test_each_answer_narrows_it_down(machine: Monotonic) -> None:
    """The true offset is 9000 - 1000; answers take a second, and say the time somewhere within it."""
    clock = DatabaseClock()
    errors = []
    for into in (0.1, 0.9, 0.2, 0.95, 0.5):
        started = machine.now
        machine.now += 1.0
        clock.learn(started, 8000.0 + started + into, machine.now)
        errors.append(abs(clock.now() - (8000.0 + machine.now)))
    assert max(errors) <= 0.5 and errors[-1] <= 0.1


def test_it_never_goes_back_when_the_databases_clock_does(machine: Monotonic) -> None:
    clock = DatabaseClock()
    clock.learn(machine.now, 9000.0, machine.now)
    before = clock.now()
    clock.learn(machine.now, 8990.0, machine.now)  # set back by 10 s
    times = []
    for _ in range(40):
        machine.now += 1.0
        times.append(clock.now())
    assert times == sorted(times) and times[0] > before
    assert times[9] - times[8] == pytest.approx(CATCH_UP), "it goes slower"
    assert times[-1] == 8990.0 + 40.0, "until it has been caught up with"


def test_it_follows_at_once_when_the_databases_clock_goes_forward(machine: Monotonic) -> None:
    clock = DatabaseClock()
    clock.learn(machine.now, 9000.0, machine.now)
    clock.learn(machine.now, 9600.0, machine.now)
    assert clock.now() == 9600.0
