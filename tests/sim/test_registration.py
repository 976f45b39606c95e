"""Whose disk a worker has, with real agents and a real engine: epochs, empty and copied disks, a revenant, and a
database that was restored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from greenroom.agent.enrolment import Enrolment
from greenroom.core import agentapi as api
from greenroom.core.errors import FailedPrecondition, Unavailable
from greenroom.core.gc.records import Papers, Registered
from greenroom.core.records import Actor, Worker, WorkerState
from greenroom.store.memory import MemoryStore
from greenroom.testing.world import SimWorld


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world(workers=1) as world:
        await world.apply()
        yield world


async def awake(world: SimWorld, name: str) -> Actor:
    key = await world.create(name)
    await world.request(key)
    return await world.actor(key)


async def record(world: SimWorld) -> Worker:
    return await world.store.get(Worker, "w0")


def papers(world: SimWorld) -> Path:
    return world.root / "w0" / "papers.json"


async def until(is_so: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.001)


async def test_the_epoch_grows_with_each_process_and_not_with_each_connection(world: SimWorld) -> None:
    first = await record(world)
    assert first.incarnation and first.epoch == 1
    await world.crash_control()
    await world.settle()
    assert (await record(world)).epoch == 1
    await world.kill_agent("w0")
    await world.start_agent("w0")
    await world.settle()
    second = await record(world)
    assert (second.incarnation, second.epoch) == (first.incarnation, 2) and second.claim != first.claim


async def test_a_worker_is_asked_and_erased_by_the_name_of_its_disk(world: SimWorld) -> None:
    asked: list[api.Sync | api.Shutdown] = []
    call, incarnation = world.engine.hub.call, (await record(world)).incarnation

    async def listening(worker: str, what: api.AgentCall, *more: Any) -> Any:
        if isinstance(what, api.Sync | api.Shutdown):
            asked.append(what)
        return await call(worker, what, *more)

    world.engine.hub.call = listening  # type: ignore[method-assign]
    await world.engine.reconciler.compare("w0", anew=True)
    await world.engine.retire_worker("w0")
    async with asyncio.timeout(60):
        await world.agents["w0"].shutdown
    assert {type(what) for what in asked} == {api.Sync, api.Shutdown}
    assert {what.incarnation for what in asked} == {incarnation}


async def test_t24_an_empty_disk_is_another_incarnation(world: SimWorld) -> None:
    first = await record(world)
    actor = await awake(world, "a")
    await world.kill_agent("w0")
    (world.root / "w0").rename(world.root / "before")  # which a thread of its agent may still be at
    await world.start_agent("w0")
    await world.settle()
    second = await record(world)
    assert second.incarnation != first.incarnation and second.epoch == 2 and not second.distrust
    assert (await world.actor(actor.key)).reason in ("SandboxLost", "WorkerLost")


async def test_t25_a_revenant_empties_itself(world: SimWorld) -> None:
    """The agent with the first disk is away, another takes its name, and then it is back."""
    actor = await awake(world, "a")
    old, old_backend = world.agents.pop("w0"), world.backends["w0"]
    world.hub.disconnect("w0")
    (world.root / "w0").rename(world.root / "old")
    await world.start_agent("w0")
    await world.settle()
    assert old_backend._sandboxes
    new = world.agents["w0"]
    old._enrolment._path = world.root / "old" / "papers.json"  # where its disk is now
    world.hub.connect(old)
    await until(lambda: not old_backend._sandboxes)
    await until(old.shutdown.done)
    assert not await old.shutdown, "the name is taken: it ends, and leaves to the other what is its"
    world.hub.connect(new)
    await world.settle()
    assert (await record(world)).incarnation == new._enrolment.papers.incarnation
    await world.request((await world.actor(actor.key)).key) if (await world.actor(actor.key)).snapshot else None
    world.hub.disconnect("w0")
    await old.close(wipe=True)
    world.hub.connect(new)


async def test_an_empty_disk_does_not_take_the_name_of_a_worker_that_may_come_back(world: SimWorld) -> None:
    """A cloned machine, and a link that breaks for a moment: who is back first does not cost the other its actors."""
    actor = await awake(world, "a")
    incarnation = (await record(world)).incarnation
    real, backend = world.agents["w0"], world.backends["w0"]
    world.hub.disconnect("w0")
    async with asyncio.timeout(60):
        while (await record(world)).state is not WorkerState.STALLED:
            await asyncio.sleep(0.001)
    root, world.root = world.root, world.root / "clone"
    await world.start_agent("w0")
    clone, world.root = world.agents["w0"], root
    assert not await asyncio.wait_for(clone.shutdown, 60), "it ends, and wipes nothing"
    world.hub.disconnect("w0")
    world.agents["w0"], world.backends["w0"] = real, backend
    world.hub.connect(real)
    await clone.close(wipe=True)
    await world.settle()
    assert (await record(world)).incarnation == incarnation
    assert (await world.request(actor.key)).count == 2
    assert (await world.actor(actor.key)).generation == actor.generation


async def test_a_copied_disk_goes_on_once(world: SimWorld) -> None:
    copied = msgspec.json.decode(papers(world).read_bytes(), type=Papers)
    await world.kill_agent("w0")
    await world.start_agent("w0")
    await world.settle()
    original = world.agents["w0"]
    enrolment = Enrolment(world.root / "copy.json", "w0")
    enrolment.papers = copied
    enrolment._write(copied)
    original._enrolment = Enrolment(world.root / "copy.json", "w0")
    world.hub.disconnect("w0")
    world.hub.connect(original)
    await until(lambda: original._enrolment.papers.incarnation != copied.incarnation)


async def test_t31_a_restored_database_destroys_nothing_until_somebody_looks(world: SimWorld) -> None:
    assert isinstance(world.store, MemoryStore)
    tables = world.store._rows._tables
    backup = {cls: dict(table) for cls, table in tables.items()}
    await world.engine.drain_worker("w0", undo=True)
    await replace_agent_and_keep_its_sandboxes(world)
    actor = await awake(world, "a")
    await world.stop_control()
    for cls, table in backup.items():
        tables[cls].clear()
        tables[cls].update(table)
    await world.start_control()
    await until(lambda: world.store._rows._tables[Worker]["w0"].distrust)  # type: ignore[attr-defined]
    found = await record(world)
    assert "was the database restored?" in found.message and found.epoch == 3
    for _ in range(3):
        await world.engine.reconciler.compare("w0", anew=True)
    assert [r.actor_uid for r in world.agents["w0"].hello().residents] == [actor.uid], "nothing was discarded"
    await world.engine.drain_worker("w0", undo=True)
    assert (await record(world)).distrust, "to let it take actors again says nothing about the database"
    with pytest.raises(FailedPrecondition, match="greenroom acknowledge worker w0"):
        await world.engine.retire_worker("w0")
    await world.engine.acknowledge_worker("w0")
    await world.engine.reconciler.compare("w0", anew=True)
    assert not world.agents["w0"].hello().residents
    assert not (await record(world)).distrust
    await world.settle()


async def test_t31_a_database_that_goes_back_under_a_running_replica(world: SimWorld) -> None:
    """The replica has seen what the database has forgotten, whatever numbers are given out meanwhile."""
    assert isinstance(world.store, MemoryStore)
    tables = world.store._rows._tables
    backup = dict(tables[Worker])
    actor = await awake(world, "a")
    seen = (await record(world)).version
    await until(lambda: tables[Worker]["w0"].version > seen + 2)  # type: ignore[attr-defined]
    await until(lambda: world.engine.census._numbers["w0"][1] > seen + 1)
    tables[Worker].update(backup)
    await until(lambda: tables[Worker]["w0"].distrust)  # type: ignore[attr-defined]
    assert "greenroom acknowledge worker w0" in (await record(world)).message
    await world.engine.reconciler.compare("w0", anew=True)
    assert [r.actor_uid for r in world.agents["w0"].hello().residents] == [actor.uid]
    await world.engine.drain_worker("w0", undo=True)


async def replace_agent_and_keep_its_sandboxes(world: SimWorld) -> None:
    await world.kill_agent("w0")
    await world.start_agent("w0")
    await world.settle()


def test_nothing_is_made_before_it_is_registered(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path / "papers.json", "w")
    with pytest.raises(Unavailable, match="not registered"):
        enrolment.check()
    said = enrolment.present(0)
    enrolment.registered(Registered(claim=said.claim, epoch=1, closed_seq=0))
    enrolment.check()


def test_a_claim_is_kept_until_it_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "papers.json"
    first = Enrolment(path, "w").present(0)
    second = Enrolment(path, "w")
    assert second.present(0) == first
    second.registered(Registered(claim=first.claim, epoch=4, closed_seq=0))
    third = Enrolment(path, "w").present(9)
    assert third.claim != first.claim and (third.epoch, third.replaces) == (4, 0)


def test_damaged_papers_are_those_of_an_empty_disk(tmp_path: Path) -> None:
    path = tmp_path / "papers.json"
    path.write_bytes(b'{"incarnation": 7')
    said = Enrolment(path, "w").present(5)
    assert (said.epoch, said.replaces) == (0, 5)


def test_what_can_not_be_written_down_is_not_said(tmp_path: Path) -> None:
    enrolment = Enrolment(tmp_path / "missing" / "papers.json", "w")
    with pytest.raises(OSError):
        enrolment.present(0)
