"""What a command's decision is made from: read in one statement, then looked at without waiting.

`transaction.load` asks for rows one after the other, and each would be a round trip. So what it is going to ask for is
fetched first (`fetch`), all in one statement and hence in one state of the database, and `Fetched` answers it. What was
not fetched it asks for with `Wanted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from string import Formatter
from typing import Any

from psycopg import AsyncConnection

from greenroom.core.commands import (
    ActorCommand,
    Begin,
    CreateActor,
    FinishUpload,
    LoseSnapshot,
    OperationCommand,
    RequestCancel,
    TakeOver,
)
from greenroom.core.records import Actor, Lease, Operation, Snapshot, Template, Worker
from greenroom.store.port import R, Stored
from greenroom.store.postgres_hints import Hints
from greenroom.store.postgres_rows import BY_KIND, TABLES, Reference, Row, cell
from greenroom.store.transaction import request_key


class Wanted(Exception):
    """A row was not fetched; or, with ``Worker`` and a pool, the pool's workers were not."""

    def __init__(self, cls: type[Stored], pk: str, *, pool: bool = False) -> None:
        super().__init__(cls, pk)
        self.cls, self.pk, self.pool = cls, pk, pool


class Fetched:
    """`transaction.Rows`, for reading, over what was fetched. Notes which rows were read.

    Attributes:
        rows: what was fetched; None where there is no such row.
        read_rows: what the decision is made from.
        pools: of which all workers were fetched, and their names.
        sure: it all belongs to one state of the database.
        assumed_new: an operation that is taken to be new, without having looked.
    """

    def __init__(self, hints: Hints | None = None, *, new_operation: str = "", new_actor: str = "") -> None:
        """With ``hints``, rows that were not fetched are looked for there, and an operation and an actor of the names
        that are given are taken to be new."""
        self.rows: dict[Reference, Row | None] = {}
        self.read_rows: set[Reference] = set()
        self.sure = True
        self.assumed_new = False
        self._hints = hints
        self._new_operation = new_operation
        self._new_actor = new_actor
        self._requests: dict[str, str] = {}  # request key -> operation id, or ""
        self._owned: dict[str, list[str]] = {}  # actor uid -> snapshot ids
        self.pools: dict[str, list[str]] = {}

    def put(self, cls: type[Stored], pk: str, row: Row | None) -> None:
        self.rows[cls, pk] = row

    def put_request(self, request: str, operation_id: str) -> None:
        self._requests[request] = operation_id

    def put_owned(self, actor_uid: str, ids: list[str]) -> None:
        self._owned[actor_uid] = ids

    def put_pool(self, pool: str, workers: list[str]) -> None:
        self.pools[pool] = workers

    def xmin(self, cls: type[Stored], pk: str) -> str | None:
        row = self.rows.get((cls, pk))
        return row.xmin if row is not None else None

    # transaction.Rows

    def read(self, cls: type[R], pk: str) -> R | None:
        if (cls, pk) not in self.rows:
            self.put(cls, pk, self._guess(cls, pk))
        row = self.rows[cls, pk]
        self.read_rows.add((cls, pk))
        return row.record if row is not None else None

    def _guess(self, cls: type[Stored], pk: str) -> Row | None:
        row = self._hints.get(cls, pk) if self._hints is not None else None
        if row is None:
            if cls is Operation and pk == self._new_operation:
                self.assumed_new = True
            elif not (cls is Actor and pk == self._new_actor):
                raise Wanted(cls, pk)
        self.sure = False
        return row

    def operation_of_request(self, request: str) -> Operation | None:
        # One that was not looked for is when the new operation is written.
        found = self._requests.get(request)
        return self.read(Operation, found) if found else None

    def snapshots_of(self, actor_uid: str) -> Sequence[Snapshot]:
        if actor_uid not in self._owned:
            raise Wanted(Snapshot, actor_uid)  # that all are known is only sure when they were just read
        return [s for s in (self.read(Snapshot, pk) for pk in self._owned[actor_uid]) if s is not None]

    def workers_of(self, pool: str) -> Sequence[Worker]:
        """Not noted as read: only the one that is chosen must still be as it was."""
        if pool in self.pools:
            found = [self.rows[Worker, name] for name in self.pools[pool]]
            return [row.record for row in found if row is not None]
        rows = self._hints.workers_of(pool) if self._hints is not None else None
        if rows is None:
            raise Wanted(Worker, pool, pool=True)
        self.sure = False
        self.rows |= {(Worker, row.record.name): row for row in rows}
        return [row.record for row in rows]

    def bound_to(self, worker: str) -> int:
        raise NotImplementedError("counted by the database")

    def insert(self, record: Stored) -> None:
        raise NotImplementedError("written by `postgres_change`")

    replace = insert

    def delete(self, cls: type[Stored], pk: str) -> None:
        raise NotImplementedError("written by `postgres_change`")


def guess(hints: Hints, command: ActorCommand) -> Fetched:
    """Nothing fetched: what can be decided from ``hints``."""
    if isinstance(command, CreateActor):
        taken = hints.get(Actor, str(command.key)) is not None
        return Fetched(hints, new_operation=command.operation_id, new_actor="" if taken else str(command.key))
    return Fetched(hints, new_operation=command.operation_id if isinstance(command, Begin) else "")


# --- fetching ---------------------------------------------------------------------------------------------

#: The parts of the statement; each gives (what, key, xmin, data, count). ``a`` is the actor, ``t`` the template.
_PARTS = {
    "actor": "SELECT 'Actor', a.pk, a.xmin::text, a.data, 0 FROM a",
    # Of whatever actor: an id is taken once for all.
    "prior": "SELECT 'Operation', o.pk, o.xmin::text, o.data, 0 FROM operations o WHERE o.pk = {operation}",
    "operation": "SELECT 'Operation', o.pk, o.xmin::text, o.data, 0 FROM operations_{part} o "
    "WHERE o.cell = {cell} AND o.pk = {operation}",
    "request": "(SELECT 'request', o.pk, o.xmin::text, o.data, 0 FROM operations o "
    "WHERE o.request = {request} AND o.request <> '' ORDER BY o.pk LIMIT 1)",
    "lease": "SELECT 'Lease', l.pk, l.xmin::text, l.data, 0 "
    "FROM a JOIN leases_{part} l ON l.cell = {cell} AND l.pk = a.uid",
    # The actor's operation, which its lease names too: nothing has to look into the actor's JSON.
    "current": "SELECT 'Operation', o.pk, o.xmin::text, o.data, 0 FROM a JOIN leases_{part} l ON l.cell = {cell} "
    "AND l.pk = a.uid JOIN operations_{part} o ON o.cell = {cell} AND o.pk = l.operation",
    "template": "SELECT 'Template', t.pk, t.row_xmin::text, t.data, 0 FROM t",
    "golden": "SELECT 'Snapshot', s.pk, s.xmin::text, s.data, 0 FROM t JOIN snapshots s ON s.pk = t.golden",
    # Where the actor that the command names is the snapshot's own.
    "named": "SELECT 'Snapshot', s.pk, s.xmin::text, s.data, 0 FROM snapshots_{part} s "
    "WHERE s.cell = {cell} AND s.pk = {snapshot}",
    "owned": "SELECT 'owned', s.pk, s.xmin::text, s.data, 0 "
    "FROM a JOIN snapshots_{part} s ON s.cell = {cell} AND s.actor_uid = a.uid",
    "workers": "SELECT 'Worker', w.pk, w.xmin::text, w.data, "
    "(SELECT count(*) FROM slots x WHERE x.worker = w.pk AND x.actor_uid <> '') "
    "FROM t JOIN workers w ON w.pool = t.pool",
}
_ACTOR = "a AS (SELECT pk, uid, template, data, xmin FROM actors_{part} WHERE cell = {cell} AND pk = {actor})"
_TEMPLATES = {
    "named": "t AS (SELECT t.*, t.xmin AS row_xmin FROM templates t WHERE t.pk = {template})",
    "of actor": "t AS (SELECT t.*, t.xmin AS row_xmin FROM templates t "
    "WHERE t.pk = {namespace} || '/' || (SELECT template FROM a))",
}
#: Which parts of the statement read what of the `View`. What is missing here is fetched when it is asked for.
_NEEDS = {
    "template": ("template",),
    "source": ("owned",),
    "previous": ("owned",),
    "golden": ("template", "golden"),
    "restart": ("template", "golden", "owned"),
    "named": ("named",),
    "owned": ("owned",),
    "workers": ("template", "workers"),
    "lease": ("lease",),
    "prior": ("prior",),
}


@cache
def _statement(cls: type[ActorCommand], needs: frozenset[str], request: bool, part: int) -> tuple[str, list[str]]:
    """The statement for a class of commands and a partition, and which values it takes in which order."""
    parts = {"actor", *(part for need in needs for part in _NEEDS.get(need, ()))}
    if needs >= {"template", "source"}:
        parts.add("golden")
    parts.add("operation" if issubclass(cls, OperationCommand | TakeOver | RequestCancel) else "current")
    if request:
        parts.add("request")
    ctes = [_ACTOR]
    if "template" in parts:
        ctes.append(_TEMPLATES["named" if cls is CreateActor else "of actor"])
    text = f"WITH {', '.join(ctes)} {' UNION ALL '.join(_PARTS[p] for p in _PARTS if p in parts)}"
    names = list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(text) if name and name != "part"))
    return text.format(part=part, **{name: f"${i}" for i, name in enumerate(names, 1)}), names


#: What is the same for many actors and seldom changes: left out of a fetch with hints.
_SHARED = frozenset({"template", "golden", "restart", "workers"})


async def fetch(
    connection: AsyncConnection[Any], part: int, command: ActorCommand, hints: Hints | None = None
) -> Fetched:
    """What ``command`` is going to be decided from, as far as it can be known; the actor is in partition ``part``. With
    ``hints``, what is not the actor's own is left to them."""
    key, begins = command.key, isinstance(command, Begin | CreateActor)
    request = request_key(key.namespace, command.request_id) if isinstance(command, Begin | CreateActor) else ""
    needs = command.needs - _SHARED if hints is not None else command.needs
    sql, names = _statement(type(command), needs, bool(request), part)
    values: dict[str, Any] = {"cell": cell(*key), "actor": str(key), "namespace": key.namespace, "request": request}
    values["operation"] = getattr(command, "operation_id", "")
    values["snapshot"] = command.snapshot_id if isinstance(command, FinishUpload | LoseSnapshot) else ""
    values["template"] = f"{key.namespace}/{command.template}" if isinstance(command, CreateActor) else ""
    found = await (await connection.execute(sql, [values[n] for n in names], prepare=True)).fetchall()

    fetched = Fetched(hints)
    fetched.put(Actor, str(key), None)
    if begins:
        fetched.put(Operation, values["operation"], None)
    owned, workers, first_request = [], [], ""
    for what, pk, xmin, data, count in found:
        if what == "request":
            what, first_request = "Operation", pk
        elif what == "owned":
            what = "Snapshot"
            owned.append(pk)
        elif what == "Worker":
            workers.append(pk)
        table = BY_KIND[what]
        fetched.put(table.cls, pk, Row(table.record(data, count), xmin))
    fetched.put_request(request, first_request)
    actor = fetched.rows[Actor, str(key)]
    if actor is not None:
        if "lease" in needs and (Lease, actor.record.uid) not in fetched.rows:
            fetched.put(Lease, actor.record.uid, None)
        if not needs.isdisjoint(("source", "previous", "owned")):
            fetched.put_owned(actor.record.uid, sorted(owned))
    if "template" in needs:
        name = values["template"] or (f"{key.namespace}/{actor.record.template}" if actor is not None else "")
        template = fetched.rows.setdefault((Template, name), None)
        if template is not None and "workers" in needs:
            fetched.put_pool(template.record.spec.pool, sorted(workers))
    return fetched


async def fetch_more(connection: AsyncConnection[Any], fetched: Fetched, wanted: Wanted) -> None:
    """What could not be known before; then what is decided is not from one state of the database."""
    fetched.sure = False
    table = TABLES[wanted.cls]
    select = _WORKERS if wanted.pool else table.select_one
    found = await (await connection.execute(select, [wanted.pk], prepare=True)).fetchall()
    rows = [Row(table.record(data, *count), xmin) for data, xmin, *count in found]
    if wanted.pool:
        for row in rows:
            fetched.put(Worker, row.record.name, row)
        fetched.put_pool(wanted.pk, [row.record.name for row in rows])
    else:
        fetched.put(wanted.cls, wanted.pk, rows[0] if rows else None)


_WORKERS = f"{TABLES[Worker].select} WHERE t.pool = $1 ORDER BY t.pk"
