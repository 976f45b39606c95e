"""Rosters: the newest of each pool arrives, whatever the control plane does meanwhile. In virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from greenroom.core.demand import Demand
from greenroom.core.errors import Conflict, FailedPrecondition, LeaseLost, Unavailable
from greenroom.core.ledger.records import Ledger, Slot, SlotState
from greenroom.core.records import Key, PoolSpec, Template, TemplateSpec
from greenroom.core.rosters import Roster, replaced
from greenroom.operator import failures
from greenroom.operator.objects import Meta, PoolObject
from greenroom.operator.plane import Change
from greenroom.operator.rosters import DELETE_AGAIN_S, PAUSE_S, POST_AGAIN_S, Rosters, roster_of
from greenroom.operator.specs import WorkerPoolSpec
from greenroom.testing.simloop import SimLoop

SPEC = WorkerPoolSpec(backend="sim", slots=3)


@dataclass
class Plane:
    """Keeps rosters by the control plane's own rule, and fails as often as it is told to."""

    failures: int = 0
    error: type[Exception] = Unavailable
    pools: dict[str, PoolSpec] = field(default_factory=dict)
    rosters: dict[str, Roster] = field(default_factory=dict)
    asked: int = 0
    pause_s: float = 0.0
    in_use: bool = False

    def _may_fail(self) -> None:
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise self.error("not now")

    async def apply_pool(self, name: str, spec: PoolSpec) -> None:
        await asyncio.sleep(self.pause_s)
        self._may_fail()
        self.pools[name] = spec

    async def delete_pool(self, name: str) -> None:
        self._may_fail()
        if self.in_use:
            raise FailedPrecondition("a template names it", reason="POOL_IN_USE")
        self.pools.pop(name, None)

    async def admit(self, roster: Roster) -> None:
        await asyncio.sleep(0.1)
        self._may_fail()
        self.rosters[roster.pool] = replaced(self.rosters.get(roster.pool), roster)

    async def demand(self, pool: str) -> Demand:
        raise NotImplementedError

    async def apply_template(self, key: Key, spec: TemplateSpec) -> Template:
        raise NotImplementedError

    async def delete_template(self, key: Key) -> None:
        raise NotImplementedError

    async def templates(self) -> AsyncIterator[Change]:
        raise NotImplementedError
        yield


def pool(version: int, uid: str = "u1", name: str = "one") -> PoolObject:
    return PoolObject(Meta(name=name, uid=uid, namespace="green", resourceVersion=str(version)))


def ledger(*pods: str, uid: str = "u1", epoch: int = 1) -> Ledger:
    slots = tuple(
        Slot(epoch=epoch, ordinal=n, term=1, state=SlotState.LIVE if pod else SlotState.RESERVED, pod_uid=pod)
        for n, pod in enumerate(pods)
    )
    doomed = Slot(epoch=epoch, ordinal=99, term=1, state=SlotState.DOOMED, pod_uid="x")
    return Ledger(pool_uid=uid, epoch=epoch, term=1, next_ordinal=100, slots=(*slots, doomed))


Scenario = Callable[[Plane, Rosters, list[Any]], Coroutine[Any, Any, None]]


def in_virtual_time(scenario: Scenario) -> Callable[[], None]:
    async def work() -> None:
        plane, troubled = Plane(), []  # type: ignore[var-annotated]
        rosters = Rosters(plane, lambda: None, troubled.append, random.Random(1))
        task = asyncio.create_task(rosters.work())
        await scenario(plane, rosters, troubled)
        task.cancel()

    def test() -> None:
        loop = SimLoop(1)
        try:
            loop.run_until_complete(work())
        finally:
            loop.close()

    test.__name__ = scenario.__name__
    return test


def test_it_says_who_counts_as_a_worker() -> None:
    found = roster_of(pool(7), ledger("a", ""))
    assert (found.pool, found.pool_uid, found.pool_namespace, found.epoch, found.ledger_version) == (
        "one",
        "u1",
        "green",
        1,
        7,
    )
    assert [(w.ordinal, w.pod_uid) for w in found.workers] == [(0, "a"), (1, "")]
    assert all(w.name.startswith("one-") for w in found.workers)


@in_virtual_time
async def test_the_newest_arrives_after_failures(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    plane.failures = 6
    rosters.tell(pool(1), SPEC, ledger(""))
    rosters.tell(pool(2), SPEC, ledger("a"))
    rosters.tell(pool(3), SPEC, ledger("a", "b"))
    await asyncio.sleep(10)
    assert troubled and rosters.trouble[("green", "one")] == "not now"
    await asyncio.sleep(6 * PAUSE_S[1])
    assert plane.rosters["one"] == roster_of(pool(3), ledger("a", "b"))
    assert plane.pools["one"] == PoolSpec(replicas=0, slots=3, backend="sim")
    assert rosters.trouble == {}


@in_virtual_time
async def test_the_same_is_told_once(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    for version in range(1, 50):
        rosters.tell(pool(version), SPEC, ledger("a"))
        await asyncio.sleep(1)
    assert plane.asked == 2 and not troubled
    rosters.tell(pool(50), WorkerPoolSpec(backend="sim", slots=9), ledger("a"))
    await asyncio.sleep(1)
    assert plane.pools["one"].slots == 9


@in_virtual_time
async def test_an_older_one_is_never_taken_and_that_is_said(
    plane: Plane, rosters: Rosters, troubled: list[Any]
) -> None:
    """Who leads and still is told that has a cluster whose versions went back: it was restored."""
    plane.rosters["one"] = roster_of(pool(9), ledger("z"))
    rosters.tell(pool(5), SPEC, ledger("a"))
    await asyncio.sleep(100)
    assert plane.rosters["one"].workers[0].pod_uid == "z" and troubled == [("green", "one")]
    assert "kubectl patch workerpool one -n green" in rosters.trouble[("green", "one")]
    rosters.tell(pool(6), SPEC, ledger("a", epoch=2))
    await asyncio.sleep(100)
    assert plane.rosters["one"].epoch == 2 and rosters.trouble == {}


@in_virtual_time
async def test_one_that_met_another_write_is_posted_again(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    plane.failures, plane.error = 2, Conflict
    rosters.tell(pool(1), SPEC, ledger("a"))
    await asyncio.sleep(10)
    assert plane.rosters["one"] == roster_of(pool(1), ledger("a")) and not troubled


@in_virtual_time
async def test_a_control_plane_that_forgot_is_told_again(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    told = roster_of(pool(1), ledger("a"))
    rosters.tell(pool(1), SPEC, ledger("a"))
    await asyncio.sleep(1)
    plane.pools.clear()
    plane.rosters.clear()
    rosters.again()
    await asyncio.sleep(1)
    assert plane.rosters["one"] == told and "one" in plane.pools
    plane.pools.clear()
    plane.rosters.clear()
    await asyncio.sleep(POST_AGAIN_S)
    rosters.tell(pool(2), SPEC, ledger("a"))
    await asyncio.sleep(1)
    assert plane.rosters["one"] == told and "one" in plane.pools


@in_virtual_time
async def test_what_is_under_way_does_not_outlive_its_pool(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    plane.pause_s = 1.0
    rosters.tell(pool(1), SPEC, ledger("a"))
    await asyncio.sleep(0.5)  # the record of the pool is on its way
    plane.pause_s = 0.0
    await rosters.leave(pool(2), ledger())
    await asyncio.sleep(100)
    assert plane.pools == {} and plane.rosters["one"].workers == ()


@in_virtual_time
async def test_a_pool_that_a_template_names_goes_after_it(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    rosters.tell(pool(1), SPEC, ledger("a"))
    await asyncio.sleep(1)
    plane.in_use = True
    await rosters.leave(pool(2), ledger())
    await asyncio.sleep(100)
    assert "one" in plane.pools and rosters.trouble == {}
    plane.in_use = False
    await asyncio.sleep(DELETE_AGAIN_S)
    assert plane.pools == {}


@in_virtual_time
async def test_a_namesake_that_comes_before_that_stays(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    rosters.tell(pool(1), SPEC, ledger("a"))
    await asyncio.sleep(1)
    plane.in_use = True
    await rosters.leave(pool(2), ledger())
    rosters.tell(pool(3, uid="u2"), SPEC, ledger("n", uid="u2"))
    await asyncio.sleep(1)
    plane.in_use = False
    await asyncio.sleep(10 * DELETE_AGAIN_S)
    assert plane.pools.keys() == {"one"} and plane.rosters["one"].pool_uid == "u2"


@in_virtual_time
async def test_a_pool_that_goes_leaves_nothing(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    rosters.tell(pool(1), SPEC, ledger("a"))
    await asyncio.sleep(1)
    plane.failures, plane.error = 1, Unavailable
    with pytest.raises(Unavailable):
        await rosters.leave(pool(2), ledger())
    await rosters.leave(pool(2), ledger())
    assert plane.pools == {} and plane.rosters["one"].workers == ()
    plane.pools["one"] = PoolSpec(replicas=0, slots=1, backend="sim")
    plane.rosters["one"] = replaced(plane.rosters["one"], roster_of(pool(5, uid="u2"), ledger("n", uid="u2")))
    await rosters.leave(pool(6), ledger())  # its name is another's by now: that stays
    assert plane.pools.keys() == {"one"} and plane.rosters["one"].pool_uid == "u2"


@in_virtual_time
async def test_what_is_refused_is_said_at_once(plane: Plane, rosters: Rosters, troubled: list[Any]) -> None:
    plane.failures, plane.error = 1, FailedPrecondition
    rosters.tell(pool(1), SPEC, ledger("a"))
    await asyncio.sleep(0.05)
    assert troubled == [("green", "one")]
    await asyncio.sleep(60)
    assert troubled == [("green", "one")] * 2 and rosters.trouble == {}


def test_who_has_lost_the_lease_says_nothing() -> None:
    def lost() -> None:
        raise LeaseLost("lost")

    async def work() -> Plane:
        plane = Plane()
        rosters = Rosters(plane, lost, lambda _: None, random.Random(1))
        rosters.tell(pool(1), SPEC, ledger("a"))
        with pytest.raises(LeaseLost):
            await rosters.work()
        return plane

    loop = SimLoop(1)
    try:
        assert loop.run_until_complete(work()).asked == 0
    finally:
        loop.close()


def test_a_stale_one_is_a_conflict() -> None:
    with pytest.raises(Conflict):
        replaced(roster_of(pool(9), ledger("z")), roster_of(pool(5), ledger("a")))


def test_a_defect_holds_up_one_pool_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Exception] = []
    monkeypatch.setattr(failures, "report", seen.append)
    loop = SimLoop(1)

    async def work() -> tuple[set[str], str]:
        plane = Plane()
        admit = plane.admit

        async def stumbles(roster: Roster) -> None:
            if roster.pool == "one":
                raise ValueError("nobody thought of that")
            await admit(roster)

        plane.admit = stumbles  # type: ignore[method-assign]
        rosters = Rosters(plane, lambda: None, lambda _: None, random.Random(1))
        working = asyncio.ensure_future(rosters.work())
        rosters.tell(pool(1), SPEC, ledger("a"))
        rosters.tell(pool(1, "u2", "two"), SPEC, ledger("b", uid="u2"))
        await asyncio.sleep(60)
        assert not working.done()
        working.cancel()
        return {*plane.rosters}, rosters.trouble["green", "one"]

    try:
        admitted, trouble = loop.run_until_complete(work())
    finally:
        loop.close()
    assert admitted == {"two"} and trouble == "ValueError: nobody thought of that"
    assert 2 < len(seen) < 20


def test_what_is_said_of_a_pool_that_is_known_to_be_over_is_how_to_make_another() -> None:
    """A cluster that was restored to before the pool was made again: no epoch of that one is ever heard."""
    loop = SimLoop(1)

    async def work() -> str:
        plane = Plane()
        plane.rosters["one"] = replaced(
            roster_of(pool(1), ledger("a")), roster_of(pool(5, "u2"), ledger("b", uid="u2"))
        )
        troubled: list[Key] = []
        rosters = Rosters(plane, lambda: None, lambda key: troubled.append(Key(*key)), random.Random(1))
        working = asyncio.ensure_future(rosters.work())
        rosters.tell(pool(9), SPEC, ledger("a", epoch=50))
        await asyncio.sleep(5)
        working.cancel()
        assert troubled
        return rosters.trouble["green", "one"]

    try:
        said = loop.run_until_complete(work())
    finally:
        loop.close()
    assert "kubectl delete workerpool one -n green" in said and "ledger" not in said.partition(";")[2].partition(";")[2]
