"""Records as rows: the statements of each table, and `transaction.Rows` over one connection.

Statements are prepared once (apsw keeps them by their text) and decoders are made once; a record costs one bind and one
step, whatever its number of fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import apsw
import msgspec

from greenroom.core.errors import DataLoss
from greenroom.core.records import Lease, Operation, Snapshot, Worker
from greenroom.store.port import FILTERS, R, Stored, Where
from greenroom.store.transaction import request_key

_encode = msgspec.json.Encoder().encode

#: Columns that never change while a record lives: an update leaves them, and so their indexes, alone.
_FIXED = frozenset({"actor_uid", "kind", "namespace", "request", "template", "uid"})


class Table:
    """The statements and the codec of one class of records."""

    def __init__(self, cls: type[Stored]) -> None:
        self.cls = cls
        self.name = f"{cls.__name__.lower()}s"
        fields = sorted(FILTERS[cls])
        # The namespace begins the key of what has a name; of the others it is a column.
        self._namespaced = "namespace" in cls.__struct_fields__
        self._namespace_in_key = self._namespaced and cls is not Operation and cls is not Snapshot
        if self._namespaced and not self._namespace_in_key:
            fields.append("namespace")
        self._values: Callable[[Any], tuple[Any, ...]] = attrgetter("pk", *fields) if fields else lambda r: (r.pk,)
        columns = ["pk", *fields, "request", "data"] if cls is Operation else ["pk", *fields, "data"]
        number = {name: f"?{i}" for i, name in enumerate(columns, 1)}
        values = ", ".join(number.values())
        changes = ", ".join(f"{c} = {number[c]}" for c in columns[1:] if c not in _FIXED)
        self.insert = f"INSERT INTO {self.name} ({', '.join(columns)}) VALUES ({values})"
        self.update = f"UPDATE {self.name} SET {changes} WHERE pk = {number['pk']}"
        self.replace = f"INSERT OR REPLACE INTO {self.name} ({', '.join(columns)}) VALUES ({values})"
        self.select = f"SELECT data FROM {self.name} WHERE pk = ?"
        self.remove = f"DELETE FROM {self.name} WHERE pk = ?"
        self._decode = msgspec.json.Decoder(cls).decode

    def row(self, record: Stored) -> tuple[Any, ...]:
        values = self._values(record)
        if isinstance(record, Operation):
            values = (*values, request_key(record.namespace, record.request_id))
        return (*values, _encode(record).decode())

    def record(self, data: Any) -> Any:
        try:
            return self._decode(data)
        except msgspec.DecodeError as error:
            raise DataLoss(
                f"a row of table {self.name} is not a {self.cls.__name__}: {error}: {data[:200]}",
                reason="DATABASE_CORRUPT",
            ) from error

    def page(self, namespace: str, where: Where, after: str, limit: int) -> tuple[str, tuple[Any, ...]]:
        """The statement of a list, and its values."""
        conditions, values = ["pk > ?"], [after]
        if namespace and self._namespace_in_key:
            values[0] = max(after, f"{namespace}/")
            conditions.append("pk < ?")
            values.append(f"{namespace}0")  # "0" follows "/"
        elif namespace and self._namespaced:
            conditions.append("namespace = ?")
            values.append(namespace)
        for name, value in where.items():
            among = value if isinstance(value, tuple) else (value,)
            conditions.append(f"{name} IN ({', '.join('?' * len(among))})")
            values += map(str, among)
        sql = f"SELECT data FROM {self.name} WHERE {' AND '.join(conditions)} ORDER BY pk LIMIT ?"
        return sql, (*values, limit)


TABLES: dict[type[Stored], Table] = {cls: Table(cls) for cls in FILTERS}


def read(connection: apsw.Connection, cls: type[R], pk: str) -> R | None:
    table = TABLES[cls]
    found = connection.execute(table.select, (pk,)).fetchall()
    record: R | None = table.record(found[0][0]) if found else None
    return record


def read_page(
    connection: apsw.Connection, cls: type[R], namespace: str, where: Where, after: str, limit: int
) -> list[R]:
    table = TABLES[cls]
    return [table.record(data) for (data,) in connection.execute(*table.page(namespace, where, after, limit))]


class SqliteRows:
    """`transaction.Rows` of the one connection that writes.

    Because no other process and no other connection writes, workers, which every wake-up compares all of, are kept as
    records; `forget` after a rollback.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._workers: dict[str, Worker] | None = None
        #: Rows written since the beginning, to tell a command that wrote from one that did not.
        self.writes = 0

    def forget(self) -> None:
        self._workers = None

    def read(self, cls: type[R], pk: str) -> R | None:
        if cls is Worker:
            return self._all_workers().get(pk)  # type: ignore[return-value]
        return read(self._connection, cls, pk)

    def operation_of_request(self, request: str) -> Operation | None:
        sql = "SELECT data FROM operations WHERE request = ? AND request <> '' ORDER BY pk LIMIT 1"
        found = self._connection.execute(sql, (request,)).fetchall()
        return TABLES[Operation].record(found[0][0]) if found else None

    def snapshots_of(self, actor_uid: str) -> Sequence[Snapshot]:
        sql = "SELECT data FROM snapshots WHERE actor_uid = ? ORDER BY pk"
        return [TABLES[Snapshot].record(data) for (data,) in self._connection.execute(sql, (actor_uid,))]

    def workers_of(self, pool: str) -> Sequence[Worker]:
        return [w for w in self._all_workers().values() if w.pool == pool]

    def bound_to(self, worker: str) -> int:
        [(count,)] = self._connection.execute("SELECT count(*) FROM actors WHERE worker = ?", (worker,))
        return int(count)

    def insert(self, record: Stored) -> None:
        table = TABLES[type(record)]
        self._write(record, table.insert, table.row(record))

    def replace(self, record: Stored) -> None:
        table = TABLES[type(record)]
        self._write(record, table.replace if isinstance(record, Lease) else table.update, table.row(record))

    def _write(self, record: Stored, sql: str, row: tuple[Any, ...]) -> None:
        self.writes += 1
        self._connection.execute(sql, row)
        if isinstance(record, Worker) and self._workers is not None:
            self._workers[record.name] = record

    def delete(self, cls: type[Stored], pk: str) -> None:
        self.writes += 1
        self._connection.execute(TABLES[cls].remove, (pk,))
        if cls is Worker and self._workers is not None:
            self._workers.pop(pk, None)

    def _all_workers(self) -> dict[str, Worker]:
        if self._workers is None:
            found = self._connection.execute("SELECT data FROM workers ORDER BY pk")
            self._workers = {w.name: w for w in (TABLES[Worker].record(data) for (data,) in found)}
        return self._workers
