"""Connections to a PostgreSQL: never more than allowed, none lost, and handed on in turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from greenroom.core.errors import ResourceExhausted, Unavailable
from greenroom.store import postgres_pool
from greenroom.store.postgres_pool import Connection, Database
from greenroom.testing.postgres import PostgresServer

NAME = "pool test"
OPEN = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'greenroom {NAME}'"


@pytest.fixture
def pool(database: str) -> Iterator[Database]:
    pool = Database(database, NAME, max_connections=3)
    yield pool
    pool.close()


async def one(connection: Connection) -> object:
    row = await (await connection.execute("SELECT 1")).fetchone()
    return row and row[0]


async def test_never_more_than_allowed_and_none_is_lost(pool: Database, postgres: PostgresServer) -> None:
    """Callers that go away, statements that fail and connections that die, all at once."""
    r = random.Random(3)
    most = 0

    async def call(n: int) -> None:
        async def work(connection: Connection) -> None:
            nonlocal most
            most = max(most, pool._made)
            match n % 5:
                case 0:
                    await connection.execute("SELECT nonsense")
                case 1:
                    await connection.execute("BEGIN")  # and does not end it
                case 2:
                    await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
                case _:
                    await connection.execute("SELECT pg_sleep(0.002)")

        await pool.run(work)

    tasks = [asyncio.ensure_future(call(n)) for n in range(300)]
    while not all(task.done() for task in tasks):
        r.choice(tasks).cancel()
        await asyncio.sleep(0.005)
    assert 1 <= most <= 3
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(60):
        assert await asyncio.gather(*(pool.run(one) for _ in range(50))) == [1] * 50
    assert pool._made <= 3 and not pool._waiting
    async with asyncio.timeout(60):  # the server takes a moment to see that one has ended
        while int(str((await asyncio.to_thread(postgres.execute, OPEN))[0][0])) > 3:
            await asyncio.sleep(0.02)


async def test_what_is_given_up_while_it_is_made_is_closed(pool: Database, postgres: PostgresServer) -> None:
    """Also while somebody keeps the error: a task that is not looked at does, or a report of it."""
    tasks = [asyncio.ensure_future(pool.run(one)) for _ in range(60)]
    for task in tasks:
        await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
    async with asyncio.timeout(60):
        while int(str((await asyncio.to_thread(postgres.execute, OPEN))[0][0])) > pool._made:
            await asyncio.sleep(0.02)


async def test_who_waits_too_long_is_told(pool: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_pool, "CONNECTION_WAIT_S", 0.05)
    free = asyncio.Event()

    async def hold(connection: Connection) -> None:
        await free.wait()

    holders = [asyncio.ensure_future(pool.run(hold)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as overloaded:
        await pool.run(one)
    assert overloaded.value.reason == "STORE_OVERLOADED"
    free.set()
    await asyncio.gather(*holders)
    assert await pool.run(one) == 1


async def test_they_wait_in_turn(pool: Database) -> None:
    order: list[int] = []

    async def call(n: int) -> None:
        async def work(connection: Connection) -> None:
            order.append(n)
            await connection.execute("SELECT 1")

        await pool.run(work)

    await asyncio.gather(*(pool.run(one) for _ in range(3)))  # the connections are made
    await asyncio.gather(*(call(n) for n in range(30)))
    assert order[3:] == sorted(order[3:])


async def test_connections_that_nobody_needs_are_closed(
    pool: Database, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*(pool.run(one) for _ in range(3)))
    pool.close_idle()
    assert pool._made == 3
    monkeypatch.setattr(postgres_pool, "MAX_IDLE_S", 0.0)
    pool.close_idle()
    assert pool._made == 0
    async with asyncio.timeout(60):
        while (await asyncio.to_thread(postgres.execute, OPEN))[0][0] != 0:
            await asyncio.sleep(0.02)
    assert await pool.run(one) == 1


async def test_all_who_wait_hear_why_there_is_no_connection() -> None:
    pool = Database("postgresql://nobody@127.0.0.1:1/nothing", NAME, max_connections=2)
    async with asyncio.timeout(60):
        results = await asyncio.gather(*(pool.run(one) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(r, Unavailable) and "127.0.0.1:1" in r.message for r in results), results
    assert pool._made == 0
