"""What a store gives by itself: whole wake-ups (begin_resume, finish_resume) and suspends per second.

PostgreSQL is a server of its own with fsync and synchronous_commit on, on this machine's disk and the same cores, and
the load comes from several processes, each with its own store and its own actors, `--concurrency` calls at a time in
all.
SQLite has one process. Actors are created through the same `apply`; each is woken once by a store that has not seen it
before (cold), suspended, and woken again (warm).

Goal with PostgreSQL: more than 1000 cold wake-ups per second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop
from _kit import WORK, conditions, percentile, report, say

from greenroom.core.commands import BeginResume, BeginSuspend, CreateActor, FinishResume, FinishSuspend, Outcome
from greenroom.core.records import Endpoint, Key, Operation
from greenroom.store.port import Store
from greenroom.store.postgres import PostgresStore
from greenroom.store.sqlite import SqliteStore
from greenroom.testing.contracts.store_world import World, made_by, template
from greenroom.testing.postgres import PostgresServer

GOAL_PER_S = 1000
WORKERS = 8
ENDPOINT = Endpoint(host="10.0.0.2", port=8080, netns="/run/netns/one", device="veth1")


class Load:
    """Calls of one process: ``concurrency`` at a time over its own actors."""

    def __init__(self, store: Store, name: str, actors: int, concurrency: int) -> None:
        self._store = store
        self._keys = [Key("bench", f"{name}-{n:06}") for n in range(actors)]
        self._name = name
        self._concurrency = concurrency
        self._operations = 0

    async def run(self, step: str) -> dict[str, Any]:
        call: Callable[[Key], Awaitable[None]] = getattr(self, step.partition("-")[0])
        latencies: list[float] = []
        keys = iter(self._keys)

        async def one(keys: Iterator[Key]) -> None:
            for key in keys:
                started = time.perf_counter()
                await call(key)
                latencies.append(time.perf_counter() - started)

        own = time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(one(keys))
        return {"latencies": latencies, "cpu_s": time.process_time() - own}

    def _id(self) -> str:
        self._operations += 1
        return f"{time.time_ns():x}-{self._name}-{self._operations:06}"

    async def create(self, key: Key) -> None:
        now = self._store.clock()
        await self._store.apply(
            CreateActor(key=key, now=now, operation_id=self._id(), uid=f"uid-{key.name}", template="t")
        )

    async def wake(self, key: Key) -> None:
        now = self._store.clock()
        change = await self._store.apply(BeginResume(key=key, now=now, operation_id=self._id(), owner=self._name))
        op = self._begun(change.outcome, change.operation)
        await self._store.apply(
            FinishResume(key=key, now=now, operation_id=op.id, generation=op.generation, endpoint=ENDPOINT)
        )

    async def suspend(self, key: Key) -> None:
        now, ids = self._store.clock(), self._id()
        begin = BeginSuspend(key=key, now=now, operation_id=ids, owner=self._name, snapshot_id=f"s-{ids}")
        change = await self._store.apply(begin)
        op = self._begun(change.outcome, change.operation)
        await self._store.apply(
            FinishSuspend(key=key, now=now, operation_id=op.id, generation=op.generation, snapshot=made_by(op))
        )

    @staticmethod
    def _begun(outcome: Outcome, operation: Operation | None) -> Operation:
        assert outcome is Outcome.CHANGED and operation is not None, outcome
        return operation


STEPS = ("create", "wake-cold", "suspend", "wake-warm")


async def child(where: str, name: str, actors: int, concurrency: int) -> None:
    """Waits for a line, does a step, says what it measured; step by step."""
    store = await open_store(where)
    load = Load(store, name, actors, concurrency)
    loop = asyncio.get_running_loop()
    print(json.dumps({"ready": True}), flush=True)
    while step := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        if step == "reopen":  # nothing is known from before
            await store.close()
            store = load._store = await open_store(where)
            print(json.dumps({}), flush=True)
        else:
            print(json.dumps(await load.run(step)), flush=True)
    await store.close()


async def open_store(where: str) -> Store:
    return await (PostgresStore.open(where) if "://" in where else SqliteStore.open(Path(where)))


def tree_cpu_seconds(pid: int) -> float:
    """Of a process and its children, also those that have ended."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().partition(" (")
            fields = rest.rpartition(") ")[2].split()
            if int(name) == pid:
                total += sum(map(int, fields[11:15]))
            elif int(fields[1]) == pid:
                total += sum(map(int, fields[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def measure(where: str, server: int, args: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    processes = args.processes if "://" in where else 1
    each = args.actors // processes
    command = [sys.executable, __file__, "--child", where, "--actors", str(each)]
    command += ["--concurrency", str(args.concurrency // processes)]
    with contextlib.ExitStack() as stack:
        children = []
        for n in range(processes):
            process = subprocess.Popen(
                [*command, "--name", f"p{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.stdin.close)  # type: ignore[union-attr]
            children.append(process)

        def all_do(step: str) -> list[dict[str, Any]]:
            for c in children:
                assert c.stdin is not None
                c.stdin.write(step + "\n")
                c.stdin.flush()
            return answers()

        def answers() -> list[dict[str, Any]]:
            return [json.loads(c.stdout.readline()) for c in children]  # type: ignore[union-attr]

        answers()
        for step in STEPS:
            if step == "wake-cold":
                all_do("reopen")
            before, started = tree_cpu_seconds(server) if server else 0.0, time.perf_counter()
            said = all_do(step)
            seconds = time.perf_counter() - started
            latencies = [s for a in said for s in a["latencies"]]
            served = tree_cpu_seconds(server) - before if server else 0.0
            name = step.replace("-", "_")
            count = len(latencies)
            figures |= {
                f"{name}_per_s": round(count / seconds, 1),
                f"{name}_p50_ms": round(percentile(latencies, 0.5) * 1e3, 2),
                f"{name}_p99_ms": round(percentile(latencies, 0.99) * 1e3, 2),
                f"{name}_client_cpu_us_each": round(sum(a["cpu_s"] for a in said) / count * 1e6, 1),
                f"{name}_server_cpu_us_each": round(served / count * 1e6, 1),
            }
            say(
                f"{name}: {figures[f'{name}_per_s']} per s, CPU each: client "
                f"{figures[f'{name}_client_cpu_us_each']} us, server {figures[f'{name}_server_cpu_us_each']} us"
            )
    return figures


async def prepare(where: str, actors: int) -> None:
    store = await open_store(where)
    # As many slots as actors, and some to spare, so that nobody waits for one.
    slots = {f"w{n}": actors // WORKERS + 100 for n in range(WORKERS)}
    await World(store).setup(slots)
    await store.put(template(namespace="bench"))
    await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument("--actors", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        uvloop.run(child(args.child, args.name, args.actors, args.concurrency))
        return
    before = conditions()
    directory = WORK / "store"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if args.store == "postgres":
        with PostgresServer(durable=True) as server:
            where = server.url(server.create_database())
            asyncio.run(prepare(where, args.actors))
            assert server.process is not None
            figures = measure(where, server.process.pid, args)
    else:
        where = str(directory)
        asyncio.run(prepare(where, args.actors))
        figures = measure(where, 0, args)
    shutil.rmtree(directory)
    setup = {k: getattr(args, k) for k in ("store", "actors", "concurrency", "processes")}
    ok = args.store == "sqlite" or figures["wake_cold_per_s"] > GOAL_PER_S
    report(f"store-{args.store}", {**setup, "goal_per_s": GOAL_PER_S, **figures}, before=before, ok=ok)


if __name__ == "__main__":
    main()
