"""What actors cost that sleep: a million of them, each with its snapshot's record, in SQLite and in PostgreSQL.

For each store two databases, a small one (1000 actors) and a large one, in the same run:

- bytes per actor: of the rows and indexes of actors and snapshots (PostgreSQL, after VACUUM), of the file (SQLite)
- creating: through the API's path (`CreateActor`, 32 at a time, each commit synced) on a sample; the rest is written
  straight into the tables (COPY, or one transaction a batch), with the stores' own rows
- a page of ListActors, from random places
- waking (begin and finish), one at a time, by a store that has not seen the actor: small and large database in turns.
  Goal: the median in the large one is at most 1.2 times that in the small one
- restart: from opening the store to the first actor that is awake; for PostgreSQL also with the server started anew
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import psycopg
import uvloop
from _kit import WORK, conditions, percentile, report, say

from greenroom.core.commands import BeginResume, CreateActor, FinishResume
from greenroom.core.records import Actor, ActorState, Endpoint, FileDigest, Key, Snapshot
from greenroom.store import postgres_rows, sqlite_rows
from greenroom.store.port import Store
from greenroom.store.postgres import PostgresStore
from greenroom.store.sqlite import SqliteStore
from greenroom.store.sqlite_file import DATABASE_FILE
from greenroom.testing.contracts.store_world import World, snapshot, template
from greenroom.testing.postgres import PostgresServer

GOAL_RATIO = 1.2
SMALL = 1_000
SAMPLE = 2_000
CONCURRENCY = 32
WAKES = 400
PAGES = 200
PAGE = 100
BATCH = 10_000
NAMESPACE = "bench"
ENDPOINT = Endpoint(host="10.0.0.2", port=8080, netns="/run/netns/one", device="veth1")
WHEN = 1_790_000_000.0


def record_ids(n: int) -> tuple[str, str, str]:
    """Name, uid and snapshot id of actor ``n``, as long as real ones."""
    return f"actor-{n:07}", f"{n:08x}{'5' * 24}", f"{n:08x}{'7' * 24}"


def actors(count: int) -> Iterator[tuple[Actor, Snapshot]]:
    """Actors that were woken and suspended once."""
    for n in range(count):
        name, uid, snapshot_id = record_ids(n)
        when = WHEN + n
        yield (
            Actor(
                namespace=NAMESPACE,
                name=name,
                uid=uid,
                template="t",
                state=ActorState.SUSPENDED,
                created_at=when,
                state_since=when + 60.5,
                generation=2,
                version=5,
                last_worker="w1",
                snapshot=snapshot_id,
                wakes=1,
                suspended_at=when + 60.5,
                durable_at=when + 60.25,
            ),
            snapshot(
                snapshot_id,
                namespace=NAMESPACE,
                actor=name,
                actor_uid=uid,
                generation=2,
                created_at=when + 60.25,
                worker="w1",
                image_digest="sha256:" + "ab" * 32,
                fingerprint="f1",
                files=tuple(
                    FileDigest(name=file, size_bytes=12_345_678 + n, sha256=f"{n:064x}")
                    for file in ("memory.img", "files.tar.zst", "state.json")
                ),
                version=1,
            ),
        )


class Place:
    """One database of one kind of store."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._woken = iter(random.Random(1).sample(range(count), min(count, 4 * WAKES)))

    def next_actor(self) -> Key:
        """One that has not been woken."""
        return Key(NAMESPACE, record_ids(next(self._woken))[0])

    async def open(self) -> Store:
        raise NotImplementedError

    def fill(self) -> None:
        raise NotImplementedError

    def size_bytes(self) -> int:
        raise NotImplementedError


class SqlitePlace(Place):
    def __init__(self, directory: Path, count: int) -> None:
        super().__init__(count)
        self._directory = directory

    async def open(self) -> Store:
        return await SqliteStore.open(self._directory)

    def fill(self) -> None:
        connection = apsw.Connection(str(self._directory / DATABASE_FILE))
        rows = actors(self.count)
        while batch := [pair for _, pair in zip(range(BATCH), rows, strict=False)]:
            with connection:
                for records in zip(*batch, strict=True):
                    table = sqlite_rows.TABLES[type(records[0])]
                    connection.executemany(table.insert, [table.row(r) for r in records])
        connection.execute("ANALYZE")
        connection.close()

    def size_bytes(self) -> int:
        return (self._directory / DATABASE_FILE).stat().st_size


class PostgresPlace(Place):
    def __init__(self, server: PostgresServer, count: int) -> None:
        super().__init__(count)
        self.server = server
        self._url = server.url(server.create_database())

    async def open(self) -> Store:
        return await PostgresStore.open(self._url)

    def fill(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            rows = actors(self.count)
            while batch := [pair for _, pair in zip(range(BATCH), rows, strict=False)]:
                for records in zip(*batch, strict=True):
                    table = postgres_rows.TABLES[type(records[0])]
                    columns = ", ".join(("pk", "version", "data", *table.columns))
                    with connection.cursor().copy(f"COPY {table.name} ({columns}) FROM STDIN") as copy:
                        for r in records:
                            copy.write_row((r.pk, r.version, postgres_rows.encode(r).decode(), *table.values(r)))
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")

    def size_bytes(self) -> int:
        with psycopg.connect(self._url) as connection:
            row = connection.execute(
                "SELECT sum(pg_total_relation_size(oid)) FROM pg_class "
                "WHERE relkind = 'r' AND relname ~ '^(actors|snapshots)_[0-9]+$'"
            ).fetchone()
        assert row is not None
        return int(row[0])


async def prepare(place: Place) -> dict[str, Any]:
    """Makes the database and fills it; how fast the API's path creates."""
    store = await place.open()
    await World(store).setup({f"w{n}": 1_000 for n in range(4)})
    await store.put(template(namespace=NAMESPACE))
    numbers = iter(range(SAMPLE))

    async def create() -> None:
        for n in numbers:
            key = Key(NAMESPACE, f"sample-{n:07}")
            ids = {"operation_id": f"create-{n:07}", "uid": f"sample-{n:07}"}
            await store.apply(CreateActor(key=key, now=WHEN, template="t", **ids))

    figures: dict[str, Any] = {}
    if place.count > SMALL:
        started = time.perf_counter()
        await asyncio.gather(*(create() for _ in range(CONCURRENCY)))
        figures["create_per_s"] = round(SAMPLE / (time.perf_counter() - started), 1)
    await store.close()
    started = time.perf_counter()
    place.fill()
    figures["bulk_fill_per_s"] = round(place.count / (time.perf_counter() - started), 1)
    return figures


async def wake(store: Store, key: Key) -> float:
    """Seconds."""
    started = time.perf_counter()
    op_id = f"wake-{key.name}"
    change = await store.apply(BeginResume(key=key, now=store.clock(), operation_id=op_id, owner="bench"))
    assert change.operation is not None and change.operation.id == op_id
    await store.apply(
        FinishResume(
            key=key,
            now=store.clock(),
            operation_id=op_id,
            generation=change.operation.generation,
            endpoint=ENDPOINT,
        )
    )
    return time.perf_counter() - started


async def measure(small: Place, large: Place, restart: Callable[[], None] | None) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    stores = {"small": await small.open(), "large": await large.open()}
    places = {"small": small, "large": large}
    seconds: dict[str, list[float]] = {"small": [], "large": []}
    for name in ("small", "large") * 20:  # connections, plans, caches
        await wake(stores[name], places[name].next_actor())
    for _ in range(WAKES):
        for name in ("small", "large"):
            seconds[name].append(await wake(stores[name], places[name].next_actor()))
    for name, values in seconds.items():
        figures[f"wake_{name}_p50_ms"] = round(percentile(values, 0.5) * 1e3, 3)
        figures[f"wake_{name}_p99_ms"] = round(percentile(values, 0.99) * 1e3, 3)
    figures["wake_ratio"] = round(percentile(seconds["large"], 0.5) / percentile(seconds["small"], 0.5), 3)
    pages: list[float] = []
    r = random.Random(2)
    for _ in range(PAGES):
        after = f"{NAMESPACE}/{record_ids(r.randrange(large.count))[0]}"
        started = time.perf_counter()
        await stores["large"].list(Actor, namespace=NAMESPACE, after=after, limit=PAGE)
        pages.append(time.perf_counter() - started)
    figures["page_p50_ms"] = round(percentile(pages, 0.5) * 1e3, 3)
    figures["page_p99_ms"] = round(percentile(pages, 0.99) * 1e3, 3)
    for store in stores.values():
        await store.close()
    for name, place in places.items():
        started = time.perf_counter()
        store = await place.open()
        await wake(store, place.next_actor())
        figures[f"reopen_{name}_ms"] = round((time.perf_counter() - started) * 1e3, 1)
        await store.close()
    if restart is not None:
        started = time.perf_counter()
        restart()
        store = await large.open()
        await wake(store, large.next_actor())
        figures["server_restart_ms"] = round((time.perf_counter() - started) * 1e3, 1)
        await store.close()
    return figures


def both(make: Callable[[int], Place], count: int, restart: Callable[[], None] | None) -> dict[str, Any]:
    small, large = make(SMALL), make(count)
    uvloop.run(prepare(small))
    figures = uvloop.run(prepare(large))
    figures["bytes_per_actor"] = round(large.size_bytes() / (count + SAMPLE))
    figures |= uvloop.run(measure(small, large, restart))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--actors", type=int, default=1_000_000)
    parser.add_argument("--store", choices=("sqlite", "postgres", "both"), default="both")
    args = parser.parse_args()
    before, home = conditions(), WORK / "dormant"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    figures: dict[str, Any] = {"actors": args.actors, "small": SMALL, "goal_wake_ratio": GOAL_RATIO}
    stores = ("sqlite", "postgres") if args.store == "both" else (args.store,)
    for name in stores:
        if name == "sqlite":
            found = both(lambda n: SqlitePlace(home / str(n), n), args.actors, None)
        else:
            with PostgresServer(durable=True) as server:
                found = both(lambda n: PostgresPlace(server, n), args.actors, server.restart)
        figures[name] = found
        say(f"{name}: {found}")
    shutil.rmtree(home)
    ok = all(figures[name]["wake_ratio"] <= GOAL_RATIO for name in stores)
    report("dormant", figures, before=before, ok=ok)


if __name__ == "__main__":
    main()
