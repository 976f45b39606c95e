"""Whether a Greenroom that runs for long stays as large as it is, and what collecting costs the control plane.

*flat*: 50 actors are woken and suspended again, over and over (one of each is a generation), on real agents and a real
server; half of them with ``durability: local``. From time to time, when nothing is under way, bytes and files on disk
are counted by what they are for, and the rows of every table. After a warm-up (each actor has its snapshot and the one
before by then) a line is fitted through the samples. Goal: rows and files do not change at all; bytes do not drift by
more than a hundredth, since memory images differ a little in size. What is kept up to a limit is measured against its
limit instead: operations (the latest 10 000 and what a round of the janitor adds), logs (8 incarnations of an actor on
a worker, 1 MiB each), the agents' journals, the database file, sandboxes that are kept warm. Then the actors are
deleted, and nothing of them may be left.

*decisions*: the rules of collection without store and network. 200 workers with 10 000 handles each report for an hour
of their own clock, each when its own schedule says so. CPU time of a decision about a full report, reports a second at
the peak and on the mean (goal: the peak of ten seconds at most twice the mean), and how many reports it takes until a
worker that has lost 1 000 sandboxes by itself is agreed with again (goal: two).

    python bench/gc.py [--only flat,decisions] [--rounds 1000 | --quick] [--backend gvisor] [--store postgres]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any

import aiohttp
import psycopg
import uvloop
from _kit import WORK, conditions, percentile, report, say

from greenroom.agent import journal, logs
from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient
from greenroom.core.gc import control, worker
from greenroom.core.gc.records import Entry, Local, Member, Orders, Papers, Resource, ResourceState
from greenroom.core.records import Durability, Operation, OperationState, Probe, TemplateSpec, TemplateState
from greenroom.store.port import KEPT_OPERATIONS
from greenroom.testing import counter_app
from greenroom.testing.leaks import leaks, read
from greenroom.testing.leaks.compare import MORE_OPERATIONS
from greenroom.testing.leaks.places import files_below
from greenroom.testing.leftovers import leftovers
from greenroom.testing.live import LiveServer
from greenroom.testing.postgres import PostgresServer
from greenroom.testing.python_image import build_python_image

HOME = WORK / "gc"
PARTS = ("flat", "decisions")

# --- flat -------------------------------------------------------------------------------------------------

WORKERS, SLOTS, WARM, AT_ONCE = 2, 4, 1, 4
QUICK_ROUNDS, ROUNDS = 20, 1_000
#: Rounds before the first sample that counts, and samples after that.
WARM_UP, SAMPLES = 50, 20
#: Until nothing is under way: the janitor comes round every 5 s, uploads may be many.
SETTLE_S = 60.0
#: What bytes may drift by, of their mean.
DRIFT = 0.01
DURABILITIES = {"acked": Durability.ACKED_AFTER_UPLOAD, "local": Durability.LOCAL}
#: Kept up to a limit, and measured against that: tables, and what is on disk.
BOUNDED_TABLES = frozenset({"operations", "outbox"})
BOUNDED = frozenset({"logs", "journal", "database", "sandboxes"})


@dataclass(frozen=True, slots=True)
class Sample:
    """``disk``: (bytes, files) by what they are for; ``rows`` by table."""

    generation: int
    disk: dict[str, tuple[int, int]]
    rows: dict[str, int]


def part_of(path: str) -> str:
    """What a file below the data directory is for; "" for what is no part of it (this server's output)."""
    parts = path.split("/")
    if parts[0] == "workers" and len(parts) > 3:
        return parts[2]
    if parts[0] == "workers":
        return "journal" if parts[-1].startswith("journal") else "worker"
    if parts[0].startswith("greenroom.db"):
        return "database"
    return "" if parts[0] == "server.log" else parts[0]


def usage(data_dir: Path) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = dict.fromkeys(("snapshots", "held", "staging", "cache", *BOUNDED), (0, 0))
    for path in files_below(data_dir):
        with contextlib.suppress(FileNotFoundError):
            size = (data_dir / path).lstat().st_size
            if part := part_of(path):
                was = found.get(part, (0, 0))
                found[part] = (was[0] + size, was[1] + 1)
    return found


class Flat:
    def __init__(self, server: LiveServer, url: str, prefix: str, actors: int) -> None:
        self.server = server
        self.url = url
        self.prefix = prefix
        self.names = [f"a{n}" for n in range(actors)]
        self.generation = 0
        self.samples: list[Sample] = []
        self.settled: list[float] = []
        self.failed: Counter[str] = Counter()

    async def run(self, rounds: int) -> list[str]:
        """What leaks at the end."""
        warm_up = min(WARM_UP, rounds // 4)
        every = max(1, (rounds - warm_up) // SAMPLES)
        connector = aiohttp.TCPConnector(force_close=True)
        async with AioClient(self.server.address) as client, aiohttp.ClientSession(connector=connector) as session:
            templates = sorted(DURABILITIES)
            for number, name in enumerate(self.names):
                template = templates[number % len(templates)]
                request = pb.CreateActorRequest(namespace="default", name=name, template=template)
                await client.actors.CreateActor(request)
            for number in range(1, rounds + 1):
                await self._round(client, session)
                if number >= warm_up and (number - warm_up) % every == 0:
                    await self._sample()
            for name in self.names:
                await client.actors.DeleteActor(pb.ActorRequest(namespace="default", name=name))
        return await self._settle()

    async def _round(self, client: AioClient, session: aiohttp.ClientSession) -> None:
        names = iter(self.names)

        async def some() -> None:
            for name in names:
                await self._generation(client, session, name)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    async def _generation(self, client: AioClient, session: aiohttp.ClientSession, name: str) -> None:
        host, port = self.server.gateway
        headers = {"Greenroom-Actor": f"default/{name}"}
        async with session.get(f"http://{host}:{port}/inc", headers=headers) as answer:
            if answer.status != 200:
                self.failed[f"wake: http {answer.status} {answer.headers.get('Greenroom-Error', '')}"] += 1
                return
        message = await client.actors.SuspendActor(pb.ActorRequest(namespace="default", name=name))
        operation = convert.from_message(Operation, message)
        if operation.state is not OperationState.DONE:
            self.failed[f"suspend: {operation.error.reason if operation.error else operation.state}"] += 1
            return
        self.generation += 1

    async def _settle(self) -> list[str]:
        began, data = time.monotonic(), self.server.data_dir
        while True:
            found = await asyncio.to_thread(leaks, data, database=self.url, prefix=self.prefix)
            if not found or time.monotonic() - began > SETTLE_S:
                self.settled.append(time.monotonic() - began)
                return found
            await asyncio.sleep(0.1)

    async def _sample(self) -> None:
        for line in await self._settle():
            say(f"after {self.generation} generations: {line}")
        rows = read(self.url or self.server.data_dir / "greenroom.db")
        self.samples.append(Sample(self.generation, usage(self.server.data_dir), dict(rows.counts)))
        say(f"{self.generation} generations: {self.samples[-1].disk}")

    # --- what it shows ------------------------------------------------------------------------------------

    def line(self, of: Callable[[Sample], int]) -> dict[str, Any]:
        values = [of(sample) for sample in self.samples]
        slope, _ = linear_regression([s.generation for s in self.samples], values)
        span = self.samples[-1].generation - self.samples[0].generation
        middle = mean(values)
        return {
            "first": values[0],
            "last": values[-1],
            "most": max(values),
            "per_generation": round(slope, 4),
            "drift": round(slope * span / middle, 4) if middle else 0.0,
            "changes": len(set(values)) > 1,
        }

    def figures(self, rounds: int) -> tuple[dict[str, Any], list[str]]:
        """And what misses its goal."""
        parts = sorted({part for sample in self.samples for part in sample.disk})
        tables = sorted(self.samples[-1].rows)
        disk = {
            part: {
                "bytes": self.line(lambda s, p=part: s.disk.get(p, (0, 0))[0]),  # type: ignore[misc]
                "files": self.line(lambda s, p=part: s.disk.get(p, (0, 0))[1]),  # type: ignore[misc]
            }
            for part in parts
        }
        rows = {table: self.line(lambda s, t=table: s.rows[t]) for table in tables}  # type: ignore[misc]
        places = len(self.names) * WORKERS
        limits = {
            "logs": (places * logs.KEPT_FILES * logs.MAX_FILE_BYTES, places * logs.KEPT_FILES),
            "journal": (WORKERS * 2 * journal.REWRITE_BYTES, WORKERS),
        }
        bad = [f"{table}: {line}" for table, line in rows.items() if line["changes"] and table not in BOUNDED_TABLES]
        if rows["operations"]["most"] > KEPT_OPERATIONS + MORE_OPERATIONS:
            bad.append(f"operations: {rows['operations']}")
        for part, found in disk.items():
            size, files = found["bytes"], found["files"]
            if part in limits:
                if size["most"] > limits[part][0] or files["most"] > limits[part][1]:
                    bad.append(f"{part}: {found}, limits {limits[part]}")
            elif part not in BOUNDED and (files["changes"] or abs(size["drift"]) > DRIFT):
                bad.append(f"{part}: {found}")
        return {
            "actors": len(self.names),
            "rounds": rounds,
            "generations": self.generation,
            "samples": len(self.samples),
            "settled_p50_s": round(percentile(self.settled, 0.5), 1),
            "settled_max_s": round(max(self.settled), 1),
            "failed": dict(self.failed),
            "disk": disk,
            "rows": rows,
            "limits": {part: {"bytes": b, "files": f} for part, (b, f) in limits.items()},
        }, bad


@contextlib.contextmanager
def database(store: str) -> Iterator[str]:
    if store == "sqlite":
        yield ""
        return
    with PostgresServer(durable=True) as server:
        yield server.url(server.create_database())


def database_bytes(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    assert row is not None
    return int(row[0])


def flat(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    image = build_python_image(HOME / "image", app=Path(counter_app.__file__), compression="none")
    with database(args.store) as url:
        data = HOME / "d"
        shared = (f"--store={url}", f"--snapshots={data / 'snapshots'}", "--name=one") if url else ()
        options = (f"--warm={WARM}", "--log-level=warning", *shared)
        server = LiveServer(data, backend=args.backend, workers=WORKERS, slots=SLOTS, options=options)
        server.start()
        try:
            for name, durability in DURABILITIES.items():
                spec = TemplateSpec(
                    image=image, readyz=Probe(path="/healthz"), idle_timeout_s=0.0, durability=durability
                )
                template = server.apply(name, spec)
                if template.state is not TemplateState.READY:
                    raise SystemExit(f"template {name} is {template.state}: {template.message}")
            part = Flat(server, url, "one-" if url else "", args.actors)
            began = time.monotonic()
            left = uvloop.run(part.run(rounds))
            took = time.monotonic() - began
            size = {"postgres_bytes": database_bytes(url)} if url else {}
        finally:
            server.stop()
        left += leftovers(data)
    figures, bad = part.figures(rounds)
    for line in (*bad, *left):
        say(line)
    more = {"backend": args.backend, "store": args.store, "seconds": round(took, 1), **size}
    return {**more, **figures, "not_flat": bad, "left_at_the_end": left}, not (bad or left or part.failed)


# --- decisions --------------------------------------------------------------------------------------------

#: Of a worker's own clock.
HOUR_S = 3600
#: Reports of these many seconds are counted together: in a single one there are some seven, and chance rules.
WINDOW_S = 10
DECISIONS = 50


class Fleet:
    """One worker stands for all: they are alike, and a decision about one reads nothing of another."""

    def __init__(self, handles: int) -> None:
        self.member = Member(name="w", incarnation="disk", claim="claim", seq=handles)
        self.papers = Papers(incarnation="disk", claim="claim", epoch=1, closed_seq=handles, answered=True)
        names = [f"{n:032x}" for n in range(handles)]
        self.rows = {
            h: Resource(handle=h, worker="w", create_seq=n + 1, state=ResourceState.LIVE) for n, h in enumerate(names)
        }
        self.table = {h: Entry(handle=h, create_seq=n + 1, state=Local.LIVE) for n, h in enumerate(names)}

    def sync(self) -> float:
        """One report, decided and written; CPU seconds of the decision."""
        said = worker.report(self.papers, "w", self.table.values())
        rows = list(self.rows.values())
        began = time.process_time()
        decision = control.sync(self.member, rows, said)
        took = time.process_time() - began
        self.member = decision.member
        for row in decision.removed:
            del self.rows[row.handle]
        self.rows |= {row.handle: row for row in decision.put}
        assert isinstance(decision.answer, Orders)
        self.papers = worker.close(self.papers, decision.answer)
        return took


def spread(workers: int, seed: int) -> tuple[float, float]:
    """(the most, the mean) reports a second, of workers that all begin in the same moment."""
    draw = random.Random(seed).random
    windows: Counter[int] = Counter()
    for _ in range(workers):
        at = control.first_pause_s(draw())
        while at < HOUR_S:
            windows[int(at / WINDOW_S)] += 1
            at += control.pause_s(draw())
    return max(windows.values()) / WINDOW_S, windows.total() / HOUR_S


def decisions(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    fleet = Fleet(args.handles)
    times = [fleet.sync() for _ in range(DECISIONS)]
    say(f"a decision about {args.handles} handles: {percentile(times, 0.5) * 1000:.1f} ms of CPU")
    peak, average = spread(args.workers, args.seed)
    say(f"{args.workers} workers: {average:.2f} reports a second, {peak:.2f} at the peak of {WINDOW_S} s")
    for handle in random.Random(args.seed).sample(sorted(fleet.table), args.lost):
        del fleet.table[handle]
    reports = 0
    while fleet.rows.keys() != fleet.table.keys():
        fleet.sync()
        reports += 1
    say(f"{args.lost} that went by themselves are known after {reports} reports")
    figures = {
        "workers": args.workers,
        "handles": args.handles,
        "decision_cpu_ms_p50": round(percentile(times, 0.5) * 1000, 2),
        "decision_cpu_ms_p99": round(percentile(times, 0.99) * 1000, 2),
        "decision_cores": round(percentile(times, 0.5) * average, 3),
        "reports_per_s_mean": round(average, 2),
        "reports_per_s_peak": round(peak, 2),
        "peak_to_mean": round(peak / average, 2),
        "reports_until_lost_are_known": reports,
    }
    return figures, peak / average <= 2.0 and reports <= 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help=f"flat: {QUICK_ROUNDS} rounds: 1 000 generations of 50")
    parser.add_argument("--rounds", type=int, default=0, help=f"flat: of all actors [{ROUNDS}]")
    parser.add_argument("--actors", type=int, default=50)
    parser.add_argument("--backend", default="gvisor" if os.geteuid() == 0 else "process")
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--handles", type=int, default=10_000)
    parser.add_argument("--lost", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=32)
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := {*parts} - {*PARTS}:
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    before = conditions()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it started is ended too
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    figures: dict[str, Any] = {}
    ok = True
    for name, run in {"flat": flat, "decisions": decisions}.items():
        if name in parts:
            figures[name], good = run(args)
            ok = ok and good
    report("gc", figures, before=before, ok=ok)
    if ok:
        shutil.rmtree(HOME, ignore_errors=True)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
