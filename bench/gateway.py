"""What a request costs in the gateway: CPU time per request, requests per second, latency; and what a wake-up adds.

Three processes: the gateway (measured), a server on a unix socket that plays the actor, and a raw client that keeps N
connections busy. CPU is that of the gateway process alone, by its own clock, user and system.

``afar``: the same with the actor on another machine, as far as that can be had on one: the way in through its agent
(TLS, one hop more), which is a fourth process. What the agent spends is told beside it.

    python bench/gateway.py [--seconds 3] [--connections 32]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from asyncio import Future
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from greenroom.agent.entrance import EntranceServer
from greenroom.agent.residents import Lodger
from greenroom.core.agentapi import Entrance, Identity, ResidentState
from greenroom.core.records import Endpoint, Key, PhaseTime
from greenroom.engine.bindings import Binding, BindingTable, Wake
from greenroom.gateway.gateway import Gateway

RESULTS = Path(__file__).parent / "results" / "gateway.json"
#: The goal for a keep-alive request, in microseconds of CPU of the gateway process.
GOAL_US = 60.0
#: A wake-up of the fake engine; what the gateway adds to it is measured.
WAKE_S = 0.05
REQUEST = (
    b"GET /items?id=7 HTTP/1.1\r\nHost: a.default.localhost\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n"
    b"Accept-Encoding: gzip, deflate\r\nAuthorization: Bearer 0123456789abcdef0123456789abcdef\r\n\r\n"
)
BODY = b'{"id": 7, "name": "seven", "tags": ["a", "b", "c"]}' * 4
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: bench\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class Waker:
    """Wakes each actor in `WAKE_S`; one wake-up for all who ask."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.bindings = BindingTable()
        self.endpoint = endpoint
        self.afar: Entrance | None = None
        self.wakes = 0
        self._waking: dict[Key, asyncio.Task[Wake]] = {}

    async def wake(self, key: Key) -> Wake:
        if binding := self.bindings.get(key):
            return Wake(binding)
        if key not in self._waking:
            self._waking[key] = asyncio.create_task(self._wake(key))
        return await asyncio.shield(self._waking[key])

    def entrance(self, binding: Binding) -> Entrance | None:
        return self.afar

    async def _wake(self, key: Key) -> Wake:
        await asyncio.sleep(WAKE_S)
        self.wakes += 1
        self.bindings.bind(Binding(key, f"uid-{key.name}", self.wakes, "w", self.endpoint, 0))
        del self._waking[key]
        return Wake(self.bindings._by_key[key], f"op-{self.wakes}", (PhaseTime(name="restore", seconds=WAKE_S),))


def serve_actor(path: str, ready: Connection) -> None:
    class Actor(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(RESPONSE * data.count(b"\r\n\r\n"))  # type: ignore[attr-defined]

    async def main() -> None:
        await asyncio.get_running_loop().create_unix_server(Actor, path)
        ready.send(True)
        await asyncio.Event().wait()

    uvloop.run(main())


def serve_entrance(path: str, link: Connection) -> None:
    """The agent's part: says where it is, then on each question how much CPU time it has used."""

    class Everybody(dict[str, Lodger]):
        def __missing__(self, uid: str) -> Lodger:
            identity = Identity(namespace="default", name=uid, uid=uid, generation=1)
            self[uid] = Lodger(identity, uid, ResidentState.RUNNING, Endpoint(path=path), "")
            return self[uid]

    async def main() -> None:
        lodgers = Everybody()
        server = EntranceServer(lambda uid: lodgers[uid], lambda uid: 0)
        link.send(await server.start("127.0.0.1", 0, "127.0.0.1"))
        while await asyncio.get_running_loop().run_in_executor(None, link.recv):
            used = resource.getrusage(resource.RUSAGE_SELF)
            link.send(used.ru_utime + used.ru_stime)

    uvloop.run(main())


class Load(asyncio.Protocol):
    """Sends the next request when the response to the last is whole."""

    def __init__(self, latencies: list[float], until: float, requests: Iterator[bytes], done: Future[None]) -> None:
        self.latencies, self.until, self.requests, self.done = latencies, until, requests, done
        self.got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.sent = time.perf_counter()
        request = next(self.requests, None)
        if request is not None:
            self.transport.write(request)  # type: ignore[attr-defined]
        elif not self.done.done():
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.got += data
        if not self.got.endswith(BODY):
            return
        assert self.got.startswith(b"HTTP/1.1 200 OK\r\n"), self.got
        self.got = b""
        now = time.perf_counter()
        self.latencies.append(now - self.sent)
        if now < self.until:
            self.ask()
        elif not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"lost with {self.got!r}"))


def load(link: Connection) -> None:
    """Runs what it is told: (port, connections, seconds, requests); sends back the latencies."""

    async def run(port: int, connections: int, seconds: float, requests: list[bytes]) -> list[float]:
        loop = asyncio.get_running_loop()
        latencies: list[float] = []
        source = itertools.repeat(requests[0]) if len(requests) == 1 else iter(requests)
        until = time.perf_counter() + seconds
        done = [loop.create_future() for _ in range(connections)]
        for future in done:
            await loop.create_connection(lambda f=future: Load(latencies, until, source, f), "127.0.0.1", port)
        await asyncio.gather(*done)
        return latencies

    while job := link.recv():
        link.send(uvloop.run(run(*job)))


async def measure(gateway: Gateway, link: Connection, *job: object) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    link.send((gateway.addresses[0][1], *job))
    latencies: list[float] = sorted(await loop.run_in_executor(None, link.recv))
    after, took = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
    n = len(latencies)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "requests": n,
        "requests_per_second": round(n / took),
        "cpu_us_per_request": round((user + system) / n * 1e6, 1),
        "user_us_per_request": round(user / n * 1e6, 1),
        "p50_ms": round(latencies[n // 2] * 1e3, 3),
        "p99_ms": round(latencies[n * 99 // 100] * 1e3, 3),
    }


async def bench_afar(
    path: str, entrance: Entrance, agent: Connection, link: Connection, seconds: float, connections: int
) -> dict[str, object]:
    """Requests to an actor that is reached through its agent; and one connection, with its handshake, for each."""
    waker = Waker(Endpoint(path=path))
    waker.afar = entrance
    gateway = Gateway(waker)
    await gateway.start("127.0.0.1", 0)

    async def both(*job: object) -> dict[str, float]:
        agent.send(True)
        before = agent.recv()
        found = await measure(gateway, link, *job)
        agent.send(True)
        found["agent_cpu_us_per_request"] = round((agent.recv() - before) / found["requests"] * 1e6, 1)
        return found

    try:
        await waker.wake(Key("default", "a"))
        await measure(gateway, link, connections, 0.5, [REQUEST])
        actors = [REQUEST.replace(b"Host: a.", b"Host: w%d." % i) for i in range(int(300 * seconds))]
        return {
            "afar_keep_alive": await both(connections, seconds, [REQUEST]),
            "afar_one_connection": await both(1, seconds / 3, [REQUEST]),
            "afar_wake": await both(connections, 60.0, actors),
        }
    finally:
        await gateway.close(grace_s=1)


async def bench(path: str, link: Connection, seconds: float, connections: int) -> dict[str, object]:
    waker = Waker(Endpoint(path=path))
    gateway = Gateway(waker)
    await gateway.start("127.0.0.1", 0)
    try:
        await waker.wake(Key("default", "a"))
        await measure(gateway, link, connections, 0.5, [REQUEST])  # warm
        keep_alive = await measure(gateway, link, connections, seconds, [REQUEST])
        single = await measure(gateway, link, 1, seconds / 3, [REQUEST])
        post = REQUEST.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 1024\r\n\r\n") + b"x" * 1024
        posts = await measure(gateway, link, connections, seconds / 3, [post])
        # Every request is for another sleeping actor: a wake-up and a connection each.
        actors = [REQUEST.replace(b"Host: a.", b"Host: w%d." % i) for i in range(int(600 * seconds))]
        waking = await measure(gateway, link, connections, 60.0, actors)
        waking["added_by_gateway_ms_p50"] = round(waking["p50_ms"] - WAKE_S * 1e3, 3)
        wakes_before = waker.wakes
        thundering = REQUEST.replace(b"Host: a.", b"Host: herd.")
        herd = await measure(gateway, link, 100, 0.0, [thundering])
        herd["wakes"] = waker.wakes - wakes_before
    finally:
        await gateway.close(grace_s=1)
    return {
        "name": "gateway",
        "keep_alive": keep_alive,
        "one_connection": single,
        "post_1k": posts,
        "wake": waking,
        "herd_of_100": herd,
        "goal_cpu_us": GOAL_US,
        "cpus": os.cpu_count(),
        "ok": keep_alive["cpu_us_per_request"] <= GOAL_US and herd["wakes"] == 1 and herd["requests"] == 100,
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=3.0)
    arguments.add_argument("--connections", type=int, default=32)
    args = arguments.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "actor.sock")
        here, there = context.Pipe()
        actor = context.Process(target=serve_actor, args=(path, there), daemon=True)
        actor.start()
        assert here.recv()
        link, far = context.Pipe()
        client = context.Process(target=load, args=(far,), daemon=True)
        client.start()
        mine, agents = context.Pipe()
        agent = context.Process(target=serve_entrance, args=(path, agents), daemon=True)
        agent.start()
        entrance = mine.recv()
        try:
            result = uvloop.run(bench(path, link, args.seconds, args.connections))
            result |= uvloop.run(bench_afar(path, entrance, mine, link, args.seconds, args.connections))
        finally:
            mine.send(False)
            agent.terminate()
            agent.join(5)
            link.send(None)
            client.join(5)
            actor.terminate()
            actor.join(5)
    for name, numbers in result.items():
        if isinstance(numbers, dict):
            print(f"{name:15}", "  ".join(f"{key} {value}" for key, value in numbers.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
