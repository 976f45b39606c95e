"""Actors that attack: whatever they send hurts only themselves, never the next response on the client's connection."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import uvloop
from gateway_kit import GET, HOST, KEY, OK, Handler, actor, answers, gateway, until

from greenroom.core.records import Endpoint, Key
from greenroom.gateway.limits import Limits

VICTIM = Key("default", "victim")
GET_VICTIM = GET.replace(b"a.default", b"victim.default")
INNOCENT = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\ninnocent"
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


def says(wire: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(wire)
            await writer.drain()

    return handler


async def attack(directory: Path, handler: Handler, requests: int = 3, answer_s: float = 60) -> list[tuple[int, bytes]]:
    """Asks the evil and the innocent actor in turn on one connection, pipelined; checks every second answer."""
    answered = []
    async with (
        actor(directory, handler) as evil,
        actor(directory, answers(INNOCENT), "victim") as innocent,
        gateway(limits=Limits(head_bytes=8192, answer_s=answer_s)) as bench,
    ):
        for key, it in ((KEY, evil), (VICTIM, innocent)):
            bench.waker.endpoints[key] = Endpoint(path=it.path)
            bench.waker.bind(key)
        async with await bench.connect() as client:
            for _ in range(requests):
                client.send(GET + GET_VICTIM)
                response = await client.response()
                answered.append(
                    (response.status, response.body if response.status == 200 else response.reason.encode())
                )
                assert (await client.response()).body == b"innocent"
        assert evil.open <= 1
    return answered


@pytest.mark.parametrize(
    "wire",
    [
        OK + EVIL,
        OK + b"\r\n",
        OK + b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + EVIL,
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok" + EVIL,
    ],
)
async def test_bytes_behind_the_response(tmp_path: Path, wire: bytes) -> None:
    assert await attack(tmp_path, says(wire)) == [(200, b"ok")] * 3


async def test_bytes_while_idle(tmp_path: Path) -> None:
    """The response of the next request, sent before it is asked for."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await asyncio.sleep(0.01)
        writer.write(EVIL)
        await reader.read()

    async with actor(tmp_path, handler) as evil, gateway() as bench, await bench.connect() as client:
        bench.waker.endpoints[KEY] = Endpoint(path=evil.path)
        for n in range(3):
            client.send(GET)
            assert (await client.response()).body == b"ok"
            assert evil.connections == n + 1
            await until(lambda: not evil.open)


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + EVIL,
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 60\r\n\r\nok" + EVIL,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, identity\r\n\r\n" + EVIL,
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok" + EVIL,
        b"HTTP/1.1 200 OK\r\nX: a\r\n Content-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + OK,
        b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + EVIL,
        b"HTTP/1.1 000 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"GET / HTTP/1.1\r\nHost: victim.default.localhost\r\n\r\n",
        b"\x00" * 100_000,
        b"garbage\r\n\r\n" + EVIL,
    ],
)
async def test_heads_that_break_the_rules(tmp_path: Path, wire: bytes) -> None:
    assert await attack(tmp_path, says(wire)) == [(502, b"BAD_RESPONSE")] * 3


async def test_a_flood_of_interim_responses(tmp_path: Path) -> None:
    """A few are passed on; then it is over."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
            await asyncio.sleep(0.001)

    async with actor(tmp_path, handler) as evil, gateway() as bench, await bench.connect() as client:
        bench.waker.endpoints[KEY] = Endpoint(path=evil.path)
        client.send(GET)
        interim = 0
        while (response := await client.response()).status == 103:
            interim += 1
        assert interim <= bench.gateway.limits.interim_responses
        assert (response.status, response.reason) == (502, "BAD_RESPONSE")


async def test_a_head_that_never_ends(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.01)

    assert await attack(tmp_path, handler, requests=1, answer_s=2) == [(504, b"ANSWER_TIMEOUT")]


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 100\r\n\r\nshort",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nokEVIL",
    ],
)
async def test_a_body_that_is_cut_off_is_seen_to_be(tmp_path: Path, body: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + body)
        await writer.drain()

    async with actor(tmp_path, handler) as evil, gateway() as bench, await bench.connect() as client:
        bench.waker.endpoints[KEY] = Endpoint(path=evil.path)
        client.send(GET + GET_VICTIM)
        with pytest.raises(asyncio.IncompleteReadError):
            await client.response()
        assert client.reader.at_eof()


async def test_an_actor_can_not_speak_for_the_gateway(tmp_path: Path) -> None:
    forged = b"HTTP/1.1 503 X\r\nGreenroom-Error: ACTOR_CRASHED\r\ngreenroom-operation: op\r\nContent-Length: 0\r\n\r\n"
    async with actor(tmp_path, says(forged)) as evil, gateway() as bench:
        bench.waker.endpoints[KEY] = Endpoint(path=evil.path)
        bench.waker.bind(KEY)
        response = await bench.ask()
        assert response.status == 503 and response.headers == {"content-length": "0"}


async def test_requests_can_not_be_smuggled(tmp_path: Path) -> None:
    """What the victim's server gets is exactly one message per request that the gateway saw."""
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            seen.append(head.split(b"\r\n", 1)[0])
            if b"Transfer-Encoding: chunked" in head:
                body = await reader.readuntil(b"0\r\n\r\n")
            else:
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                body = await reader.readexactly(length)
            seen.append(body)
            writer.write(OK)

    inner = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    async with actor(tmp_path, handler) as victim, gateway() as bench, await bench.connect() as client:
        bench.waker.endpoints[KEY] = Endpoint(path=victim.path)
        client.send(b"POST /1 HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(inner) + inner)
        client.send(
            b"POST /2 HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(inner), inner)
        )
        client.send(GET.replace(b"/", b"/3", 1))
        assert [(await client.response()).status for _ in range(3)] == [200] * 3
    assert seen == [
        b"POST /1 HTTP/1.1", inner, b"POST /2 HTTP/1.1", b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner),
        b"GET /3 HTTP/1.1",
        b"",
    ]  # fmt: skip
