"""Of the contract of stores: slots of workers."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from greenroom.core.commands import BeginDelete, BeginResume, BeginSuspend, Change, FallBack, Outcome, Rebind
from greenroom.core.errors import FailedPrecondition, ResourceExhausted
from greenroom.core.records import ActorState, Key, Operation, Rejection, Worker, WorkerState
from greenroom.store.port import Store
from greenroom.testing.contracts.store_world import World, audit, dump


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

    async def test_of_many_for_few_slots_exactly_as_many_wake(self, store: Store) -> None:
        world = await World(store).setup({"w1": 3, "w2": 2, "w3": 2})
        keys = [await world.create(f"a{i:02}") for i in range(50)]
        commands = [world.begin_command(BeginResume, key) for key in keys]
        results = await asyncio.gather(*map(store.apply, commands), return_exceptions=True)
        woken = [r for r in results if isinstance(r, Change)]
        refused = [r for r in results if isinstance(r, ResourceExhausted)]
        assert (len(woken), len(refused)) == (7, 43) and {r.reason for r in refused} == {"NO_CAPACITY"}
        assert {w.name: w.used for w in await store.list(Worker)} == {"w1": 3, "w2": 2, "w3": 2}
        assert len(await store.list(Operation, where={"kind": "Resume"})) == 7, "who is refused leaves nothing behind"
        await audit(store)

    async def test_slots_that_are_freed_meanwhile_are_never_taken_twice(self, store: Store) -> None:
        """Every actor wakes once and is suspended, all at the same time, until each has had its turn."""
        world = await World(store).setup({"w1": 3, "w2": 2})
        waiting = {await world.create(f"a{i:02}") for i in range(50)}
        running: list[Operation] = []

        async def watch_slots() -> None:
            for _ in range(20):
                for w in await store.list(Worker):
                    assert 0 <= w.used <= w.capacity

        async def free(op: Operation) -> None:
            begun = await store.apply(world.begin_command(BeginSuspend, op.key))
            assert begun.operation is not None
            await store.apply(world.finish_command(begun.operation))

        async def wake(key: Key) -> Operation | None:
            try:
                begun = await store.apply(world.begin_command(BeginResume, key))
            except ResourceExhausted:
                return None
            assert begun.operation is not None
            await store.apply(world.finish_command(begun.operation))
            return begun.operation

        for _ in range(50):  # at most: with every slot taken at the beginning, each turn frees them all
            _, woken, *_ = await asyncio.gather(
                watch_slots(), asyncio.gather(*map(wake, waiting)), asyncio.gather(*map(free, running))
            )
            running = [op for op in woken if op is not None]
            waiting -= {op.key for op in running}
            used = sum(w.used for w in await store.list(Worker))
            assert used == len(running) <= 5 and (running or waiting)
            await audit(store)
            if not waiting:
                break
        assert not waiting
        await asyncio.gather(*map(free, running))
        assert [w.used for w in await store.list(Worker)] == [0, 0]
        await audit(store)

    async def test_a_delete_frees_a_slot_for_one_who_waits(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1})
        first, second = await world.create("a"), await world.create("b")
        await world.do(BeginResume, first)
        with pytest.raises(ResourceExhausted):
            await world.begin(BeginResume, second)
        deleting = await world.begin(BeginDelete, first)
        with pytest.raises(ResourceExhausted):  # its sandbox may still be there
            await world.begin(BeginResume, second)
        await world.finish(deleting)
        await world.do(BeginResume, second)

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

    async def test_full_draining_and_stalled_workers_take_nobody(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1, "w2": 5, "w3": 5})
        await store.put(replace(await store.get(Worker, "w2"), state=WorkerState.DRAINING))
        await store.put(replace(await store.get(Worker, "w3"), state=WorkerState.STALLED))
        assert (await world.begin(BeginResume, await world.create("a"))).worker == "w1"
        with pytest.raises(ResourceExhausted):
            await world.begin(BeginResume, await world.create("b"))

    async def test_workers_are_chosen_by_labels_trust_and_reach(self, store: Store) -> None:
        world = await World(store).setup({"w1": 5, "w2": 5, "w3": 5})
        for name, zone in (("w1", "a"), ("w2", "a"), ("w3", "b")):
            await store.put(replace(await store.get(Worker, name), labels={"zone": zone}))
        ill = replace(await store.get(Worker, "w1"), failures=3, quarantined_until=world.now + 30)
        await store.put(ill)
        one = await world.create("a", worker_selector={"zone": "a"})
        assert (await world.actor(one)).worker_selector == {"zone": "a"}
        op = await world.begin(BeginResume, one, prefer=("w3", "w1"))
        assert op.worker == "w2" and {r.worker for r in op.rejected} == {"w1", "w3"}
        assert (await store.get(Operation, op.id)).rejected == op.rejected
        two = await world.create("b", worker_selector={"zone": "a"})
        op = await world.begin(BeginResume, two, reachable=("w1", "w3"))
        assert op.worker == "w1", "in quarantine, but rather than none"
        with pytest.raises(FailedPrecondition) as never:
            await world.begin(BeginResume, await world.create("c", worker_selector={"zone": "c"}))
        assert never.value.reason == "NO_COMPATIBLE_WORKER"

    async def test_rebind_moves_the_slot(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), prefer=("w1",))
        change = await world.apply(world.step(Rebind, op, avoid=("w1",), why="no route"))
        assert change.operation is not None and change.actor is not None and change.source is not None
        assert (change.actor.worker, change.operation.worker, change.operation.attempts) == ("w2", "w2", 2)
        assert {w.name: w.used for w in await world.store.list(Worker)} == {"w1": 0, "w2": 1}
        assert (await world.store.get(Operation, op.id)).rejected == (Rejection(worker="w1", why="no route"),)
        await world.finish(change.operation)

    async def test_a_rebind_that_comes_late_or_twice_moves_nothing(self, world: World) -> None:
        """Its caller has given it up and sent it again; then the first arrives."""
        op = await world.begin(BeginResume, await world.create(), prefer=("w1",))
        late = world.step(Rebind, op, attempts=1, avoid=("w1",))
        moved = await world.apply(late)
        again = await world.apply(late)
        assert again.outcome is Outcome.REPEATED and again.operation == moved.operation
        before = await dump(world.store)
        assert moved.operation is not None
        back = await world.apply(world.step(Rebind, op, attempts=2, avoid=("w2",)))
        assert back.operation is not None and (back.operation.worker, back.operation.attempts) == ("w1", 3)
        after = await dump(world.store)
        assert (await world.apply(late)).outcome is Outcome.REPEATED
        assert await dump(world.store) == after != before

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
