"""Workers that stall, are given up, are forgotten, retire, and those that come back after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from greenroom.agent.erase import erase
from greenroom.core import placement
from greenroom.core.errors import FailedPrecondition, NotFound, ResourceExhausted
from greenroom.core.records import (
    Actor,
    ActorState,
    Durability,
    OperationState,
    Snapshot,
    SnapshotState,
    Worker,
    WorkerState,
)
from greenroom.engine.members import RETIRING
from greenroom.testing.world import QUICK, SimWorld

RETURN_S = 1.0


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world(config=replace(QUICK, worker_return_s=RETURN_S)) as world:
        await world.apply(on_crash="restore-last")
        yield world


async def until(check: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(60):
        while not await check():
            await asyncio.sleep(0.002)


async def record(world: SimWorld, name: str) -> Worker:
    return await world.store.get(Worker, name)


async def saved_and_awake(world: SimWorld, name: str = "a") -> Actor:
    """Saved at 1, and at 2 now."""
    key = await world.create(name)
    await world.request(key)
    await world.engine.suspend(key)
    await world.request(key)
    return await world.actor(key)


async def forget(world: SimWorld, name: str, **options: Any) -> None:
    """As soon as it may be said."""
    async with asyncio.timeout(60):
        while True:
            try:
                await world.engine.forget_worker(name, **options)
                return
            except FailedPrecondition as error:
                if error.reason != "WORKER_HEARD":
                    raise
                await asyncio.sleep(0.01)


class Partition:
    """A worker that nobody hears, whose process and sandboxes live on; `heal` lets it be heard again."""

    def __init__(self, world: SimWorld, name: str) -> None:
        self.world, self.name = world, name
        self.agent, self.backend = world.agents.pop(name), world.backends[name]
        world.hub.disconnect(name)

    def heal(self) -> None:
        self.world.agents[self.name] = self.agent
        self.world.hub.connect(self.agent)


async def test_a_worker_that_is_heard_can_not_be_forgotten(world: SimWorld) -> None:
    actor = await saved_and_awake(world)
    with pytest.raises(FailedPrecondition, match=f"greenroom retire worker {actor.worker}") as heard:
        await world.engine.forget_worker(actor.worker, accept_loss=True)
    assert heard.value.reason == "WORKER_HEARD"
    gone = Partition(world, actor.worker)
    with pytest.raises(FailedPrecondition, match="Try again in") as soon:
        await until_stalled(world, actor.worker)
        await world.engine.forget_worker(actor.worker, accept_loss=True)
    assert soon.value.reason == "WORKER_HEARD", "what runs there may not be frozen yet"
    gone.heal()
    await world.settle()
    assert (await world.request(actor.key)).count == 3


async def until_stalled(world: SimWorld, name: str) -> None:
    async def stalled() -> bool:
        return (await record(world, name)).state is WorkerState.STALLED

    await until(stalled)


async def test_a_gone_worker_that_comes_back_wipes_itself_and_its_actor_is_never_alive_twice(world: SimWorld) -> None:
    actor = await saved_and_awake(world)
    before = await record(world, actor.worker)
    away = Partition(world, actor.worker)
    await forget(world, actor.worker, accept_loss=True)
    gone = await record(world, actor.worker)
    assert gone.state is WorkerState.GONE and gone.used == 0 and "will not come back" in gone.message
    assert (await world.request(actor.key)).count == 2, "from its last snapshot, elsewhere"
    assert (await world.actor(actor.key)).worker != actor.worker
    assert away.backend._sandboxes
    away.heal()

    async def admitted() -> bool:
        return (await record(world, actor.worker)).state is WorkerState.ACTIVE

    await until(admitted)
    assert not away.backend._sandboxes, "it has wiped itself before it was admitted"
    after = await record(world, actor.worker)
    assert after.incarnation != before.incarnation and after.epoch == before.epoch + 1
    assert not after.distrust and not after.message
    await world.settle()
    assert (await world.request(actor.key)).count == 3


async def test_t29_stalled_for_long_then_back_nothing_is_lost(world: SimWorld) -> None:
    """However long: until somebody says that it is gone, nothing of it is reaped."""
    await world.apply("local", durability=Durability.LOCAL)
    go, publish = asyncio.Event(), world.snapshots.publish

    async def later(*args: Any, **more: Any) -> Snapshot:
        await go.wait()
        return await publish(*args, **more)

    world.snapshots.publish = later  # type: ignore[method-assign]
    key = await world.create("b", "local")
    await world.request(key)
    await world.engine.suspend(key)
    only = await world.store.get(Snapshot, (await world.actor(key)).snapshot)
    away = Partition(world, only.worker)
    before = await record(world, only.worker)
    await until_stalled(world, only.worker)
    await asyncio.sleep(4 * RETURN_S)  # nothing is to happen; there is no condition for that
    stalled = await record(world, only.worker)
    assert stalled.incarnation == before.incarnation and stalled.state is WorkerState.STALLED
    assert (await world.store.get(Snapshot, only.id)).state is SnapshotState.LOCAL
    away.heal()
    go.set()
    await world.settle()
    assert (await world.request(key)).count == 2
    assert (await record(world, only.worker)).incarnation == before.incarnation


async def test_what_only_its_disk_has_is_counted_and_lost_on_purpose_only(world: SimWorld) -> None:
    await world.apply("local", durability=Durability.LOCAL)

    async def never(*_: Any, **__: Any) -> Snapshot:
        await asyncio.Event().wait()
        raise AssertionError

    key = await world.create("b", "local")
    await world.request(key)
    world.snapshots.publish = never  # type: ignore[method-assign]
    await world.engine.suspend(key)
    only = await world.store.get(Snapshot, (await world.actor(key)).snapshot)
    Partition(world, only.worker)
    with pytest.raises(FailedPrecondition, match=r"1 snapshots that are nowhere else.*--yes") as counted:
        await forget(world, only.worker)
    assert counted.value.metadata["snapshots"] == only.id
    assert (await record(world, only.worker)).state is WorkerState.STALLED
    await forget(world, only.worker, accept_loss=True)
    lost = await world.actor(key)
    assert (lost.state, lost.reason) == (ActorState.CRASHED, "SnapshotLost")


async def test_t30_gone_then_forgotten_then_back(world: SimWorld) -> None:
    """Without the tombstone nobody knows it: what is there is not destroyed until somebody has looked."""
    actor = await saved_and_awake(world)
    away = Partition(world, actor.worker)
    await forget(world, actor.worker, accept_loss=True)
    farewell = await world.engine.forget_worker(actor.worker)
    assert farewell.removed
    with pytest.raises(NotFound):
        await record(world, actor.worker)
    assert (await world.request(actor.key)).count == 2
    away.heal()

    async def distrusted() -> bool:
        try:
            return bool((await record(world, actor.worker)).distrust)
        except NotFound:
            return False

    await until(distrusted)
    assert f"greenroom acknowledge worker {actor.worker}" in (await record(world, actor.worker)).message
    assert away.backend._sandboxes, "not destroyed"
    assert {s.owner.uid for s in away.backend._sandboxes.values()} == {actor.uid}
    assert (await world.actor(actor.key)).worker != actor.worker, "and not alive twice: it is frozen there"
    await world.engine.reconciler.compare(actor.worker, anew=True)  # what it has seen is known only then
    await world.engine.acknowledge_worker(actor.worker)
    await world.settle()
    assert not (await record(world, actor.worker)).distrust
    assert (await world.request(actor.key)).count == 3


async def test_an_acknowledgement_is_not_undone_by_a_comparison_that_read_before_it(world: SimWorld) -> None:
    actor = await saved_and_awake(world)
    for _ in range(2):  # it gets numbers that the new record of its worker does not know
        await world.engine.suspend(actor.key)
        await world.request(actor.key)
    actor = await world.actor(actor.key)
    away = Partition(world, actor.worker)
    await forget(world, actor.worker, accept_loss=True)
    await world.engine.forget_worker(actor.worker)
    registered, looks, acknowledged = world.engine.inventories._registered, 0, asyncio.Event()

    async def between(worker: str) -> Worker:
        nonlocal looks
        found = await registered(worker)
        if worker == actor.worker and found.distrust:
            looks += 1
            if looks == 2:  # it was asked, and its answer is about to be judged by this record
                await world.engine.acknowledge_worker(worker)
                acknowledged.set()
        return found

    world.engine.inventories._registered = between  # type: ignore[method-assign]
    away.heal()
    await acknowledged.wait()
    await world.settle()
    assert not (await record(world, actor.worker)).distrust


async def test_a_fresh_disk_takes_the_name_of_a_tombstone(world: SimWorld) -> None:
    actor = await saved_and_awake(world)
    await world.kill_agent(actor.worker)
    await forget(world, actor.worker, accept_loss=True)
    (world.root / actor.worker).rename(world.root / "before")  # which a thread of its agent may still be at
    await world.start_agent(actor.worker)
    await world.settle()
    fresh = await record(world, actor.worker)
    assert fresh.state is WorkerState.ACTIVE and not fresh.distrust and not fresh.message and not fresh.cordon


async def test_a_worker_that_nobody_hears_for_long_enough_is_gone_by_itself(make_world: Callable[..., Any]) -> None:
    async with make_world(config=replace(QUICK, worker_return_s=0.3, worker_gone_s=0.6)) as world:
        await world.apply(on_crash="restore-last")
        actor = await saved_and_awake(world)
        away = Partition(world, actor.worker)

        async def gone() -> bool:
            return (await record(world, actor.worker)).state is WorkerState.GONE

        await until(gone)
        assert "nobody has heard it for more than 0.6 s" in (await record(world, actor.worker)).message
        assert (await world.request(actor.key)).count == 2
        away.heal()
        await world.settle()
        assert not [s for s in away.backend._sandboxes.values() if s.owner.uid == actor.uid]


async def test_an_operation_that_is_bound_to_it_ends(world: SimWorld) -> None:
    """And nothing holds the actor, or a slot, any more."""
    actor = await saved_and_awake(world)
    away = Partition(world, actor.worker)
    asked = asyncio.create_task(world.engine.suspend(actor.key))
    await forget(world, actor.worker, accept_loss=True)
    async with asyncio.timeout(60):
        ended = await asked
    assert ended.state is not OperationState.RUNNING

    async def settled() -> bool:
        return (await world.actor(actor.key)).state is ActorState.CRASHED

    await until(settled)
    assert (await record(world, actor.worker)).used == 0
    assert (await world.request(actor.key)).count == 2
    farewell = await world.engine.forget_worker(actor.worker)
    assert farewell.removed and away.backend._sandboxes


async def test_who_waits_for_what_only_a_silent_worker_has_is_told_the_way_out(
    make_world: Callable[..., Any],
) -> None:
    async with make_world(config=replace(QUICK, worker_return_s=RETURN_S, capacity_wait_s=0.2)) as world:
        await world.apply(durability=Durability.LOCAL)

        async def never(*_: Any, **__: Any) -> Snapshot:
            await asyncio.Event().wait()
            raise AssertionError

        key = await world.create("a")
        await world.request(key)
        publish, world.snapshots.publish = world.snapshots.publish, never  # type: ignore[method-assign]
        await world.engine.suspend(key)
        holder = (await world.store.get(Snapshot, (await world.actor(key)).snapshot)).worker
        away = Partition(world, holder)
        await until_stalled(world, holder)
        workers = await world.engine.census.all(Worker)
        snapshot = await world.store.get(Snapshot, (await world.actor(key)).snapshot)
        with pytest.raises(ResourceExhausted, match=f"greenroom forget worker {holder}"):
            placement.choose(workers, placement.Demand(pool="default", snapshot=snapshot), world.engine.now())
        world.snapshots.publish = publish  # type: ignore[method-assign]
        away.heal()


async def test_a_gone_worker_is_not_drained_nor_retired(world: SimWorld) -> None:
    await world.kill_agent("w1")
    await forget(world, "w1")
    for ask in (world.engine.drain_worker, world.engine.retire_worker):
        with pytest.raises(FailedPrecondition, match="greenroom forget worker w1") as refused:
            await ask("w1")
        assert refused.value.reason == "WORKER_GONE"


async def test_a_retired_worker_leaves_nothing(world: SimWorld) -> None:
    actor = await saved_and_awake(world)
    name = actor.worker
    agent = world.agents[name]
    shown = await world.engine.retire_worker(name)
    assert (shown.state, shown.cordon) == (WorkerState.RETIRING, "retiring")
    assert await asyncio.wait_for(agent.shutdown, 60) is True

    async def removed() -> bool:
        return await world.engine.members.find(name) is None

    await until(removed)
    asleep = await world.actor(actor.key)
    assert asleep.state is ActorState.SUSPENDED
    assert not (papers := world.root / name / "papers.json").exists(), papers
    await world.kill_agent(name)
    assert not (world.root / name).exists(), "its state disk"
    assert (await world.request(actor.key)).count == 3, "elsewhere"
    await world.start_agent(name)  # a fresh worker takes the name, without a word

    async def back() -> bool:
        return not await removed()

    await until(back)
    assert not (await record(world, name)).message and (await record(world, name)).epoch == 1


async def test_a_retirement_goes_on_after_the_control_plane_was_killed(world: SimWorld) -> None:
    actor = await saved_and_awake(world)
    agent = world.agents[actor.worker]
    await world.engine.retire_worker(actor.worker)
    await world.crash_control()
    assert await asyncio.wait_for(agent.shutdown, 60) is True
    await world.kill_agent(actor.worker)
    await world.settle()
    assert (await world.request(actor.key)).count == 3


async def test_a_retirement_is_undone(world: SimWorld) -> None:
    key = await world.create("a")
    await world.request(key)
    worker = (await world.actor(key)).worker
    agent = world.agents[worker]
    hold = asyncio.Event()
    flush = world.engine.uploads.flush

    async def held(name: str) -> None:
        await hold.wait()
        await flush(name)

    world.engine.uploads.flush = held  # type: ignore[method-assign]
    await world.engine.retire_worker(worker)
    await world.engine.drain_worker(worker, undo=True)
    hold.set()
    await world.settle()
    assert not agent.shutdown.done() and (await record(world, worker)).state is WorkerState.ACTIVE


async def test_a_retirement_that_was_undone_and_asked_for_again_spares_what_woke_meanwhile(world: SimWorld) -> None:
    """The one of before goes on from where it waited, with a worker's record that is newer than what it looked at."""
    key = await world.create("a")
    await world.request(key)
    worker = (await world.actor(key)).worker
    await world.engine.suspend(key)
    go, reached = asyncio.Event(), asyncio.Event()
    flush = world.engine.uploads.flush

    async def held(name: str) -> None:
        reached.set()
        await go.wait()
        await flush(name)

    world.engine.uploads.flush = held  # type: ignore[method-assign]
    await world.engine.retire_worker(worker)
    await reached.wait()
    await world.engine.drain_worker(worker, undo=True)
    for other in world.agents:
        if other != worker:
            await world.engine.drain_worker(other)
    assert (await world.request(key)).count == 2 and (await world.actor(key)).worker == worker
    asked = await world.engine.retire_worker(worker)
    assert asked.cordon == RETIRING
    agent, first = world.agents[worker], world.engine.decommission.begin(worker)
    go.set()
    await first
    assert agent._ending is None and (await world.actor(key)).state is ActorState.RUNNING
    await world.engine.drain_worker(worker, undo=True)


async def test_one_that_dies_while_it_retires_leaves_a_tombstone_and_no_alarm(world: SimWorld) -> None:
    """Its pool was made smaller while it was dead."""
    await world.kill_agent("w1")
    await world.engine.retire_worker("w1")

    async def gone() -> bool:
        return (await record(world, "w1")).state is WorkerState.GONE

    await until(gone)
    await world.start_agent("w1")
    await world.settle()
    back = await record(world, "w1")
    assert back.state is WorkerState.ACTIVE and not back.distrust and not back.message


async def test_acknowledging_a_worker_that_is_trusted_changes_nothing(world: SimWorld) -> None:
    before = await record(world, "w0")
    assert not (await world.engine.acknowledge_worker("w0")).distrust
    assert (await record(world, "w0")).incarnation == before.incarnation
    with pytest.raises(NotFound):
        await world.engine.acknowledge_worker("none")


def test_a_state_disk_is_erased_and_nothing_beside_it(tmp_path: Path) -> None:
    erase(tmp_path / "none")
    directory = tmp_path / "w"
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "link").symlink_to(tmp_path)
    erase(directory)
    assert not directory.exists() and tmp_path.exists()
