"""The schema of the database: which one it has, which one this program knows, and how it gets from one to the next."""

from __future__ import annotations

import importlib.resources
import re
from typing import Any, NamedTuple

from psycopg import AsyncConnection

from greenroom.core.errors import FailedPrecondition
from greenroom.store.postgres_rows import CELLS, PARTITIONS

#: Held while the schema is brought up to date, so that of several programs that start at once one does it. Any number
#: that nobody else uses in this database: "greenroom" as hexadecimal digits of its first letters.
ADVISORY_LOCK = 0x677265656E

#: Beyond a statement's ordinary time: a migration may have to look at every row of a large table. It waits for a table
#: no longer than other statements do, because those queue up behind it; then it is tried again.
MIGRATION_TIMEOUT_MS = 3_600_000

_TABLE = "CREATE TABLE IF NOT EXISTS schema (version int NOT NULL, compatible_from int NOT NULL)"
_HEADER = re.compile(r"^-- compatible_from: (\d+)\n")


class Migration(NamedTuple):
    """``compatible_from``: the oldest schema whose programs can use the database afterwards too."""

    sql: str
    compatible_from: int


def migrations() -> list[Migration]:
    """The scripts in order; script n (from 1) leads from schema n - 1 to n."""
    folder = importlib.resources.files("greenroom.store") / "migrations_postgres"
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".sql"))
    assert [int(n[:4]) for n in names] == list(range(1, len(names) + 1)), f"migrations not numbered in order: {names}"
    return [parse((folder / n).read_text(encoding="utf-8")) for n in names]


def parse(script: str) -> Migration:
    """A script begins with a line ``-- compatible_from: N``."""
    header = _HEADER.match(script)
    assert header, f"a migration does not begin with what it is compatible from: {script[:80]}"
    return Migration(script, int(header[1]))


async def migrate(connection: AsyncConnection[Any], scripts: list[Migration], where: str) -> None:
    """Brings the schema up to date, in one transaction; however many programs do it at once, it is done once.

    A database that is newer is left alone. It can be used if its last migration says so.

    Raises:
        FailedPrecondition: it can't be used by this program (reason ``SCHEMA_TOO_NEW``).
        psycopg.Error
    """
    if await _have(connection, scripts, where) >= len(scripts):
        return
    async with connection.transaction():
        await connection.execute(f"SET LOCAL statement_timeout = {MIGRATION_TIMEOUT_MS}")
        await connection.execute(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
        have = await _have(connection, scripts, where)
        for migration in scripts[have:]:
            await connection.execute(migration.sql, prepare=False)
        if have < len(scripts):
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema (version int NOT NULL, compatible_from int NOT NULL)"
            )
            await connection.execute("DELETE FROM schema")
            await connection.execute(
                "INSERT INTO schema VALUES ($1::int, $2::int)", [len(scripts), scripts[-1].compatible_from]
            )


async def partitions(connection: AsyncConnection[Any]) -> list[int]:
    """In which partition each cell is; the same for every table that has partitions."""
    sql = (
        "SELECT part FROM generate_series(0, $1 - 1) cell, generate_series(0, $2 - 1) part "
        "WHERE satisfies_hash_partition('actors'::regclass, $2, part, cell::smallint) ORDER BY cell"
    )
    found = [part for (part,) in await (await connection.execute(sql, [CELLS, PARTITIONS])).fetchall()]
    assert len(found) == CELLS, "each cell is in one partition"
    return found


async def check(connection: AsyncConnection[Any], scripts: list[Migration], where: str) -> None:
    """Raises `FailedPrecondition` as `migrate`."""
    await _have(connection, scripts, where)


async def _have(connection: AsyncConnection[Any], scripts: list[Migration], where: str) -> int:
    """The schema that there is; 0 for none."""
    [exists] = await (await connection.execute("SELECT to_regclass('schema') IS NOT NULL")).fetchone()  # type: ignore[misc]
    if not exists:
        return 0
    row = await (await connection.execute("SELECT version, compatible_from FROM schema")).fetchone()
    version, compatible_from = row or (0, 0)
    if compatible_from > len(scripts):
        raise FailedPrecondition(
            f"{where} has schema {version}, but this program knows schemas up to {len(scripts)}: a newer Greenroom "
            "wrote it; start that version or a newer one, or use another database",
            reason="SCHEMA_TOO_NEW",
            metadata={"schema": str(version), "known": str(len(scripts))},
        )
    return int(version)
