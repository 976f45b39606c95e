"""Of the contract of stores: single records, lists, watching, trimming, closing."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from greenroom.core.commands import BeginDelete, BeginResume, BeginSuspend, Change
from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    InvalidArgument,
    LeaseHeld,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Pool,
    PoolSpec,
    Snapshot,
    Template,
    Worker,
)
from greenroom.store.port import MAX_PAGE, Event, EventType, Store
from greenroom.testing.contracts.store_world import World, audit, dump, list_all, operation, snapshot, template, worker


class Records:
    """What a store holds, and how it is read."""

    # single records

    async def test_put_inserts_and_replaces_the_version_that_was_read(self, store: Store) -> None:
        one = await store.put(Pool(name="p", uid="u", spec=PoolSpec(replicas=1), created_at=1.0))
        assert one.version == 1 and await store.get(Pool, "p") == one
        two = await store.put(replace(one, spec=PoolSpec(replicas=3)))
        assert two.version == 2 and (await store.get(Pool, "p")).spec.replicas == 3
        with pytest.raises(AlreadyExists):
            await store.put(replace(one, version=0))
        with pytest.raises(Conflict) as stale:
            await store.put(one)
        assert stale.value.reason == "VERSION_CONFLICT"
        assert await store.get(Pool, "p") == two

    async def test_remove_is_conditional_and_repeatable(self, store: Store) -> None:
        one = await store.put(template())
        two = await store.put(replace(one, reason="Changed"))
        with pytest.raises(Conflict):
            await store.remove(one)
        await store.remove(two)
        await store.remove(two)
        with pytest.raises(NotFound) as gone:
            await store.get(Template, "ns/t")
        assert "template ns/t" in gone.value.message and gone.value.reason == "TEMPLATE_NOT_FOUND"
        with pytest.raises(Conflict):
            await store.put(two)

    async def test_of_many_writers_of_one_version_one_wins(self, store: Store) -> None:
        one = await store.put(template())
        tries = [store.put(replace(one, reason=f"r{i}")) for i in range(20)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        won = [r for r in results if isinstance(r, Template)]
        assert len(won) == 1 and sum(isinstance(r, Conflict) for r in results) == 19
        assert await store.get(Template, "ns/t") == won[0]

    async def test_every_kind_comes_back_as_it_was(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(labels={"team": "ü"}))
        await world.store.put(operation("prepare"))
        await world.store.put(Pool(name="p", uid="u", spec=PoolSpec(), created_at=1.5))
        for name, record in (await dump(world.store)).items():
            assert await world.store.get(type(record), record.pk) == record, name
        assert (await world.store.get(Lease, op.uid)).operation == op.id
        assert (await world.actor(op.key)).labels == {"team": "ü"}

    async def test_used_slots_belong_to_the_lifecycle(self, world: World) -> None:
        before = await world.store.get(Worker, "w1")
        await world.do(BeginResume, await world.create(), prefer=("w1",))
        kept = await world.store.put(replace(before, used=0, last_seen=9.0))
        assert kept.used == 1, "a slot that was taken since does not conflict, and is not lost"
        await audit(world.store)
        await world.store.remove(kept)
        again = await world.store.put(worker("w1", used=7))
        assert again.used == 1, "a worker that comes back has the slots that its actors hold"
        await audit(world.store)

    # lists

    async def test_lists_are_ordered_paged_and_filtered(self, world: World) -> None:
        names = [f"a{i:02}" for i in range(7)]
        for name in reversed(names):
            await world.create(name)
        await world.begin(BeginResume, Key("ns", "a03"), operation_id="op-r", prefer=("w2",))
        store = world.store
        assert [a.name for a in await store.list(Actor)] == names
        assert [a.name for a in await store.list(Actor, after="ns/a04")] == ["a05", "a06"]
        assert [a.name for a in await store.list(Actor, limit=2)] == ["a00", "a01"]
        assert [a.name for a in await list_all(store, Actor, limit=3)] == names
        assert [a.name for a in await store.list(Actor, where={"state": "Resuming"})] == ["a03"]
        assert [a.name for a in await store.list(Actor, where={"worker": "w2", "template": "t"})] == ["a03"]
        assert len(await store.list(Actor, where={"worker": ""})) == 6
        uid = (await world.actor(Key("ns", "a05"))).uid
        assert [a.name for a in await store.list(Actor, where={"uid": uid})] == ["a05"]
        assert [o.id for o in await store.list(Operation, where={"kind": "Resume", "state": "Running"})] == ["op-r"]
        some: dict[str, str | tuple[str, ...]] = {"pk": ("ns/a05", "ns/a01", "ns/nobody", "other/a01")}
        assert [a.name for a in await store.list(Actor, where=some)] == ["a01", "a05"]
        assert [a.name for a in await store.list(Actor, where=some | {"uid": (uid, "another")})] == ["a05"]
        assert await store.list(Actor, where={"uid": ()}) == []
        assert [lease.operation for lease in await store.list(Lease, where={"owner": "one"})] == ["op-r"]
        assert [w.name for w in await store.list(Worker, where={"pool": "default", "state": "Active"})] == ["w1", "w2"]
        assert [s.id for s in await store.list(Snapshot, where={"actor_uid": "uid-x", "template": "t"})] == ["golden"]

    async def test_a_namespace_is_not_the_beginning_of_another(self, store: Store) -> None:
        for namespace in ("team", "team-a", "tea", "team0"):
            await store.put(template(namespace=namespace))
            await store.put(snapshot(f"s-{namespace}", namespace=namespace))
            await store.put(operation(f"o-{namespace}", namespace=namespace))
        assert [t.pk for t in await store.list(Template, namespace="team")] == ["team/t"]
        assert await store.list(Template, namespace="team", after="team/t") == []
        assert [s.id for s in await store.list(Snapshot, namespace="team")] == ["s-team"]
        assert [o.id for o in await store.list(Operation, namespace="team")] == ["o-team"]
        assert [t.namespace for t in await store.list(Template)] == ["tea", "team-a", "team", "team0"]

    async def test_a_list_refuses_what_it_can_not_do(self, store: Store) -> None:
        with pytest.raises(InvalidArgument, match="only by: pk, state, template, uid, worker"):
            await store.list(Actor, where={"reason": "x"})
        for limit in (0, -1, MAX_PAGE + 1):
            with pytest.raises(InvalidArgument, match=f"limit {limit}"):
                await store.list(Actor, limit=limit)

    # watching, trimming, closing

    async def test_watchers_see_every_write_in_order_once_it_can_be_read(self, world: World) -> None:
        watch = world.store.watch()
        key = await world.create()
        op = await world.begin(BeginResume, key, prefer=("w1",))
        with pytest.raises(LeaseHeld):
            await world.begin(BeginDelete, key)
        await world.finish(op)
        await world.do(BeginDelete, key)
        await world.store.remove(await world.store.get(Template, "ns/t"))
        seen: list[Event] = []
        while not seen or not isinstance(seen[-1].record, Template):
            seen.append(await anext(watch))
        assert [e.sequence for e in seen] == list(range(seen[0].sequence, seen[0].sequence + len(seen)))
        actors = [(e.type, e.record.state) for e in seen if isinstance(e.record, Actor)]
        S, put, deleted = ActorState, EventType.PUT, EventType.DELETED
        assert actors == [
            (put, S.SUSPENDED),
            (put, S.RESUMING),
            (put, S.RUNNING),
            (put, S.DELETING),
            (deleted, S.DELETING),
        ]
        # A store may leave out events of workers that only had a slot taken or freed.
        assert [e.record.used for e in seen if isinstance(e.record, Worker)] in ([1, 0], [])
        assert seen[-1].type is deleted

    async def test_an_event_comes_after_its_write_can_be_read(self, world: World) -> None:
        async def reader() -> None:
            async for event in watch:
                if isinstance(event.record, Operation) and event.record.state is OperationState.DONE:
                    assert (await world.store.get(Operation, event.record.id)).version >= event.record.version
                    if event.record.kind is OperationKind.SUSPEND:
                        assert (await world.actor(event.record.key)).state is ActorState.SUSPENDED
                        return

        watch = world.store.watch()
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(reader())
            key, _ = await world.in_state(ActorState.RUNNING)
            await world.do(BeginSuspend, key)

    async def test_a_slow_watcher_is_told(self, store: Store) -> None:
        slow, quick = store.watch(capacity=3), store.watch()
        for i in range(4):
            await store.put(operation(f"o{i}"))
        with pytest.raises(ResourceExhausted) as error:
            await anext(slow)
        assert error.value.reason == "WATCH_TOO_SLOW"
        assert [(await anext(quick)).record.pk for _ in range(4)] == ["o0", "o1", "o2", "o3"]

    async def test_trim_drops_the_oldest_finished_operations(self, world: World) -> None:
        key = await world.create("z")
        running = await world.begin(BeginResume, key)
        for i in range(10):
            await world.create(f"a{i}", request_id=f"r{i}")
        assert await world.store.trim(keep=4) == 7  # ten and that of "z" are finished
        left = await world.store.list(Operation)
        assert len(left) == 5 and running.id in {o.id for o in left}
        assert {o.name for o in left} == {"z", "a6", "a7", "a8", "a9"}
        assert await world.store.trim(keep=4) == 0
        await audit(world.store)
        with pytest.raises(AlreadyExists):  # its request is forgotten
            await world.create("a0", request_id="r0")

    async def test_after_close_every_call_is_refused(self, world: World) -> None:
        store, watch = world.store, world.store.watch()
        key = await world.create()
        await store.close()
        await store.close()
        seen = [await anext(watch), await anext(watch)]
        assert [type(e.record) for e in seen] == [Actor, Operation]
        with pytest.raises(Unavailable):
            await anext(watch)
        for call in (
            lambda: store.get(Actor, str(key)),
            lambda: store.list(Actor),
            lambda: store.apply(world.begin_command(BeginDelete, key)),
            lambda: store.put(template("x")),
            lambda: store.remove(template("x")),
            lambda: store.trim(),
        ):
            with pytest.raises(Unavailable):
                await call()
        with pytest.raises(Unavailable):
            store.watch()

    async def test_a_cancelled_caller_harms_nobody(self, world: World) -> None:
        keys = [await world.create(f"a{i:02}") for i in range(40)]
        commands = [world.begin_command(BeginDelete, key) for key in keys]
        tasks = [asyncio.ensure_future(world.store.apply(c)) for c in commands]
        await asyncio.sleep(0)  # all are submitted
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, Change) for r in results[1::2])
        await audit(world.store)
        for command in commands[::2]:  # it may or may not have happened; it can be asked again
            assert (await world.store.apply(command)).operation is not None
        assert len(await world.store.list(Actor, where={"state": "Deleting"})) == 40
