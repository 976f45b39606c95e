"""How many sleeping actors the control plane can wake in a second, sandboxes aside.

The `sim` backend answers at once, everything else is real: the server and its agent are processes of their own, the
store is SQLite with synchronous=FULL on this machine's disk, and each wake-up is the first request to an actor that
sleeps. Two ways in: an HTTP request through the gateway, and a ResumeActor call through gRPC; 32 at a time. The load
comes from a third process on the same two cores.

The same with PostgreSQL: two replicas, each with its gateway and half of the load, share one database (commits synced)
and one agent; database, replicas, agent and load generator share the two cores.

Goal: at least 1000 wake-ups per second through the gateway, on either store. The floor in the same run: as many fsyncs,
one after the other, of the same disk, and requests to actors that are awake already.

    python bench/control.py [--wakes 5000] [--store sqlite|postgres|both]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop
from _kit import WORK, conditions, percentile, report, say

from greenroom.api import convert
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api.client import AioClient
from greenroom.core.records import Operation, OperationState, Probe, TemplateSpec, TemplateState
from greenroom.testing.live import GREENROOM, LiveServer, cpu_seconds, descendants
from greenroom.testing.postgres import PostgresServer

GOAL_PER_S = 1000
CONCURRENCY = 32


class Connection(asyncio.Protocol):
    """A keep-alive HTTP/1.1 client connection that costs the load generator as little as possible."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._answer: asyncio.Future[int] | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's do not derive from it

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        assert self._answer is not None
        self._answer.set_result(self._parser.get_status_code())

    def request(self, actor: str) -> asyncio.Future[int]:
        self._answer = asyncio.get_running_loop().create_future()
        head = f"GET /inc HTTP/1.1\r\nHost: bench\r\nGreenroom-Actor: default/{actor}\r\n\r\n"
        self.transport.write(head.encode())
        return self._answer


async def flood(
    names: Iterator[str], concurrency: int, make: Callable[[], Awaitable[Callable[[str], Awaitable[None]]]]
) -> tuple[float, list[float]]:
    """Works through ``names``, ``concurrency`` at a time; (seconds in all, seconds of each)."""
    latencies: list[float] = []

    async def one() -> None:
        call = await make()
        for name in names:
            started = time.perf_counter()
            await call(name)
            latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one())
    return time.perf_counter() - started, latencies


async def through_gateway(address: tuple[str, int], names: list[str], concurrency: int) -> tuple[float, list[float]]:
    loop = asyncio.get_running_loop()

    async def make() -> Callable[[str], Awaitable[None]]:
        _, connection = await loop.create_connection(Connection, *address)

        async def call(name: str) -> None:
            status = await connection.request(name)
            if status != 200:
                raise SystemExit(f"actor {name} answered {status}")

        return call

    return await flood(iter(names), concurrency, make)


async def through_grpc(client: AioClient, names: list[str], concurrency: int) -> tuple[float, list[float]]:
    async def make() -> Callable[[str], Awaitable[None]]:
        async def call(name: str) -> None:
            operation = await client.actors.ResumeActor(pb.ActorRequest(namespace="default", name=name))
            if convert.from_message(Operation, operation).state is not OperationState.DONE:
                raise SystemExit(f"actor {name} did not wake: {operation}")

        return call

    return await flood(iter(names), concurrency, make)


async def create(client: AioClient, names: list[str]) -> None:
    async def make() -> Callable[[str], Awaitable[None]]:
        async def call(name: str) -> None:
            await client.actors.CreateActor(pb.CreateActorRequest(namespace="default", name=name, template="sim"))

        return call

    await flood(iter(names), 64, make)


def fsyncs_per_s(directory: Path, seconds: float = 1.0) -> float:
    """What the disk gives: 4 KiB appended and synced, one after the other."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            file.write(bytes(4096))
            file.flush()
            os.fdatasync(file.fileno())
            count += 1
        return count / (time.perf_counter() - started)


async def measure(server: LiveServer, wakes: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    pids = server.pids()
    client = AioClient(server.address)
    runs = {
        "gateway": lambda names: through_gateway(server.gateway, names, CONCURRENCY),
        "gateway_awake": lambda names: through_gateway(server.gateway, names, CONCURRENCY),
        "grpc": lambda names: through_grpc(client, names, CONCURRENCY),
        "gateway_alone": lambda names: through_gateway(server.gateway, names, 1),
    }
    names = {"gateway": "g", "gateway_awake": "g", "grpc": "r", "gateway_alone": "a"}
    counts = {"gateway_alone": wakes // 10}
    for prefix in ("g", "r", "a"):
        await create(client, [f"{prefix}{n}" for n in range(wakes)])
    for run, work in runs.items():
        count = counts.get(run, wakes)
        before, own = cpu_seconds(pids), time.process_time()
        seconds, latencies = await work([f"{names[run]}{n}" for n in range(count)])
        spent, own = cpu_seconds(pids) - before, time.process_time() - own
        figures |= {
            f"{run}_per_s": round(count / seconds, 1),
            f"{run}_p50_ms": round(percentile(latencies, 0.5) * 1e3, 2),
            f"{run}_p99_ms": round(percentile(latencies, 0.99) * 1e3, 2),
            f"{run}_cpu_us_each": round(spent / count * 1e6, 1),
            f"{run}_load_generator_cpu_us_each": round(own / count * 1e6, 1),
        }
        say(f"{run}: {figures[f'{run}_per_s']} per s, {figures[f'{run}_cpu_us_each']} us of CPU each")
    await client.close()
    return figures


async def measure_replicas(cluster: Cluster, wakes: int) -> dict[str, Any]:
    """Half of the load through each replica's gateway, at the same time."""
    figures: dict[str, Any] = {}
    client = AioClient(cluster.replicas[0].address)
    await create(client, [f"p{n}" for n in range(wakes)])
    await client.close()
    gateways = [replica.gateway for replica in cluster.replicas]
    for run in ("wakes", "awake"):
        shares = [[f"p{n}" for n in range(k, wakes, len(gateways))] for k in range(len(gateways))]
        parts = {name: cpu_seconds(pids) for name, pids in cluster.pids().items()}
        own, started = time.process_time(), time.perf_counter()
        each = CONCURRENCY // len(gateways)
        took = await asyncio.gather(
            *(through_gateway(gateway, names, each) for gateway, names in zip(gateways, shares, strict=True))
        )
        seconds, own = time.perf_counter() - started, time.process_time() - own
        latencies = [latency for _, part in took for latency in part]
        spent = {name: cpu_seconds(pids) - parts[name] for name, pids in cluster.pids().items()}
        figures |= {
            f"{run}_per_s": round(wakes / seconds, 1),
            f"{run}_p50_ms": round(percentile(latencies, 0.5) * 1e3, 2),
            f"{run}_p99_ms": round(percentile(latencies, 0.99) * 1e3, 2),
            f"{run}_load_generator_cpu_us_each": round(own / wakes * 1e6, 1),
            **{f"{run}_{name}_cpu_us_each": round(s / wakes * 1e6, 1) for name, s in spent.items()},
        }
        say(f"{run}: {figures[f'{run}_per_s']} per s; CPU in us each: {spent_line(spent, wakes)}")
    return figures


def spent_line(spent: dict[str, float], wakes: int) -> str:
    return ", ".join(f"{name} {s / wakes * 1e6:.0f}" for name, s in spent.items())


class Cluster:
    """Two replicas on one PostgreSQL that syncs every commit, and one agent of the `sim` backend that both reach."""

    def __init__(self, server: PostgresServer, home: Path, slots: int) -> None:
        self._server = server
        url = server.url(server.create_database())
        shared = (f"--store={url}", f"--snapshots={home / 'snapshots'}", "--no-workers", "--log-level=warning")
        self.replicas = [
            LiveServer(home / name, backend="sim", workers=0, slots=1, options=(*shared, f"--name={name}"))
            for name in ("a", "b")
        ]
        links = [f"--control=unix:{home / name / 'run' / 'agents.sock'}" for name in ("a", "b")]
        places = ["--worker=w0", "--pool=default", "--backend=sim", f"--slots={slots}", f"--state-dir={home / 'w0'}"]
        stores = [f"--images={home / 'images'}", f"--snapshots={home / 'snapshots'}", "--log-level=warning"]
        self._agent_command = [*GREENROOM, "agent", *places, *stores, *links]
        self._log = home / "w0.log"

    def __enter__(self) -> Cluster:
        for replica in self.replicas:
            replica.start()
        with self._log.open("ab") as log:
            self._agent = subprocess.Popen(self._agent_command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._agent.send_signal(signal.SIGUSR1)  # wipe: see greenroom.cli.agent
        self._agent.wait(60)
        for replica in self.replicas:
            replica.stop()

    def pids(self) -> dict[str, list[int]]:
        assert self._server.process is not None
        postmaster = self._server.process.pid
        servers = [r.process.pid for r in self.replicas if r.process is not None]
        return {"replicas": servers, "agent": [self._agent.pid], "postgres": [postmaster, *descendants(postmaster)]}


def postgres(wakes: int) -> dict[str, Any]:
    home = WORK / "control-postgres"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    settings = {"shared_buffers": "256MB"}
    with (
        PostgresServer(durable=True, settings=settings, directory=home / "pg") as server,
        Cluster(server, home, min(10_000, wakes + 16)) as cluster,
    ):
        spec = TemplateSpec(image="none", readyz=Probe(path="/healthz"), idle_timeout_s=0)
        template = cluster.replicas[0].apply("sim", spec)
        assert template.state is TemplateState.READY, template
        figures = uvloop.run(measure_replicas(cluster, wakes))
        figures["fsyncs_per_s"] = round(fsyncs_per_s(home), 1)
    shutil.rmtree(home)
    return figures


def embedded(wakes: int) -> dict[str, Any]:
    shutil.rmtree(WORK / "control", ignore_errors=True)
    server = LiveServer(WORK / "control", backend="sim", workers=1, slots=10_000, options=("--log-level=warning",))
    slots = 3 * wakes
    server.slots = min(10_000, slots)
    server.workers = -(-slots // server.slots)
    server.start()
    try:
        spec = TemplateSpec(image="none", readyz=Probe(path="/healthz"), idle_timeout_s=0)
        template = server.apply("sim", spec)
        assert template.state is TemplateState.READY, template
        figures = uvloop.run(measure(server, wakes))
        figures["fsyncs_per_s"] = round(fsyncs_per_s(server.data_dir), 1)
    finally:
        server.stop()
    shutil.rmtree(WORK / "control")
    return {"workers": server.workers, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wakes", type=int, default=5000, help="actors woken in each run")
    parser.add_argument("--store", choices=("sqlite", "postgres", "both"), default="both")
    args = parser.parse_args()
    before = conditions()
    setup = {"wakes": args.wakes, "concurrency": CONCURRENCY, "goal_per_s": GOAL_PER_S}
    figures: dict[str, Any] = {}
    reached: list[float] = []
    if args.store != "postgres":
        figures["sqlite"] = embedded(args.wakes)
        reached.append(figures["sqlite"]["gateway_per_s"])
    if args.store != "sqlite":
        figures["postgres"] = postgres(args.wakes)
        reached.append(figures["postgres"]["wakes_per_s"])
    report("control", {**setup, **figures}, before=before, ok=min(reached) >= GOAL_PER_S)


if __name__ == "__main__":
    main()
