"""What the gateway's tests need: an engine that wakes at the test's word, actors as raw sockets, and a raw client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenroom.core.agentapi import Entrance
from greenroom.core.errors import NotFound
from greenroom.core.records import Endpoint, Key, PhaseTime
from greenroom.engine.bindings import Binding, BindingTable, Wake
from greenroom.gateway.gateway import Gateway
from greenroom.gateway.limits import Limits

KEY = Key("default", "a")
HOST = b"Host: a.default.localhost\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class FakeWaker:
    """Knows endpoints of actors; a wake-up binds. ``gate`` keeps wake-ups waiting while it is clear."""

    def __init__(self) -> None:
        self.bindings = BindingTable()
        self.endpoints: dict[Key, Endpoint] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()
        #: Of workers that are elsewhere.
        self.entrances: dict[str, Entrance] = {}
        self.calls = 0
        self.operations = 0
        self.error: Exception | None = None
        self.phases: tuple[PhaseTime, ...] = ()
        #: Actors that somebody else has put to sleep, which only who asks hears.
        self.elsewhere: set[Key] = set()
        self._waking: dict[Key, asyncio.Task[Wake]] = {}

    async def wake(self, key: Key) -> Wake:
        self.calls += 1
        self.called.set()
        binding = self.bindings.get(key)
        if binding is not None:
            return Wake(binding)
        task = self._waking.get(key)
        if task is None:
            task = self._waking[key] = asyncio.create_task(self._wake(key))
            task.add_done_callback(lambda _: self._waking.pop(key, None))
        return await asyncio.shield(task)

    async def _wake(self, key: Key) -> Wake:
        self.operations += 1
        operation = f"op-{self.operations}"
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if key not in self.endpoints:
            raise NotFound(f"actor {key} does not exist; create it first")
        return Wake(self.bind(key), operation, self.phases)

    async def is_over(self, binding: Binding) -> bool:
        if binding.key in self.elsewhere:
            self.elsewhere.discard(binding.key)
            self.bindings.revoke(binding.key)
        return binding.revoked

    async def entrance(self, binding: Binding) -> Entrance | None:
        return self.entrances.get(binding.worker)

    def bind(self, key: Key) -> Binding:
        binding = Binding(key, f"uid-{key.name}", self._generation(), "w", self.endpoints[key], 300.0)
        self.bindings.bind(binding)
        return binding

    def _generation(self) -> int:
        self.generation = getattr(self, "generation", 0) + 1
        return self.generation


@dataclass
class Actor:
    """``handler`` plays the actor on each connection; ``seen`` counts connections."""

    path: str
    handler: Handler
    connections: int = 0
    open: int = 0


@asynccontextmanager
async def actor(directory: Path, handler: Handler, name: str = "a") -> AsyncIterator[Actor]:
    """An actor on a unix socket."""
    it = Actor(str(directory / f"{name}.sock"), handler)
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        it.connections += 1
        it.open += 1
        writers.add(writer)
        try:
            await it.handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the gateway hung up: what many tests are about
        finally:
            it.open -= 1
            writers.discard(writer)
            writer.close()

    server = await asyncio.start_unix_server(serve, it.path, limit=1 << 20)
    try:
        yield it
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


def answers(response: bytes) -> Handler:
    """Reads heads without bodies and answers each with ``response``."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)

    return handler


@dataclass
class Bench:
    waker: FakeWaker
    gateway: Gateway
    port: int

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24))

    async def ask(self, request: bytes = GET, method: str = "GET") -> Response:
        """One request on a connection of its own."""
        async with await self.connect() as client:
            client.send(request)
            return await client.response(method)


@asynccontextmanager
async def gateway(
    waker: FakeWaker | None = None, limits: Limits | None = None, **options: object
) -> AsyncIterator[Bench]:
    waker = waker or FakeWaker()
    it = Gateway(waker, limits=limits, **options)  # type: ignore[arg-type]
    await it.start("127.0.0.1", 0)
    try:
        yield Bench(waker, it, it.addresses[0][1])
    finally:
        await it.close(grace_s=0)
        assert it.held == 0 and it.held_body_bytes == 0
        for binding in waker.bindings.all():
            assert binding.in_flight == 0


@asynccontextmanager
async def running(
    directory: Path, handler: Handler, limits: Limits | None = None
) -> AsyncIterator[tuple[Bench, Actor]]:
    """A gateway and one actor ``default/a`` that runs."""
    async with actor(directory, handler) as it, gateway(limits=limits) as bench:
        bench.waker.endpoints[KEY] = Endpoint(path=it.path)
        bench.waker.bind(KEY)
        yield bench, it


@dataclass
class Response:
    status: int
    head: str
    headers: dict[str, str]
    body: bytes
    trailers: dict[str, str]

    @property
    def reason(self) -> str:
        """Of an answer that is the gateway's own."""
        error = json.loads(self.body)["error"]
        assert self.headers["greenroom-error"] == error["reason"] and error["message"] and error["code"]
        return str(error["reason"])


def fields(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        found[name.lower()] = f"{found[name.lower()]}, {value}" if name.lower() in found else value
    return found


class Client:
    """A client that says exactly what it is told, and reads responses strictly."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.transport.abort()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, str, dict[str, str]]:
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text[:-4].split("\r\n")
        return int(first.split(" ")[1]), text, fields(lines)

    async def response(self, method: str = "GET") -> Response:
        status, head, headers = await self.head()
        body, trailers = b"", {}
        if method == "HEAD" or status < 200 or status in (204, 304):
            pass
        elif headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            lines = []
            while (line := await self.reader.readuntil(b"\r\n")) != b"\r\n":
                lines.append(line.decode().strip())
            trailers = fields(lines)
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = await self.reader.read()
        return Response(status, head, headers, body, trailers)

    async def eof(self) -> bytes:
        """What still comes until the gateway closes; fails on a reset."""
        return await self.reader.read()


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Turns the loop until the condition holds, for what nothing announces; returns what it came to."""
    async with asyncio.timeout(timeout_s):
        while not (value := condition()):
            await asyncio.sleep(0.002)
    return value
