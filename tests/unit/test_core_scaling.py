"""Sizes by demand: what must hold of every decision, and the decisions that people expect."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from greenroom.core.demand import Demand, WorkerDemand
from greenroom.core.scaling import COOL_DOWN_S, LOOK_AHEAD_S, Limits, Size, needed, size

NOW = 1_000_000.0
NAMES = [f"w{n}" for n in range(12)]
workers = st.lists(
    st.builds(
        WorkerDemand,
        name=st.sampled_from(NAMES),
        awake=st.integers(0, 5),
        ready=st.booleans(),
        idle_s=st.floats(0, 1000),
    ),
    max_size=12,
    unique_by=lambda worker: worker.name,
)
demands = st.builds(
    Demand,
    pool=st.just("p"),
    slots=st.integers(0, 60),
    awake=st.integers(0, 60),
    waiting=st.integers(0, 60),
    wakes_per_s=st.floats(0, 10),
    workers=workers.map(tuple),
)
limits = st.builds(
    Limits,
    slots=st.integers(1, 10),
    min_replicas=st.integers(0, 12),
    max_replicas=st.integers(0, 12),
    min_free=st.integers(0, 20),
)
active = st.frozensets(st.sampled_from(NAMES))
times = st.floats(0, 2 * NOW)
decisions = st.integers(0, 15)


@given(demands, limits, active, decisions, times)
def test_what_holds_of_every_decision(
    demand: Demand, limit: Limits, there: frozenset[str], decided: int, changed_at: float
) -> None:
    found = size(demand, limit, there, decided, changed_at, NOW)
    if found is None:
        return
    known = {worker.name: worker for worker in demand.workers}
    for victim in found.victims:
        assert victim in there and known[victim].awake == 0 and known[victim].ready
        assert known[victim].idle_s >= COOL_DOWN_S
    if found.victims:
        # What stays holds all who are awake or wait, and as few as are allowed.
        assert found.replicas == len(there) - len(found.victims) >= needed(demand, limit)
        assert not 0 <= NOW - changed_at < COOL_DOWN_S
    else:
        # It grows as far as it may, or stays.
        assert found.replicas == max(len(there), needed(demand, limit)) != decided


@given(demands, limits, active, decisions, times)
def test_the_same_again_changes_nothing_within_the_cool_down(
    demand: Demand, limit: Limits, there: frozenset[str], decided: int, changed_at: float
) -> None:
    found = size(demand, limit, there, decided, changed_at, NOW)
    if found is None:
        return
    after = there - set(found.victims) | {f"new{n}" for n in range(found.replicas - len(there))}
    assert len(after) == found.replicas
    assert size(demand, limit, after, found.replicas, NOW, NOW + COOL_DOWN_S / 2) is None


@given(demands, limits)
def test_more_demand_never_needs_fewer(demand: Demand, limit: Limits) -> None:
    more = Demand(pool="p", awake=demand.awake + 1, waiting=demand.waiting + 1, wakes_per_s=demand.wakes_per_s + 1)
    assert needed(demand, limit) <= needed(more, limit)
    assert needed(demand, limit) <= limit.max_replicas


def worker(name: str, awake: int = 0, idle_s: float = 1000.0, *, ready: bool = True) -> WorkerDemand:
    return WorkerDemand(name=name, awake=awake, ready=ready, idle_s=0.0 if awake else idle_s)


def test_who_waits_gets_workers_at_once() -> None:
    demand = Demand(pool="p", slots=4, awake=4, waiting=9, workers=(worker("w0", 4),))
    found = size(demand, Limits(slots=4), frozenset({"w0"}), 1, NOW, NOW)
    assert found is not None and found.replicas == 4 and not found.victims


def test_slots_are_kept_free_for_those_who_come() -> None:
    assert needed(Demand(pool="p", awake=4), Limits(slots=4, min_free=1)) == 2
    assert needed(Demand(pool="p", wakes_per_s=2.0), Limits(slots=4)) == math.ceil(2 * LOOK_AHEAD_S / 4)
    assert needed(Demand(pool="p"), Limits(slots=4)) == 0
    assert needed(Demand(pool="p", waiting=1000), Limits(slots=4, max_replicas=3)) == 3


def test_only_who_is_idle_goes_the_longest_first() -> None:
    loads = (
        worker("a", 1),
        worker("b", idle_s=200.0),
        worker("c", idle_s=300.0),
        worker("d", ready=False),
        worker("x"),
    )
    there = frozenset("abcd")
    demand = Demand(pool="p", awake=1, workers=loads)
    found = size(demand, Limits(slots=4, min_replicas=3), there, 4, 0.0, NOW)
    assert found is not None and found.victims == ("c",) and found.replicas == 3
    found = size(demand, Limits(slots=4), there, 4, 0.0, NOW)
    assert found is not None and found.victims == ("b", "c") and found.replicas == 2
    assert size(demand, Limits(slots=4), there, 4, NOW - 1, NOW) is None
    # A clock that was wrong holds up nothing.
    assert size(demand, Limits(slots=4), there, 4, NOW + 1e6, NOW) is not None
    # Nobody knows who is idle: nobody goes.
    assert size(Demand(pool="p", awake=1), Limits(slots=4), there, 4, 0.0, NOW) is None


def test_what_was_decided_and_lost_is_what_there_is() -> None:
    demand = Demand(pool="p", awake=8, workers=tuple(worker(name, 2) for name in "abcd"))
    assert size(demand, Limits(slots=4), frozenset("abcd"), 0, 0.0, NOW) == Size(replicas=4)
    assert size(demand, Limits(slots=4), frozenset("abcd"), 4, 0.0, NOW) is None
