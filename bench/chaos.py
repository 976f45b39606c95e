"""What is lost when parts die at random: two replicas on one PostgreSQL, four agents with real sandboxes, `kill -9`.

Actors count. Clients send them requests through either replica's gateway and suspend them through either replica's API,
all the time; every few seconds a replica or an agent is killed and started again some seconds later. What the clients
were told is then held against what they are told later:

- *acknowledged suspends lost*: an actor whose suspend was answered DONE comes back with a lower count than it had then.
- *not usable in time*: an actor's requests failed for longer than the lease's life and 5 s, on whichever replica,
  counted from the first that failed or, if parts were killed after that, from the last kill.
- *double incarnations*: a request that began after another one had been answered was answered by an older incarnation,
  or by the same one with a count that is not higher.
- *leaked slots*: at the end, when nothing is under way, a worker's taken slots are not the actors bound to it, or what
  lives on it.

Goal: 0 of each. The sandboxes are gVisor's where this runs as root, else those of the process backend (whose actors
keep their files only).

    python bench/chaos.py [--seconds 300] [--actors 24] [--seed 1] [--backend gvisor|process]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from _kit import WORK, conditions, percentile, report, say

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient
from greenroom.core.errors import GreenroomError
from greenroom.core.records import (
    Actor,
    OnCrash,
    Operation,
    OperationState,
    Probe,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.core.states import BOUND, BUSY
from greenroom.testing import counter_app
from greenroom.testing.live import LiveAgent, LiveServer
from greenroom.testing.postgres import PostgresServer
from greenroom.testing.python_image import build_python_image

HOME = WORK / "chaos"
LEASE_TTL_S = 10.0
WORKER_RETURN_S = 8.0
USABLE_S = LEASE_TTL_S + 5.0
AGENTS, SLOTS = 4, 4
#: Between two kills, and until what was killed is started again.
KILL_EVERY_S = (2.0, 8.0)
RESTART_AFTER_S = (0.2, 4.0)
#: One request, and one suspend, of a client; who waits longer tries the other replica.
REQUEST_TIMEOUT_S = 10.0
#: Until everything has come to rest at the end: an operation's deadline, a lease, and a worker's return.
SETTLE_S = 120.0


@dataclass
class Seen:
    """What clients were told about one actor."""

    saved: int = 0  # count at the last suspend that was acknowledged
    answered: tuple[int, int] = (0, 0)  # (generation, count) of the latest answer
    failing_since: float | None = None
    outages: list[float] = field(default_factory=list)


@dataclass
class Findings:
    lost: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


class Cluster:
    def __init__(self, url: str, backend: str) -> None:
        shared = [f"--store={url}", f"--snapshots={HOME / 'snapshots'}", f"--images={HOME / 'images'}"]
        clocks = [f"--lease-ttl={LEASE_TTL_S:g}", f"--worker-return={WORKER_RETURN_S:g}", "--capacity-wait=20"]
        self.replicas = [
            LiveServer(
                HOME / name,
                backend=backend,
                workers=0,
                slots=SLOTS,
                options=(*shared, *clocks, f"--name={name}", "--no-workers", "--log-level=info"),
            )
            for name in ("a", "b")
        ]
        self.agents = [
            LiveAgent(
                f"w{n}",
                HOME / f"w{n}",
                images=HOME / "images",
                snapshots=HOME / "snapshots",
                control=tuple(replica.control for replica in self.replicas),
                backend=backend,
                slots=SLOTS,
                options=("--warm=1",),
            )
            for n in range(AGENTS)
        ]
        self.down: set[str] = set()
        self.last_kill = 0.0

    def start(self) -> None:
        for replica in self.replicas:
            replica.start()
        for agent in self.agents:
            agent.start()

    def stop(self) -> None:
        for agent in self.agents:
            agent.stop()
        for replica in self.replicas:
            if replica.process is not None and replica.process.poll() is None:
                replica.stop()


class Clients:
    """All clients: one task per actor that sends requests, and some that suspend."""

    def __init__(self, cluster: Cluster, actors: int, seed: int) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self.names = [f"c{n}" for n in range(actors)]
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.found = Findings()
        self.wakes: list[float] = []
        self.session: aiohttp.ClientSession

    async def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self.session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        async with self.session, asyncio.TaskGroup() as group:
            for name in self.names:
                group.create_task(self._drive(name, until))

    async def _drive(self, name: str, until: float) -> None:
        """One client of one actor: what it knows is in order, so it can tell a step back."""
        while time.monotonic() < until or self.seen[name].failing_since is not None:
            await asyncio.sleep(self.random.expovariate(1 / 0.4))
            if self.random.random() < 0.3:
                await self._suspend(name)
            else:
                await self._request(name)
            failing = self.seen[name].failing_since
            if failing is not None and time.monotonic() > until + SETTLE_S:
                self.found.late.append(f"{name} was never usable again")
                return

    async def _request(self, name: str) -> None:
        seen, began = self.seen[name], time.monotonic()
        host, port = self.random.choice(self.cluster.replicas).gateway
        headers = {"Greenroom-Actor": f"default/{name}"}
        try:
            async with self.session.get(f"http://{host}:{port}/inc", headers=headers) as answer:
                body = await answer.read()
                if answer.status != 200:
                    why = answer.headers.get("Greenroom-Error", "")
                    return self._failed(seen, began, f"http {answer.status} {why}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return self._failed(seen, began, type(error).__name__)
        said = json.loads(body)
        now, this = (said["generation"], said["file"]), time.monotonic() - began
        if now[1] <= seen.saved:
            self.found.lost.append(f"{name}: {now[1]} after a suspend that was acknowledged with {seen.saved}")
        if now[0] < seen.answered[0] or (now[0] == seen.answered[0] and now[1] <= seen.answered[1]):
            self.found.doubles.append(f"{name}: (generation, count) {now} after {seen.answered}")
        seen.answered = now
        self.found.counts["requests answered"] += 1
        self.wakes.append(this)
        self._usable(name, seen)

    async def _suspend(self, name: str) -> None:
        seen, count = self.seen[name], self.seen[name].answered[1]
        replica = self.random.choice(self.cluster.replicas)
        client = AioClient(replica.address)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                message = await client.actors.SuspendActor(pb.ActorRequest(namespace="default", name=name))
            operation = convert.from_message(Operation, message)
        except (GreenroomError, TimeoutError) as error:
            self.found.reasons[f"suspend: {getattr(error, 'reason', type(error).__name__)}"] += 1
            return
        finally:
            await client.close()
        if operation.state is OperationState.DONE and operation.id:
            seen.saved = max(seen.saved, count)
            self.found.counts["suspends acknowledged"] += 1
        elif operation.error is not None:
            self.found.reasons[f"suspend failed: {operation.error.reason}"] += 1

    def _failed(self, seen: Seen, began: float, why: str) -> None:
        self.found.reasons[why] += 1
        if seen.failing_since is None:
            seen.failing_since = began

    def _usable(self, name: str, seen: Seen) -> None:
        if seen.failing_since is not None:
            outage = time.monotonic() - max(seen.failing_since, self.cluster.last_kill)
            seen.outages.append(time.monotonic() - seen.failing_since)
            if outage > USABLE_S:
                self.found.late.append(f"{name} was not usable for {outage:.1f} s after the last kill")
            seen.failing_since = None


async def havoc(cluster: Cluster, seconds: float, seed: int, kills: Counter[str]) -> None:
    """Kills a replica or an agent, again and again. Never the last replica: then nobody could answer anybody."""
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    restarts: set[asyncio.Task[None]] = set()
    while time.monotonic() < until:
        await asyncio.sleep(chance.uniform(*KILL_EVERY_S))
        up = [r for r in cluster.replicas if r.data_dir.name not in cluster.down]
        agents = [a for a in cluster.agents if a.name not in cluster.down]
        victims: list[tuple[str, Callable[[], None], Callable[[], None]]] = []
        if len(up) > 1:
            victims += [(r.data_dir.name, r.kill, r.start) for r in up for _ in range(2)]
        if len(agents) > 1:
            victims += [(a.name, a.kill, a.start) for a in agents]
        if not victims:
            continue
        name, kill, start = chance.choice(victims)
        cluster.down.add(name)
        kills["replicas" if name in ("a", "b") else "agents"] += 1
        cluster.last_kill = time.monotonic()
        await asyncio.to_thread(kill)
        task = asyncio.create_task(_again(cluster, name, start, chance.uniform(*RESTART_AFTER_S)))
        restarts.add(task)
        task.add_done_callback(restarts.discard)
    if restarts:
        await asyncio.wait(restarts)


async def _again(cluster: Cluster, name: str, start: Callable[[], None], after_s: float) -> None:
    await asyncio.sleep(after_s)
    await asyncio.to_thread(start)
    cluster.down.discard(name)


async def at_rest(cluster: Cluster) -> list[str]:
    """Waits until nothing is under way; what does not fit then."""
    client = AioClient(cluster.replicas[0].address)
    until = time.monotonic() + SETTLE_S
    try:
        while True:
            problems = await _problems(client)
            if not problems or time.monotonic() > until:
                return problems
            await asyncio.sleep(0.5)
    finally:
        await client.close()


async def _problems(client: AioClient) -> list[str]:
    actors = [convert.from_message(Actor, a) for a in (await client.actors.ListActors(pb.ListActorsRequest())).actors]
    answer = await client.workers.ListWorkers(pb.ListWorkersRequest())
    workers = [convert.from_message(Worker, w) for w in answer.workers]
    bound = Counter(a.worker for a in actors if a.worker)
    found = [f"under way: {a.key} is {a.state}" for a in actors if a.state in BUSY]
    found += [f"{w.name}: {w.used} slots taken, {bound[w.name]} actors" for w in workers if w.used != bound[w.name]]
    found += [f"{a.key} holds a slot while {a.state}" for a in actors if a.worker and a.state not in BOUND]
    found += [f"worker {w.name} is {w.state}" for w in workers if w.state is not WorkerState.ACTIVE]
    return found


async def wait_for(check: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not await check():
        if time.monotonic() > until:
            raise SystemExit(f"{what} took longer than {timeout_s:g} s")
        await asyncio.sleep(0.2)


async def measure(cluster: Cluster, actors: int, seconds: float, seed: int) -> dict[str, Any]:
    clients = Clients(cluster, actors, seed)
    admin = AioClient(cluster.replicas[0].address)
    for name in clients.names:
        request = pb.CreateActorRequest(namespace="default", name=name, template="counter")
        await admin.actors.CreateActor(request)
    await admin.close()
    kills: Counter[str] = Counter()
    load = asyncio.create_task(clients.run(seconds))
    await havoc(cluster, seconds, seed, kills)
    await load
    problems = await at_rest(cluster)
    found = clients.found
    outages = [o for seen in clients.seen.values() for o in seen.outages]
    for line in (*found.lost, *found.doubles, *found.late, *problems):
        say(line)
    return {
        "seconds": seconds,
        "actors": actors,
        "replicas_killed": kills["replicas"],
        "agents_killed": kills["agents"],
        "requests_answered": found.counts["requests answered"],
        "suspends_acknowledged": found.counts["suspends acknowledged"],
        "acknowledged_suspends_lost": len(found.lost),
        "not_usable_in_time": len(found.late),
        "double_incarnations": len(found.doubles),
        "leaked_slots": len(problems),
        "usable_within_s": USABLE_S,
        "outages": len(outages),
        "outage_p50_s": round(percentile(outages, 0.5), 2) if outages else 0.0,
        "outage_max_s": round(max(outages, default=0.0), 2),
        "request_p50_ms": round(percentile(clients.wakes, 0.5) * 1e3, 1) if clients.wakes else 0.0,
        "failures_seen_by_clients": dict(found.reasons.most_common(12)),
        "problems": [*found.lost, *found.doubles, *found.late, *problems][:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--actors", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="gvisor" if os.geteuid() == 0 else "process")
    args = parser.parse_args()
    before = conditions()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    app = build_python_image(HOME / "image", app=Path(counter_app.__file__))
    with PostgresServer(durable=True) as server:
        cluster = Cluster(server.url(server.create_database()), args.backend)
        try:
            cluster.start()
            spec = TemplateSpec(
                image=app,
                readyz=Probe(path="/healthz"),
                idle_timeout_s=5.0,
                on_crash=OnCrash.RESTORE_LAST,
            )
            template = cluster.replicas[0].apply("counter", spec)
            if template.state is not TemplateState.READY:
                raise SystemExit(f"the template is {template.state}: {template.message}")
            figures = uvloop.run(measure(cluster, args.actors, args.seconds, args.seed))
        finally:
            with contextlib.suppress(Exception):
                cluster.stop()
    goals = ("acknowledged_suspends_lost", "not_usable_in_time", "double_incarnations", "leaked_slots")
    ok = all(figures[name] == 0 for name in goals)
    setup = {"backend": args.backend, "agents": AGENTS, "slots": SLOTS, "seed": args.seed, "lease_ttl_s": LEASE_TTL_S}
    report("chaos", {**setup, **figures}, before=before, ok=ok)
    if ok:
        shutil.rmtree(HOME, ignore_errors=True)


if __name__ == "__main__":
    main()
