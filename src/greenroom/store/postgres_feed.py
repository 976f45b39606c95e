"""What other processes wrote, and whether the database can be used at all: one task with a connection of its own.

    connect -> bring the schema up to date -> look at the outbox, again and again -> (the connection is lost) -> connect

Each look reads the rows of the outbox that have become visible since the one before: those whose transaction the last
look's snapshot did not see. So it does not matter in which order transactions end, and none is missed or seen twice.

A process publishes its own writes by itself, at once; in the outbox it looks only for those that it does not know of,
because the reply was lost. For each record the events' numbers are in the order of what happened to it, and an event
that comes after one with a higher number is dropped: a later state of that record has been published already.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import NamedTuple

import psycopg
import structlog

from greenroom.core.errors import GreenroomError, ResourceExhausted
from greenroom.core.records import Worker
from greenroom.store.port import EventType, Stored
from greenroom.store.postgres_clock import DatabaseClock
from greenroom.store.postgres_errors import translate
from greenroom.store.postgres_hints import Hints
from greenroom.store.postgres_pool import Connection, Database, limited
from greenroom.store.postgres_rows import BY_KIND, xmin_of
from greenroom.store.postgres_schema import Migration, check, migrate, partitions
from greenroom.store.transaction import Effects
from greenroom.store.watch import Broadcast

log = structlog.get_logger(__name__)

#: Between two looks while there is something to see, in seconds; a look takes the database some 0.1 ms.
BUSY_INTERVAL_S = 0.02
#: Between two looks at most; each look that sees nothing makes the interval longer.
IDLE_INTERVAL_S = 0.1
IDLE_GROWTH = 1.3
#: Of its time, what a process looks at most: where a look takes long (an old transaction makes it look further back),
#: it looks less often.
MAX_SHARE = 0.25
#: Rows older than this are deleted, in seconds.
KEPT_S = 60
#: Who has not looked for longer than this may have missed rows, in seconds: half of what is kept, because a transaction
#: may end some seconds after it wrote its rows.
AWAY_LIMIT_S = 30
#: Between two trims of the outbox, in seconds, and rows in one statement, so that it takes milliseconds.
TRIM_INTERVAL_S = 5
TRIM_CHUNK = 2_000
#: Before it connects again, in seconds: at first, and at most.
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 1.0

_DURABILITY = "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'synchronous_commit')"
_SNAPSHOT = "SELECT pg_current_snapshot()::text"
#: $1 the snapshot of the look before, $2 this process. Its first row is the new snapshot, the time, and from which
#: schema on programs can use the database. What this process wrote comes without its content.
_LOOK = """
SELECT 0, pg_current_snapshot()::text, extract(epoch FROM clock_timestamp())::float8,
    (SELECT compatible_from::text FROM schema), '', '', NULL::text
UNION ALL
SELECT o.id, o.xact::text, 0, o.type, o.kind, o.pk, CASE WHEN o.writer <> $2 THEN o.data END
FROM outbox o
WHERE o.xact >= pg_snapshot_xmin($1::pg_snapshot) AND NOT pg_visible_in_snapshot(o.xact, $1::pg_snapshot)
"""
_CONTENT = "SELECT id, data FROM outbox WHERE xact = ANY($1::xid8[]) AND id = ANY($2::bigint[])"
_TRIM = """
DELETE FROM outbox WHERE (xact, id) IN (
    SELECT xact, id FROM (SELECT xact, id, at FROM outbox ORDER BY xact, id LIMIT $1 FOR UPDATE SKIP LOCKED) oldest
    WHERE at < clock_timestamp() - make_interval(secs => $2))
"""

Key = tuple[str, str]  # kind and key of a record


class Published:
    """Hands events to the watchers of this process, each record's in the order of their numbers.

    The number of a record's newest event is kept as long as an older one may still come: from the outbox, until a look
    that began afterwards is done; from a write of this process that was under way then, until it has ended.
    """

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._newest: dict[Key, tuple[int, int]] = {}  # -> number of its newest event, round in which it was published
        self._round = 0
        self._under_way: dict[object, int] = {}  # a write of this process -> the round in which it began

    def begin(self, write: object) -> None:
        """A write of this process begins; ``end`` must follow, however it ends."""
        self._under_way[write] = self._round

    def end(self, write: object) -> None:
        del self._under_way[write]

    def knows(self, key: Key, number: int) -> bool:
        """Whether that event, or a later one of the same record, has been published."""
        return self._newest.get(key, (0, 0))[0] >= number

    def note(self, key: Key, number: int) -> None:
        """That event needs no publishing any more."""
        self._newest.pop(key, None)  # to the end of the order
        self._newest[key] = number, self._round

    def publish(self, effects: Effects, number: int, *, foreign: bool = False) -> None:
        """``number``: of the last of them; all are of one transaction. ``foreign``: of another process."""
        new: Effects = []
        for kind, record in effects:
            key = type(record).__name__, record.pk
            if not self.knows(key, number):
                self.note(key, number)
                new.append((kind, record))
        self._broadcast.publish(new, foreign=foreign)

    def begin_round(self) -> int:
        """A look at the outbox begins."""
        self._round += 1
        return self._round

    def end_round(self) -> None:
        """The look is done and what it saw is published."""
        until = min(self._round, *self._under_way.values(), self._round)
        old = itertools.takewhile(lambda item: item[1][1] < until, self._newest.items())
        for key in [key for key, _ in old]:
            del self._newest[key]


class Feed:
    """The task.

    Attributes:
        tried: set when it is known for the first time whether the database can be used.
        trouble: why it can't be used now.
        partitions: the partition of each cell; known when it could be used once.
    """

    def __init__(
        self,
        database: Database,
        scripts: list[Migration],
        writer: str,
        published: Published,
        broadcast: Broadcast,
        hints: Hints,
        clock: DatabaseClock,
    ) -> None:
        self._database = database
        self._scripts = scripts
        self._writer = writer
        self._published = published
        self._broadcast = broadcast
        self._hints = hints
        self._clock = clock
        self.tried = asyncio.Event()
        self.trouble: GreenroomError | None = None
        self.partitions: list[int] = []
        self._open = False
        self._snapshot = ""
        self._looked_at = 0.0  # the database's time at the last look
        self._unknown: list[_Seen] = []  # own rows that were not published at the last look
        self._trimmed_at = 0.0
        self._task = asyncio.create_task(self._run(), name="store-feed")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        wait, following = RECONNECT_MIN_S, False
        while True:
            try:
                connection = await self._database.connect()
                try:
                    await migrate(connection, self._scripts, self._database.where)  # takes the time that it takes
                    async with limited(connection):
                        self.partitions = await partitions(connection)
                        await self._check_durable(connection)
                        if not self._snapshot:
                            await self._begin(connection)
                    self._usable()
                    wait, following = RECONNECT_MIN_S, True
                    await self._follow(connection)
                finally:
                    await connection.close()
            except (psycopg.Error, OSError, GreenroomError) as error:
                if following and not isinstance(error, GreenroomError):
                    following = False
                    continue  # perhaps only this connection was lost: the next try tells
                self._unusable(error)
            except Exception:  # our own bug must not leave this process without what others write
                log.exception("the feed of the database failed")
            await asyncio.sleep(wait)
            wait = min(wait * 2, RECONNECT_MAX_S)

    def _usable(self) -> None:
        self._open = True
        if self.trouble is not None:
            log.info("the database can be used again", database=self._database.where)
        self.trouble = None
        self.tried.set()

    def _unusable(self, error: Exception) -> None:
        trouble = translate(error, self._database.where)
        if self.trouble is None or self.trouble.message != trouble.message:
            log.warning("the database can't be used", error=trouble.message)
        self.trouble = trouble
        self.tried.set()

    async def _check_durable(self, connection: Connection) -> None:
        """A database that forgets what it has answered is for tests only."""
        settings: dict[str, str] = dict(await (await connection.execute(_DURABILITY)).fetchall())
        if "off" in settings.values() and not self._open:
            log.warning("the database may lose what it has answered", database=self._database.where, **settings)

    # --- looking ------------------------------------------------------------------------------------------

    async def _follow(self, connection: Connection) -> None:
        interval = BUSY_INTERVAL_S
        while True:
            started = time.monotonic()
            async with limited(connection):
                seen = await self._look(connection)
                if started - self._trimmed_at > TRIM_INTERVAL_S:
                    self._trimmed_at = started
                    await self._trim(connection)
                    self._database.close_idle()
            interval = BUSY_INTERVAL_S if seen else min(interval * IDLE_GROWTH, IDLE_INTERVAL_S)
            await asyncio.sleep(max(interval, (time.monotonic() - started) / MAX_SHARE))

    async def _begin(self, connection: Connection) -> None:
        """From now on; what was before, nobody has missed, because no call has been answered yet."""
        row = await (await connection.execute(_SNAPSHOT)).fetchone()
        assert row is not None
        self._snapshot = row[0]

    async def _look(self, connection: Connection) -> int:
        """Publishes what is new; how much that was."""
        self._published.begin_round()
        started = time.monotonic()
        rows = await (await connection.execute(_LOOK, [self._snapshot, self._writer], prepare=True)).fetchall()
        (_, snapshot, now, compatible_from, *_), *found = sorted(rows)
        if int(compatible_from) > len(self._scripts):
            await check(connection, self._scripts, self._database.where)
        self._clock.learn(started, now, time.monotonic())
        missed = self._missed(snapshot, now)
        self._snapshot, self._looked_at = snapshot, now
        if missed:
            self._unknown.clear()
            self._hints.forget()
            message = "this process could not follow what others wrote; list again, then watch anew"
            self._broadcast.end(ResourceExhausted(message, reason="WATCH_TOO_SLOW"))
            return len(found)
        new = [_Seen(*row) for row in found]
        await self._find_own(connection)
        for seen in new:
            if seen.data is not None:
                self._publish(seen, foreign=True)
            elif not self._published.knows(seen.key, seen.id):
                self._unknown.append(seen)  # its reply is on its way, or was lost
        self._published.end_round()
        return len(found)

    def _missed(self, snapshot: str, now: float) -> bool:
        """Whether rows may have gone unseen: they are deleted by now, or the database has lost its latest transactions
        (an older copy has taken its place)."""
        away = self._looked_at and now - self._looked_at > AWAY_LIMIT_S
        return bool(away) or _end(snapshot) < _end(self._snapshot)

    async def _find_own(self, connection: Connection) -> None:
        """Those rows of this process that were not published by now, one look later: nobody else will."""
        unknown, self._unknown = [s for s in self._unknown if not self._published.knows(s.key, s.id)], []
        if not unknown:
            return
        values = [[s.xact for s in unknown], [s.id for s in unknown]]
        content: dict[int, str] = dict(await (await connection.execute(_CONTENT, values)).fetchall())
        for seen in unknown:
            if seen.id in content:
                self._publish(seen._replace(data=content[seen.id]), foreign=False)

    def _publish(self, seen: _Seen, *, foreign: bool) -> None:
        if self._published.knows(seen.key, seen.id):
            return
        table, kind = BY_KIND[seen.kind], EventType(seen.type)
        record: Stored | None = None
        if self._broadcast.watched or table.cls is Worker:
            record = table.record(seen.data)
        there = record if kind is EventType.PUT else None
        self._hints.written_elsewhere(table.cls, seen.pk, there, xmin_of(seen.xact))
        if record is None:
            self._published.note(seen.key, seen.id)
        else:
            self._published.publish([(kind, record)], seen.id, foreign=foreign)

    async def _trim(self, connection: Connection) -> None:
        deleted = await connection.execute(_TRIM, [TRIM_CHUNK, KEPT_S])
        if deleted.rowcount == TRIM_CHUNK:  # there is more
            self._trimmed_at = 0.0


class _Seen(NamedTuple):
    """A row of the outbox. ``data`` None: this process wrote it."""

    id: int
    xact: str
    time: float  # of the look; none for a row
    type: str
    kind: str
    pk: str
    data: str | None

    @property
    def key(self) -> Key:
        return self.kind, self.pk


def _end(snapshot: str) -> int:
    """The first transaction that it does not see, whatever became of it (``xmin:xmax:...``)."""
    return int(snapshot.split(":")[1])
