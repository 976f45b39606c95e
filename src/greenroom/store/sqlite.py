"""The embedded store: SQLite, one file, one server.

    callers --submit--> writer thread --one commit a batch--> answers, one hand-over to the event loop a batch
    callers <-get------ a connection on the event loop        (a point read takes some 10 us: less than a hand-over)
    callers <-list----- a connection in a thread of its own

A caller is answered after the commit that holds its write, so what it reads then includes it. A caller that is
cancelled leaves its write where it is, in the batch.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import apsw

from greenroom.core.commands import ActorCommand, Change
from greenroom.core.errors import ResourceExhausted
from greenroom.core.records import OperationState
from greenroom.store import sqlite_file, transaction
from greenroom.store.clock import SteadyClock
from greenroom.store.hold import Hold
from greenroom.store.port import KEPT_OPERATIONS, MAX_PAGE, Free, R, W, Where, check_list, not_found
from greenroom.store.sqlite_rows import read, read_page
from greenroom.store.sqlite_writer import Done, Job, Writer
from greenroom.store.transaction import Effects
from greenroom.store.watch import Broadcast, Watcher, closed

T = TypeVar("T")

#: Writes, and likewise lists, that may wait: seconds of work. Beyond it callers are better told at once.
MAX_WAITING = 10_000
#: Operations that `SqliteStore.trim` drops in one job, so that wake-ups are not held up behind it.
TRIM_CHUNK = 200


class SqliteStore:
    """Made by `open`; for use on the event loop that it was opened on."""

    def __init__(self, directory: Path, hold: Hold, loop: asyncio.AbstractEventLoop) -> None:
        self._path = directory / sqlite_file.DATABASE_FILE
        self._hold = hold
        self._loop = loop
        self._broadcast = Broadcast()
        self._clock = SteadyClock()
        self._waiting = 0
        self._listing = 0
        self._closed = False
        self._writer = Writer(self._path, self._answer_from_thread)
        try:
            self._points = sqlite_file.open_reader(self._path)
            self._pages = sqlite_file.open_reader(self._path)
        except BaseException:
            self._writer.close()
            raise
        self._pager = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-list")

    @classmethod
    async def open(cls, directory: Path) -> SqliteStore:
        """Opens the store in ``directory``, which is made if need be, and holds it until `close`.

        Raises:
            FailedPrecondition: another server holds it (reason ``DATA_DIR_IN_USE``, the message says which); it was
                written by a newer program (reason ``SCHEMA_TOO_NEW``); it may not be written.
            DataLoss: the file is damaged.
            ResourceExhausted: the disk is full (reason ``DISK_FULL``).
        """
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(cls._open, directory, loop)

    @classmethod
    def _open(cls, directory: Path, loop: asyncio.AbstractEventLoop) -> SqliteStore:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            hold = Hold(directory)
        except OSError as error:
            raise sqlite_file.translate(error, directory / sqlite_file.DATABASE_FILE) from error
        try:
            return cls(directory, hold, loop)
        except BaseException:
            hold.release()
            raise

    # --- writing ------------------------------------------------------------------------------------------

    async def apply(self, command: ActorCommand) -> Change:
        change: Change = await self._write(transaction.apply, command)
        return change

    async def put(self, record: W) -> W:
        stored: W = await self._write(transaction.put, record)
        return stored

    async def remove(self, record: Free) -> None:
        await self._write(transaction.remove, record)

    def clock(self) -> float:
        return self._clock()

    async def trim(self, keep: int = KEPT_OPERATIONS) -> int:
        finished = sorted(await self._in_pager(_finished_beyond, self._pages, keep))
        dropped = 0
        for start in range(0, len(finished), TRIM_CHUNK):
            dropped += await self._write(transaction.drop_operations, finished[start : start + TRIM_CHUNK])
        return dropped

    def _write(self, work: Any, argument: object) -> asyncio.Future[Any]:
        if self._closed:
            raise closed()
        if self._waiting >= MAX_WAITING:
            raise _overloaded(self._waiting)
        future = self._loop.create_future()
        self._waiting += 1
        self._writer.submit(Job(work, argument, future))
        return future

    def _answer_from_thread(self, dones: list[Done], effects: Effects) -> None:
        if not self._loop.is_closed():  # else nobody waits any more
            self._loop.call_soon_threadsafe(self._answer, dones, effects)

    def _answer(self, dones: list[Done], effects: Effects) -> None:
        self._waiting -= len(dones)
        for future, result, error in dones:
            if future.done():
                continue  # its caller was cancelled
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        self._broadcast.publish(effects)

    # --- reading ------------------------------------------------------------------------------------------

    async def get(self, cls: type[R], pk: str) -> R:
        if self._closed:
            raise closed()
        try:
            record = read(self._points, cls, pk)
        except apsw.Error as error:
            raise sqlite_file.translate(error, self._path) from error
        if record is None:
            raise not_found(cls, pk)
        return record

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
        args = (self._pages, cls, namespace, dict(where or {}), after, limit)
        page: list[R] = await self._in_pager(read_page, *args)
        return page

    def watch(self, *, capacity: int = 10_000) -> Watcher:
        if self._closed:
            raise closed()
        return self._broadcast.watch(capacity)

    async def _in_pager(self, work: Any, *args: object) -> Any:
        if self._closed:
            raise closed()
        if self._listing >= MAX_WAITING:
            raise _overloaded(self._listing)
        self._listing += 1
        try:
            return await self._loop.run_in_executor(self._pager, work, *args)
        except apsw.Error as error:
            raise sqlite_file.translate(error, self._path) from error
        finally:
            self._listing -= 1

    # --- end ----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """As the port says; what was submitted before is carried out and answered. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await asyncio.shield(asyncio.to_thread(self._close))
        finally:
            self._broadcast.close()

    def _close(self) -> None:
        self._pager.shutdown(wait=True)
        self._points.close()
        self._pages.close()
        self._writer.close()
        self._hold.release()


def _finished_beyond(connection: apsw.Connection, keep: int) -> list[str]:
    sql = "SELECT pk FROM operations WHERE state IN (?, ?) ORDER BY pk DESC LIMIT -1 OFFSET ?"
    return [pk for (pk,) in connection.execute(sql, (OperationState.DONE, OperationState.FAILED, max(keep, 0)))]


def _overloaded(waiting: int) -> ResourceExhausted:
    return ResourceExhausted(f"{waiting} calls wait for the store already; try again later", reason="STORE_OVERLOADED")
