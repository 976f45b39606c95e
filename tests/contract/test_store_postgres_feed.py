"""What processes that share a PostgreSQL tell each other, and how its schema moves on under them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace

from greenroom.core.commands import BeginDelete, BeginResume, BeginSuspend
from greenroom.core.errors import FailedPrecondition, GreenroomError, ResourceExhausted
from greenroom.core.records import Actor, ActorState, Pool, PoolSpec, Replica, Template
from greenroom.store import postgres_feed, postgres_schema
from greenroom.store.port import Event, EventType
from greenroom.store.postgres import PostgresStore
from greenroom.store.postgres_rows import TABLES
from greenroom.testing.contracts.store import World, audit, dump
from greenroom.testing.contracts.store_world import template
from greenroom.testing.postgres import PostgresServer

Stores = Callable[..., Any]


@pytest.fixture
async def open_store(database: str) -> AsyncIterator[Stores]:
    opened: list[PostgresStore] = []

    async def make(**options: Any) -> PostgresStore:
        opened.append(await PostgresStore.open(database, **options))
        return opened[-1]

    yield make
    for store in opened:
        await store.close()


class Seen:
    """What a watcher is told, until `last` is."""

    def __init__(self, store: PostgresStore) -> None:
        self.events: list[Event] = []
        self._watch = store.watch()
        self._store = store

    async def until(self, wanted: Callable[[Event], bool]) -> list[Event]:
        async with asyncio.timeout(60):
            while not self.events or not wanted(self.events[-1]):
                self.events.append(await anext(self._watch))
        return self.events


async def test_each_is_told_what_the_others_write(open_store: Stores) -> None:
    one, two = await open_store(), await open_store()
    world = await World(one).setup()
    seen, own = Seen(two), Seen(one)
    key = await world.create()
    await world.do(BeginResume, key)
    await world.do(BeginSuspend, key)
    await world.do(BeginDelete, key)
    await one.remove(await one.get(Template, "ns/t"))
    last: Callable[[Event], bool] = lambda e: e.type is EventType.DELETED and isinstance(e.record, Template)  # noqa: E731
    told = [(e.type, e.record) for e in await seen.until(last)]
    expected = [(e.type, e.record) for e in await own.until(last)]
    assert told[-len(expected) :] == expected, "in the same order, whole"
    assert len(expected) > 10 and all(e.foreign for e in seen.events) and not any(e.foreign for e in own.events)


async def test_nothing_is_lost_and_no_record_goes_back(open_store: Stores, database: str) -> None:
    """Everybody writes the same records at once, while another transaction stays open for ever."""
    stores = [await open_store() for _ in range(3)]
    await World(stores[0]).setup()
    watchers = [Seen(s) for s in stores]
    pools = [await stores[0].put(Pool(name=f"p{i}", uid="u", spec=PoolSpec(), created_at=1.0)) for i in range(4)]

    async def change(store: PostgresStore, seed: int) -> None:
        r = random.Random(seed)
        for n in range(150):
            with contextlib.suppress(GreenroomError):
                name = r.choice(pools).name
                pool = await store.get(Pool, name)
                if r.random() < 0.1:
                    await store.remove(pool)
                    await store.put(Pool(name=name, uid=f"{seed}-{n}", spec=PoolSpec(), created_at=1.0))
                else:
                    await store.put(replace(pool, spec=PoolSpec(slots=1 + n)))

    async with await psycopg.AsyncConnection.connect(database) as other:
        await other.execute("CREATE TABLE something_else (a int)")  # it has a transaction number, and does not end
        async with asyncio.TaskGroup() as group:
            for seed in range(9):
                group.create_task(change(stores[seed % 3], seed))
        # What the others wrote before their end has been told when that is; one's own end is told at once.
        for i, store in enumerate(stores):
            await store.put(Pool(name=f"end{i}", uid="u", spec=PoolSpec(), created_at=1.0))
        for seen in watchers:
            for i in range(3):
                await seen.until(lambda e, i=i: any(e.record.pk == f"end{i}" for e in seen.events))  # noqa: B023
    history: dict[str, list[tuple[str, Any]]] = {}
    async with await psycopg.AsyncConnection.connect(database) as other:
        rows = await other.execute("SELECT pk, type, data FROM outbox WHERE kind = 'Pool' ORDER BY id")
        for pk, kind, data in await rows.fetchall():
            history.setdefault(pk, []).append((kind, TABLES[Pool].record(data)))
    assert sum(map(len, history.values())) > 300
    for seen in watchers:
        told: dict[str, list[tuple[str, Any]]] = {}
        for event in seen.events:
            told.setdefault(event.record.pk, []).append((event.type, event.record))
        for pool in pools:
            happened = iter(history[pool.pk])
            assert all(event in happened for event in told[pool.pk]), "in the order in which it happened"
            assert told[pool.pk][-1] == history[pool.pk][-1], "up to the end"


async def test_a_write_whose_reply_was_lost_is_told_all_the_same(open_store: Stores) -> None:
    """The caller is gone (here: cancelled) between the commit and the reply."""
    store = await open_store()
    world = await World(store).setup()
    seen = Seen(store)
    key = await world.create()
    committed = 0
    for i in range(30):
        task = asyncio.ensure_future(store.put(Replica(name=f"r{i:02}", incarnation="i")))
        await asyncio.sleep(random.Random(i).random() * 0.004)
        task.cancel()
        await asyncio.wait([task])
    committed = len(await store.list(Replica))
    await store.apply(world.begin_command(BeginDelete, key))
    deleting = lambda e: isinstance(e.record, Actor) and e.record.state is ActorState.DELETING  # noqa: E731
    await seen.until(deleting)
    async with asyncio.timeout(60):
        while len(told := {e.record.pk for e in seen.events if isinstance(e.record, Replica)}) < committed:
            seen.events.append(await anext(seen._watch))
    assert told == {r.name for r in await store.list(Replica)}
    assert committed > 0, "some were carried out"


async def test_who_was_away_too_long_is_told_to_list_again(
    open_store: Stores, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_store()
    await store.put(template())
    watch = store.watch()
    backends = postgres.execute("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'greenroom%'")
    assert backends
    with monkeypatch.context() as impatient:
        impatient.setattr(postgres_feed, "AWAY_LIMIT_S", 0.5)
        frozen = asyncio.ensure_future(asyncio.to_thread(postgres.freeze, 1.0))
        with pytest.raises(ResourceExhausted) as slow:
            async with asyncio.timeout(60):
                await anext(watch)
        await frozen
    assert slow.value.reason == "WATCH_TOO_SLOW"
    again = store.watch()
    await store.put(template("later"))
    assert (await anext(again)).record.pk == "ns/later"


async def test_old_rows_of_the_outbox_go(open_store: Stores, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_feed, "KEPT_S", 0)
    monkeypatch.setattr(postgres_feed, "TRIM_INTERVAL_S", 0)
    store = await open_store()
    await World(store).setup()
    async with asyncio.timeout(60), await psycopg.AsyncConnection.connect(database, autocommit=True) as other:
        while (await (await other.execute("SELECT count(*) FROM outbox")).fetchone()) != (0,):
            await asyncio.sleep(0.02)


async def test_the_clock_is_the_databases(open_store: Stores, database: str) -> None:
    store = await open_store()
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as other:
        low = store.clock()
        row = await (await other.execute("SELECT extract(epoch FROM clock_timestamp())::float8")).fetchone()
        assert row is not None and low - 0.05 <= row[0] <= store.clock() + 0.05
    times = [store.clock() for _ in range(1000)]
    assert times == sorted(times)


# --- schema -----------------------------------------------------------------------------------------------

NEXT = postgres_schema.parse(
    f"-- compatible_from: {len(postgres_schema.migrations())}\n"
    "ALTER TABLE actors ADD COLUMN colour text NOT NULL DEFAULT 'green';\n"
    "ALTER TABLE operations ADD COLUMN colour text;\n"
    "CREATE TABLE colours (name text PRIMARY KEY);\n"
)
BREAKING = postgres_schema.parse("-- compatible_from: 99\nALTER TABLE actors RENAME COLUMN uid TO identity;\n")


async def test_programs_of_two_versions_work_side_by_side(open_store: Stores) -> None:
    known = postgres_schema.migrations()
    old = await open_store()
    world = await World(old).setup()
    await world.in_state(ActorState.SUSPENDING, "before")
    new = await open_store(scripts=[*known, NEXT])
    another_old = await open_store()  # an old one that starts on the new schema
    seen = Seen(another_old)
    for i, store in enumerate((old, new, another_old)):
        their = World(store)
        their.now += 100 * i
        key = await their.create(f"a{i}", operation_id=f"create-{i}", uid=f"uid-a{i}")
        for n, step in enumerate((BeginResume, BeginSuspend, BeginResume, BeginDelete)):
            extra = {"snapshot_id": f"snap-{i}-{n}"} if step is BeginSuspend else {}
            await their.do(step, key, operation_id=f"op-{i}-{n}", **extra)
        await audit(store)
    assert await dump(old) == await dump(new) == await dump(another_old)
    await seen.until(lambda e: e.type is EventType.DELETED and e.record.pk == "ns/a2")
    deleted = [e.record.pk for e in seen.events if e.type is EventType.DELETED and isinstance(e.record, Actor)]
    assert deleted == ["ns/a0", "ns/a1", "ns/a2"]


async def test_a_newer_schema_is_refused_by_programs_that_it_is_not_for(open_store: Stores, database: str) -> None:
    known = postgres_schema.migrations()
    running = await open_store()
    await World(running).setup()
    await open_store(scripts=[*known, BREAKING])
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as newer:
            await PostgresStore.open(database)
        assert newer.value.reason == "SCHEMA_TOO_NEW"
        assert f"schema {len(known) + 1}" in newer.value.message and f"up to {len(known)}" in newer.value.message
    async with asyncio.timeout(60):  # one that runs finds out
        while True:
            try:
                await running.get(Template, "ns/t")
            except FailedPrecondition as error:
                assert error.reason == "SCHEMA_TOO_NEW"
                break
            await asyncio.sleep(0.02)


async def test_many_that_start_at_once_migrate_once(database: str) -> None:
    stores = await asyncio.gather(*(PostgresStore.open(database) for _ in range(6)))
    await World(stores[0]).setup()
    for store in stores:
        assert await store.list(Template)
        await store.close()
    async with await psycopg.AsyncConnection.connect(database) as other:
        assert await (await other.execute("SELECT version FROM schema")).fetchall() == [
            (len(postgres_schema.migrations()),)
        ]


async def test_a_migration_that_fails_changes_nothing(open_store: Stores, database: str) -> None:
    known = postgres_schema.migrations()
    await open_store()
    fails = postgres_schema.parse(NEXT.sql + "CREATE TABLE actors (a int);\n")
    with pytest.raises(GreenroomError):
        await PostgresStore.open(database, scripts=[*known, fails])
    async with await psycopg.AsyncConnection.connect(database) as other:
        assert await (await other.execute("SELECT version FROM schema")).fetchall() == [(len(known),)]
        assert await (await other.execute("SELECT to_regclass('colours')")).fetchall() == [(None,)]
    await open_store()
