"""The store of a cluster: PostgreSQL, which any number of control-plane processes share.

    apply   read what the command is decided from -> `decide` -> write it, if all of that is still so
            (one statement each; nothing is locked in between, and who was overtaken reads again)
            what is known here already is not read; what is written at the same time is written together
    put     one statement, conditional on the version
    watch   own writes at once, those of other processes by the feed (`postgres_feed`)

The database need not be up when the store is opened, nor stay so: while it can't be reached, calls raise `Unavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from msgspec.structs import replace

from greenroom.core.commands import ActorCommand, Change, Outcome
from greenroom.core.errors import GreenroomError, Unavailable
from greenroom.core.lifecycle import decide
from greenroom.core.records import Operation, Worker
from greenroom.store import transaction
from greenroom.store.port import KEPT_OPERATIONS, MAX_PAGE, EventType, Free, R, W, Where, check_list, not_found
from greenroom.store.postgres_change import ChangeRow, Code, Written, effects, row_of, write
from greenroom.store.postgres_clock import DatabaseClock
from greenroom.store.postgres_errors import Overtaken
from greenroom.store.postgres_feed import Feed, Published
from greenroom.store.postgres_hints import Hints
from greenroom.store.postgres_pool import MAX_CONNECTIONS, Connection, Database
from greenroom.store.postgres_rows import PARTITIONED, TABLES, Row, Table, cell, encode, without_used, xmin_of
from greenroom.store.postgres_schema import Migration, migrations
from greenroom.store.postgres_view import Fetched, Wanted, fetch, fetch_more, guess
from greenroom.store.postgres_writer import Writer
from greenroom.store.transaction import Effects
from greenroom.store.watch import Broadcast, Watcher, closed

T = TypeVar("T")
#: Does a piece of work with a connection, which it finds.
_Run = Callable[[Callable[[Connection], Awaitable[Any]]], Awaitable[Any]]

#: How often a write is tried that others overtake. From `LOCK_FROM` on the actor is locked from the read to the write,
#: so that only a change of its template, of a worker or of the last free slot can come in between.
MAX_TRIES = 12
LOCK_FROM = 2
#: Before trying again, at most; grows with each try. In seconds: about what a write takes.
RETRY_WAIT_S = 0.002
#: Operations that `PostgresStore.trim` drops in one statement, so that it takes milliseconds.
TRIM_CHUNK = 200


class PostgresStore:
    """Made by `open`; for use on the event loop that it was opened on."""

    def __init__(self, url: str, replica: str, scripts: list[Migration], max_connections: int) -> None:
        self._database = Database(url, replica, max_connections=max_connections)
        #: Tells this process's rows in the outbox from those of others.
        self._name = uuid.uuid4().hex
        self._writer = Writer(self._database, self._name)
        self._broadcast = Broadcast()
        self._published = Published(self._broadcast)
        self._clock = DatabaseClock()
        self._hints = Hints()
        self._feed = Feed(
            self._database, scripts, self._name, self._published, self._broadcast, self._hints, self._clock
        )
        self._calls = 0
        self._quiet = asyncio.Event()  # set when closed and no call is under way
        self._closed = False

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        replica: str = "",
        max_connections: int = MAX_CONNECTIONS,
        scripts: list[Migration] | None = None,
    ) -> PostgresStore:
        """Opens the store in the database ``url`` (``postgresql://USER:PASSWORD@HOST:PORT/NAME``) and brings its
        schema up to date. If the database can't be reached, the store is opened all the same, for when it can.

        Args:
            replica: what this process is called, for who looks at the database's connections.
            max_connections: at most, of this process, beside one for the feed.
            scripts: the schema's migrations; those of this program by default.

        Raises:
            InvalidArgument: ``url`` is no URL of a database.
            FailedPrecondition: a newer program wrote it (reason ``SCHEMA_TOO_NEW``), or its user may not do what is
                needed (``STORE_NOT_WRITABLE``).
        """
        store = cls(url, replica, migrations() if scripts is None else scripts, max_connections)
        try:
            await store._feed.tried.wait()
            if store._feed.trouble is not None and not isinstance(store._feed.trouble, Unavailable):
                raise store._feed.trouble
        except BaseException:
            await store.close()
            raise
        return store

    # --- writing ------------------------------------------------------------------------------------------

    async def apply(self, command: ActorCommand) -> Change:
        return await self._until_not_stale(lambda attempt: self._apply(command, attempt), str(command.key))

    async def _apply(self, command: ActorCommand, attempt: int) -> Change | None:
        """None: it has to be tried again; somebody was faster, or what was known here was not enough."""
        if attempt < LOCK_FROM:
            async with self._under_way():
                decided = await self._decide(self._database.run, command, attempt)
                if decided is None:
                    return None
                change, row = decided
                written = None if row is None else await self._count(change, self._writer.write(row))
        else:
            locked = await self._call(lambda connection: self._apply_locked(connection, command))
            if locked is None:
                return None
            change, written = locked
        if written is not None:
            if written.code != Code.WRITTEN:
                return None
            self._published.publish(effects(change), written.event)
            self._hints.written(change, written.xmin)
        return change

    async def _apply_locked(
        self, connection: Connection, command: ActorCommand
    ) -> tuple[Change, Written | None] | None:
        """The same in one transaction that keeps others from the actor."""

        async def run(work: Callable[[Connection], Awaitable[T]]) -> T:
            return await work(connection)

        async with connection.transaction():
            await connection.execute(_LOCK, [cell(*command.key), str(command.key)], prepare=True)
            decided = await self._decide(run, command, LOCK_FROM)
            if decided is None:
                return None
            change, row = decided
            if row is None:
                return change, None

            async def write_it() -> Written:
                [written] = await write(connection, self._name, [row])
                return written

            return change, await self._count(change, write_it())

    async def _decide(self, run: _Run, command: ActorCommand, attempt: int) -> tuple[Change, ChangeRow | None] | None:
        """What to do, and what of it is to be written; raises what `decide` raises. None: what was read does not belong
        together. The first attempt begins with what this process knows, the next reads everything."""
        locked, known = attempt >= LOCK_FROM, attempt == 0
        fetched = guess(self._hints, command) if known else await self._fetch(run, command)
        while True:
            try:
                view = transaction.load(fetched, command)
                break
            except Wanted as wanted:
                if known and wanted.cls in PARTITIONED:  # one statement for all that is the actor's own
                    known, fetched = False, await self._fetch(run, command, self._hints)
                else:
                    await self._fetch_more(run, fetched, wanted)
        try:
            change = decide(view, command)
        except GreenroomError:
            if fetched.sure or locked:
                raise
            return None  # perhaps only because what was read does not belong together
        if change.outcome is not Outcome.CHANGED:
            return (change, None) if fetched.sure or locked else None
        return change, row_of(self._feed.partitions[cell(*command.key)], command.key, change, fetched)

    async def _count(self, change: Change, writing: Awaitable[Written]) -> Written:
        """Slots that a change takes count from now on, so that many who choose at the same time do not all choose the
        same worker; those of one that is not written do not."""
        self._hints.count(change)
        done = False
        try:
            written = await writing
            done = written.code == Code.WRITTEN
            return written
        finally:
            if not done:
                self._hints.count(change, -1)

    async def _fetch(self, run: _Run, command: ActorCommand, hints: Hints | None = None) -> Fetched:
        part = self._feed.partitions[cell(*command.key)]
        fetched: Fetched = await run(lambda connection: fetch(connection, part, command, hints))
        self._hints.learn(fetched)
        return fetched

    async def _fetch_more(self, run: _Run, fetched: Fetched, wanted: Wanted) -> None:
        await run(lambda connection: fetch_more(connection, fetched, wanted))
        self._hints.learn(fetched)

    async def put(self, record: W) -> W:
        return await self._until_not_stale(lambda _: self._put(record), record.pk)

    async def _put(self, record: W) -> W | None:
        table: Table = TABLES[type(record)]
        new: W = replace(record, version=record.version + 1)
        data = (without_used(new) if isinstance(new, Worker) else encode(new)).decode()
        values: list[Any] = [self._name, new.pk, new.version, data, record.version, *table.values(new)]

        async def work(connection: Connection) -> tuple[W, int, str] | None:
            row: Any
            if isinstance(new, Worker):
                row = await (await connection.execute(_PUT_WORKER, values, prepare=True)).fetchone()
                if row is not None and row[0] is not None:
                    return replace(new, used=row[0]), row[1], row[2]
            else:
                sql = table.replace if record.version else table.insert
                row = await (await connection.execute(sql, values, prepare=True)).fetchone()
                if row is not None:
                    return new, *row
            row = await (await connection.execute(table.select_version, [new.pk], prepare=True)).fetchone()
            transaction.check_put(record, row[0] if row else None)
            return None  # it was, a moment ago

        done = await self._call(work)
        if done is None:
            return None
        stored, event, xact = done
        self._published.publish([(EventType.PUT, stored)], event)
        self._hints.put(type(stored), stored.pk, Row(stored, xmin_of(xact)))
        return stored

    async def remove(self, record: Free) -> None:
        await self._until_not_stale(lambda _: self._remove(record), record.pk)

    async def _remove(self, record: Free) -> bool | None:
        table = TABLES[type(record)]

        async def work(connection: Connection) -> tuple[int, Free] | bool | None:
            sql = _REMOVE_WORKER if isinstance(record, Worker) else table.remove
            values = [self._name, record.pk, record.version]
            row = await (await connection.execute(sql, values, prepare=True)).fetchone()
            if row is not None and row[0] is not None:
                return row[0], table.record(*row[1:])
            row = await (await connection.execute(table.select_version, [record.pk], prepare=True)).fetchone()
            if row is None:
                return True
            transaction.check_remove(record, row[0])
            return None

        done = await self._call(work)
        if isinstance(done, tuple):
            self._published.publish([(EventType.DELETED, done[1])], done[0])
            self._hints.put(type(record), record.pk, None)
        return None if done is None else True

    async def trim(self, keep: int = KEPT_OPERATIONS) -> int:
        async def find(connection: Connection) -> list[str]:
            rows = await (await connection.execute(_FINISHED, [max(keep, 0)], prepare=False)).fetchall()
            return sorted(pk for (pk,) in rows)

        async def drop(connection: Connection, ids: list[str]) -> list[tuple[Any, ...]]:
            return await (await connection.execute(_DROP, [self._name, ids], prepare=True)).fetchall()

        finished, dropped = await self._call(find), 0
        what = "the list of operations"
        for start in range(0, len(finished), TRIM_CHUNK):
            chunk = finished[start : start + TRIM_CHUNK]
            rows = await self._until_not_stale(lambda _: self._call(lambda c: drop(c, chunk)), what)  # noqa: B023
            gone: Effects = [(EventType.DELETED, TABLES[Operation].record(data)) for _, data in sorted(rows)]
            self._published.publish(gone, max((event for event, _ in rows), default=0))
            dropped += len(rows)
        return dropped

    # --- reading ------------------------------------------------------------------------------------------

    async def get(self, cls: type[R], pk: str) -> R:
        table = TABLES[cls]

        async def work(connection: Connection) -> R:
            select = table.select_one
            if table.kind == "Actor" and "/" in pk:  # its key tells in which partition it is
                select = table.select_in[self._feed.partitions[cell(*pk.split("/", 1))]]
            row = await (await connection.execute(select, [pk], prepare=True)).fetchone()
            if row is None:
                raise not_found(cls, pk)
            record: R = table.record(row[0], *row[2:])
            return record

        return await self._call(work)

    async def list(
        self,
        cls: type[R],
        *,
        namespace: str = "",
        where: Where | None = None,
        after: str = "",
        limit: int = MAX_PAGE,
    ) -> list[R]:
        check_list(cls, where or {}, limit)
        table = TABLES[cls]
        page = table.page(namespace, where or {}, after, limit)

        async def work(connection: Connection) -> list[R]:
            rows = await (await connection.execute(page, prepare=False)).fetchall()
            return [table.record(row[0], *row[2:]) for row in rows]

        return await self._call(work)

    def watch(self, *, capacity: int = 10_000) -> Watcher:
        if self._closed:
            raise closed()
        return self._broadcast.watch(capacity)

    def clock(self) -> float:
        return self._clock.now()

    # --- calls --------------------------------------------------------------------------------------------

    async def _call(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._under_way():
            return await self._database.run(work)

    @contextlib.asynccontextmanager
    async def _under_way(self) -> AsyncIterator[None]:
        """Around everything that asks the database. What it wrote is to be published in the turn of the loop in which
        it ends."""
        if self._closed:
            raise closed()
        self._calls += 1
        call = object()
        self._published.begin(call)
        try:
            if not self._feed.tried.is_set():
                await self._feed.tried.wait()
            if self._feed.trouble is not None:
                raise copy.copy(self._feed.trouble)
            yield
        finally:
            self._published.end(call)
            self._calls -= 1
            if self._closed and not self._calls:
                self._quiet.set()

    async def _until_not_stale(self, work: Callable[[int], Awaitable[T | None]], what: str) -> T:
        for attempt in range(MAX_TRIES):
            if attempt > 1:  # the second try reads what the first one took for granted
                await asyncio.sleep(random.random() * RETRY_WAIT_S * attempt)
            with contextlib.suppress(Overtaken):
                done = await work(attempt)
                if done is not None:
                    return done
        raise Unavailable(f"{what} is being changed by others all the time; try again", reason="STORE_CONTENDED")

    async def close(self) -> None:
        """As the port says. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._calls:
                await self._quiet.wait()
            await self._writer.close()
            await self._feed.close()
            self._database.close()
        finally:
            self._broadcast.close()


_LOCK = "SELECT FROM actors WHERE cell = $1 AND pk = $2 FOR UPDATE"
_PUT_WORKER = (
    "SELECT used, event, pg_current_xact_id()::text FROM put_worker_v1("
    "$1::text, $2::text, $3::bigint, $4::text, $5::bigint, $6::text, $7::text, $8::int)"
)
_REMOVE_WORKER = "SELECT event, data, used FROM remove_worker_v1($1::text, $2::text, $3::bigint)"
_FINISHED = "SELECT pk FROM operations WHERE state IN ('Done', 'Failed') ORDER BY pk DESC OFFSET $1::int"
_DROP = """
WITH gone AS (DELETE FROM operations WHERE pk = ANY($2::text[]) AND state <> 'Running' RETURNING pk, data)
INSERT INTO outbox (writer, type, kind, pk, data)
SELECT $1, 'Deleted', 'Operation', pk, data FROM gone ORDER BY pk RETURNING id, data
"""
