"""A PostgreSQL that is away, comes back, stands still, is full, or wants a password. Each test has its own server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenroom.core import commands as c
from greenroom.core.errors import FailedPrecondition, Internal, InvalidArgument, ResourceExhausted, Unavailable
from greenroom.core.records import Actor, ActorState, Key, Operation, Pool, PoolSpec, Template
from greenroom.store import postgres_pool
from greenroom.store.postgres import PostgresStore
from greenroom.testing.contracts.store import World, audit
from greenroom.testing.contracts.store_world import operation, template
from greenroom.testing.postgres import UNPRIVILEGED, USER, PostgresServer, find_programs

pytestmark = pytest.mark.skipif(
    find_programs() is None, reason="no PostgreSQL server; scripts/setup.sh --test gets one"
)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with PostgresServer(tcp=True) as server:
        yield server


async def usable(store: PostgresStore) -> None:
    """Returns when the store answers."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Unavailable):
                await store.list(Template)
                return
            await asyncio.sleep(0.02)


async def test_a_database_that_is_not_there_yet(server: PostgresServer) -> None:
    url = server.url(server.create_database())
    server.stop()
    store = await PostgresStore.open(url)
    watch = store.watch()
    started = time.monotonic()
    for call in (store.list(Template), store.put(template()), store.get(Actor, "ns/a")):
        with pytest.raises(Unavailable) as away:
            await call
        assert away.value.reason == "STORE_UNAVAILABLE" and away.value.retry_after_s > 0
        assert str(server.directory) in away.value.message
    assert time.monotonic() - started < postgres_pool.CALL_TIMEOUT_S, "they are told at once"
    assert abs(store.clock() - time.time()) < 5
    server.start()
    await usable(store)
    await World(store).setup()
    assert (await anext(watch)).record.pk == "w1"
    await store.close()


async def test_a_store_that_never_met_its_database_closes(server: PostgresServer) -> None:
    url = server.url("nothing-of-that-name")
    store = await PostgresStore.open(url)
    with pytest.raises(Unavailable, match="nothing-of-that-name"):
        await store.list(Template)
    await store.close()
    with pytest.raises(Unavailable) as closed:
        await store.list(Template)
    assert closed.value.reason == "STORE_CLOSED"


@pytest.mark.parametrize("how", ["stop", "kill", "cut"])
async def test_restarts_under_load(server: PostgresServer, how: str) -> None:
    """Calls are answered or refused as unavailable; what was answered is there; a command that is sent again is done
    once."""
    name = server.create_database()
    store = await PostgresStore.open(server.url(name))
    world = await World(store).setup({"w1": 50})
    stop = asyncio.get_running_loop().time() + 4
    met: Counter[str] = Counter()
    created: list[str] = []

    async def surely(command: c.ActorCommand) -> c.Change:
        while True:
            try:
                change = await store.apply(command)
                met[change.outcome] += 1
                return change
            except Unavailable as error:
                met[error.reason] += 1
                await asyncio.sleep(0.01)

    async def life(n: int) -> None:
        i = 0
        while asyncio.get_running_loop().time() < stop:
            i += 1
            key = Key("ns", f"a{n}-{i}")
            create = c.CreateActor(key=key, now=1.0, operation_id=f"o{n}-{i}", uid=f"u{n}-{i}", template="t")
            await surely(create)
            for step in (c.BeginResume, c.BeginSuspend):
                op = (await surely(world.begin_command(step, key))).operation
                assert op is not None
                await surely(world.finish_command(op))
            created.append(key.name)

    async def outages() -> None:
        for _ in range(3):
            await asyncio.sleep(0.6)
            if how == "cut":
                sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'greenroom%'"
                await asyncio.to_thread(server.execute, sql)
            else:
                await asyncio.to_thread(server.stop if how == "stop" else server.kill)
                server.start()  # in this thread, because the server ends with the one that starts it

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for n in range(12):
            group.create_task(life(n))
        group.create_task(outages())

    assert met["STORE_UNAVAILABLE"] > 0 and met["changed"] > 100, met
    await audit(store)
    assert len(created) > 10
    for name in created:
        actor = await store.get(Actor, f"ns/{name}")
        assert (actor.state, actor.generation, actor.wakes) == (ActorState.SUSPENDED, 2, 1), "done once, and not lost"
    await store.close()


async def test_a_server_that_stands_still(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await PostgresStore.open(server.url(server.create_database()))
    await store.put(template())
    server.pause()
    with monkeypatch.context() as hasty:
        hasty.setattr(postgres_pool, "CALL_TIMEOUT_S", 0.5)
        async with asyncio.timeout(60):
            with pytest.raises(Unavailable):
                await store.get(Template, "ns/t")
    server.resume()
    await usable(store)
    assert (await store.get(Template, "ns/t")).version == 1
    await store.close()


async def test_a_failover_of_addresses(server: PostgresServer) -> None:
    """Of several hosts the one that answers is taken."""
    name = server.create_database()
    url = f"postgresql://{USER}@127.0.0.1:1,127.0.0.1:{server.port}/{name}"
    store = await PostgresStore.open(url)
    await store.put(template())
    await store.close()


async def test_the_password_is_never_said(
    server: PostgresServer, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    name, secret = server.create_database(), "s3cr3t-p4ssw0rd"
    server.execute(f"ALTER USER {USER} PASSWORD '{secret}'")
    hba = server.directory / "data" / "pg_hba.conf"
    hba.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    server.execute("SELECT pg_reload_conf()")
    right = f"postgresql://{USER}:{secret}@127.0.0.1:{server.port}/{name}"
    store = await PostgresStore.open(right)
    await store.put(template())
    said = [repr(store)]
    server.stop()
    for call in (store.list(Template), store.put(template("x"))):
        with pytest.raises(Unavailable) as away:
            await call
        said.append(f"{away.value!r} {away.value.message} {away.value.metadata} {away.value.__cause__!r}")
    await store.close()
    server.start()
    wrong = await PostgresStore.open(right.replace(secret, "another-" + secret))
    with pytest.raises(Unavailable, match="password authentication failed") as refused:
        await wrong.list(Template)
    said.append(f"{refused.value!r} {refused.value.__cause__!r}")
    await wrong.close()
    for url in (f"postgres//{USER}:{secret}@host/db", f"postgresql://{USER}:{secret}@host/db?nonsense={secret}", ""):
        with pytest.raises(InvalidArgument) as invalid:
            await PostgresStore.open(url)
        said.append(f"{invalid.value!r} {invalid.value.__cause__!r} {invalid.value.__context__!r}")
    output = capsys.readouterr()
    assert secret not in " ".join([*said, caplog.text, output.out, output.err])
    assert f"{name} at 127.0.0.1:{server.port}" in " ".join(said)


@pytest.fixture
def small_disk(server: PostgresServer) -> Iterator[Path]:
    """A file system of 24 MiB with a tablespace, in which there is a database; both are called "small"."""
    where = server.directory / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "greenroom-test", where], check=True)
    os.chown(where, UNPRIVILEGED, UNPRIVILEGED)
    server.execute(f"CREATE TABLESPACE small LOCATION '{where}'")
    server.execute("CREATE DATABASE small TABLESPACE small")
    yield where
    server.stop()
    subprocess.run(["umount", where], check=True)


@pytest.mark.root
async def test_a_full_disk(server: PostgresServer, small_disk: Path) -> None:
    store = await PostgresStore.open(server.url("small"))
    await World(store).setup()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 65536)
    written = []
    with pytest.raises(ResourceExhausted) as full:
        for i in range(5000):
            written.append(await store.put(operation(f"o{i:04}")))
    assert full.value.reason == "DISK_FULL" and "small at" in full.value.message
    assert await store.get(Template, "ns/t"), "what is there can be read"
    assert await store.list(Operation, limit=1000) == written[:1000]
    filler.unlink()
    await store.put(operation("p"))
    assert [o.id for o in await store.list(Operation, after="o9999")] == ["p"]
    await store.close()


async def test_errors_are_of_greenroom(server: PostgresServer) -> None:
    """Whatever an administrator does to the schema."""
    name = server.create_database()
    store = await PostgresStore.open(server.url(name))
    await store.put(template())
    server.execute("DROP TABLE templates", name)
    with pytest.raises(Internal, match="templates"):
        await store.get(Template, "ns/t")
    server.execute("ALTER TABLE pools ADD CHECK (pk <> 'p')", name)
    with pytest.raises(Internal, match="check constraint"):
        await store.put(Pool(name="p", uid="u", spec=PoolSpec(), created_at=1.0))
    await store.close()


async def test_a_user_who_may_not_write(server: PostgresServer) -> None:
    name = server.create_database()
    await (await PostgresStore.open(server.url(name))).close()
    server.execute("CREATE USER reader")
    server.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader", name)
    store = await PostgresStore.open(server.url(name, user="reader"))
    with pytest.raises(FailedPrecondition) as refused:
        await store.put(template())
    assert refused.value.reason == "STORE_NOT_WRITABLE"
    await store.close()
