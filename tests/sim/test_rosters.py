"""Workers whose pool has a roster, with real agents and a real engine: who waits, who is let in, who goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from greenroom.core.errors import Conflict, InvalidArgument, NotFound
from greenroom.core.records import ActorState, Key, Pool, PoolSpec, Worker, WorkerState
from greenroom.core.rosters import Berth, Roster, RosterEntry
from greenroom.engine import rosters
from greenroom.engine.engine import Engine
from greenroom.testing.local_hub import LocalHub
from greenroom.testing.world import QUICK, SimWorld


@pytest.fixture
async def world(make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SimWorld]:
    monkeypatch.setattr(rosters, "LOOK_AGAIN_S", 0.05)
    async with make_world(workers=0, config=replace(QUICK, worker_return_s=1.0)) as world:
        yield world


def roster(*ordinals: int, version: int = 1, **more: Any) -> Roster:
    entries = tuple(RosterEntry(name=f"w{n}", ordinal=n, epoch=1, pod_uid=f"pod-{n}") for n in ordinals)
    return Roster(pool="default", pool_uid="u", ledger_version=version, workers=entries, **more)


def berth(ordinal: int, pod_uid: str = "") -> Berth:
    return Berth(pool_uid="u", epoch=1, ordinal=ordinal, pod_uid=pod_uid or f"pod-{ordinal}")


async def until(check: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(60):
        while not await check():
            await asyncio.sleep(0.002)


async def active(world: SimWorld, *names: str) -> None:
    """These are, and no others; and they know it, which they are told after it was written down."""

    async def are() -> bool:
        workers = await world.store.list(Worker)
        found = sorted(w.name for w in workers if w.state is WorkerState.ACTIVE and not w.cordon)
        return found == [*names] and not any(world.agents[name].unready() for name in names)

    await until(are)


async def names(world: SimWorld) -> list[str]:
    return [w.name for w in await world.store.list(Worker)]


async def test_a_worker_waits_for_the_roster_that_names_it(world: SimWorld) -> None:
    await world.engine.admit_workers(roster(1))
    await world.start_agent("w0", berth(0))
    await asyncio.sleep(0.3)
    assert await names(world) == [] and world.agents["w0"].unready()
    await world.engine.admit_workers(roster(0, 1, version=2))
    await active(world, "w0")


async def test_who_waits_is_not_asked_again_for_the_rosters_of_other_pools(
    world: SimWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of pools at once, when a cluster begins: each change would ask every worker that waits for any."""
    monkeypatch.setattr(rosters, "LOOK_AGAIN_S", 60.0)
    asked: list[str] = []
    refusal = world.engine.rosters.refusal

    async def count(hello: Any) -> str:
        asked.append(hello.worker)
        return await refusal(hello)

    monkeypatch.setattr(world.engine.rosters, "refusal", count)
    await world.engine.admit_workers(roster(1))
    await world.start_agent("w0", berth(0))
    await until(lambda: asyncio.sleep(0, bool(asked)))
    await asyncio.sleep(0.1)
    before = len(asked)
    for version in range(20):
        await world.engine.admit_workers(replace_pool(roster(1, version=version), "other"))
        await asyncio.sleep(0.005)
    assert len(asked) == before
    await world.engine.admit_workers(roster(0, 1, version=2))
    await active(world, "w0")


def replace_pool(known: Roster, pool: str) -> Roster:
    return structs.replace(known, pool=pool, pool_uid=f"uid-{pool}")


async def test_a_roster_that_another_replica_was_sent_holds_here(world: SimWorld) -> None:
    other = Engine(world.store, LocalHub(), world.snapshots, replace(QUICK, owner="other/1", replica="other"))
    await other.admit_workers(roster(1))
    await world.start_agent("w0", berth(0))
    await asyncio.sleep(0.2)
    assert await names(world) == []
    await other.admit_workers(roster(0, version=2))
    await active(world, "w0")
    with pytest.raises(Conflict):
        await world.engine.admit_workers(roster(1, version=1))
    await other.close()


async def test_a_pool_without_a_roster_takes_whoever_comes_unless_rosters_are_asked_for(world: SimWorld) -> None:
    await world.start_agent("w0")
    await active(world, "w0")
    world.configure(rosters=True)
    await world.start_agent("w1")
    await asyncio.sleep(0.2)
    await world.engine.rosters.hold(world.agents["w0"].hello())  # as the end of a registration that the option overtook
    await active(world, "w0")
    assert await names(world) == ["w0"], "what was there before is not thrown out for want of a roster"


@pytest.mark.parametrize("wrong", [berth(0, "another-pod"), berth(1), Berth(pod_uid="pod-0"), Berth()])
async def test_a_pod_that_is_not_the_slots_is_never_let_in(world: SimWorld, wrong: Berth) -> None:
    await world.engine.admit_workers(roster(0, 1))
    await world.start_agent("w0", wrong)
    await asyncio.sleep(0.2)
    assert await names(world) == []


async def test_who_is_dropped_is_emptied_first_and_leaves_nothing(world: SimWorld) -> None:
    await world.engine.admit_workers(roster(0, 1))
    await world.start_agent("w0", berth(0))
    await world.start_agent("w1", berth(1))
    await active(world, "w0", "w1")
    await world.apply()
    key = await world.create("a")
    assert (await world.request(key)).count == 1
    on = (await world.actor(key)).worker
    left = 1 if on == "w0" else 0
    _, retiring = await world.engine.admit_workers(roster(left, version=2))
    assert retiring == [on]
    async with asyncio.timeout(60):
        await world.agents[on].shutdown
    await world.kill_agent(on)

    async def gone() -> bool:
        return await names(world) == [f"w{left}"]

    await until(gone)
    assert (await world.request(key)).count == 2, "suspended, and awake on the other"


async def test_a_drop_that_was_cut_short_is_gone_on_with(world: SimWorld) -> None:
    """The replica dies when the roster is written, and the worker comes back to its successor with an actor awake."""
    await world.engine.admit_workers(roster(0, 1))
    await world.start_agent("w0", berth(0))
    await active(world, "w0")
    await world.apply()
    key = await world.create("a")
    await world.request(key)
    there = await world.store.get(Roster, "default")
    await world.store.put(structs.replace(there, ledger_version=2, workers=()))
    await world.crash_control()
    async with asyncio.timeout(60):
        await world.agents["w0"].shutdown
    await world.kill_agent("w0")
    assert (await world.actor(key)).state is ActorState.SUSPENDED, "it was let in to be emptied, and lost nothing"

    async def gone() -> bool:
        return await names(world) == []

    await until(gone)


async def test_one_that_died_and_was_dropped_leaves_no_tombstone(world: SimWorld) -> None:
    await world.engine.admit_workers(roster(0, 1))
    await world.start_agent("w0", berth(0))
    await active(world, "w0")
    await world.kill_agent("w0")
    await world.engine.admit_workers(roster(1, version=2))

    async def gone() -> bool:
        return await names(world) == []

    await until(gone)
    await world.start_agent("w0", berth(0))  # it was not dead after all
    await asyncio.sleep(0.2)
    assert await names(world) == []


async def test_an_empty_disk_under_a_name_that_was_dropped_is_not_let_in(world: SimWorld) -> None:
    await world.engine.admit_workers(roster(0))
    await world.start_agent("w0", berth(0))
    await active(world, "w0")
    await world.kill_agent("w0")
    (world.root / "w0").rename(world.root / "before")  # which a thread of its agent may still be at
    await world.engine.admit_workers(roster(version=2))
    await world.start_agent("w0", berth(0))
    await asyncio.sleep(0.2)
    assert all(w.state is not WorkerState.ACTIVE for w in await world.store.list(Worker))


@pytest.mark.parametrize(
    "bad",
    [
        Roster(pool="default", pool_uid=""),
        Roster(pool="Default", pool_uid="u"),
        Roster(pool="default", pool_uid="u", epoch=0),
        Roster(pool="default", pool_uid="u", ledger_version=-1),
        Roster(pool="default", pool_uid="u", workers=(RosterEntry(name="a_b", ordinal=0),)),
        Roster(pool="default", pool_uid="u", workers=2 * (RosterEntry(name="a", ordinal=0),)),
        Roster(pool="default", pool_uid="u", workers=tuple(RosterEntry(name=f"a{n}", ordinal=n) for n in range(2001))),
    ],
)
async def test_bad_rosters_are_refused(world: SimWorld, bad: Roster) -> None:
    with pytest.raises(InvalidArgument):
        await world.engine.admit_workers(bad)
    assert await world.store.list(Roster) == []


async def test_demand_is_that_of_all_replicas(world: SimWorld) -> None:
    world.configure(exclusive=False, replica="here")
    world.slots = 1
    await world.store.put(Pool(name="default", uid="p", spec=PoolSpec(), created_at=0.0))
    await world.start_agent("w0")
    await active(world, "w0")
    await world.apply(evictable=False)
    first, second = [await world.create(name) for name in "ab"]
    await world.request(first)
    other = Engine(
        world.store, LocalHub(), world.snapshots, replace(QUICK, owner="o/1", replica="o", link="l", exclusive=False)
    )
    await other.start()
    other.hub.connect(world.agents["w0"])  # type: ignore[attr-defined]
    waiting = asyncio.create_task(other.wake(second))

    async def is_told() -> bool:
        world.hub.heartbeat()
        other.hub.heartbeat()  # type: ignore[attr-defined]
        demand = await world.engine.demand("default")
        return demand.waiting == 1

    await world.engine.replicas._report()
    await until(is_told)
    demand = await world.engine.demand("default")
    assert (demand.slots, demand.awake) == (1, 1) and demand.wakes_per_s > 0
    [worker] = demand.workers
    assert (worker.name, worker.awake, worker.ready, worker.idle_s) == ("w0", 1, True, 0.0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await other.close()
    with pytest.raises(NotFound):
        await world.engine.demand("none")


async def test_since_when_a_worker_has_had_no_actor(world: SimWorld) -> None:
    await world.store.put(Pool(name="default", uid="p", spec=PoolSpec(), created_at=0.0))
    await world.start_agent("w0")
    await active(world, "w0")
    await world.apply()
    key = Key("default", "a")
    await world.create("a")
    await world.request(key)
    await asyncio.sleep(0.2)
    asleep = time.monotonic()
    await world.engine.suspend(key)
    just_now = (await world.engine.demand("default")).workers[0].idle_s
    assert just_now <= time.monotonic() - asleep
    await asyncio.sleep(0.2)
    assert (await world.engine.demand("default")).workers[0].idle_s >= 0.2


async def test_what_is_asked_of_many_pools_is_summed_once(world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are read by every probe of a replica; to go through all workers for each pool took a second."""
    demands = world.engine.pools_asked
    summed = 0
    count = demands._asked

    def counted() -> Any:
        nonlocal summed
        summed += 1
        return count()

    monkeypatch.setattr(demands, "_asked", counted)
    for number in range(200):
        await world.store.put(Pool(name=f"p{number}", uid=f"u{number}", spec=PoolSpec(), created_at=0.0))
    for number in range(2000):
        name = f"p{number % 200}-{number}"
        worker = Worker(name=name, pool=f"p{number % 200}", backend="sim", fingerprint="", capacity=2)
        await world.store.put(worker)
    found = {demand.pool: demand for demand in await demands.all()}
    assert summed == 1
    assert [found[f"p{n}"].slots for n in (0, 199)] == [20, 20] and len(found["p7"].workers) == 10
