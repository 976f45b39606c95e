"""Changes on their way to the database: those that come at the same time share a transaction and its sync.

    write -> waiting -> (one of `SENDERS` is free) -> all that waits, as one batch -> each hears what became of it

A change that comes alone is sent at once, so an idle process waits for nothing; a busy one sends the more at a time,
the more there is to do. Changes of one batch have nothing to do with each other: one that can't be written undoes the
batch, and then each is tried by itself.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from typing import NamedTuple

from psycopg import errors

from greenroom.core.errors import GreenroomError, Unavailable
from greenroom.store.postgres_change import ChangeRow, Written, write
from greenroom.store.postgres_errors import Overtaken, overloaded
from greenroom.store.postgres_pool import MAX_WAITING, Connection, Database

#: Batches under way at the same time: while one is synced, the database works on another.
SENDERS = 2
#: Changes in one batch: more would only wait longer for the first of them.
MAX_BATCH = 64
#: How long a batch waits for a row that another transaction has locked, which takes as long as a commit. Who waits
#: longer does so alone.
BATCH_LOCK_WAIT_MS = 50


class _Waiting(NamedTuple):
    row: ChangeRow
    written: asyncio.Future[Written]


class Writer:
    """For use on the event loop that it was made on."""

    def __init__(self, database: Database, name: str) -> None:
        """``name``: by which this process's events are told from those of others."""
        self._database = database
        self._name = name
        self._waiting: deque[_Waiting] = deque()
        self._sending: set[asyncio.Task[None]] = set()
        self._pumps = False

    async def write(self, row: ChangeRow) -> Written:
        """Writes one change. Who is cancelled does not know whether it was written.

        Raises:
            Overtaken: something that it was decided from has changed.
            GreenroomError: as `Database.run`.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise overloaded(len(self._waiting))
        loop = asyncio.get_running_loop()
        waiting = _Waiting(row, loop.create_future())
        self._waiting.append(waiting)
        if not self._pumps:  # not at once: others may come in the same turn of the loop
            self._pumps = True
            loop.call_soon(self._pump)
        return await waiting.written

    async def close(self) -> None:
        """Returns when nothing is under way. Nobody waits for an answer any more."""
        while self._sending:
            await asyncio.wait(self._sending)

    def _pump(self) -> None:
        self._pumps = False
        while self._waiting and len(self._sending) < SENDERS:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            batch = [waiting for waiting in batch if not waiting.written.done()]
            if batch:
                task = asyncio.create_task(self._send(batch), name="store-write")
                self._sending.add(task)
                task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._pump()

    async def _send(self, batch: list[_Waiting]) -> None:
        try:
            await self._try(batch)
        except Unavailable as away:
            # What waits would wait as long for the same answer.
            for waiting in (*batch, *self._waiting):
                _fail(waiting, away)
        except (Overtaken, GreenroomError) as error:
            if len(batch) == 1:
                _fail(batch[0], error)
            else:
                await asyncio.gather(*(self._send([waiting]) for waiting in batch))
        except BaseException:
            for waiting in batch:
                waiting.written.cancel()
            raise

    async def _try(self, batch: list[_Waiting]) -> None:
        rows = [waiting.row for waiting in batch]
        wait_ms = BATCH_LOCK_WAIT_MS if len(batch) > 1 else None

        async def work(connection: Connection) -> list[Written]:
            try:
                return await write(connection, self._name, rows, wait_ms)
            except errors.LockNotAvailable as locked:
                if wait_ms is None:
                    raise
                raise Overtaken(str(locked)) from locked

        for waiting, written in zip(batch, await self._database.run(work), strict=True):
            if not waiting.written.done():
                waiting.written.set_result(written)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.written.done():
        waiting.written.set_exception(copy.copy(error))
