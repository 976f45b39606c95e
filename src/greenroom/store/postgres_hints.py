"""What this process has read or written lately, to decide from without reading again.

Nothing here is trusted: a change that was decided from it is written only if every row is still in the state that it
was decided from (`postgres_change`), and whatever else comes of it (a refusal, a repeated command) is decided again
from what the database says. So an old hint costs a call, and never a wrong answer. Which slots are free is not kept
here; how many there are is, to choose a worker, and the slot itself is taken in the database or not at all.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from msgspec.structs import replace

from greenroom.core.commands import Change
from greenroom.core.records import Actor, Lease, Operation, OperationState, Snapshot, Worker
from greenroom.store.port import Stored
from greenroom.store.postgres_rows import Reference, Row

if TYPE_CHECKING:
    from greenroom.store.postgres_view import Fetched

#: Rows that are kept: those of the actors that are at work, some four each, at a kilobyte or two.
MAX_ROWS = 20_000
#: How long the numbers of free slots are good for, in seconds: what other processes take and free is not told. One
#: command in so long reads them anew, which takes a millisecond for some thousand slots.
WORKERS_FRESH_S = 0.5


class Hints:
    def __init__(self) -> None:
        self._rows: dict[Reference, Row] = {}  # the oldest first
        self._workers: dict[str, Row] = {}
        self._read_at: dict[str, float] = {}  # pool -> when its workers were read (`time.monotonic`)

    def get(self, cls: type[Stored], pk: str) -> Row | None:
        return self._workers.get(pk) if cls is Worker else self._rows.get((cls, pk))

    def workers_of(self, pool: str) -> list[Row] | None:
        """In the order of their names; None when they have to be read."""
        now = time.monotonic()
        if now - self._read_at.get(pool, -WORKERS_FRESH_S) >= WORKERS_FRESH_S:
            if pool in self._read_at:
                self._read_at[pool] = now  # whoever asked reads them; the others go on with what there is
            return None
        return [row for _, row in sorted(self._workers.items()) if row.record.pool == pool]

    # --- learning -----------------------------------------------------------------------------------------

    def put(self, cls: type[Stored], pk: str, row: Row | None) -> None:
        """A row as it was read or written; None: it is gone, or has changed."""
        if cls is Worker:
            if row is None:
                self._workers.pop(pk, None)
            else:
                self._workers[pk] = row
            return
        self._rows.pop((cls, pk), None)
        if row is not None:
            self._rows[cls, pk] = row
            if len(self._rows) > MAX_ROWS:
                del self._rows[next(iter(self._rows))]

    def learn(self, fetched: Fetched) -> None:
        """What a command has just read."""
        for (cls, pk), row in fetched.rows.items():
            if row is not None and not (cls is Operation and row.record.state is not OperationState.RUNNING):
                self.put(cls, pk, row)
        for pool, workers in fetched.pools.items():
            for name in [n for n, row in self._workers.items() if row.record.pool == pool and n not in workers]:
                del self._workers[name]
            self._read_at[pool] = time.monotonic()

    def written(self, change: Change, xmin: str) -> None:
        """A change of this process, in a transaction of that number. Its slots are counted by `count`."""
        if (actor := change.actor) is not None:
            self.put(Actor, actor.pk, None if change.delete_actor else Row(actor, xmin))
        if (op := change.operation) is not None:
            self.put(Operation, op.id, Row(op, xmin) if op.state is OperationState.RUNNING else None)
        if change.lease is not None:
            self.put(Lease, change.lease.uid, Row(change.lease, xmin))
        elif change.drop_lease:
            self.put(Lease, change.drop_lease, None)
        for snapshot in change.snapshots:
            self.put(Snapshot, snapshot.id, Row(snapshot, xmin))

    def count(self, change: Change, times: int = 1) -> None:
        """Slots that this process takes and frees; ``times`` -1 takes it back."""
        for name, difference in change.slots:
            if (row := self._workers.get(name)) is not None:
                used = max(row.record.used + difference * times, 0)
                self._workers[name] = Row(replace(row.record, used=used), row.xmin)

    def written_elsewhere(self, cls: type[Stored], pk: str, record: Stored | None, xmin: str) -> None:
        """What another process wrote; ``record`` is only looked at if it is a worker."""
        if isinstance(record, Worker):
            known = self._workers.get(pk)
            if known is not None:  # how many slots are taken is not told
                self._workers[pk] = Row(replace(record, used=known.record.used), xmin)
            else:
                self._read_at.pop(record.pool, None)
        else:
            self.put(cls, pk, None)

    def forget(self) -> None:
        self._rows.clear()
        self._workers.clear()
        self._read_at.clear()
