"""HTTP through the gateway, over real sockets: framing, order, flow control, upgrades. On asyncio's loop and uvloop."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
import structlog
import uvloop
from aiohttp import web
from gateway_kit import GET, HOST, KEY, OK, Client, FakeWaker, actor, answers, gateway, running, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from greenroom.core.errors import FailedPrecondition
from greenroom.core.records import Endpoint, Key
from greenroom.gateway.gateway import Gateway
from greenroom.gateway.limits import Limits


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


async def test_a_request_and_its_answer(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK)) as (bench, it), await bench.connect() as client:
        for _ in range(3):
            client.send(GET)
            response = await client.response()
            assert (response.status, response.body) == (200, b"ok")
            assert response.headers == {"content-length": "2"}
        assert it.connections == 1
        binding = bench.waker.bindings.peek(KEY)
        assert binding is not None and binding.in_flight == 0


async def test_the_access_log_is_for_debugging(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK)) as (bench, _):
        with structlog.testing.capture_logs() as lines:
            await bench.ask()
            bench.gateway.access_log = True
            await bench.ask()
        assert [(line["log_level"], line["actor"], line["status"]) for line in lines] == [("debug", "default/a", 200)]


async def test_what_the_actor_sees(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        seen.append(await reader.readexactly(10))
        writer.write(OK)

    async with running(tmp_path, handler) as (bench, _):
        await bench.ask(
            b"POST /x?y HTTP/1.1\r\nHost: elsewhere\r\nGreenroom-Actor: a\r\nContent-Length: 10\r\n\r\n0123456789"
        )
    assert seen == [
        b"POST /x?y HTTP/1.1\r\nHost: elsewhere\r\nGreenroom-Actor: default/a\r\nX-Forwarded-For: 127.0.0.1\r\n"
        b"X-Forwarded-Proto: http\r\nX-Forwarded-Host: elsewhere\r\nContent-Length: 10\r\n\r\n",
        b"0123456789",
    ]


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            n = head.split()[1]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(n), n))

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        for n in range(200):
            client.send(b"GET /%d HTTP/1.1\r\n%b\r\n" % (n, HOST))
            if n % 3 == 0:
                client.send(b"\r\nGET / HTTP/1.1\r\nHost: nobody\r\n\r\n")
        for n in range(200):
            assert (await client.response()).body == b"/%d" % n
            if n % 3 == 0:
                assert (await client.response()).reason == "NO_ROUTE"


@pytest.mark.parametrize(
    ("sent", "body", "framing"),
    [
        (b"Content-Length: 5\r\n\r\nhello", b"hello", "content-length"),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n", b"hello", "transfer-encoding"),
        (b"\r\nhello", b"hello", "transfer-encoding"),
        (b"Content-Length: 0\r\n\r\n", b"", "content-length"),
    ],
)
async def test_response_framings(tmp_path: Path, sent: bytes, body: bytes, framing: str) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + sent)
        await writer.drain()  # and closes

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        for _ in range(2):
            client.send(GET)
            response = await client.response()
            assert response.body == body and framing in response.headers
    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        client.send(b"GET / HTTP/1.0\r\n" + HOST + b"\r\n")
        response = await client.response()
        assert response.body == body and "transfer-encoding" not in response.headers
        assert await client.eof() == b""


async def test_bodiless_answers_keep_their_headers(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for status in (b"200", b"304", b"204"):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 %b X\r\nContent-Length: 77\r\n\r\n" % status)

    async with running(tmp_path, handler) as (bench, it), await bench.connect() as client:
        client.send(GET.replace(b"GET", b"HEAD"))
        assert (await client.response("HEAD")).headers == {"content-length": "77"}
        client.send(GET)
        assert (await client.response()).headers == {"content-length": "77"}
        client.send(GET)
        assert (await client.response()).headers == {}
        assert it.connections == 1


async def test_http10_keep_alive(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK)) as (bench, _), await bench.connect() as client:
        for _ in range(2):
            client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n" + HOST + b"\r\n")
            assert (await client.response()).headers["connection"] == "keep-alive"
        client.send(b"GET / HTTP/1.0\r\nGreenroom-Actor: a\r\n\r\n")
        assert (await client.response()).headers["connection"] == "close"
        assert await client.eof() == b""


async def test_trailers_both_ways(tmp_path: Path) -> None:
    got: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        got.append(await reader.readuntil(b"0\r\nSum: 7\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Digest\r\n\r\n")
        writer.write(b"1\r\nx\r\n0\r\nDigest: abc\r\nGreenroom-Error: FORGED\r\nContent-Length: 5\r\n\r\n")

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        client.send(
            b"POST / HTTP/1.1\r\n"
            + HOST
            + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nSum: 7\r\nHost: x\r\n\r\n"
        )
        response = await client.response()
        assert response.body == b"x" and response.trailers == {"digest": "abc"}
        assert response.headers["trailer"] == "Digest"
    assert got == [b"3\r\nabc\r\n0\r\nSum: 7\r\n\r\n"]


async def test_expect_100_continue(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Expect: 100-continue" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(3) == b"abc"
        writer.write(OK)

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert (await client.response()).headers == {"link": "</a>"}
        assert (await client.response()).status == 100
        client.send(b"abc")
        assert (await client.response()).status == 200


async def test_an_early_answer_ends_the_connection_but_arrives(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await reader.read()

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000000\r\n\r\n" + b"x" * 100_000)
        response = await client.response()
        assert (response.status, response.headers["connection"]) == (413, "close")
        client.send(b"x" * 100_000)
        assert await client.eof() == b""


async def test_events_are_passed_on_at_once(tmp_path: Path) -> None:
    """Each event is sent only after the client has the one before: nothing may wait for more."""
    go = asyncio.Semaphore(0)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for n in range(20):
            await go.acquire()
            writer.write(b"data: %d\n\n" % n)

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        client.send(GET)
        assert (await client.head())[0] == 200
        for n in range(20):
            go.release()
            assert await client.reader.readuntil(b"\n\n\r\n") == b"%x\r\ndata: %d\n\n\r\n" % (9 + (n > 9), n)


async def test_a_slow_reader_does_not_fill_the_memory(tmp_path: Path) -> None:
    size = 64 << 20
    sent = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    limits = Limits(write_buffer_bytes=65536)
    async with running(tmp_path, handler, limits) as (bench, _):
        with socket.create_connection(("127.0.0.1", bench.port)) as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, GET)
            (connection,) = await until(lambda: [c for c in bench.gateway.clients if c.write_paused])
            stuck = await settled(lambda: sent)
            assert stuck < 16 << 20  # the kernel's buffers of two connections, and ours
            assert connection.transport.get_write_buffer_size() < 1 << 20
            got = -1
            while got < size:
                data = await loop.sock_recv(sock, 1 << 20)
                assert data
                got = len(data) - data.index(b"\r\n\r\n") - 4 if got < 0 else got + len(data)
            assert got == size


async def test_a_slow_actor_does_not_fill_the_memory(tmp_path: Path) -> None:
    size = 64 << 20
    read = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await read.wait()
        left = size
        while left:
            left -= len(await reader.read(1 << 20))
        writer.write(OK)

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as client:
        client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size)
        client.send(b"x" * size)
        (connection,) = await until(lambda: [c for c in bench.gateway.clients if c.body_paused])
        left = await settled(client.writer.transport.get_write_buffer_size)
        assert left > size - (16 << 20)
        assert connection.body_paused
        read.set()
        assert (await client.response()).status == 200


async def settled(value) -> int:  # type: ignore[no-untyped-def]
    """The value once it has not changed for a while."""
    before, same = value(), 0
    while same < 50:
        await asyncio.sleep(0.002)
        before, same = (before, same + 1) if value() == before else (value(), 0)
    return int(before)


async def test_websocket(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(f"{request.headers['Greenroom-Actor']} {message.data}")
        return ws

    app = web.Application()
    app.router.add_get("/ws", echo)
    runner = web.AppRunner(app)
    await runner.setup()
    path = str(tmp_path / "ws.sock")
    await web.UnixSite(runner, path).start()
    waker = FakeWaker()
    waker.endpoints[KEY] = Endpoint(path=path)
    try:
        async with gateway(waker) as bench, aiohttp.ClientSession() as session:
            async with session.ws_connect(
                f"http://127.0.0.1:{bench.port}/ws", headers={"Host": "a.default.localhost"}
            ) as ws:
                binding = waker.bindings.peek(KEY)
                assert binding is not None and binding.in_flight == 1
                for n in range(3):
                    await ws.send_str(f"{n}" * 100_000)
                    assert await ws.receive_str() == f"default/a {f'{n}' * 100_000}"
            await until(lambda: binding.in_flight == 0)
    finally:
        await runner.cleanup()


async def test_a_tunnel_half_closes(tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: raw\r\n\r\nhi ")
        writer.write(await reader.read())  # everything until the client's end
        await writer.drain()

    async with running(tmp_path, handler) as (bench, it), await bench.connect() as client:
        client.send(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: raw\r\n\r\nearly ")
        status, _, headers = await client.head()
        assert (status, headers["upgrade"], headers["connection"]) == (101, "raw", "upgrade")
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        client.writer.write_eof()
        assert await client.eof() == b"hi early GET / HTTP/1.1\r\n\r\n"
        await until(lambda: it.open == 0 and not bench.gateway.clients)


async def test_a_refused_upgrade_is_an_answer(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK)) as (bench, _), await bench.connect() as client:
        client.send(GET[:-2] + b"Connection: upgrade\r\nUpgrade: raw\r\n\r\n" + GET)
        assert [(await client.response()).status for _ in range(2)] == [200, 200]


async def test_other_ports_and_routing_errors(tmp_path: Path) -> None:
    async def start(text: bytes) -> tuple[asyncio.Server, int]:
        server = await asyncio.start_server(
            lambda r, w: answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))(r, w),
            "127.0.0.1",
        )
        return server, server.sockets[0].getsockname()[1]

    main, port = await start(b"main")
    other, other_port = await start(b"other")
    waker = FakeWaker()
    waker.endpoints[KEY] = Endpoint(host="127.0.0.1", port=port)
    async with main, other, actor(tmp_path, answers(OK), "u") as unix, gateway(waker) as bench:
        waker.endpoints[Key("default", "u")] = Endpoint(path=unix.path)
        assert (await bench.ask()).body == b"main"
        assert (await bench.ask(GET.replace(b"a.default", b"%d--a.default" % other_port))).body == b"other"
        by_header = b"GET / HTTP/1.1\r\nHost: x\r\nGreenroom-Actor: default/a\r\nGreenroom-Port: %d\r\n\r\n"
        assert (await bench.ask(by_header % other_port)).body == b"other"
        assert (await bench.ask(GET.replace(b"a.default", b"80--u.default"))).reason == "NO_SUCH_PORT"
        missing = await bench.ask(GET.replace(b"a.default", b"missing.default"))
        assert (missing.status, missing.reason) == (404, "NOT_FOUND")
        nobody = await bench.ask(GET.replace(b"a.default.localhost", b"localhost"))
        assert (nobody.status, nobody.reason) == (404, "NO_ROUTE")
        other.close()
        binding = waker.bindings.peek(KEY)
        for _ in range(2):
            refused = await bench.ask(by_header % 1)
            assert (refused.status, refused.reason) == (502, "CONNECT_FAILED")
        assert binding is waker.bindings.peek(KEY)


async def test_a_port_in_use_is_named() -> None:
    async with gateway() as bench:
        second = Gateway(FakeWaker())
        with pytest.raises(FailedPrecondition, match=f"port {bench.port} .* in use") as e:
            await second.start("127.0.0.1", bench.port)
        assert e.value.reason == "PORT_IN_USE"
        await second.close()


async def test_bad_requests_are_answered_and_the_connection_closed(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK), Limits(head_bytes=4096)) as (bench, it):
        for request, status in (
            (GET[:-2] + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET, 400),
            (GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\nZ\r\n" + GET, 400),
            (GET[:-2] + b"Cookie: " + b"x" * 5000, 431),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        ):
            async with await bench.connect() as client:
                client.send(request)
                response = await client.response()
                assert (response.status, response.headers["connection"]) == (status, "close")
                assert response.reason in ("BAD_REQUEST", "HEAD_TOO_LARGE")
                assert await client.eof() == b""
        assert it.open == 0


async def test_deadlines(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    limits = Limits(head_s=0.1, stall_s=0.1, answer_s=0.1, linger_s=0.1)
    async with running(tmp_path, silent, limits) as (bench, it):
        for request, status in (
            (b"GET / HT", 408),
            (GET[:-2] + b"Content-Length: 5\r\n\r\nab", 408),
            (GET, 504),
        ):
            response = await bench.ask(request)
            assert (response.status, bool(response.reason)) == (status, True)
        await until(lambda: it.open == 0)
    async with gateway(limits=Limits(keep_alive_s=0.1)) as bench, await bench.connect() as client:
        assert await client.eof() == b""  # idle


async def test_close_lets_open_requests_end(tmp_path: Path) -> None:
    go, asked = asyncio.Event(), asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await go.wait()
        writer.write(OK)

    async with running(tmp_path, handler) as (bench, _), await bench.connect() as idle, await bench.connect() as client:
        client.send(GET)
        await asked.wait()
        closing = asyncio.create_task(bench.gateway.close(grace_s=10))
        assert await idle.eof() == b""
        with pytest.raises(OSError):
            await bench.connect()
        go.set()
        response = await client.response()
        assert (response.status, response.headers["connection"]) == (200, "close")
        client.writer.close()
        await closing


async def test_too_many_clients_are_told(tmp_path: Path) -> None:
    async with running(tmp_path, answers(OK), Limits(clients=1)) as (bench, _), await bench.connect() as first:
        first.send(GET)
        assert (await first.response()).status == 200
        async with await bench.connect() as second:
            assert (await second.response()).reason == "TOO_MANY_CLIENTS"
            assert await second.eof() == b""


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 400), max_size=6), st.lists(st.integers(1, 400), max_size=6))
def test_splits_do_not_change_the_message(request_cuts: list[int], response_cuts: list[int]) -> None:
    """However the bytes of request and response are cut, the same messages come out."""
    asyncio.run(_split_exchange(request_cuts, response_cuts))


async def _split_exchange(request_cuts: list[int], response_cuts: list[int]) -> None:
    body = b"--payload--" * 30
    wire_request = (
        b"POST /p HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nX: y\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:200], body[200:]))
        + b"0\r\nT: u\r\n\r\n"
    )  # fmt: skip
    wire_response = wire_request.replace(b"POST /p HTTP/1.1\r\n" + HOST, b"HTTP/1.1 200 OK\r\n")

    async def send(writer: asyncio.StreamWriter, wire: bytes, cuts: list[int]) -> None:
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        for cut in cuts:
            writer.write(wire[:cut])
            wire = wire[cut:]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        writer.write(wire)

    seen: list[object] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(reader, writer)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        reader._buffer[:0] = b"HTTP/1.1 200 OK\r\n" + head.partition("\r\n")[2].encode()  # type: ignore[attr-defined]
        as_response = await client.response()
        seen.append((head, as_response.body, as_response.trailers))
        await send(writer, wire_response, response_cuts)

    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory), handler) as (bench, _), await bench.connect() as client:
            await send(client.writer, wire_request, request_cuts)
            response = await client.response()
    assert seen == [
        (
            "POST /p HTTP/1.1\r\nHost: a.default.localhost\r\nX: y\r\nGreenroom-Actor: default/a\r\n"
            "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Host: a.default.localhost\r\n"
            "Transfer-Encoding: chunked\r\n\r\n",
            body,
            {"t": "u"},
        )
    ]
    assert (response.status, response.body, response.trailers) == (200, body, {"t": "u"})
    assert response.headers == {"transfer-encoding": "chunked", "x": "y"}


async def test_errors_are_json(tmp_path: Path) -> None:
    async with gateway() as bench:
        response = await bench.ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert json.loads(response.body)["error"].keys() == {"code", "reason", "message"}
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("pieces", [[b"0\r\n\r\n"], [b"0\r\n", b"\r\n"], [b"2\r\nok\r\n", b"0\r\n\r\n"]])
async def test_a_post_that_was_sent_whole_is_not_sent_again(tmp_path: Path, pieces: list[bytes]) -> None:
    """Also when it has an empty body of unknown length: its actor may have carried it out before it hung up."""
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        await reader.readuntil(b"0\r\n\r\n")

    limits = Limits(fresh_enough_s=60, upstream_idle_s=60)
    async with running(tmp_path, handler, limits) as (bench, _), await bench.connect() as client:
        client.send(GET)
        assert (await client.response()).body == b"ok"
        client.send(b"POST /pay HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + pieces[0])
        for piece in pieces[1:]:
            await until(lambda: seen)
            client.send(piece)
        async with asyncio.timeout(60):
            assert (await client.response()).status == 502
        assert len(seen) == 1


async def test_a_client_that_is_slow_and_takes_what_it_is_sent_gets_all_of_it(tmp_path: Path) -> None:
    size, loop = 200_000, asyncio.get_running_loop()
    limits = Limits(stall_s=4.0)
    wire = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
    async with running(tmp_path, answers(wire), limits) as (bench, _):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # so that little is on its way
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", bench.port))
            (there,) = await until(lambda: bench.gateway.clients)
            there.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            await loop.sock_sendall(client, GET)
            bench.gateway.limits = replace(limits, keep_alive_s=0.3, head_s=0.3)  # not while it connects
            got, whole = 0, wire.partition(b"\r\n\r\n")[0]
            while got < size + len(whole):
                piece = await loop.sock_recv(client, 4096)
                assert piece, f"cut off after {got} bytes"
                got += len(piece)
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("host", ["evil.default.localhost", "9--evil.default.localhost:8080", "attacker.example"])
async def test_a_page_of_somebody_elses_reaches_no_actor_by_a_header(tmp_path: Path, host: str) -> None:
    """What a browser loaded from an actor, or from a name that was led here, may send any header to the same place."""
    async with running(tmp_path, answers(OK)) as (bench, it):
        forged = b"GET / HTTP/1.1\r\nHost: %b\r\nGreenroom-Actor: default/a\r\n\r\n" % host.encode()
        answer = await bench.ask(forged)
        assert (answer.status, answer.reason) == (404, "NO_ROUTE") and it.connections == 0
        for good in (b"a.default.localhost", b"localhost:80", b"127.0.0.1:80", b"[::1]:80", b"gateway", b"x.y.svc"):
            assert (await bench.ask(forged.replace(host.encode(), good))).status == 200, good
