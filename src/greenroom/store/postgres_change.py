"""Writing what was decided for one actor, in one call of the database."""

from __future__ import annotations

import enum
import random
from typing import Any, NamedTuple

from psycopg import AsyncConnection

from greenroom.core.commands import Change
from greenroom.core.records import Actor, Key, Lease, Operation, Snapshot, Template, Worker
from greenroom.store.port import EventType
from greenroom.store.postgres_rows import PARTITIONS, cell, cell_of, encode
from greenroom.store.postgres_view import Fetched
from greenroom.store.transaction import Effects, request_key


class Code(enum.StrEnum):
    WRITTEN = ""
    STALE = "stale"  # something is not as it was read
    FULL = "full"  # the worker has no free slot


class Written(NamedTuple):
    """``xmin`` of the rows that were written, ``event``: the number of the last event."""

    code: str
    xmin: str
    event: int


_TYPES = (  # noqa: SIM905  # as a table
    "text smallint boolean "
    "text xid boolean bigint text text text text text "
    "text xid bigint text text text text text "
    "xid text text text boolean "
    "text xid text xid "
    "smallint[] text[] xid[] "
    "text xid integer text "
    "smallint[] text[] xid[] bigint[] text[] text[] text[] text[] text[]"
).split()
_VALUES = ", ".join(f"${i}::{t}" for i, t in enumerate(_TYPES, 1))
_CALLS = [f"SELECT code, xact::text, event FROM write_change_v1_{n}({_VALUES})" for n in range(PARTITIONS)]


async def write(
    connection: AsyncConnection[Any], part: int, writer: str, key: Key, change: Change, fetched: Fetched
) -> Written:
    """Writes ``change`` of the actor ``key`` (in partition ``part``), decided from ``fetched``, if that is still so.

    Raises:
        psycopg.Error: among them a conflict (`postgres_errors.CONFLICTS`), which is `Code.STALE` noticed late.
    """
    actor = fetched.rows.get((Actor, str(key)))
    uid = change.actor.uid if change.actor is not None else actor.record.uid if actor is not None else ""
    values = [
        *(writer, cell(*key), fetched.assumed_new),
        *(str(key), actor.xmin if actor else None, change.delete_actor, *_actor(change.actor, uid)),
        *_operation(change.operation, fetched),
        *_lease(change, uid, fetched),
        *_read(change, fetched),
        *_slots(change, fetched),
        *_snapshots(change.snapshots, fetched),
    ]
    found = await (await connection.execute(_CALLS[part], values, prepare=True)).fetchone()
    assert found is not None
    return Written(*found)


def _actor(actor: Actor | None, uid: str) -> tuple[Any, ...]:
    if actor is None:
        return None, None, None, None, uid, None
    return actor.version, actor.state, actor.worker, actor.template, uid, encode(actor).decode()


def _operation(op: Operation | None, fetched: Fetched) -> tuple[Any, ...]:
    if op is None:
        return (None,) * 8
    xmin = fetched.xmin(Operation, op.id) if op.version > 1 else None
    request = request_key(op.namespace, op.request_id)
    return op.id, xmin, op.version, op.kind, op.namespace, op.state, request, encode(op).decode()


def _lease(change: Change, uid: str, fetched: Fetched) -> tuple[Any, ...]:
    lease = change.lease
    if lease is None:
        return None, None, None, None, bool(change.drop_lease)
    return fetched.xmin(Lease, uid), lease.owner, lease.operation, encode(lease).decode(), False


def _read(change: Change, fetched: Fetched) -> tuple[Any, ...]:
    """The template, the worker and the snapshots that the decision was made from and that it does not write itself."""
    template: tuple[str | None, str | None] = None, None
    place: tuple[str | None, str | None] = None, None
    snapshots: list[tuple[int, str, str]] = []
    written = {s.id for s in change.snapshots}
    for cls, pk in fetched.read_rows:
        row = fetched.rows[cls, pk]
        if row is None:
            continue
        if cls is Template:
            template = pk, row.xmin
        elif cls is Worker:
            place = pk, row.xmin
        elif cls is Snapshot and pk not in written:
            snapshots.append((cell_of(row.record), pk, row.xmin))
    return *template, *place, *_columns(snapshots, 3)


def _slots(change: Change, fetched: Fetched) -> tuple[Any, ...]:
    take = free = None
    for name, difference in change.slots:
        if difference > 0:
            assert take is None, "an actor takes one slot at a time"
            take = name
        else:
            assert free is None, "an actor frees the one slot that it has"
            free = name
    if take is None:
        return None, None, None, free
    row = fetched.rows[Worker, take]
    assert row is not None, "it was chosen from them"
    # Where to begin to look for a free slot: anywhere, so that not everybody looks through the same taken ones.
    return take, row.xmin, random.randrange(max(row.record.capacity, 1)), free


def _snapshots(snapshots: tuple[Snapshot, ...], fetched: Fetched) -> tuple[Any, ...]:
    rows = [
        (
            cell_of(s),
            s.id,
            fetched.xmin(Snapshot, s.id) if s.version > 1 else None,
            s.version,
            s.actor_uid,
            s.namespace,
            s.state,
            s.template,
            encode(s).decode(),
        )
        for s in snapshots
    ]
    return _columns(rows, 9)


def _columns(rows: list[Any], width: int) -> tuple[str | None, ...]:
    """An array for each column, as PostgreSQL writes it (the client takes longer for a list than for all the rest)."""
    return tuple(map(_array, zip(*rows, strict=True))) if rows else (None,) * width


def _array(values: tuple[Any, ...]) -> str:
    return "{" + ",".join("NULL" if v is None else _quoted(str(v)) for v in values) + "}"


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def effects(change: Change) -> Effects:
    """The events of a change, in their order."""
    found: Effects = [(EventType.PUT, s) for s in change.snapshots]
    if change.actor is not None:
        found.append((EventType.DELETED if change.delete_actor else EventType.PUT, change.actor))
    if change.operation is not None:
        found.append((EventType.PUT, change.operation))
    return found
