"""Of the contract of stores: slots of workers."""

import asyncio

import pytest
from msgspec.structs import replace

from greenroom.core.commands import (
    BeginResume,
    BeginSuspend,
    FallBack,
    Rebind,
)
from greenroom.core.errors import (
    FailedPrecondition,
    ResourceExhausted,
)
from greenroom.core.records import (
    ActorState,
    Worker,
    WorkerState,
)
from greenroom.store.port import Store
from greenroom.testing.contracts.store_world import (
    World,
    audit,
)


class Slots:
    """A slot is taken and freed with the actor that it is for."""

    async def test_the_last_slot_is_taken_once(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1})
        keys = [await world.create(f"a{i}") for i in range(8)]
        commands = [world.begin_command(BeginResume, key) for key in keys]
        results = await asyncio.gather(*map(store.apply, commands), return_exceptions=True)
        refused = [r for r in results if isinstance(r, ResourceExhausted)]
        assert len(refused) == 7 and {r.reason for r in refused} == {"NO_CAPACITY"}
        assert (await store.get(Worker, "w1")).used == 1
        await audit(store)

    async def test_a_worker_that_gets_fewer_slots_than_are_taken(self, store: Store) -> None:
        world = await World(store).setup({"w1": 4})
        keys = [await world.create(f"a{i}") for i in range(6)]
        for key in keys[:4]:
            await world.do(BeginResume, key)
        await store.put(replace(await store.get(Worker, "w1"), capacity=2))
        await audit(store)
        for key in keys[:3]:
            with pytest.raises(ResourceExhausted):
                await world.begin(BeginResume, keys[4])
            await world.do(BeginSuspend, key)
        assert (await store.get(Worker, "w1")).used == 1
        await world.do(BeginResume, keys[4])
        with pytest.raises(ResourceExhausted):
            await world.begin(BeginResume, keys[5])
        await store.put(replace(await store.get(Worker, "w1"), capacity=3))
        await world.do(BeginResume, keys[5])
        with pytest.raises(ResourceExhausted):
            await world.begin(BeginResume, keys[0])
        await store.put(replace(await store.get(Worker, "w1"), capacity=0))
        for key in keys[3:]:
            await world.do(BeginSuspend, key)
        assert (await store.get(Worker, "w1")).used == 0

    async def test_full_draining_and_disconnected_workers_take_nobody(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1, "w2": 5, "w3": 5})
        await store.put(replace(await store.get(Worker, "w2"), state=WorkerState.DRAINING))
        await store.put(replace(await store.get(Worker, "w3"), state=WorkerState.DISCONNECTED))
        assert (await world.begin(BeginResume, await world.create("a"))).worker == "w1"
        with pytest.raises(ResourceExhausted):
            await world.begin(BeginResume, await world.create("b"))

    async def test_rebind_moves_the_slot(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), prefer=("w1",))
        change = await world.apply(world.step(Rebind, op, avoid=("w1",)))
        assert change.operation is not None and change.actor is not None and change.source is not None
        assert (change.actor.worker, change.operation.worker, change.operation.attempts) == ("w2", "w2", 2)
        assert {w.name: w.used for w in await world.store.list(Worker)} == {"w1": 0, "w2": 1}
        await world.finish(change.operation)

    async def test_rebind_to_the_only_worker_keeps_its_slot(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1})
        op = await world.begin(BeginResume, await world.create())
        change = await world.apply(world.step(Rebind, op, avoid=("w1",)))
        assert change.operation and change.operation.worker == "w1" and (await store.get(Worker, "w1")).used == 1

    async def test_a_paused_actor_is_never_rebound(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.PAUSED)
        op = await world.begin(BeginResume, key)
        assert op.worker == (await world.actor(key)).worker and op.snapshot == ""
        for command in (world.step(Rebind, op), world.step(FallBack, op, snapshot_id="golden", detail="x")):
            with pytest.raises(FailedPrecondition):
                await world.apply(command)
        await world.finish(op)
