"""Waking, holding and suspension: what happens to a request whose actor sleeps, or is put to sleep under it."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from gateway_kit import GET, HOST, KEY, OK, Client, FakeWaker, actor, answers, gateway, running, until

from greenroom.core.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted, Unavailable
from greenroom.core.records import Endpoint, Key, PhaseTime
from greenroom.engine.bindings import Binding, Wake
from greenroom.gateway.limits import Limits

POST = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc"


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


def asleep(path: str) -> FakeWaker:
    waker = FakeWaker()
    waker.endpoints[KEY] = Endpoint(path=path)
    return waker


async def test_a_hundred_requests_are_one_wake_up(tmp_path: Path) -> None:
    async with actor(tmp_path, answers(OK)) as it, gateway(asleep(it.path)) as bench:
        bench.waker.gate.clear()
        asking = [asyncio.create_task(bench.ask()) for _ in range(100)]
        await until(lambda: bench.gateway.held == 100)
        bench.waker.gate.set()
        assert [(await a).body for a in asking] == [b"ok"] * 100
        assert bench.waker.operations == 1


async def test_the_timing_of_a_wake_up(tmp_path: Path) -> None:
    async with actor(tmp_path, answers(OK.replace(b"\r\n\r\n", b"\r\nServer-Timing: db;dur=1\r\n\r\n"))) as it:
        waker = asleep(it.path)
        waker.phases = (PhaseTime(name="place", seconds=0.001), PhaseTime(name="restore", seconds=0.002))
        waker.gate.clear()
        async with gateway(waker) as bench, await bench.connect() as client:
            client.send(GET)
            await until(lambda: bench.gateway.held == 1)
            await asyncio.sleep(0.01)  # so that the phases fit into what is measured
            waker.gate.set()
            response = await client.response()
            assert response.headers["greenroom-operation"] == "op-1"
            own, ours = response.headers["server-timing"].split(", ", 1)
            assert own == "db;dur=1"
            found = re.fullmatch(
                r"queue;dur=(\d+\.\d\d), place;dur=1\.00, restore;dur=2\.00, answer;dur=(\d+\.\d\d), "
                r"total;dur=(\d+\.\d\d)",
                ours,
            )
            assert found
            queue, answer, total = map(float, found.groups())
            assert queue >= 7 and round(queue + 3 + answer, 2) == total
            client.send(GET)
            response = await client.response()
            assert response.headers["server-timing"] == "db;dur=1" and "greenroom-operation" not in response.headers


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ResourceExhausted("full", retry_after_s=3), 503, "NO_CAPACITY"),
        (FailedPrecondition("crashed", reason="ACTOR_CRASHED"), 503, "ACTOR_CRASHED"),
        (Unavailable("no worker"), 503, "UNAVAILABLE"),
        (DeadlineExceeded("slow"), 504, "DEADLINE_EXCEEDED"),
        (Internal("bug"), 502, "INTERNAL"),
        (RuntimeError("a bug of ours"), 502, "INTERNAL"),
    ],
)
async def test_wake_ups_that_fail(error: Exception, status: int, reason: str) -> None:
    async with gateway(asleep("/nowhere")) as bench, await bench.connect() as client:
        bench.waker.error = error
        for _ in range(2):
            client.send(GET)
            response = await client.response()
            assert (response.status, response.reason) == (status, reason)
        if isinstance(error, ResourceExhausted):
            assert response.headers["retry-after"] == "3"


async def test_held_requests_are_bounded(tmp_path: Path) -> None:
    limits = Limits(held_per_actor=2, held_total=3)
    async with actor(tmp_path, answers(OK)) as it, gateway(asleep(it.path), limits) as bench:
        bench.waker.gate.clear()
        bench.waker.endpoints[Key("default", "b")] = bench.waker.endpoints[KEY]
        other = GET.replace(b"a.default", b"b.default")
        held = [asyncio.create_task(bench.ask()) for _ in range(2)]
        await until(lambda: bench.gateway.held == 2)
        response = await bench.ask()
        assert (response.status, response.reason) == (503, "TOO_MANY_HELD") and "retry-after" in response.headers
        held.append(asyncio.create_task(bench.ask(other)))
        await until(lambda: bench.gateway.held == 3)
        assert (await bench.ask(other)).reason == "TOO_MANY_HELD"
        bench.waker.gate.set()
        assert [(await h).status for h in held] == [200] * 3


async def test_holding_ends(tmp_path: Path) -> None:
    async with actor(tmp_path, answers(OK)) as it, gateway(asleep(it.path), Limits(hold_s=0.05)) as bench:
        bench.waker.gate.clear()
        response = await bench.ask()
        assert (response.status, response.reason) == (504, "HOLD_TIMEOUT")
        bench.waker.gate.set()


async def test_a_client_that_leaves_drops_only_its_request(tmp_path: Path) -> None:
    async with actor(tmp_path, answers(OK)) as it, gateway(asleep(it.path)) as bench:
        bench.waker.gate.clear()
        stays = asyncio.create_task(bench.ask())
        async with await bench.connect() as client:
            client.send(POST)
            await until(lambda: bench.gateway.held == 2)
        await until(lambda: bench.gateway.held == 1 and bench.gateway.held_body_bytes == 0)
        bench.waker.gate.set()
        assert (await stays).status == 200 and it.connections == 1


async def test_a_held_body_is_not_read_ahead(tmp_path: Path) -> None:
    size = 32 << 20
    got = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        await reader.readuntil(b"\r\n\r\n")
        while got < size:
            got += len(await reader.read(1 << 20))
        writer.write(OK)

    async with actor(tmp_path, handler) as it, gateway(asleep(it.path)) as bench, await bench.connect() as client:
        bench.waker.gate.clear()
        client.send(b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        await until(lambda: [c for c in bench.gateway.clients if c.body_paused])
        assert 0 < bench.gateway.held_body_bytes < 1 << 20
        bench.waker.gate.set()
        assert (await client.response()).status == 200 and got == size


async def test_held_bodies_together_are_bounded(tmp_path: Path) -> None:
    async with actor(tmp_path, answers(OK)) as it, gateway(asleep(it.path), Limits(held_body_bytes=4)) as bench:
        bench.waker.gate.clear()
        async with await bench.connect() as client:
            client.send(POST)
            await until(lambda: bench.gateway.held == 1)
            response = await bench.ask(POST)
            assert (response.status, response.reason) == (503, "GATEWAY_BUSY")
            bench.waker.gate.set()


# --- suspension under a request ---------------------------------------------------------------------------


class Stage:
    """An actor that says when it has a request, and answers the first one only in part."""

    def __init__(self, first: bytes) -> None:
        self.first = first
        self.asked = asyncio.Event()
        self.requests = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            writer.write(self.first if self.requests == 1 else OK)
            self.asked.set()


async def revoked_under(
    tmp_path: Path, request: bytes, first: bytes, check: Callable[[Client], Awaitable[None]]
) -> Stage:
    """Sends ``request``, waits for all of ``first``, revokes the binding, and lets the test look at the client."""
    stage = Stage(first)
    async with actor(tmp_path, stage) as it, gateway(asleep(it.path)) as bench:
        binding = bench.waker.bind(KEY)
        async with await bench.connect() as client:
            client.send(request)
            await stage.asked.wait()
            if first:
                await client.reader.readuntil(first[-4:])
            assert binding.in_flight == 1
            bench.waker.bindings.revoke(KEY)
            assert binding.in_flight == 0  # at once, before anything else can happen
            await check(client)
        await until(lambda: it.open <= 1)
    return stage


async def test_a_get_cut_off_by_a_suspension_is_repeated(tmp_path: Path) -> None:
    async def check(client: Client) -> None:
        response = await client.response()
        assert (response.status, response.headers["greenroom-operation"]) == (200, "op-1")

    assert (await revoked_under(tmp_path, GET, b"", check)).requests == 2


async def test_a_post_cut_off_by_a_suspension_is_not(tmp_path: Path) -> None:
    async def check(client: Client) -> None:
        response = await client.response()
        assert (response.status, response.reason) == (502, "ACTOR_SUSPENDED")

    assert (await revoked_under(tmp_path, POST, b"", check)).requests == 1


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\npart\r\n\r\n",
    ],
)
async def test_a_suspension_under_a_response_cuts_it_off(tmp_path: Path, first: bytes) -> None:
    async def check(client: Client) -> None:
        rest = await client.eof()
        assert b"0\r\n" not in rest and b"HTTP/" not in rest  # neither the last chunk nor an answer of the gateway's

    assert (await revoked_under(tmp_path, GET, first, check)).requests == 1


async def test_a_suspension_under_an_undelimited_response_resets(tmp_path: Path) -> None:
    async def check(client: Client) -> None:
        with pytest.raises(ConnectionResetError):
            await client.eof()

    request = b"GET / HTTP/1.0\r\n" + HOST + b"\r\n"
    await revoked_under(tmp_path, request, b"HTTP/1.1 200 OK\r\n\r\npart", check)


async def test_a_suspension_ends_a_tunnel(tmp_path: Path) -> None:
    async def check(client: Client) -> None:
        assert await client.eof() == b""

    request = GET[:-2] + b"Connection: upgrade\r\nUpgrade: raw\r\n\r\n"
    await revoked_under(tmp_path, request, b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: raw\r\n\r\n", check)


async def test_a_suspension_closes_idle_connections(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK)) as (bench, it), await bench.connect() as client:
        client.send(GET)
        await client.response()
        assert it.open == 1
        bench.waker.bindings.revoke(KEY)
        await until(lambda: it.open == 0)
        client.send(GET)
        assert (await client.response()).headers["greenroom-operation"] == "op-1"
        assert it.connections == 2


async def test_bindings_revoked_before_they_are_used(tmp_path: Path) -> None:
    """The engine suspends again and again, in the turn of the loop in which it hands out the binding."""

    class Restless(FakeWaker):
        restless = 2

        async def wake(self, key: Key) -> Wake:
            wake = await super().wake(key)
            if self.restless > 0:
                self.restless -= 1
                self.bindings.revoke(key)
            return wake

    async with actor(tmp_path, answers(OK)) as it:
        waker = Restless()
        waker.endpoints[KEY] = Endpoint(path=it.path)
        async with gateway(waker) as bench:
            assert (await bench.ask(POST)).status == 200
            waker.bindings.revoke(KEY)
            waker.restless = 100
            response = await bench.ask()
            assert (response.status, response.reason) == (502, "ACTOR_SUSPENDED")
            assert waker.restless == 100 - bench.gateway.limits.rewakes - 1


async def test_a_suspension_while_connecting(tmp_path: Path) -> None:
    """A connection that would take for ever is given up at once; nothing was sent, so any request goes on."""
    async with actor(tmp_path, answers(OK)) as it, gateway(asleep(it.path)) as bench:
        # A listener whose queue is full: connecting to it waits.
        stuck = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        stuck.bind(("127.0.0.1", 0))
        stuck.listen(0)
        port = stuck.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        bench.waker.endpoints[KEY] = Endpoint(host="127.0.0.1", port=port)
        binding = bench.waker.bind(KEY)
        asking = asyncio.create_task(bench.ask(POST))
        await until(lambda: binding.in_flight == 1)
        pool = bench.gateway.pool(binding)
        await until(lambda: pool._connecting)
        bench.waker.endpoints[KEY] = Endpoint(path=it.path)
        bench.waker.bindings.revoke(KEY)
        assert (await asyncio.wait_for(asking, 60)).status == 200
        for sock in (stuck, *fillers):
            sock.close()


# --- connections that die ---------------------------------------------------------------------------------


async def test_a_stale_connection_is_replaced(tmp_path: Path) -> None:
    """The actor answers one request per connection and closes when it sees the second: each one but the first finds its
    pooled connection dead."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")

    limits = Limits(fresh_enough_s=60, upstream_idle_s=60)
    async with running(tmp_path, handler, limits) as (bench, it), await bench.connect() as client:
        for n in range(4):
            client.send(GET)
            assert (await client.response()).status == 200
            assert it.connections == n + 1
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n")
        response = await client.response()
        assert (response.status, response.reason) == (502, "CONNECTION_CLOSED")


async def test_an_actor_that_never_answers_gets_one_retry_at_most(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with running(tmp_path, handler) as (bench, it):
        response = await bench.ask()
        assert (response.status, response.reason, it.connections) == (502, "CONNECTION_CLOSED", 1)


async def test_a_dead_endpoint_is_resolved_again(tmp_path: Path) -> None:
    """The table still has the old place of the actor; the engine, when asked, knows better."""
    async with actor(tmp_path, answers(OK)) as it:
        waker = FakeWaker()
        waker.endpoints[KEY] = Endpoint(path=str(tmp_path / "gone.sock"))
        async with gateway(waker) as bench:
            waker.bind(KEY)
            waker.endpoints[KEY] = Endpoint(path=it.path)
            waker.elsewhere.add(KEY)
            response = await bench.ask(POST)
            assert (response.status, waker.calls) == (200, 1)


@pytest.mark.parametrize(("request_", "status"), [(GET, 200), (POST, 502)], ids=["get", "post"])
async def test_what_another_replica_suspended_is_woken_again(tmp_path: Path, request_: bytes, status: int) -> None:
    """Its endpoint still took the connection, then ended it, before this process heard of the suspension."""
    asked = 0

    async def dies_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        if asked > 1:
            writer.write(OK)
            await writer.drain()

    async with running(tmp_path, dies_once) as (bench, _):
        bench.waker.elsewhere.add(KEY)
        response = await bench.ask(request_)
        assert response.status == status
        assert status == 200 or response.reason == "ACTOR_SUSPENDED"


@pytest.mark.parametrize(
    ("request_", "outcome"),
    [(GET, (503, "STORE_UNAVAILABLE")), (POST, (502, "CONNECTION_CLOSED"))],
    ids=["get", "post"],
)
async def test_an_actor_that_hangs_up_while_nobody_can_say_why(
    tmp_path: Path, request_: bytes, outcome: tuple[int, str]
) -> None:
    class Unknowing(FakeWaker):
        async def is_over(self, binding: Binding) -> bool:
            raise Unavailable("the store does not answer", reason="STORE_UNAVAILABLE", retry_after_s=1.0)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with actor(tmp_path, handler) as it:
        waker = Unknowing()
        waker.endpoints[KEY] = Endpoint(path=it.path)
        async with gateway(waker) as bench:
            response = await bench.ask(request_)
            assert (response.status, response.reason) == outcome


async def test_connections_per_actor_are_bounded(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with running(tmp_path, silent, Limits(connections_per_actor=2)) as (bench, it):
        clients = [await bench.connect() for _ in range(2)]
        for client in clients:
            client.send(GET)
        await until(lambda: it.open == 2)
        response = await bench.ask()
        assert (response.status, response.reason) == (503, "ACTOR_BUSY")
        for client in clients:
            client.writer.transport.abort()
        await until(lambda: it.open == 0)


async def test_idle_connections_are_bounded_and_the_freshest_kept(tmp_path: Path) -> None:
    """A POST takes no connection that has been idle for long, nor do those keep its own from being kept."""
    limits = Limits(idle_connections_per_actor=2, fresh_enough_s=60, upstream_idle_s=600)
    async with running(tmp_path, answers(OK), limits) as (bench, it):
        clients = [await bench.connect() for _ in range(4)]
        for client in clients:
            client.send(GET * 20)
        for client in clients:
            assert [(await client.response()).status for _ in range(20)] == [200] * 20
        await until(lambda: it.open <= 2)
        (pool,) = bench.gateway._pools.values()
        for connection in pool.open:
            connection.idle_since -= 61  # now they are too old for a POST
        before = it.connections
        post = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n"
        clients[0].send(post * 10)
        assert [(await clients[0].response()).status for _ in range(10)] == [200] * 10
        assert it.connections == before + 1
        for client in clients:
            client.writer.transport.abort()


async def test_idle_connections_end(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK), Limits(upstream_idle_s=0.05)) as (bench, it):
        await bench.ask()
        assert it.open == 1
        await until(lambda: it.open == 0)


async def test_a_connection_is_never_used_for_another_binding(tmp_path: Path) -> None:
    """Two incarnations and two actors, each on its own socket; whoever answers says its name."""

    def named(name: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(name), name)

    keys = [Key("default", "a"), Key("default", "b")]
    async with (
        actor(tmp_path, answers(named(b"a1")), "a1") as a1,
        actor(tmp_path, answers(named(b"a2")), "a2") as a2,
        actor(tmp_path, answers(named(b"b1")), "b1") as b1,
        gateway() as bench,
        await bench.connect() as client,
    ):
        places = {keys[0]: a1, keys[1]: b1}
        bound: dict[Key, Binding] = {}
        for key in keys:
            bench.waker.endpoints[key] = Endpoint(path=places[key].path)
            bound[key] = bench.waker.bind(key)
        get_b = GET.replace(b"a.default", b"b.default")
        for _ in range(3):
            client.send(GET + get_b)
            assert [(await client.response()).body for _ in range(2)] == [b"a1", b"b1"]
        bench.waker.endpoints[keys[0]] = Endpoint(path=a2.path)
        bench.waker.bind(keys[0])  # replaces and revokes
        for _ in range(3):
            client.send(GET + get_b)
            assert [(await client.response()).body for _ in range(2)] == [b"a2", b"b1"]
        await until(lambda: a1.open == 0)
        assert bound[keys[0]].revoked
