"""Which worker an actor goes to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.errors import FailedPrecondition, ResourceExhausted
from greenroom.core.placement import Demand, can_run, choose
from greenroom.core.records import SnapshotScope, Worker, WorkerState
from greenroom.testing.contracts.store_world import snapshot, worker

MEMORY = snapshot("s")
DATA = snapshot("s", scope=SnapshotScope.DATA)
NOW = 100.0


def demand(**fields: Any) -> Demand:
    made: dict[str, Any] = {"pool": "default", "snapshot": MEMORY}
    return Demand(**made | fields)


def chosen(*workers: Worker, **fields: Any) -> str:
    """The name, which the order of the workers must not change."""
    names = {choose(order, demand(**fields), NOW)[0].name for order in itertools.permutations(workers)}
    assert len(names) == 1
    return names.pop()


def test_gates() -> None:
    fit = worker("z", capacity=1)
    unfit = (
        worker("a", pool="other", capacity=9),
        worker("b", used=2),
        worker("c", state=WorkerState.DRAINING, capacity=9),
        worker("d", state=WorkerState.DISCONNECTED, capacity=9),
        worker("e", fingerprint="f2", capacity=9),
        worker("f", backend="gvisor", capacity=9),
    )
    names = tuple(w.name for w in unfit)
    assert chosen(fit, *unfit[:3], prefer=names) == chosen(fit, *unfit[3:], prefer=names) == "z"
    for one in unfit[:4]:
        with pytest.raises(ResourceExhausted) as full:
            choose([one], demand(), NOW)
        assert full.value.reason == "NO_CAPACITY" and full.value.retry_after_s > 0
    for one in unfit[4:]:
        with pytest.raises(FailedPrecondition, match="snapshot s") as never:
            choose([one], demand(), NOW)
        assert never.value.reason == "NO_COMPATIBLE_WORKER"


def test_preferences_in_their_order() -> None:
    a, b, c = worker("a", capacity=5), worker("b", capacity=9), worker("c", capacity=9, used=3)
    assert chosen(a, b, c) == "b", "most free slots"
    assert chosen(a, replace(b, used=4), c) == "c"
    assert chosen(a, replace(b, used=4), replace(c, used=4)) == "a", "then the name"
    assert chosen(a, b, c, prefer=("x", "c", "a")) == "c", "preferred before free"
    assert chosen(a, b, c, prefer=("c", "a"), avoid=("c",)) == "a", "avoided last of all"
    assert chosen(a, avoid=("a",)) == "a", "but rather than none"
    assert chosen(replace(a, used=5), b, prefer=("a",)) == "b", "a full one is no choice"


def test_what_can_run_what() -> None:
    same, other = worker("w"), worker("w", fingerprint="f2")
    assert can_run(same, MEMORY) and not can_run(other, MEMORY)
    assert can_run(other, DATA) and not can_run(worker("w", backend="gvisor"), DATA)
    assert choose([other], demand(snapshot=None), NOW) == (other, ()), "a boot runs anywhere"


def test_a_pool_without_workers() -> None:
    with pytest.raises(ResourceExhausted, match="0 workers"):
        choose([], demand(), NOW)
