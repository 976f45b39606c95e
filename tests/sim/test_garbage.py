"""Garbage as people see it, on a real engine with real agents: a dry run, a round, what failed, and single things."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from greenroom.core import agentapi as api
from greenroom.core.errors import InvalidArgument, NotFound, Unavailable
from greenroom.core.gc.verdict import Judged, There
from greenroom.core.records import Durability, Key, Snapshot, SnapshotState
from greenroom.engine import members
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.world import QUICK, SimWorld


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        await world.apply()
        yield world


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await check():
            await asyncio.sleep(0.002)


async def slept(world: SimWorld, name: str, times: int = 1) -> Key:
    key = await world.create(name)
    for _ in range(times):
        await world.request(key)
        await world.engine.suspend(key)
    return key


def refuse_deletes(world: SimWorld) -> Callable[[], None]:
    """The snapshot store deletes nothing until the function that is returned is called."""
    delete = world.snapshots.delete

    async def refused(*_: Any) -> None:
        raise Unavailable("the bucket refuses")

    world.snapshots.delete = refused  # type: ignore[method-assign]

    def again() -> None:
        world.snapshots.delete = delete  # type: ignore[method-assign]

    return again


def goes(found: Sequence[Judged], kind: str) -> list[str]:
    return [one.id for one in found if one.kind == kind and one.goes]


async def condemned(world: SimWorld) -> set[str]:
    return {s.id for s in await list_all(world.store, Snapshot) if s.state is SnapshotState.CONDEMNED}


async def test_a_dry_run_says_what_goes_and_destroys_nothing(world: SimWorld) -> None:
    again = refuse_deletes(world)
    await slept(world, "a", times=4)
    there = await condemned(world)
    assert len(there) == 2
    report = await world.engine.garbage.collect(dry_run=True)
    assert set(goes(report.would_go, "snapshot")) == there and not report.removed and not report.failures
    (first, *_) = report.would_go
    assert first.size_bytes > 0 and first.made_at and first.when and first.where == "snapshot store"
    assert await condemned(world) == there
    again()
    await world.settle()


async def test_a_round_says_what_it_destroyed_and_what_it_could_not(world: SimWorld) -> None:
    again = refuse_deletes(world)
    await slept(world, "a", times=3)
    (doomed,) = await condemned(world)
    failed = await world.engine.garbage.collect()
    assert not failed.removed and any("the bucket refuses" in line and doomed in line for line in failed.failures)
    position = world.engine.removals.position
    again()
    report = await world.engine.garbage.collect()
    assert [r.id for r in report.removed if r.kind == "snapshot"] == [doomed], "whoever asks does not wait for a pause"
    await world.settle()
    done = [r for r in world.engine.removals.since(position) if not r.failure]
    assert [(r.kind, r.id) for r in done if r.kind == "snapshot"] == [("snapshot", doomed)]
    assert world.engine.removals.destroyed["snapshot"] == 1 and world.engine.removals.failed["snapshot"] >= 1
    assert world.engine.removals.syncs["done"] > 0


async def test_what_a_worker_has_and_nobody_speaks_of(world: SimWorld) -> None:
    await world.apply("local", durability=Durability.LOCAL)
    key = await world.create("a", "local")
    await world.request(key)
    await world.engine.suspend(key)
    await world.settle()
    actor = await world.actor(key)
    copy = await world.store.get(Snapshot, actor.snapshot)

    async def inventory(worker: str) -> Sequence[There]:
        if worker != copy.worker:
            return []
        return [
            There(worker=worker, kind="sandbox", id="box-1", owner="uid-of-nobody", size_bytes=7),
            There(worker=worker, kind="sandbox", id="box-2", owner=actor.uid),
            There(worker=worker, kind="copy", id=copy.id, owner=copy.id),
            There(worker=worker, kind="copy", id="lost", owner="lost"),
        ]

    world.engine.garbage.inventory = inventory
    report = await world.engine.garbage.collect(dry_run=True)
    assert goes(report.would_go, "sandbox") == ["box-1", "box-2"] and goes(report.would_go, "copy") == ["lost"]
    why = {one.id: one.why for one in report.would_go}
    assert why["box-2"] == "actor default/a is Suspended, and on no worker"
    figures, workers = await world.engine.garbage.figures()
    assert figures["sandbox"].objects == 2 and figures["sandbox"].size_bytes == 7
    assert (workers["Active"], workers["Gone"], workers["distrusted"]) == (2, 0, 0)
    (kept,) = [one for one in await world.engine.garbage.explain(copy.id) if one.kind == "copy"]
    assert not kept.goes and "without a download" in kept.why


async def test_a_worker_that_does_not_answer_holds_up_nothing(world: SimWorld) -> None:
    again = refuse_deletes(world)
    await slept(world, "a", times=3)

    async def silent(worker: str) -> Sequence[There]:
        if worker == "w0":
            raise Unavailable("worker w0 does not answer")
        return [There(worker=worker, kind="sandbox", id="box", owner="nobody")]

    world.engine.garbage.inventory = silent
    report = await world.engine.garbage.collect(dry_run=True)
    assert report.failures == ("worker w0: worker w0 does not answer",)
    assert goes(report.would_go, "sandbox") == ["box"] and len(goes(report.would_go, "snapshot")) == 1
    again()


async def test_everything_of_an_actor(world: SimWorld) -> None:
    key = await slept(world, "a", times=2)
    await world.request(key)
    actor = await world.actor(key)
    found = await world.engine.garbage.explain("default/a")
    assert [(one.kind, one.goes) for one in found] == [
        ("actor", False),
        ("snapshot", False),
        ("snapshot", False),
        ("sandbox", False),
    ]
    why = {one.id: one.why for one in found}
    assert why[actor.snapshot] == "actor default/a wakes from it" and "way back" in why[actor.previous_snapshot]
    assert await world.engine.garbage.explain("a") == found == await world.engine.garbage.explain("actor/a")
    (sandbox,) = await world.engine.garbage.explain(f"sandbox/{actor.uid}")
    assert sandbox.where == actor.worker and sandbox.why == "actor default/a is Running in it"


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("w0", "worker", "it is Active"),
        ("worker/w1", "worker", "it is Active"),
        ("template/t", "template", "1 actors are made from it"),
        ("template/default/t", "template", "1 actors are made from it"),
    ],
)
async def test_single_things(world: SimWorld, name: str, kind: str, says: str) -> None:
    await slept(world, "a")
    (found,) = await world.engine.garbage.explain(name)
    assert found.kind == kind and says in found.why


async def test_the_golden_snapshot_is_kept(world: SimWorld) -> None:
    golden = (await world.template()).golden_snapshot
    (found,) = await world.engine.garbage.explain(f"snapshot/{golden}")
    assert not found.goes and "it is the golden snapshot of template default/t" in found.why


async def test_what_nobody_knows(world: SimWorld) -> None:
    for name in ("nothing", "snapshot/nothing", "actor/w0", "image/sha256:00", "object/x"):
        with pytest.raises(NotFound, match="nothing is called"):
            await world.engine.garbage.explain(name)
    for name in ("", "x" * 2000):
        with pytest.raises(InvalidArgument):
            await world.engine.garbage.explain(name)


async def test_images_only_when_they_are_asked_for(world: SimWorld) -> None:
    assert not (await world.engine.garbage.collect(dry_run=True)).would_go
    report = await world.engine.garbage.collect(dry_run=True, images=True)
    assert {one.kind for one in report.would_go} <= {"image"} and not report.failures


async def test_a_worker_that_does_not_let_go_holds_up_nobody_elses_snapshots(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still and keeps its connection open."""
    monkeypatch.setattr(members, "ANSWER_TIMEOUT_S", 0.1)
    async with make_world(workers=1) as world:
        await world.apply()
        await world.apply("local", durability=Durability.LOCAL)
        call = world.engine.hub.call

        async def hangs(worker: str, what: api.AgentCall, *more: Any) -> Any:
            if isinstance(what, api.Release):
                await asyncio.Event().wait()
            return await call(worker, what, *more)

        world.engine.hub.call = hangs
        mine = await world.create("mine", "local")
        for _ in range(4):
            await world.request(mine)
            await world.engine.suspend(mine)
            await until(lambda: no_more(world, SnapshotState.LOCAL))
        held = await condemned(world)
        assert len(held) == 2
        await slept(world, "other", times=4)

        async def only_the_held_ones_are_left() -> bool:
            return await condemned(world) == held

        await until(only_the_held_ones_are_left)
        world.engine.hub.call = call


async def no_more(world: SimWorld, state: SnapshotState) -> bool:
    return not [s for s in await list_all(world.store, Snapshot) if s.state is state]


async def test_a_copy_that_its_worker_was_not_told_to_let_go_is_found_by_the_next_comparison(
    make_world: Callable[..., Any],
) -> None:
    async with make_world(workers=1, config=replace(QUICK, reconcile_s=3600.0)) as world:
        await world.apply(durability=Durability.LOCAL)
        key = await world.create("a")
        await world.request(key)
        call, lost = world.engine.hub.call, asyncio.Event()

        async def loses(worker: str, what: api.AgentCall, *more: Any) -> Any:
            if isinstance(what, api.Release):
                lost.set()
                raise Unavailable("the connection broke")
            answer = await call(worker, what, *more)
            if isinstance(what, api.Publish):
                await world.engine.reconciler.compare("w0", anew=True)  # its operation runs, so it belongs to that
                raise Unavailable("the answer is lost")
            return answer

        world.engine.hub.call = loses
        suspended = await world.engine.suspend(key)
        assert suspended.error is not None
        await lost.wait()
        held = world.agents["w0"]._held
        assert held.ids()
        for _ in range(2):
            await world.engine.reconciler.compare("w0", anew=True)

        async def let_go() -> bool:
            return not held.ids()

        await until(let_go)
        world.engine.hub.call = call
