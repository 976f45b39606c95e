"""What the control plane's database says, read from beside it: nothing that the product has cached comes between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psycopg
from msgspec import structs

from greenroom.core.records import Actor, Lease, Operation, Pool, Record, Replica, Snapshot, Template, Worker
from greenroom.store import sqlite_file

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Rows:
    """All records as of one moment. ``counts``: rows of every table, by its name."""

    actors: tuple[Actor, ...] = ()
    templates: tuple[Template, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    operations: tuple[Operation, ...] = ()
    leases: tuple[Lease, ...] = ()
    workers: tuple[Worker, ...] = ()
    pools: tuple[Pool, ...] = ()
    replicas: tuple[Replica, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()


def read(database: Path | str) -> Rows:
    """``database``: the SQLite file, which a server may be using, or a ``postgresql://`` URL.

    Raises:
        FileNotFoundError: there is no such file.
        apsw.Error, psycopg.Error: it can't be read.
    """
    return _postgres(str(database)) if "://" in str(database) else _sqlite(Path(database))


def _sqlite(path: Path) -> Rows:
    if not path.exists():  # opening it would say "unable to open"
        raise FileNotFoundError(path)
    connection = sqlite_file.open_reader(path)

    def column(query: str) -> list[Any]:
        return [row[0] for row in connection.execute(query)]

    try:
        connection.execute("BEGIN")  # one moment
        names = column("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        counts = {name: column(f"SELECT count(*) FROM {name}")[0] for name in names}
        return _rows(lambda table: column(f"SELECT data FROM {table}"), counts)
    finally:
        connection.close()


def _postgres(url: str) -> Rows:
    with psycopg.connect(url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one moment

        def column(query: str) -> list[Any]:
            return [row[0] for row in connection.execute(query.encode())]

        names = column(
            "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND NOT relispartition "
            "AND relnamespace = 'public'::regnamespace ORDER BY relname"
        )
        counts = {name: column(f'SELECT count(*) FROM "{name}"')[0] for name in names}
        rows = _rows(lambda table: column(f"SELECT data FROM {table}"), counts)
        taken = column("SELECT worker FROM slots WHERE actor_uid <> ''")  # the records do not say it there
        workers = tuple(structs.replace(w, used=taken.count(w.name)) for w in rows.workers)
        return replace(rows, workers=workers)


def _rows(data_of: Any, counts: dict[str, int]) -> Rows:
    def all_of(cls: type[R], table: str) -> tuple[R, ...]:
        decode = msgspec.json.Decoder(cls).decode
        found: Iterable[str | bytes] = data_of(table) if table in counts else ()
        return tuple(map(decode, found))

    return Rows(
        actors=all_of(Actor, "actors"),
        templates=all_of(Template, "templates"),
        snapshots=all_of(Snapshot, "snapshots"),
        operations=all_of(Operation, "operations"),
        leases=all_of(Lease, "leases"),
        workers=all_of(Worker, "workers"),
        pools=all_of(Pool, "pools"),
        replicas=all_of(Replica, "replicas"),
        counts=tuple(counts.items()),
    )
