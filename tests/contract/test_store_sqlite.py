"""The SQLite store keeps the contract of every store, and what only a file can do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from greenroom.core.commands import BeginDelete, BeginResume, BeginSuspend, CreateActor
from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import Actor, ActorState, Key, Operation, Snapshot, SnapshotState, Template, Worker
from greenroom.store import sqlite_file, sqlite_writer
from greenroom.store.port import FILTERS
from greenroom.store.sqlite import SqliteStore
from greenroom.store.sqlite_rows import TABLES
from greenroom.testing.contracts.store import StoreContract, World, audit, dump
from greenroom.testing.contracts.store_world import operation, snapshot, template


class TestSqliteStore(StoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[SqliteStore]:
        store = await SqliteStore.open(tmp_path)
        yield store
        await store.close()


def database(directory: Path) -> Path:
    return directory / sqlite_file.DATABASE_FILE


# --- durability -------------------------------------------------------------------------------------------

_COMMITS = """
import asyncio, pathlib, sys
from greenroom.store.sqlite import SqliteStore
from greenroom.testing.contracts.store import World
from greenroom.core.commands import (CreateActor)
from greenroom.core.records import Key

async def main():
    store = await SqliteStore.open(pathlib.Path(sys.argv[1]))
    await World(store).setup()
    async def create(first):
        for i in range(first, 10**6, 8):
            key = Key("ns", f"a{i:06}")
            await store.apply(CreateActor(key=key, now=1.0, operation_id=f"o{i:06}", uid=f"u{i}", template="t"))
            sys.stdout.write(key.name + "\\n")
            sys.stdout.flush()
    await asyncio.gather(*(create(first) for first in range(8)))

asyncio.run(main())
"""


@contextlib.contextmanager
def server(code: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that runs ``code``; killed at the end."""
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    for directory in (tmp_path / "1", tmp_path / "2"):
        with server(_COMMITS, directory) as process:
            assert process.stdout is not None
            said = [process.stdout.readline().strip() for _ in range(300)]
            os.kill(process.pid, signal.SIGKILL)
            said += process.stdout.read().split("\n")[:-1]  # a line cut short was not read by anybody
            assert process.wait() == -signal.SIGKILL
        store = await SqliteStore.open(directory)  # the hold of the dead process is no hindrance
        for name in said:
            assert (await store.get(Actor, f"ns/{name}")).state is ActorState.SUSPENDED
            assert (await store.get(Operation, f"o{name[1:]}")).name == name
        await audit(store)
        await World(store).do(BeginDelete, Key("ns", said[0]), operation_id="delete")  # and goes on
        await store.close()


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    world = await World(store).setup()
    await world.in_state(ActorState.SUSPENDING)
    before = await dump(store)
    await store.close()
    store = await SqliteStore.open(tmp_path)
    assert await dump(store) == before
    await store.close()


async def test_rows_can_be_read_with_the_shell(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    await World(store).setup()
    await store.close()
    assert database(tmp_path).stat().st_mode & 0o077 == 0
    shell = apsw.Connection(str(database(tmp_path)))
    [(state, data)] = shell.execute("SELECT state, data FROM templates WHERE pk = 'ns/t'")
    assert state == "Ready" and json.loads(data)["spec"]["image"] == "oci:/images/t"
    shell.close()


async def test_every_filter_uses_its_index_and_needs_no_sort(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    await store.close()
    shell = apsw.Connection(str(database(tmp_path)))
    for cls, fields in FILTERS.items():
        for field in fields:
            sql, values = TABLES[cls].page("", {field: "x"}, "a", 10)
            plan = " ".join(row[3] for row in shell.execute("EXPLAIN QUERY PLAN " + sql, values))
            assert f"USING INDEX {cls.__name__.lower()}s_{field} ({field}=? AND pk>?)" in plan, (sql, plan)
            assert "TEMP B-TREE" not in plan
    shell.close()


# --- group commit -----------------------------------------------------------------------------------------


async def test_commands_that_wait_share_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    together = sqlite_writer.Writer._together

    def count(self: sqlite_writer.Writer, jobs: list[sqlite_writer.Job]) -> object:
        batches.append(len(jobs))
        return together(self, jobs)

    monkeypatch.setattr(sqlite_writer.Writer, "_together", count)
    store = await SqliteStore.open(tmp_path)
    await asyncio.gather(*(store.put(operation(f"o{i:03}")) for i in range(1000)))
    assert sum(batches) == 1000 and max(batches) <= sqlite_writer.MAX_BATCH and len(batches) < 100
    await store.close()


async def test_one_that_goes_wrong_in_the_middle_of_its_writes_fails_alone(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    world = await World(store).setup()
    keys = [await world.create(f"a{i}") for i in range(3)]
    for key in keys:
        await world.do(BeginResume, key)
    ops = [await world.begin(BeginSuspend, key) for key in keys]
    # A hand-made change while the store runs: snapshot, slot and actor are written, then the operation fails.
    shell = apsw.Connection(str(database(tmp_path)))
    shell.set_busy_timeout(5000)
    fails = "BEGIN SELECT raise(ABORT, 'not this one'); END"
    shell.execute(f"CREATE TRIGGER no BEFORE UPDATE ON operations WHEN new.pk = '{ops[1].id}' {fails}")
    results = await asyncio.gather(*(store.apply(world.finish_command(op)) for op in ops), return_exceptions=True)
    assert isinstance(results[1], Internal) and "not this one" in results[1].message
    assert [(await world.actor(key)).state for key in keys] == ["Suspended", "Suspending", "Suspended"]
    await audit(store)
    shell.execute("DROP TRIGGER no")
    shell.close()
    await world.finish(ops[1])
    assert [w.used for w in await store.list(Worker)] == [0, 0]
    await store.close()


async def test_too_many_that_wait_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.store.sqlite.MAX_WAITING", 5)
    store = await SqliteStore.open(tmp_path)
    results = await asyncio.gather(*(store.put(operation(f"o{i}")) for i in range(9)), return_exceptions=True)
    refused = [r for r in results if isinstance(r, ResourceExhausted)]
    assert len(refused) == 4 and {r.reason for r in refused} == {"STORE_OVERLOADED"}
    assert len(await store.list(Operation)) == 5
    await store.close()


async def test_close_answers_what_was_submitted(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    puts = [asyncio.ensure_future(store.put(operation(f"o{i}"))) for i in range(50)]
    await asyncio.sleep(0)
    await store.close()
    assert [(await p).version for p in puts] == [1] * 50


async def test_another_program_that_holds_the_lock_is_waited_for_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 50)
    store = await SqliteStore.open(tmp_path)
    shell = apsw.Connection(str(database(tmp_path)))
    shell.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as locked:
        await store.put(operation("o1"))
    assert locked.value.reason == "DATABASE_LOCKED"
    shell.execute("ROLLBACK")
    shell.close()
    assert (await store.put(operation("o1"))).version == 1
    await store.close()


# --- opening ----------------------------------------------------------------------------------------------


async def test_a_second_server_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from greenroom.store.sqlite import SqliteStore\n"
        "async def main():\n"
        "    store = await SqliteStore.open(pathlib.Path(sys.argv[1]))\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
    )
    with server(code, tmp_path) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "open\n"
        with pytest.raises(FailedPrecondition) as used:
            await SqliteStore.open(tmp_path)
        assert used.value.reason == "DATA_DIR_IN_USE" and used.value.metadata["pid"] == str(process.pid)
        assert str(tmp_path) in used.value.message and f"process {process.pid} (-c" in used.value.message
        process.stdin.close()
        assert process.wait() == 0
    store = await SqliteStore.open(tmp_path)
    with pytest.raises(FailedPrecondition):  # nor twice by one process
        await SqliteStore.open(tmp_path)
    await store.close()


async def test_a_file_that_a_dead_process_left_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "held-by").write_text('{"pid": 1, "command": "init", "since": "2020-01-01T00:00:00"}')
    await (await SqliteStore.open(tmp_path)).close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    await (await SqliteStore.open(tmp_path)).close()
    shell = apsw.Connection(str(database(tmp_path)))
    known = shell.pragma("user_version")
    shell.execute(f"PRAGMA user_version = {known + 3}")
    shell.close()
    before = database(tmp_path).read_bytes()
    for _ in range(2):  # the first refusal lets go of the directory
        with pytest.raises(FailedPrecondition) as newer:
            await SqliteStore.open(tmp_path)
        assert newer.value.reason == "SCHEMA_TOO_NEW"
        assert f"schema {known + 3}" in newer.value.message and f"up to {known}" in newer.value.message
    assert database(tmp_path).read_bytes() == before


def test_migrations_are_one_transaction(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    connection = apsw.Connection(str(path))
    first = sqlite_file.migrations()
    sqlite_file.migrate(connection, path, first)
    good = "ALTER TABLE pools ADD COLUMN colour TEXT;"
    with pytest.raises(apsw.SQLError):
        sqlite_file.migrate(connection, path, [*first, good, "CREATE TABLE pools (a);"])
    assert connection.pragma("user_version") == len(first)
    assert "colour" not in [c[1] for c in connection.execute("PRAGMA table_info(pools)")]
    sqlite_file.migrate(connection, path, [*first, good])
    assert connection.pragma("user_version") == len(first) + 1
    assert "colour" in [c[1] for c in connection.execute("PRAGMA table_info(pools)")]
    connection.close()


@pytest.mark.parametrize("damage", ["not a database", "cut", "page"])
async def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    store = await SqliteStore.open(tmp_path)
    await asyncio.gather(*(store.put(operation(f"o{i:04}")) for i in range(500)))
    await store.close()
    path = database(tmp_path)
    if damage == "not a database":
        path.write_bytes(b"# my notes\n" * 1000)
    elif damage == "cut":
        os.truncate(path, 4096 + 100)
    else:
        content = bytearray(path.read_bytes())
        content[4096:] = os.urandom(len(content) - 4096)
        path.write_bytes(content)
    with pytest.raises(DataLoss) as loss:
        store = await SqliteStore.open(tmp_path)
        try:
            await store.list(Operation)
        finally:
            await store.close()
    assert str(path) in loss.value.message and loss.value.reason == "DATABASE_CORRUPT"


async def test_a_row_that_is_no_record_is_named(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    await store.put(template())
    shell = apsw.Connection(str(database(tmp_path)))
    shell.execute("UPDATE templates SET data = '{\"name\": 7}'")
    shell.close()
    with pytest.raises(DataLoss, match="templates is not a Template"):
        await store.get(Template, "ns/t")
    with pytest.raises(DataLoss, match="templates is not a Template"):
        await store.list(Template)
    await store.close()


async def test_a_directory_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GreenroomError, match=str(tmp_path / "file")):
        await SqliteStore.open(tmp_path / "file")


async def test_what_nobody_thought_of_ends_its_batch_and_not_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await SqliteStore.open(tmp_path)
    world = await World(store).setup()

    def breaks(*_: object) -> None:
        raise RuntimeError("nobody thought of that")

    with monkeypatch.context() as broken:
        broken.setattr(sqlite_writer.Writer, "_together", breaks)
        broken.setattr(sqlite_writer.Writer, "_alone", breaks)
        async with asyncio.timeout(60):
            with pytest.raises(Internal, match="nobody thought of that"):
                await world.create("a")
    await world.create("b")
    await store.close()


async def test_a_disk_on_which_no_room_can_be_set_aside_is_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was mounted again for reading only when it was full."""
    store = await SqliteStore.open(tmp_path)
    world = await World(store).setup()
    (tmp_path / sqlite_file.RESERVE_FILE).unlink()
    writer: Any = store._writer
    writer._full = True
    real = os.open

    def refuses(path: Any, *more: Any, **others: Any) -> int:
        if str(path).endswith(sqlite_file.RESERVE_FILE):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, *more, **others)

    with monkeypatch.context() as refused:
        refused.setattr(os, "open", refuses)
        async with asyncio.timeout(60):
            with pytest.raises(ResourceExhausted):
                await world.create("a")
    await world.create("b")
    await store.close()


# --- full disk --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "greenroom-test", where], check=True)
    yield where
    subprocess.run(["umount", "--lazy", where], check=True)  # a test that failed may hold a file open


@pytest.mark.root
async def test_a_full_disk(small_disk: Path) -> None:
    store = await SqliteStore.open(small_disk)
    world = await World(store).setup()
    reserve = small_disk / sqlite_file.RESERVE_FILE
    assert reserve.stat().st_blocks * 512 >= sqlite_file.RESERVE_BYTES
    key, _ = await world.in_state(ActorState.RUNNING)
    await world.do(BeginSuspend, key)
    await world.do(BeginResume, key)
    filler = small_disk / "filler"
    _fill(filler)

    created = 0
    with pytest.raises(ResourceExhausted) as full:
        while True:
            commands = [_create(created + i) for i in range(50)]
            results = await asyncio.gather(*map(store.apply, commands), return_exceptions=True)
            created += sum(not isinstance(r, BaseException) for r in results)
            for r in results:
                if isinstance(r, BaseException):
                    raise r
    assert full.value.reason == "DISK_FULL" and str(small_disk) in full.value.message
    assert not reserve.exists()
    left = os.statvfs(small_disk)
    _fill(small_disk / "filler2", keep_bytes=left.f_bfree * left.f_frsize * 3 // 4)

    await audit(store)
    assert len(await _all(store)) == created + 1, "what was refused is not there, what was answered is"
    with pytest.raises(ResourceExhausted):
        await world.create("one-more")
    with pytest.raises(ResourceExhausted):
        await store.put(snapshot("new"))
    # What is under way ends, what is to go goes, leases are held.
    suspended = await store.list(Actor, where={"state": ActorState.SUSPENDED}, limit=300)
    for actor in suspended:
        begun = await store.apply(world.begin_command(BeginDelete, actor.key))
        assert begun.operation is not None
        await store.apply(world.finish_command(begun.operation))
    golden = await store.get(Snapshot, "golden")
    await store.put(replace(golden, state=SnapshotState.CONDEMNED))
    await store.remove(await store.get(Snapshot, "golden"))
    await world.do(BeginDelete, key)
    with pytest.raises(ResourceExhausted):
        await world.create("one-more")

    filler.unlink()
    (small_disk / "filler2").unlink()
    await world.create("one-more")
    assert reserve.exists(), "the reserve is made again"
    await store.close()
    store = await SqliteStore.open(small_disk)
    await audit(store)
    assert (await store.get(Actor, "ns/one-more")).state is ActorState.SUSPENDED
    await store.close()


@pytest.mark.root
async def test_opening_on_a_full_disk(small_disk: Path) -> None:
    store = await SqliteStore.open(small_disk)
    world = await World(store).setup()
    key = await world.create()
    await store.close()
    _fill(small_disk / "filler")
    store = await SqliteStore.open(small_disk)
    await World(store).do(BeginDelete, key, operation_id="delete")
    assert await store.list(Actor) == [] and (await store.get(Worker, "w1")).used == 0
    await store.close()


@pytest.mark.root
async def test_a_new_store_on_a_full_disk(small_disk: Path) -> None:
    _fill(small_disk / "filler")
    with pytest.raises(ResourceExhausted) as full:
        await SqliteStore.open(small_disk)
    assert full.value.reason == "DISK_FULL"


def _create(i: int) -> CreateActor:
    labels = {"text": "x" * 1000}
    key = Key("ns", f"b{i:06}")
    return CreateActor(key=key, now=1.0, operation_id=f"c{i:06}", uid=f"u{i}", template="t", labels=labels)


async def _all(store: SqliteStore) -> list[Actor]:
    found: list[Actor] = []
    while page := await store.list(Actor, after=found[-1].pk if found else ""):
        found += page
    return found


def _fill(path: Path, keep_bytes: int = 0) -> None:
    """Writes a file until the disk is full, then gives ``keep_bytes`` of it back."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    if keep_bytes:
        os.truncate(path, max(path.stat().st_size - keep_bytes, 0))
