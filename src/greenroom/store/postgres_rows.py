"""Records as rows: the columns, the statements and the codec of each table."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace
from psycopg import sql

from greenroom.core.errors import DataLoss
from greenroom.core.marks import Mark
from greenroom.core.records import Actor, Lease, Operation, Pool, Replica, Snapshot, Template, Worker
from greenroom.core.rosters import Roster
from greenroom.store.port import FILTERS, Stored, Where
from greenroom.store.transaction import request_key

#: Actors are spread over so many cells, and these over the partitions of the tables. Part of the schema: never changed.
CELLS = 64

#: How many partitions these tables have.
PARTITIONS = 8

#: Tables that are partitioned by cell.
PARTITIONED: frozenset[type[Stored]] = frozenset({Actor, Snapshot, Operation, Lease})

encode = msgspec.json.Encoder().encode


def cell(namespace: str, name: str) -> int:
    """The cell of an actor, and of all that belongs to it."""
    return zlib.crc32(f"{namespace}/{name}".encode()) % CELLS


def cell_of(record: Actor | Operation | Snapshot) -> int:
    return cell(record.namespace, record.actor if isinstance(record, Snapshot) else record.name)


Reference = tuple[type[Stored], str]  # class and key


class Row(NamedTuple):
    """A record as it was read. ``xmin``: the transaction that wrote the row; with the key it names this state of the
    record, because a row that is written again, or deleted and made anew, has another."""

    record: Any
    xmin: str


def xmin_of(xact: str) -> str:
    """What rows show that were written by a transaction of that number, of which they keep the lower half."""
    return str(int(xact) & 0xFFFFFFFF)


#: The columns beside ``pk``, ``version`` and ``data``, and what of the record is in them; see the schema.
_COLUMNS: dict[type[Stored], dict[str, Callable[[Any], Any]]] = {
    Actor: {"cell": cell_of} | {f: attrgetter(f) for f in ("state", "worker", "template", "uid")},
    Snapshot: {"cell": cell_of} | {f: attrgetter(f) for f in ("actor_uid", "namespace", "state", "template")},
    Operation: {"cell": cell_of}
    | {f: attrgetter(f) for f in ("kind", "namespace", "state", "uid")}
    | {"request": lambda op: request_key(op.namespace, op.request_id)},
    Lease: {},  # written by `write_change` alone
    Template: {
        "state": attrgetter("state"),
        "pool": attrgetter("spec.pool"),
        "golden": attrgetter("golden_snapshot"),
    },
    Pool: {},
    Roster: {},
    Mark: {},
    Replica: {},
    Worker: {f: attrgetter(f) for f in ("pool", "state", "capacity")},  # written by `put_worker` alone
}


class Table:
    """The statements and the codec of one class of records. Statements take their values by number."""

    def __init__(self, cls: type[Stored]) -> None:
        self.cls = cls
        self.kind = cls.__name__
        self.name = f"{cls.__name__.lower()}s"
        self._namespaced = "namespace" in cls.__struct_fields__
        # The namespace begins the key of what has a name; of the others it is a column.
        self._namespace_in_key = self._namespaced and cls is not Operation and cls is not Snapshot
        self._columns = _COLUMNS[cls]
        self.columns = list(self._columns)
        self._decode = msgspec.json.Decoder(cls).decode
        # A worker's taken slots are counted whenever it is read.
        self.select = f"SELECT t.data, t.xmin::text{_USED if cls is Worker else ''} FROM {self.name} t"
        self.select_one = f"{self.select} WHERE t.pk = $1"
        #: The same in one partition.
        self.select_in = [self.select_one.replace(f"{self.name} t", f"{self.name}_{n} t") for n in range(PARTITIONS)]
        self.select_version = f"SELECT t.version FROM {self.name} t WHERE t.pk = $1"

        # Writes: $1 writer, $2 key, $3 new version, $4 JSON, $5 old version, then the columns. Each says the event's
        # number and the transaction's if it was done.
        columns = self.columns
        number = {c: f"${i}" for i, c in enumerate(columns, 6)}
        event = "INSERT INTO outbox (writer, type, kind, pk, data)"
        # A key is taken whatever the cell; $5 is there so that both writes take the same values.
        self.insert = (
            f"WITH r AS (INSERT INTO {self.name} (pk, version, data{''.join(f', {c}' for c in columns)}) "
            f"SELECT $2, $3, $4{''.join(f', {number[c]}' for c in columns)} "
            f"WHERE $5 = 0 AND NOT EXISTS (SELECT FROM {self.name} WHERE pk = $2) ON CONFLICT DO NOTHING RETURNING 1) "
            f"{event} SELECT $1, 'Put', '{self.kind}', $2, $4 FROM r RETURNING id, xact::text"
        )
        changes = "".join(f", {c} = {number[c]}" for c in columns if c != "cell")
        within = f" AND cell = {number['cell']}" if "cell" in columns else ""
        self.replace = (
            f"WITH r AS (UPDATE {self.name} SET version = $3, data = $4{changes} "
            f"WHERE pk = $2 AND version = $5{within} RETURNING 1) "
            f"{event} SELECT $1, 'Put', '{self.kind}', $2, $4 FROM r RETURNING id, xact::text"
        )
        #: $1 writer, $2 key, $3 version.
        self.remove = (
            f"WITH r AS (DELETE FROM {self.name} WHERE pk = $2 AND version = $3 RETURNING data) "
            f"{event} SELECT $1, 'Deleted', '{self.kind}', $2, r.data FROM r RETURNING id, data"
        )

    def values(self, record: Any) -> list[Any]:
        """Of the columns of `insert` and `replace`, in their order."""
        return [value(record) for value in self._columns.values()]

    def record(self, data: Any, used: int = 0) -> Any:
        """Raises `DataLoss` if ``data`` is not one."""
        try:
            record = self._decode(data)
        except msgspec.DecodeError as error:
            raise DataLoss(
                f"a row of table {self.name} is not a {self.kind}: {error}: {data[:200]}", reason="DATABASE_CORRUPT"
            ) from error
        return replace(record, used=used) if used else record

    def page(self, namespace: str, where: Where, after: str, limit: int) -> sql.Composed:
        """The statement of a list. The values are in it, so that it is planned for them: which index is best depends on
        how many rows have them, and some are for certain values only."""
        within = namespace if self._namespace_in_key else ""
        conditions = [sql.SQL("t.pk > {}").format(max(after, f"{within}/") if within else after)]
        if within:
            conditions.append(sql.SQL("t.pk < {}").format(f"{within}0"))  # "0" follows "/"
        elif namespace and self._namespaced:
            conditions.append(sql.SQL("t.namespace = {}").format(namespace))
        for name, value in where.items():
            if isinstance(value, tuple):
                among = sql.SQL("t.{} = ANY({}::text[])").format(sql.Identifier(name), [*map(str, value)])
            else:
                among = sql.SQL("t.{} = {}").format(sql.Identifier(name), str(value))
            conditions.append(among)
        select, order = sql.SQL(self.select), sql.SQL("ORDER BY t.pk LIMIT {}").format(limit)
        return sql.SQL("{} WHERE {} {}").format(select, sql.SQL(" AND ").join(conditions), order)


_USED = ", (SELECT count(*) FROM slots s WHERE s.worker = t.pk AND s.actor_uid <> '')"

TABLES: dict[type[Stored], Table] = {cls: Table(cls) for cls in FILTERS}
BY_KIND: dict[str, Table] = {table.kind: table for table in TABLES.values()}


def without_used(worker: Worker) -> bytes:
    """A worker as it is stored."""
    return encode(replace(worker, used=0))
