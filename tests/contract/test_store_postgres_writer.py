"""Changes that come at the same time share a transaction, and one that can't be written harms no other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import pytest

from greenroom.core import commands as c
from greenroom.core.errors import ResourceExhausted, Unavailable
from greenroom.core.records import Actor, ActorState, Key, Operation
from greenroom.store import postgres_writer
from greenroom.store.postgres import PostgresStore
from greenroom.testing.contracts.store_world import World, audit

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def store(database: str) -> AsyncIterator[PostgresStore]:
    store = await PostgresStore.open(database)
    yield store
    await store.close()


async def actors(store: PostgresStore, count: int) -> tuple[World, list[Key]]:
    world = await World(store).setup({"w1": 50})
    return world, [await world.create(f"a{i}") for i in range(count)]


async def ask(database: str, sql: str) -> list[tuple[object, ...]]:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        return await (await connection.execute(sql.encode())).fetchall()


async def test_they_share_transactions(store: PostgresStore, database: str) -> None:
    world, keys = await actors(store, 30)
    [(before,)] = await ask(database, "SELECT max(id) FROM outbox")
    changes = await asyncio.gather(*(store.apply(world.begin_command(c.BeginResume, key)) for key in keys))
    assert {change.outcome for change in changes} == {c.Outcome.CHANGED}
    [(events, transactions)] = await ask(
        database, f"SELECT count(*), count(DISTINCT xact) FROM outbox WHERE id > {before}"
    )
    assert events == 60 and isinstance(transactions, int) and transactions < 15
    await audit(store)


async def test_events_of_one_record_are_in_order(store: PostgresStore, database: str) -> None:
    """Here and elsewhere, though many are written together."""
    other = await PostgresStore.open(database)
    world, keys = await actors(store, 10)
    seen: dict[bool, dict[str, list[int]]] = {}

    async def follow(who: PostgresStore) -> None:
        versions = seen.setdefault(who is store, {})
        async for event in who.watch():
            if isinstance(event.record, Actor):
                versions.setdefault(event.record.pk, []).append(event.record.version)

    following = [asyncio.create_task(follow(who)) for who in (store, other)]
    await asyncio.sleep(0)

    async def live(key: Key) -> None:
        for begin in (c.BeginResume, c.BeginSuspend) * 3:
            operation = (await store.apply(world.begin_command(begin, key))).operation
            assert operation is not None
            await store.apply(world.finish_command(operation))

    await asyncio.gather(*map(live, keys))
    last = {str(key): (await store.get(Actor, str(key))).version for key in keys}
    async with asyncio.timeout(60):
        while {pk: versions[-1] for pk, versions in seen[False].items()} != last:
            await asyncio.sleep(0.01)
    for versions in (*seen[True].values(), *seen[False].values()):
        assert versions == sorted(set(versions))
    assert {pk: versions[-1] for pk, versions in seen[True].items()} == last
    for task in following:
        task.cancel()
    await other.close()


async def test_one_that_is_stale_costs_the_others_nothing(store: PostgresStore, database: str) -> None:
    """What this process knows of one of the actors is old; nobody notices before the first write."""
    world, keys = await actors(store, 12)
    await ask(database, "UPDATE actors SET version = version WHERE pk IN ('ns/a3', 'ns/a7') RETURNING 1")
    changes = await asyncio.gather(*(store.apply(world.begin_command(c.BeginResume, key)) for key in keys))
    assert {change.outcome for change in changes} == {c.Outcome.CHANGED}
    await audit(store)


async def test_one_whose_row_is_locked_waits_alone(store: PostgresStore, database: str) -> None:
    world, keys = await actors(store, 12)
    async with await psycopg.AsyncConnection.connect(database) as locker:
        await locker.execute("SELECT FROM actors WHERE pk = 'ns/a3' FOR UPDATE")
        tasks = {key: asyncio.create_task(store.apply(world.begin_command(c.BeginResume, key))) for key in keys}
        waits = tasks.pop(Key("ns", "a3"))
        async with asyncio.timeout(60):
            changes = await asyncio.gather(*tasks.values())
        assert {change.outcome for change in changes} == {c.Outcome.CHANGED}
        assert not waits.done()
        await locker.rollback()
        assert (await waits).outcome is c.Outcome.CHANGED
    await audit(store)


async def test_who_is_cancelled_takes_nobody_along(store: PostgresStore) -> None:
    world, keys = await actors(store, 12)
    tasks = [asyncio.create_task(store.apply(world.begin_command(c.BeginResume, key))) for key in keys]
    await asyncio.sleep(0.001)
    for task in tasks[::3]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(d, c.Change) for n, d in enumerate(done) if n % 3)
    for key, result in zip(keys, done, strict=True):
        actor = await store.get(Actor, str(key))
        if isinstance(result, c.Change):
            assert actor.state is ActorState.RESUMING
    await audit(store)


async def test_too_many_changes_are_refused(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    world, keys = await actors(store, 30)
    monkeypatch.setattr(postgres_writer, "MAX_WAITING", 5)
    tries = (store.apply(world.begin_command(c.BeginResume, key)) for key in keys)
    results = await asyncio.gather(*tries, return_exceptions=True)
    refused = [r for r in results if isinstance(r, ResourceExhausted)]
    assert refused and {r.reason for r in refused} == {"STORE_OVERLOADED"}
    assert all(isinstance(r, c.Change | ResourceExhausted) for r in results)


async def test_closing_waits_for_what_nobody_waits_for(database: str) -> None:
    store = await PostgresStore.open(database)
    world, [key] = await actors(store, 1)
    command = world.begin_command(c.BeginResume, key)
    task = asyncio.create_task(store.apply(command))
    while not store._writer._sending:
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await store.close()
    with pytest.raises(Unavailable):
        await store.apply(command)
    again = await PostgresStore.open(database)
    assert (await again.get(Operation, command.operation_id)).id == command.operation_id
    await again.close()
