"""Agents that fetch blobs from each other: the registry is asked once, and no peer is believed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from registry_kit import docker_registry, find_registry
from yarl import URL

from greenroom.core.errors import NotFound
from greenroom.images import download, peers
from greenroom.images.peers import PeerServer
from greenroom.images.pieces import PIECE_BYTES
from greenroom.images.port import Image
from greenroom.images.store import DiskImageStore
from greenroom.testing.contracts.images import contents, make_image
from greenroom.testing.fault_proxy import FaultProxy
from greenroom.testing.oci_layout import push_layout

pytestmark = pytest.mark.skipif(find_registry() is None, reason="no docker-registry: run scripts/setup.sh --test")

DATA = os.urandom((6 << 20) + 99)
SIZE = len(DATA)

Serve = Callable[..., Awaitable[str]]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        layout = tmp_path_factory.mktemp("layout")
        make_image(layout, {"large": DATA}, {"small": b"small"}, compression="zstd")
        push_layout(layout, f"{host}/test/image:1")
        yield host


@pytest.fixture
async def proxy(upstream: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(upstream).running() as running:
        yield running


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once, and no peer is left out because this machine stood still."""
    monkeypatch.setattr(download, "RETRY_BASE_S", 0.001)
    monkeypatch.setattr(peers, "CONNECT_TIMEOUT_S", 60.0)


@pytest.fixture
async def image(proxy: FaultProxy, tmp_path: Path) -> Image:
    """What the first worker has fetched."""
    return await DiskImageStore(tmp_path / "first").prepare(f"{proxy.host}/test/image:1")


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(root: Path, *, token: str = "") -> str:
            server = PeerServer(root, token=token)
            stack.push_async_callback(server.close)
            return await server.start("127.0.0.1")

        yield start


async def bad_peer(stack: AsyncExitStack, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> str:
    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


def check(found: Image) -> None:
    assert contents(found.rootfs) == {"large": DATA, "small": b"small"}


async def test_the_second_worker_needs_no_registry(
    image: Image, proxy: FaultProxy, serve: Serve, tmp_path: Path
) -> None:
    peer = await serve(tmp_path / "first")
    requests = len(proxy.requests)
    second = DiskImageStore(tmp_path / "second", peers=lambda: [peer])
    check(await second.prepare(f"{proxy.host}/test/image@{image.digest}"))
    assert len(proxy.requests) == requests
    # A tag is the registry's to say; the rest comes from the peer.
    third = DiskImageStore(tmp_path / "third", peers=lambda: [peer])
    fetched = proxy.blob_bytes
    check(await third.prepare(f"{proxy.host}/test/image:1"))
    assert proxy.blob_bytes == fetched


async def test_pieces_come_from_all_who_have_them(
    image: Image, proxy: FaultProxy, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: dict[str, int] = {}
    real = PeerServer._serve

    async def count(self: PeerServer, request: web.Request) -> web.StreamResponse:
        served[self.address] = served.get(self.address, 0) + 1
        return await real(self, request)

    monkeypatch.setattr(PeerServer, "_serve", count)
    addresses = [await serve(tmp_path / "first") for _ in range(3)]
    empty = await serve(tmp_path / "empty")
    second = DiskImageStore(tmp_path / "second", peers=lambda: [empty, *addresses])
    check(await second.prepare(f"{proxy.host}/test/image@{image.digest}"))
    assert all(served.get(address) for address in addresses)


@pytest.mark.parametrize("fault", ["gone", "silent", "empty", "lies", "shorter", "refuses", "whole", "breaks off"])
async def test_peers_may_fail(
    image: Image, proxy: FaultProxy, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whatever a peer does, the image comes from the registry, and it is the right one."""
    monkeypatch.setattr(peers, "SILENCE_TIMEOUT_S", 0.2)

    async def handle(request: web.Request) -> web.StreamResponse:
        start, end = 0, SIZE
        if "Range" in request.headers:
            first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1
        total = SIZE - 1 if fault == "shorter" else next(size for size in sizes if size >= min(end, max(sizes)))
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
        match fault:
            case "silent":
                await asyncio.sleep(2)
            case "refuses":
                return web.Response(status=403)
            case "whole":
                return web.Response(body=bytes(1000))
            case "breaks off":
                response = web.StreamResponse(status=206, headers={**headers, "Content-Length": str(end - start)})
                await response.prepare(request)
                await response.write(bytes(1000))
                assert request.transport is not None
                request.transport.abort()
                return response
        return web.Response(status=206, headers=headers, body=bytes(end - start))

    sizes = sorted(path.stat().st_size for path in (tmp_path / "first/blobs/sha256").iterdir())
    async with AsyncExitStack() as stack:
        match fault:
            case "gone":
                peer = "http://127.0.0.1:1"
            case "empty":
                peer = await serve(tmp_path / "empty")
            case _:
                peer = await bad_peer(stack, handle)
        second = DiskImageStore(tmp_path / "second", peers=lambda: [peer])
        check(await second.prepare(f"{proxy.host}/test/image@{image.digest}"))


async def test_goes_on_at_the_registry_where_a_peer_went_away(image: Image, proxy: FaultProxy, tmp_path: Path) -> None:
    """A peer ends in the middle: what came from it stays."""
    server = PeerServer(tmp_path / "first")
    peer = await server.start("127.0.0.1")
    closing: list[asyncio.Task[None]] = []

    async with FaultProxy(peer.removeprefix("http://")).running() as between:

        async def end_in_the_middle() -> None:
            if between.blob_bytes > SIZE // 3:
                closing[:] = closing or [asyncio.create_task(server.close())]
                await asyncio.wait(closing)

        between.before_chunk = end_in_the_middle
        fetched = proxy.blob_bytes
        second = DiskImageStore(tmp_path / "second", peers=lambda: [f"http://{between.host}"])
        check(await second.prepare(f"{proxy.host}/test/image@{image.digest}"))
        assert closing
        assert 0 < proxy.blob_bytes - fetched < SIZE
    await asyncio.gather(*closing)


async def test_only_with_the_token(image: Image, proxy: FaultProxy, serve: Serve, tmp_path: Path) -> None:
    peer = await serve(tmp_path / "first", token="shared")
    path = f"/blobs/{image.digest.replace(':', '/')}"
    async with aiohttp.ClientSession() as session:
        for said in ("", "Bearer other", "shared", "Bearer sharedx"):
            async with session.get(peer + path, headers={"Authorization": said}) as response:
                assert response.status == 401
    requests = len(proxy.requests)
    second = DiskImageStore(tmp_path / "second", peers=lambda: [peer], peer_token="shared")
    check(await second.prepare(f"{proxy.host}/test/image@{image.digest}"))
    assert len(proxy.requests) == requests


async def test_serves_nothing_else(image: Image, serve: Serve, tmp_path: Path) -> None:
    """Whole blobs by digest, for reading: no lists, no partial downloads, no other files."""
    peer = await serve(tmp_path / "first")
    (tmp_path / "first/partial" / ("ab" * 32)).write_bytes(b"half")
    async with aiohttp.ClientSession() as session:
        for method, path, status in (
            ("GET", "/", 404),
            ("GET", "/blobs/sha256/", 404),
            ("GET", f"/blobs/sha256/{'ab' * 32}", 404),
            ("GET", f"/blobs/sha256/{'AB' * 32}", 404),
            ("GET", "/blobs/sha256/..%2f..%2fimages", 404),
            ("GET", f"/blobs/sha256/%2e%2e/{image.digest[7:]}", 404),
            ("PUT", f"/blobs/sha256/{image.digest[7:]}", 405),
            ("DELETE", f"/blobs/sha256/{image.digest[7:]}", 405),
            ("GET", f"/blobs/sha256/{image.digest[7:]}", 200),
        ):
            async with session.request(method, peer + path) as response:
                assert response.status == status, path
        layer = image.layers[0].replace(":", "/")
        whole = (tmp_path / "first/blobs" / layer).read_bytes()
        for part, wanted in (
            ("bytes=0-9", whole[:10]),
            (f"bytes={PIECE_BYTES}-{PIECE_BYTES + 4}", whole[PIECE_BYTES : PIECE_BYTES + 5]),
            ("bytes=-7", whole[-7:]),
        ):
            async with session.get(f"{peer}/blobs/{layer}", headers={"Range": part}) as response:
                assert (response.status, await response.read()) == (206, wanted)
        async with session.get(f"{peer}/blobs/{layer}", headers={"Range": f"bytes={len(whole)}-"}) as response:
            assert response.status == 416


async def test_no_peer_has_it(serve: Serve, proxy: FaultProxy, tmp_path: Path) -> None:
    """The registry's word counts."""
    peer = await serve(tmp_path / "empty")
    store = DiskImageStore(tmp_path / "store", peers=lambda: [peer])
    with pytest.raises(NotFound, match="is not in registry"):
        await store.prepare(f"{proxy.host}/test/image@sha256:{'1' * 64}")


async def test_a_reader_that_does_not_read(
    image: Image, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a turn for a while and not for ever."""
    monkeypatch.setattr(peers, "SERVE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(peers, "MAX_REQUESTS", 1)
    peer = await serve(tmp_path / "first")
    path = f"{peer}/blobs/{image.layers[0].replace(':', '/')}"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        url = URL(peer)
        await loop.sock_connect(connection, (url.host, url.port))
        await loop.sock_sendall(connection, f"GET {URL(path).path} HTTP/1.1\r\nHost: peer\r\n\r\n".encode())
        await loop.sock_recv(connection, 100)
        monkeypatch.setattr(peers, "SERVE_TIMEOUT_S", 60.0)  # that of the one before has begun
        async with (
            asyncio.timeout(60),
            aiohttp.ClientSession() as session,
            session.get(path, headers={"Range": "bytes=0-9"}) as response,
        ):
            assert (response.status, len(await response.read())) == (206, 10)
