"""A snapshot store that is away, or another installation's: nothing is taken for lost, and nothing for nobody's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from greenroom.core.errors import FailedPrecondition, GreenroomError, Unavailable
from greenroom.core.marks import SNAPSHOTS, Mark
from greenroom.core.records import ActorState, Key, Snapshot, SnapshotState
from greenroom.engine import belongings
from greenroom.engine.engine import Engine
from greenroom.testing.local_hub import LocalHub
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


async def counted_twice(world: SimWorld, name: str = "a") -> Key:
    """An actor that sleeps, with two snapshots."""
    key = await world.create(name)
    for _ in range(2):
        await world.request(key)
        await world.engine.suspend(key)
    return key


def unmounted(world: SimWorld, *, empty: bool) -> Callable[[], None]:
    """Returns what mounts it again."""
    there, aside = world.root / "snapshots", world.root / "aside"
    there.rename(aside)
    if empty:
        there.mkdir()

    def mount() -> None:
        if empty:
            there.rmdir()  # nothing was put there
        aside.rename(there)

    return mount


@pytest.mark.parametrize("empty", [False, True])
async def test_what_is_missing_in_a_store_that_is_not_mounted_is_not_lost(world: SimWorld, empty: bool) -> None:
    key = await counted_twice(world)
    before = await world.actor(key)
    mount = unmounted(world, empty=empty)
    with pytest.raises(Unavailable):
        await world.request(key)
    after = await world.actor(key)
    assert (after.state, after.snapshot, after.previous_snapshot) == (
        ActorState.SUSPENDED,
        before.snapshot,
        before.previous_snapshot,
    )
    states = [(await world.store.get(Snapshot, s)).state for s in (after.snapshot, after.previous_snapshot)]
    assert states == [SnapshotState.PRESENT] * 2
    mount()

    async def wakes() -> bool:
        try:
            return (await world.request(key)).count == 3
        except GreenroomError:
            return False

    await until(wakes)


async def test_nobody_is_put_to_sleep_into_a_store_that_is_not_mounted(world: SimWorld) -> None:
    key = await world.create("a")
    await world.request(key)
    mount = unmounted(world, empty=True)
    operation = await world.engine.suspend(key)
    assert operation.error is not None and operation.error.reason == "SNAPSHOT_STORE_AWAY"
    mount()
    assert (await world.request(key)).count == 2
    await world.engine.suspend(key)
    assert (await world.request(key)).count == 3


async def test_a_start_without_the_store_goes_on_when_it_is_there(world: SimWorld) -> None:
    key = await counted_twice(world)
    await world.stop_control()
    mount = unmounted(world, empty=True)
    await world.start_control()
    with pytest.raises(Unavailable):
        await world.engine.collection.scrub()
    with pytest.raises(Unavailable):
        await world.request(key)
    mount()

    async def wakes() -> bool:
        try:
            return (await world.request(key)).count == 3
        except GreenroomError:
            return False

    await until(wakes)


async def test_another_installations_store_is_refused(world: SimWorld, tmp_path: Path) -> None:
    key = await counted_twice(world)
    other = SimWorld(tmp_path / "other", workers=0)
    other.snapshots = world.snapshots
    with pytest.raises(FailedPrecondition) as refused:
        await other.start_control()
    assert refused.value.reason == "SNAPSHOT_STORE_FOREIGN" and "--snapshots" in refused.value.message
    await other.engine.close()
    world.snapshots.expect(world.engine.belongings.mark)
    assert (await world.request(key)).count == 3


async def test_a_store_that_answers_late_and_is_another_installations(
    world: SimWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then nobody waits for the start: nothing there is used, and above all nothing removed."""
    await counted_twice(world)
    monkeypatch.setattr(belongings, "START_WAIT_S", 0.01)
    other = SimWorld(tmp_path / "other", workers=0)
    answers, mark = asyncio.Event(), other.snapshots.mark
    (tmp_path / "other" / "snapshots").rmdir()
    (tmp_path / "other" / "snapshots").symlink_to(world.root / "snapshots")

    async def late(value: str = "") -> str:
        await answers.wait()
        return await mark(value)

    monkeypatch.setattr(other.snapshots, "mark", late)
    await other.start_control()
    assert other.engine.belongings.mark == "" and await other.engine.collection.scrub() == []
    there = await world.snapshots.list()
    answers.set()

    async def known() -> bool:
        return bool(other.engine.belongings.mark)

    await until(known)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await other.engine.collection.scrub()
    await other.stop_control()
    assert await world.snapshots.list() == there != []


async def test_two_replicas_that_begin_at_once_give_one_mark(world: SimWorld, tmp_path: Path) -> None:
    fresh = SimWorld(tmp_path / "fresh", workers=0)
    engines = [Engine(fresh.store, LocalHub(), fresh.snapshots, QUICK) for _ in range(2)]
    await asyncio.gather(*(engine.belongings.check() for engine in engines))
    marks = {engine.belongings.mark for engine in engines}
    record = await fresh.store.get(Mark, SNAPSHOTS)
    assert marks == {record.value} == {await fresh.snapshots.mark()} and record.placed
    for engine in engines:
        await engine.close()


@pytest.mark.parametrize("left", ["record", "record and mark"])
async def test_a_first_start_that_died_half_way_is_gone_on_with(world: SimWorld, tmp_path: Path, left: str) -> None:
    fresh = SimWorld(tmp_path / "fresh", workers=0)
    await fresh.store.put(Mark(name=SNAPSHOTS, value="m"))
    if left == "record and mark":
        await fresh.snapshots.mark("m")
    await fresh.start_control()
    assert fresh.engine.belongings.mark == "m" == await fresh.snapshots.mark()
    assert (await fresh.store.get(Mark, SNAPSHOTS)).placed
    await fresh.stop_control()
