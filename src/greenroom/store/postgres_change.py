"""What was decided for one actor, as the database takes it (``change_v1`` of the schema), and writing it."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from psycopg import AsyncConnection

from greenroom.core.commands import Change
from greenroom.core.records import Actor, Key, Lease, Operation, Snapshot, Template, Worker
from greenroom.store.port import EventType
from greenroom.store.postgres_rows import cell, cell_of, encode
from greenroom.store.postgres_view import Fetched
from greenroom.store.transaction import Effects, request_key


class Code(enum.StrEnum):
    WRITTEN = ""
    STALE = "stale"  # something is not as it was read
    FULL = "full"  # the worker has no free slot


class Written(NamedTuple):
    """``xmin`` of the rows that were written, ``event``: not less than the numbers of its events, and less than that of
    whatever is written of the same records later."""

    code: str
    xmin: str
    event: int


class ChangeRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """See the schema, where a field that is left out is null, and ``chosen`` is not known: the actor goes on from a
    snapshot that somebody named. An ``xmin`` is a number of a transaction in decimal."""

    part: int
    cell: int
    check_new: bool
    chosen: bool = False
    a_pk: str
    a_uid: str
    a_xmin: str | None = None
    a_deletes: bool = False
    a_version: int | None = None
    a_state: str | None = None
    a_worker: str | None = None
    a_template: str | None = None
    a_data: str | None = None
    o_pk: str | None = None
    o_xmin: str | None = None
    o_version: int | None = None
    o_kind: str | None = None
    o_namespace: str | None = None
    o_state: str | None = None
    o_request: str | None = None
    o_data: str | None = None
    l_xmin: str | None = None
    l_owner: str | None = None
    l_operation: str | None = None
    l_data: str | None = None
    l_drops: bool = False
    t_pk: str | None = None
    t_xmin: str | None = None
    k_pk: str | None = None
    k_xmin: str | None = None
    r_cells: list[int] | None = None
    r_pks: list[str] | None = None
    r_xmins: list[str] | None = None
    w_take: str | None = None
    w_take_xmin: str | None = None
    w_take_from: int | None = None
    w_free: str | None = None
    s_cells: list[int] | None = None
    s_pks: list[str] | None = None
    s_xmins: list[str | None] | None = None
    s_versions: list[int] | None = None
    s_actor_uids: list[str] | None = None
    s_namespaces: list[str] | None = None
    s_states: list[str] | None = None
    s_templates: list[str] | None = None
    s_datas: list[str] | None = None


def row_of(part: int, key: Key, change: Change, fetched: Fetched) -> ChangeRow:
    """``change`` of the actor ``key`` (in partition ``part``), decided from ``fetched``."""
    known = fetched.rows.get((Actor, str(key)))
    row = ChangeRow(
        part=part,
        cell=cell(*key),
        check_new=fetched.assumed_new,
        a_pk=str(key),
        a_uid=change.actor.uid if change.actor is not None else known.record.uid if known is not None else "",
        a_xmin=known.xmin if known is not None else None,
        a_deletes=change.delete_actor,
    )
    if (actor := change.actor) is not None:
        row.a_version, row.a_state, row.a_worker = actor.version, actor.state, actor.worker
        row.a_template, row.a_data = actor.template, encode(actor).decode()
    if (op := change.operation) is not None:
        row.o_xmin = fetched.xmin(Operation, op.id) if op.version > 1 else None
        row.o_pk, row.o_version, row.o_kind, row.o_namespace = op.id, op.version, op.kind, op.namespace
        row.o_state, row.o_request = op.state, request_key(op.namespace, op.request_id)
        row.o_data = encode(op).decode()
        row.chosen = op.chosen and op.version == 1
    if (lease := change.lease) is not None:
        row.l_xmin = fetched.xmin(Lease, row.a_uid)
        row.l_owner, row.l_operation, row.l_data = lease.owner, lease.operation, encode(lease).decode()
    else:
        row.l_drops = bool(change.drop_lease)
    _add_read(row, change, fetched)
    _add_slots(row, change, fetched)
    if change.snapshots:
        _add_snapshots(row, change.snapshots, fetched)
    return row


def _add_read(row: ChangeRow, change: Change, fetched: Fetched) -> None:
    """The template, the worker and the snapshots that the decision was made from and that it does not write itself."""
    snapshots: list[tuple[int, str, str]] = []
    written = {s.id for s in change.snapshots}
    for cls, pk in fetched.read_rows:
        read = fetched.rows[cls, pk]
        if read is None:
            continue
        if cls is Template:
            row.t_pk, row.t_xmin = pk, read.xmin
        elif cls is Worker:
            row.k_pk, row.k_xmin = pk, read.xmin
        elif cls is Snapshot and pk not in written:
            snapshots.append((cell_of(read.record), pk, read.xmin))
    if snapshots:
        row.r_cells, row.r_pks, row.r_xmins = map(list, zip(*snapshots, strict=True))


def _add_slots(row: ChangeRow, change: Change, fetched: Fetched) -> None:
    for name, difference in change.slots:
        if difference > 0:
            assert row.w_take is None, "an actor takes one slot at a time"
            chosen = fetched.rows[Worker, name]
            assert chosen is not None, "it was chosen from them"
            row.w_take, row.w_take_xmin = name, chosen.xmin
            # Where to begin to look for a free slot: anywhere, so that not everybody looks through the same taken ones.
            row.w_take_from = random.randrange(max(chosen.record.capacity, 1))
        else:
            assert row.w_free is None, "an actor frees the one slot that it has"
            row.w_free = name


def _add_snapshots(row: ChangeRow, snapshots: tuple[Snapshot, ...], fetched: Fetched) -> None:
    row.s_cells = [cell_of(s) for s in snapshots]
    row.s_pks = [s.id for s in snapshots]
    row.s_xmins = [fetched.xmin(Snapshot, s.id) if s.version > 1 else None for s in snapshots]
    row.s_versions = [s.version for s in snapshots]
    row.s_actor_uids = [s.actor_uid for s in snapshots]
    row.s_namespaces = [s.namespace for s in snapshots]
    row.s_states = [s.state for s in snapshots]
    row.s_templates = [s.template for s in snapshots]
    row.s_datas = [encode(s).decode() for s in snapshots]


_LOCK = "SELECT FROM actors WHERE cell = $1::smallint AND pk = $2::text FOR NO KEY UPDATE"
_WRITE = "SELECT codes, xact::text, event FROM write_changes_v1($1::text, $2::json, $3::int)"


async def write(
    connection: AsyncConnection[Any], writer: str, rows: Sequence[ChangeRow], wait_ms: int | None = None
) -> list[Written]:
    """Writes changes in one transaction, each if what it was decided from is still so.

    Args:
        wait_ms: for a row that another transaction has locked, at most; as long as the connection allows by default.

    Raises:
        psycopg.Error: none was written; with a conflict (`postgres_errors.CONFLICTS`) because one of them is stale.
    """
    values = [writer, encode(rows).decode(), wait_ms]
    if chosen := [(row.cell, row.a_pk) for row in rows if row.chosen]:
        # What nobody has named is kept. One that was may be condemned by who has locked the actor's row just now; so it
        # is waited for before what was read of it is compared.
        async with connection.transaction():
            for actor in chosen:
                await connection.execute(_LOCK, actor)
            found = await (await connection.execute(_WRITE, values, prepare=True)).fetchone()
    else:
        found = await (await connection.execute(_WRITE, values, prepare=True)).fetchone()
    assert found is not None
    codes, xmin, event = found
    return [Written(code, xmin or "", event or 0) for code in codes.split(",")]


def effects(change: Change) -> Effects:
    """The events of a change, in their order."""
    found: Effects = [(EventType.PUT, s) for s in change.snapshots]
    if change.actor is not None:
        found.append((EventType.DELETED if change.delete_actor else EventType.PUT, change.actor))
    if change.operation is not None:
        found.append((EventType.PUT, change.operation))
    return found
