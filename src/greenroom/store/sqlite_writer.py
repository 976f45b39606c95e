"""The one thread that writes: group commit, and what happens when a batch fails.

The thread takes all the jobs that wait and carries them out in one transaction, so that one sync of the log pays for
all of them. A job that is refused has written nothing (`transaction` decides before it writes), so the others go on
beside it. Whatever else goes wrong rolls the batch back, and its jobs are carried out again one by one, each in a
transaction of its own: the one at fault fails alone.

A full disk: the reserve is given back, and until there is room again nothing new is begun. What is under way may end,
what wants to be deleted is deleted, each written at once into the room that the reserve left.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import structlog

from greenroom.core.commands import BeginPause, BeginResume, BeginSuspend, CreateActor
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Operation, Pool, Snapshot, Template
from greenroom.store import sqlite_file, transaction
from greenroom.store.sqlite_rows import SqliteRows
from greenroom.store.transaction import Effects

log = structlog.get_logger(__name__)

#: Jobs in one transaction: far above what waits during one sync (about a millisecond), and few enough that a batch
#: takes milliseconds, not seconds, however many wait.
MAX_BATCH = 512

_NEW_WORK = (CreateActor, BeginResume, BeginSuspend, BeginPause)
_NEW_RECORDS = (Template, Pool, Snapshot, Operation)


class Job(NamedTuple):
    """``work(rows, argument)`` is one of the functions of `transaction`; ``ticket`` is the caller's."""

    work: Callable[[Any, Any], tuple[Any, Effects]]
    argument: Any
    ticket: Any

    @property
    def begins_something(self) -> bool:
        if isinstance(self.argument, _NEW_RECORDS):
            return self.work is transaction.put and self.argument.version == 0
        return isinstance(self.argument, _NEW_WORK)


class Done(NamedTuple):
    """A job's result, or the error that its caller gets."""

    ticket: Any
    result: Any = None
    error: GreenroomError | None = None


Answer = Callable[[list[Done], Effects], None]


class Writer:
    """Owns the connection that writes. ``answer`` is called in the writer's thread, once a batch, after its commit."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self._path = path
        self._answer = answer
        self._reserve = sqlite_file.Reserve(path.parent)
        try:
            self._connection = sqlite_file.open_writer(path)
        except GreenroomError as error:
            if error.reason != "DISK_FULL":
                raise
            self._reserve.free()
            self._connection = sqlite_file.open_writer(path)
        self._rows = SqliteRows(self._connection)
        self._full = not self._reserve.make()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Carries out what was submitted before, then ends the thread. Blocks; to be called once."""
        self._jobs.put(None)
        self._thread.join()
        self._connection.close()

    # --- in the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch = self._take()
            jobs = [job for job in batch if job is not None]
            if jobs:
                try:
                    answers = self._carry_out(jobs)
                except Exception as error:  # without this thread every later job would wait for ever
                    log.exception("a batch failed in a way nobody thought of", jobs=len(jobs))
                    told = sqlite_file.translate(error, self._path)
                    answers = [Done(job.ticket, error=told) for job in jobs], []
                self._answer(*answers)
            if len(jobs) < len(batch):
                return

    def _take(self) -> list[Job | None]:
        batch = [self._jobs.get()]
        while len(batch) < MAX_BATCH and not self._jobs.empty():
            batch.append(self._jobs.get())  # nobody else takes
        return batch

    def _carry_out(self, jobs: list[Job]) -> tuple[list[Done], Effects]:
        if self._full:
            self._full = not self._reserve.make()
        if not self._full:
            try:
                return self._together(jobs)
            except Exception as error:
                self._roll_back()
                if isinstance(error, apsw.BusyError):  # each would only wait as long again
                    told = sqlite_file.translate(error, self._path)
                    return [Done(job.ticket, error=told) for job in jobs], []
                if sqlite_file.is_disk_full(error, self._path.parent):
                    self._make_room()
        dones: list[Done] = []
        effects: Effects = []
        for job in jobs:
            done, effect = self._alone(job)
            dones.append(done)
            effects += effect
        if self._full:
            self._checkpoint()
        return dones, effects

    def _together(self, jobs: list[Job]) -> tuple[list[Done], Effects]:
        rows, dones = self._rows, []
        effects: Effects = []
        self._connection.execute("BEGIN IMMEDIATE")
        for work, argument, ticket in jobs:
            before = rows.writes
            try:
                result, effect = work(rows, argument)
            except GreenroomError as error:
                if rows.writes != before:
                    raise
                dones.append(Done(ticket, error=error))
            else:
                dones.append(Done(ticket, result))
                effects += effect
        self._connection.execute("COMMIT")
        return dones, effects

    def _alone(self, job: Job) -> tuple[Done, Effects]:
        if self._full and job.begins_something:
            return Done(job.ticket, error=sqlite_file.disk_full(self._path)), []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            result, effects = job.work(self._rows, job.argument)
            self._connection.execute("COMMIT")
            return Done(job.ticket, result), effects
        except Exception as error:
            self._roll_back()
            if sqlite_file.is_disk_full(error, self._path.parent) and not self._full:
                self._make_room()
                return self._alone(job)
            told = sqlite_file.translate(error, self._path)
            if told is not error:
                told.__cause__ = error
            return Done(job.ticket, error=told), []

    def _roll_back(self) -> None:
        try:
            sqlite_file.rollback(self._connection)
        except apsw.Error as error:  # BEGIN says so once more, to whoever comes next
            log.error("a transaction could not be rolled back", error=str(error))
        self._rows.forget()

    def _make_room(self) -> None:
        self._full = True
        self._reserve.free()
        self._checkpoint()

    def _checkpoint(self) -> None:
        """Empties the log, so that on a full disk it takes no more than one batch needs."""
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.Error as error:  # the log keeps what it holds, and is read from there
            log.info("the log was not emptied", error=str(error))
