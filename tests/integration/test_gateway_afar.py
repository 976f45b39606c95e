"""A gateway and actors on another machine: through the entrance of their agent, over real TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import agent_kit
import gateway_kit
import pytest
import uvloop
from agent_kit import short_directory, until
from gateway_kit import GET, HOST, KEY, OK, Handler, answers
from msgspec.structs import replace

from greenroom.agent import entrance as agent_entrance
from greenroom.agent.entrance import EntranceServer
from greenroom.agent.residents import Lodger
from greenroom.core import agentapi as api
from greenroom.core.agentapi import Entrance, Identity, ResidentState
from greenroom.core.records import Endpoint, Key
from greenroom.engine.bindings import Binding

UID = "uid-a"


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Servers run on uvloop, whose TLS is its own."""
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@dataclass
class Afar:
    """A gateway, and an actor that it reaches only through an entrance. ``seen``: the highest generation."""

    gateway: gateway_kit.Bench
    actor: gateway_kit.Actor
    server: EntranceServer
    entrance: Entrance
    lodgers: dict[str, Lodger]
    seen: dict[str, int] = field(default_factory=dict)

    async def line(self, line: bytes) -> bytes:
        """What a stranger is answered, until it is hung up on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.entrance.port, ssl=context)
        except (ConnectionError, ssl.SSLError):  # that was while they shook hands
            return b""
        try:
            writer.write(line)
            async with asyncio.timeout(60):
                return await reader.read()
        except (ConnectionError, ssl.SSLError):
            return b""
        finally:
            writer.transport.abort()

    def announce(self, entrance: Entrance) -> None:
        self.gateway.waker.entrances["w"] = entrance


def lodger(endpoint: Endpoint, uid: str = UID, generation: int = 1) -> Lodger:
    identity = Identity(namespace="default", name="a", uid=uid, generation=generation)
    return Lodger(identity, "s", ResidentState.RUNNING, endpoint, "")


@asynccontextmanager
async def afar(directory: Path, handler: Handler) -> AsyncIterator[Afar]:
    async with gateway_kit.running(directory, handler) as (gateway, actor):
        lodgers = {UID: lodger(Endpoint(path=actor.path))}
        seen: dict[str, int] = {}
        server = EntranceServer(lodgers.get, lambda uid: seen.get(uid, 0))
        it = Afar(gateway, actor, server, await server.start("127.0.0.1", 0, "127.0.0.1"), lodgers, seen)
        it.announce(it.entrance)
        # Nobody may reach it by what its record says: that is on another machine.
        gateway.waker.endpoints[KEY] = Endpoint(path="/nowhere")
        binding = gateway.waker.bindings.get(KEY)
        assert binding is not None
        binding.endpoint = Endpoint(path="/nowhere")
        try:
            yield it
        finally:
            await server.close()


async def test_requests_share_connections_as_on_one_machine(tmp_path: Path) -> None:
    async with afar(tmp_path, answers(OK)) as it, await it.gateway.connect() as client:
        for _ in range(20):
            client.send(GET)
            assert (await client.response()).body == b"ok"
        assert it.actor.connections == 1 and len(it.server.open) == 1


async def test_large_bodies_pass_both_ways_whoever_is_slow(tmp_path: Path) -> None:
    size = 16 << 20

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        left = size
        while left:
            data = await reader.read(1 << 16)
            left -= len(data)
            writer.write(data)
            await writer.drain()

    body = bytes(range(256)) * (size // 256)
    async with afar(tmp_path, echo) as it, await it.gateway.connect() as client:
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size + body)
        assert (await client.response()).body == body


async def test_what_an_actor_ends_by_hanging_up_is_whole(tmp_path: Path) -> None:
    async def until_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 3_000_000)
        await writer.drain()

    async with afar(tmp_path, until_close) as it:
        assert len((await it.gateway.ask()).body) == 3_000_000


@pytest.mark.parametrize("what", ["ticket", "fingerprint"])
async def test_who_is_not_who_he_says_gets_no_request(tmp_path: Path, what: str) -> None:
    heard: list[bytes] = []
    async with afar(tmp_path, answers(OK)) as it:
        admit = it.server.admit

        def hear(line: bytes) -> Any:
            heard.append(line)
            return admit(line)

        it.server.admit = hear  # type: ignore[method-assign]
        it.announce(replace(it.entrance, **{what: "0" * 64}))
        answer = await it.gateway.ask()
        assert (answer.status, answer.reason) == (502, "CONNECT_FAILED")
        await until(lambda: not it.server.open)
        assert it.actor.connections == 0
        assert bool(heard) == (what == "ticket"), "an agent that shows another certificate is told nothing"
        it.announce(it.entrance)
        assert (await it.gateway.ask()).status == 200


async def test_only_the_incarnation_that_is_meant_is_reached(tmp_path: Path) -> None:
    async with afar(tmp_path, answers(OK)) as it:
        it.seen[UID] = 2  # the control plane has gone on, and this gateway does not know yet
        assert (await it.gateway.ask()).status == 502
        it.seen[UID] = 1
        it.lodgers[UID].state = ResidentState.FROZEN
        assert (await it.gateway.ask()).status == 502
        it.lodgers[UID].state = ResidentState.RUNNING
        assert (await it.gateway.ask()).status == 200
        del it.lodgers[UID]
        ask = f"GREENROOM/1 {it.entrance.ticket} {UID} 1 0\n".encode()
        assert await it.line(ask) == b"NO that actor is not awake here\n"


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        b"GREENROOM/1 a b c d e f\n",
        b"x" * 10_000,
        b"GREENROOM/1 TICKET uid-a -1 0\n",
        b"GREENROOM/1 TICKET uid-a 1 99999\n",
        b"GREENROOM/1 TICKET uid-a 1 80\n",
        b"GREENROOM/1 TICKET uid-a 1 0\nGET / HTTP/1.1\r\n\r\n",
        b"GREENROOM/1 \xff uid-a 1 0\n",
    ],
)
async def test_bad_lines_lead_nowhere(tmp_path: Path, line: bytes) -> None:
    async with afar(tmp_path, answers(OK)) as it:
        answer = await it.line(line.replace(b"TICKET", it.entrance.ticket.encode()))
        assert answer.startswith(b"NO ") or answer == b""
        assert it.actor.connections == 0
        await until(lambda: not it.server.open)
        assert (await it.gateway.ask()).status == 200


async def test_who_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_entrance, "GREETING_TIMEOUT_S", 0.2)
    async with afar(tmp_path, answers(OK)) as it:
        assert await it.line(b"") == b""
        assert await it.line(b"GREENROOM/1 ") == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", it.entrance.port)  # not even TLS
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()


async def test_too_many_connections_are_closed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_entrance, "MAX_CONNECTIONS", 0)
    async with afar(tmp_path, answers(OK)) as it:
        assert (await it.gateway.ask()).status == 502


async def test_a_request_that_waits_is_cut_before_its_actor_is_frozen(tmp_path: Path) -> None:
    reached, closed = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reached.set()
        assert await reader.read() == b""
        closed.set()

    async with afar(tmp_path, silent) as it:
        asked = asyncio.create_task(it.gateway.ask())
        async with asyncio.timeout(60):
            await reached.wait()
            it.lodgers[UID].shut_out()
            await closed.wait()
            assert (await asked).status in (502, 503)
        assert not it.server.open and not it.lodgers[UID].doors


async def test_a_request_on_its_way_when_its_actor_is_frozen_is_answered_at_any_moment(tmp_path: Path) -> None:
    """Whether it had reached the actor by then or not, nothing of it stays open."""
    async with afar(tmp_path, answers(OK)) as it:
        outcomes: set[int] = set()
        for moment in range(0, 300, 3):
            it.lodgers[UID].shut = False
            asked = asyncio.create_task(it.gateway.ask())
            for _ in range(moment):
                await asyncio.sleep(0)
            it.lodgers[UID].shut_out()
            async with asyncio.timeout(60):
                outcomes.add((await asked).status)
            await until(lambda: not it.server.open and not it.actor.open)
        assert outcomes <= {200, 502, 503} and len(outcomes) > 1


class Reluctant:
    """Accepts, and reads nothing of what it is sent."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cast("asyncio.Transport", writer.transport).pause_reading()
        await writer.wait_closed()


@asynccontextmanager
async def visit(it: Afar, size: int) -> AsyncIterator[asyncio.StreamWriter]:
    """A gateway that has been let in and sends so many bytes; the way to the actor takes some of them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", it.entrance.port, ssl=context)
    try:
        writer.write(f"GREENROOM/1 {it.entrance.ticket} {UID} 1 0\n".encode())
        assert await reader.readline() == b"OK\n"
        writer.write(b"x" * size)
        yield writer
    finally:
        writer.transport.abort()


async def test_an_actor_that_never_reads_holds_no_place_of_a_gateway_that_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with afar(tmp_path, Reluctant()) as it:
        async with visit(it, 8 << 20):
            (visitor,) = it.server.open
            await until(
                lambda: (
                    visitor._inner is not None
                    and visitor._inner.transport.get_write_buffer_size() > agent_entrance.BUFFER_BYTES
                )
            )
            timer = visitor._timer
            assert timer is not None and not timer.cancelled()
            assert timer.when() > asyncio.get_running_loop().time() + agent_entrance.GREETING_TIMEOUT_S
        timer.cancel()  # the time begins anew, and is short
        monkeypatch.setattr(agent_entrance, "STALL_S", 0.1)
        visitor.hold()
        await until(lambda: not it.server.open and not it.lodgers[UID].doors and visitor._inner.gone)


async def test_one_actor_has_so_many_places_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_entrance, "MAX_TO_ONE", 1)
    async with afar(tmp_path, Reluctant()) as it, visit(it, 1):
        line = f"GREENROOM/1 {it.entrance.ticket} {UID} 1 0\n".encode()
        assert await it.line(line) == b"NO 1 connections to that actor are open, 2 in all\n"


async def test_what_a_gateway_that_has_gone_has_sent_is_closed_with_its_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_entrance, "LINGER_S", 3600.0)
    async with afar(tmp_path, Reluctant()) as it:
        async with visit(it, 400 << 10) as writer:  # more than the socket takes, less than stops the gateway
            (visitor,) = it.server.open
            await writer.drain()
            await until(lambda: visitor._inner is not None and visitor._inner.transport.get_write_buffer_size())
        await until(lambda: visitor._gone)
        assert it.server.open and it.lodgers[UID].doors and not visitor._inner.gone
        it.lodgers[UID].shut_out()
        await until(lambda: not it.server.open and not it.lodgers[UID].doors and visitor._inner.gone)


async def test_an_actor_may_take_for_a_while_what_a_gateway_that_has_gone_has_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_entrance, "LINGER_S", 0.5)
    async with afar(tmp_path, Reluctant()) as it:
        async with visit(it, 400 << 10) as writer:
            (visitor,) = it.server.open
            await writer.drain()
        await until(lambda: not it.server.open and not it.lodgers[UID].doors and visitor._inner.gone)


# --- a whole agent ------------------------------------------------------------------------------------------------


async def test_an_agent_lets_nobody_in_to_an_actor_that_sleeps() -> None:
    with short_directory() as root:
        async with agent_kit.Bench(root) as bench, gateway_kit.gateway() as gateway:
            await bench.agent.let_in("127.0.0.1", 0, "127.0.0.1")
            entrance = bench.agent.hello().entrance
            assert entrance is not None and entrance.ticket not in repr(bench.agent.hello())
            gateway.waker.entrances["w"] = entrance

            key = Key("ns", "a")

            async def status(generation: int) -> int:
                gateway.waker.bindings.revoke(key)
                gateway.waker.endpoints[key] = Endpoint(path="/nowhere")
                gateway.waker.bindings.bind(Binding(key, "a", generation, "w", Endpoint(path="/nowhere"), 300.0))
                return (await gateway.ask(GET.replace(HOST, b"Host: a.ns.localhost\r\n"))).status

            await bench.boot()
            assert await status(1) == 200
            await bench.call(api.Freeze(**bench.ids("freeze", 2)))
            assert [await status(n) for n in (1, 2)] == [502, 502]
            await bench.call(api.Thaw(**bench.ids("thaw", 3)))
            assert [await status(n) for n in (1, 2, 3)] == [502, 502, 200]
            await bench.suspend("sleep", 4)
            assert await status(3) == 502
