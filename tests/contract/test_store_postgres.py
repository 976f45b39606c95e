"""The PostgreSQL store keeps the contract of every store, alone and when several processes share it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace

from greenroom.core import commands as c
from greenroom.core.errors import FailedPrecondition, GreenroomError, InvalidArgument, ResourceExhausted, Unavailable
from greenroom.core.records import Actor, ActorState, Key, Operation, Snapshot, SnapshotState, Worker, WorkerState
from greenroom.store import postgres_pool, postgres_writer
from greenroom.store.port import FILTERS
from greenroom.store.postgres import PostgresStore
from greenroom.store.postgres_rows import TABLES, cell
from greenroom.testing.contracts.store import StoreContract, World, audit, dump
from greenroom.testing.contracts.store_world import FAILURE, operation, snapshot, template, worker


class TestPostgresStore(StoreContract):
    @pytest.fixture
    async def store(self, database: str) -> AsyncIterator[PostgresStore]:
        store = await PostgresStore.open(database)
        yield store
        await store.close()


class TestTwoProcesses(StoreContract):
    """Every other call goes through another store on the same database, as when a balancer is in front."""

    @pytest.fixture
    async def store(self, database: str) -> AsyncIterator[Alternating]:
        stores = [await PostgresStore.open(database) for _ in range(2)]
        yield Alternating(stores)
        for store in stores:
            await store.close()

    # What is promised to one process: to be told of each of its own writes at once, and a clock that never goes back.
    test_replicas_are_watched = None
    test_rosters_are_watched = None
    test_watchers_see_every_write_in_order_once_it_can_be_read = None
    test_a_slow_watcher_is_told = None
    test_after_close_every_call_is_refused = None
    test_the_clock_tells_the_time_and_never_goes_back = None


class Alternating:
    def __init__(self, stores: list[PostgresStore]) -> None:
        self._stores = stores

    def __getattr__(self, name: str) -> Any:
        self._stores.reverse()
        return getattr(self._stores[0], name)


@pytest.fixture
async def stores(database: str) -> AsyncIterator[list[PostgresStore]]:
    stores = [await PostgresStore.open(database) for _ in range(3)]
    yield stores
    for store in stores:
        await store.close()


# --- several processes ------------------------------------------------------------------------------------


async def test_of_many_processes_one_begins(stores: list[PostgresStore]) -> None:
    world = await World(stores[0]).setup()
    for i in range(5):
        key = await world.create(f"a{i}")
        tries = [s.apply(world.begin_command(c.BeginResume, key, owner=f"o{n}")) for n, s in enumerate(stores * 4)]
        changes = await asyncio.gather(*tries)
        begun = [ch for ch in changes if ch.outcome is c.Outcome.CHANGED]
        assert len(begun) == 1 and {ch.outcome for ch in changes} == {c.Outcome.CHANGED, c.Outcome.JOINED}
        assert {ch.operation.id for ch in changes if ch.operation} == {begun[0].operation.id}  # type: ignore[union-attr]
        await world.finish(begun[0].operation)  # type: ignore[arg-type]
        await world.do(c.BeginSuspend, key)


async def test_one_request_is_carried_out_once_whoever_gets_it(stores: list[PostgresStore]) -> None:
    """Also when it is asked of different actors at the same time, which have no row in common."""
    await World(stores[0]).setup()
    for i in range(10):
        creates = [
            s.apply(
                c.CreateActor(
                    key=Key("ns", f"a{i}-{n}"), now=1.0, operation_id=f"o{i}-{n}", uid=f"u{i}-{n}", template="t",
                    request_id=f"r{i}",
                )
            )
            for n, s in enumerate(stores * 3)
        ]  # fmt: skip
        results = await asyncio.gather(*creates, return_exceptions=True)
        assert sum(isinstance(r, c.Change) for r in results) == 1
        assert all(isinstance(r, c.Change | InvalidArgument) for r in results), results
    await audit(stores[0])


async def test_no_slot_is_given_twice_or_lost(stores: list[PostgresStore]) -> None:
    """Far more wishes than slots, from everybody at once, while workers come, go, shrink and are drained."""
    world = await World(stores[0]).setup({"w1": 3, "w2": 5, "w3": 2})
    names = [f"a{i:02}" for i in range(24)]
    for name in names:
        await world.create(name)
    stop = asyncio.get_running_loop().time() + 6
    done: dict[str, int] = {}

    async def actors(store: PostgresStore, mine: list[str], seed: int) -> None:
        r = random.Random(seed)
        while asyncio.get_running_loop().time() < stop:
            key = Key("ns", r.choice(mine))
            actor = await store.get(Actor, str(key))
            begin = c.BeginResume if actor.state in (ActorState.SUSPENDED, ActorState.CRASHED) else c.BeginSuspend
            try:
                op = (await store.apply(world.begin_command(begin, key))).operation
                if op is None or op.name != key.name:
                    continue
                match r.randrange(6):
                    case 0:
                        back = op.from_state or ActorState.SUSPENDED
                        await store.apply(world.step(c.BackOut, op, to_state=back, error=FAILURE))
                    case 1 if begin is c.BeginResume:
                        await store.apply(world.step(c.Rebind, op, attempts=op.attempts, avoid=(op.worker,)))
                    case _:
                        await store.apply(world.finish_command(op))
                done[begin.__name__] = done.get(begin.__name__, 0) + 1
            except GreenroomError as error:
                assert not isinstance(error, Unavailable), error
                done[error.reason] = done.get(error.reason, 0) + 1

    async def workers(store: PostgresStore) -> None:
        r = random.Random(7)
        while asyncio.get_running_loop().time() < stop:
            try:
                w = await store.get(Worker, r.choice(("w1", "w2", "w3")))
                if r.random() < 0.2:
                    await store.remove(w)
                    await store.put(worker(w.name, capacity=r.randrange(1, 6)))
                else:
                    state = r.choice((WorkerState.ACTIVE, WorkerState.ACTIVE, WorkerState.DRAINING))
                    await store.put(replace(w, state=state, capacity=r.randrange(0, 6)))
            except GreenroomError as error:
                assert not isinstance(error, Unavailable), error
            await asyncio.sleep(0.005)

    async with asyncio.TaskGroup() as group:
        for seed in range(12):  # each actor is wanted by several, through different processes
            group.create_task(actors(stores[seed % 3], names[seed % 4 * 6 :][:8], seed))
        group.create_task(workers(stores[0]))
        group.create_task(workers(stores[1]))

    assert min(done.get(k, 0) for k in ("BeginResume", "BeginSuspend", "NO_CAPACITY")) > 10, done
    for name in ("w1", "w2", "w3"):
        w = await stores[0].get(Worker, name)
        await stores[0].put(replace(w, capacity=30, state=WorkerState.ACTIVE))
    await _nothing_leaks(stores[2], names)


async def _nothing_leaks(store: PostgresStore, names: list[str]) -> None:
    await audit(store)
    world = World(store)
    world.now = 9000.0
    for name in names:
        actor = await store.get(Actor, f"ns/{name}")
        if actor.operation:
            op = await store.get(Operation, actor.operation)
            taken = await store.apply(
                c.TakeOver(key=actor.key, now=world.now, operation_id=op.id, owner="me", force=True)
            )
            assert taken.operation is not None
            await world.finish(taken.operation)
        await world.do(c.BeginDelete, actor.key, operation_id=f"delete-{name}")
    assert [w.used for w in await store.list(Worker)] == [0, 0, 0]
    await audit(store)


async def test_who_is_draining_a_worker_sees_everybody_who_got_in(stores: list[PostgresStore]) -> None:
    """Once the put of a drained worker has returned, nobody is bound to it who is not there to be seen."""
    world = await World(stores[0]).setup({"w1": 200})
    keys = [await world.create(f"a{i}") for i in range(40)]

    async def begin(store: PostgresStore, key: Key) -> None:
        for _ in range(20):
            try:
                op = (await store.apply(world.begin_command(c.BeginResume, key))).operation
                assert op is not None
                await store.apply(world.step(c.BackOut, op, to_state=ActorState.SUSPENDED, error=FAILURE))
            except ResourceExhausted:
                await asyncio.sleep(0.002)

    async def drain(store: PostgresStore) -> None:
        for _ in range(15):
            w = await store.put(replace(await store.get(Worker, "w1"), state=WorkerState.DRAINING))
            bound = {a.name for a in await store.list(Actor, where={"worker": "w1"})}
            await asyncio.sleep(0.01)
            later = {a.name for a in await store.list(Actor, where={"worker": "w1"})}
            assert later <= bound, "somebody was let in who was not seen"
            await store.put(replace(w, state=WorkerState.ACTIVE))
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for i, key in enumerate(keys):
            group.create_task(begin(stores[i % 2], key))
        group.create_task(drain(stores[2]))


async def test_who_goes_on_from_a_snapshot_that_is_just_being_condemned_is_told_so(
    stores: list[PostgresStore], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process takes away what alone kept it, and commits while the other waits for the actor's row: which has
    compared before what it had read of the snapshot."""
    world = await World(stores[0]).setup()
    key = await world.create("a")
    kept = []
    for _ in range(3):
        await world.do(c.BeginResume, key)
        kept.append((await world.do(c.BeginSuspend, key)).snapshot)
        tag = c.TagSnapshot(key=key, now=world.now, snapshot_id=kept[0], tag="keep")
        await stores[0].apply(tag)
    wrote, go, write = asyncio.Event(), asyncio.Event(), postgres_writer.write
    condemns = stores[0]._writer._name

    async def slowly(connection: Any, writer: str, *more: Any) -> Any:
        if writer != condemns:
            return await write(connection, writer, *more)
        async with connection.transaction():
            written = await write(connection, writer, *more)
            wrote.set()
            await go.wait()
        return written

    monkeypatch.setattr(postgres_writer, "write", slowly)
    condemning = asyncio.ensure_future(stores[0].apply(replace(tag, undo=True)))
    await wrote.wait()
    going_on = asyncio.ensure_future(stores[1].apply(world.begin_command(c.BeginResume, key, snapshot_id=kept[0])))
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as watching, asyncio.timeout(60):
        while (await (await watching.execute(waits)).fetchone()) != (1,):
            await asyncio.sleep(0.005)
    go.set()
    assert (await condemning).outcome is c.Outcome.CHANGED
    with pytest.raises(FailedPrecondition) as refused:
        await going_on
    assert refused.value.reason == "SNAPSHOT_CONDEMNED"
    assert (await stores[2].get(Actor, str(key))).state is ActorState.SUSPENDED
    assert (await stores[2].get(Snapshot, kept[0])).state is SnapshotState.CONDEMNED


# --- rows -------------------------------------------------------------------------------------------------


async def test_an_id_is_taken_in_whatever_partition_it_is(database: str) -> None:
    store = await PostgresStore.open(database)
    names = {cell("ns", f"n{i}"): f"n{i}" for i in range(200)}
    one, *others = names.values()
    await store.put(operation("o", name=one))
    await store.put(snapshot("s", actor=one))
    for other in others[:16]:
        for record in (operation("o", name=other), snapshot("s", actor=other)):
            with pytest.raises(GreenroomError, match="exists already"):
                await store.put(record)
    assert (await store.get(Operation, "o")).name == one and len(await store.list(Snapshot)) == 1
    await store.close()


async def test_cells_never_change() -> None:
    """What is stored is found by them."""
    assert [cell("default", f"a{i}") for i in range(6)] == [24, 14, 52, 34, 1, 23]


async def test_every_filter_can_use_an_index(database: str) -> None:
    await (await PostgresStore.open(database)).close()
    values = {"state": "Running"}
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute("SET enable_seqscan = off")
        for cls, fields in FILTERS.items():
            for field in fields - ({"uid", "kind"} if cls is Operation else set()):  # few enough to look through
                page = TABLES[cls].page("", {field: values.get(field, "x")}, "a", 10)
                plan = await (await connection.execute(b"EXPLAIN " + page.as_bytes(connection))).fetchall()
                text = "\n".join(row[0] for row in plan)
                assert f"_{field}" in text and "Seq Scan" not in text, text


async def test_a_key_that_is_no_text_is_refused(database: str) -> None:
    store = await PostgresStore.open(database)
    with pytest.raises(InvalidArgument):
        await store.get(Actor, "ns/a\0b")
    await store.put(template(message="a\0b ü \\ ' \U0001f600"))
    assert (await store.list(type(template())))[0].message == "a\0b ü \\ ' \U0001f600"
    await store.close()


async def test_too_many_that_wait_are_told(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_pool, "MAX_WAITING", 5)
    store = await PostgresStore.open(database, max_connections=1)
    results = await asyncio.gather(*(store.put(operation(f"o{i}")) for i in range(20)), return_exceptions=True)
    refused = [r for r in results if isinstance(r, ResourceExhausted)]
    assert refused and {r.reason for r in refused} == {"STORE_OVERLOADED"}
    assert len(await store.list(Operation)) == 20 - len(refused) >= 5
    await store.close()


async def test_everything_is_there_after_a_restart(database: str) -> None:
    store = await PostgresStore.open(database)
    world = await World(store).setup()
    await world.in_state(ActorState.SUSPENDING)
    before = await dump(store)
    await store.close()
    store = await PostgresStore.open(database)
    assert await dump(store) == before
    await store.close()


async def test_trim_by_everybody_at_once(stores: list[PostgresStore]) -> None:
    world = await World(stores[0]).setup()
    for i in range(60):
        await world.store.apply(
            c.CreateActor(key=Key("ns", f"a{i}"), now=1.0, operation_id=f"op-{i:02}", uid=f"u{i}", template="t")
        )
    dropped = await asyncio.gather(*(store.trim(10) for store in stores))
    assert sum(dropped) == 50 and len(await stores[0].list(Operation)) == 10
