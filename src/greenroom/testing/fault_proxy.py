"""A bad link, and a bad registry: an HTTP proxy before a registry that throttles, delays, cuts, corrupts and refuses.

In a test it is an object whose attributes may be changed while it runs::

    async with FaultProxy(upstream="127.0.0.1:5000").running() as proxy:
        proxy.bits_per_s, proxy.latency_s = 10e6, 0.4
        proxy.answer(429, times=2, headers={"Retry-After": "1"}, path="/manifests/")
        ...  # pull from proxy.host
        assert proxy.blob_bytes < size + (4 << 20)

Beside a benchmark it is a process of its own, which prints its ``host:port`` when it is up and answers
``GET /-/counts`` with what it has passed on so far::

    python -m greenroom.testing.fault_proxy --upstream 127.0.0.1:5000 --bits-per-s 10e6 --latency-s 0.4
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

#: Bytes passed on at a time: small enough that a throttled link trickles rather than jumps.
_CHUNK_BYTES = 16 << 10
#: What the kernel holds back for a receiver that does not read. Small, so that what counts as sent has arrived, but for
#: this much a connection.
_SEND_BUFFER_BYTES = 64 << 10

Intercept = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


@dataclass
class _Answer:
    """An answer that the proxy gives itself."""

    status: int
    times: int
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class FaultProxy:
    """An HTTP reverse proxy on loopback whose faults are attributes.

    Attributes:
        host: ``host:port`` while it runs.
        bits_per_s: what all bodies together get; None is as fast as it goes.
        latency_s: a round trip: each request waits for one, and the first of a connection for one more.
        cut_after_bytes: each body of a blob breaks off after so many bytes.
        cut_every_bytes: whenever so many more bytes of blobs have passed in all, every open connection breaks.
        corrupt_at: the byte at this offset of each blob arrives damaged.
        ignore_ranges: every blob is sent from its start.
        intercept: may answer a request itself, or return None to pass it on.
        before_chunk: awaited before each piece of a blob's body.
        requests: methods and paths, as they came.
        ranges: the ``Range`` header of each request for a blob, ``""`` without one.
        blob_bytes: sent of blobs' bodies.
        cuts: connections that were broken.
    """

    def __init__(
        self,
        upstream: str,
        *,
        bits_per_s: float | None = None,
        latency_s: float = 0.0,
        cut_every_bytes: int | None = None,
    ) -> None:
        self.upstream = upstream
        self.host = ""
        self.bits_per_s = bits_per_s
        self.latency_s = latency_s
        self.cut_after_bytes: int | None = None
        self.cut_every_bytes = cut_every_bytes
        self.corrupt_at: int | None = None
        self.ignore_ranges = False
        self.intercept: Intercept | None = None
        self.before_chunk: Callable[[], Awaitable[None]] | None = None
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.blob_bytes = 0
        self.cuts = 0
        self._answers: list[_Answer] = []
        self._known: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._busy: set[asyncio.Transport] = set()
        self._free_at = 0.0  # when the link has sent what it was given (the loop's clock)
        self._session: aiohttp.ClientSession | None = None

    def answer(
        self, status: int, *, times: int = 1, path: str = "", headers: dict[str, str] | None = None, body: bytes = b""
    ) -> None:
        """Answers the next ``times`` requests whose path has ``path`` in it like this, instead of passing them on."""
        self._answers.append(_Answer(status, times, path, headers or {}, body))

    def want_tokens(
        self,
        *,
        account: tuple[str, str] | None = None,
        identity_token: str = "",
        lifetime_requests: int = 1_000_000,
        repository: str = "test/image",
    ) -> list[str]:
        """From now on every request needs a bearer token of this proxy's own ``/token``, good for so many requests.

        Args:
            account: who gets one (basic authentication); None: everybody.
            identity_token: who gets one (a refresh token, posted as OAuth 2 has it).

        Returns:
            The scopes that tokens were asked for, a list that grows.
        """
        scopes: list[str] = []
        left: dict[str, int] = {}

        async def intercept(request: web.Request) -> web.StreamResponse | None:
            if request.path == "/token":
                query = await request.post() if request.method == "POST" else request.query
                if account is not None and request.headers.get("Authorization") != aiohttp.encode_basic_auth(*account):
                    return web.Response(status=401)
                if identity_token and query.get("refresh_token") != identity_token:
                    return web.Response(status=401)
                scopes.append(str(query["scope"]))
                token = f"token{len(scopes)}"
                left[token] = lifetime_requests
                return web.json_response({"access_token" if identity_token else "token": token, "expires_in": 300})
            token = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if left.get(token, 0) > 0:
                left[token] -= 1
                return None
            scope = f"repository:{repository}:pull"
            challenge = f'Bearer realm="http://{self.host}/token",service="test registry",scope="{scope}"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})

        self.intercept = intercept
        return scopes

    def cut(self) -> None:
        """Breaks every connection that has a request under way."""
        for transport in self._busy:
            self.cuts += 1
            transport.abort()
        self._busy.clear()

    @contextlib.asynccontextmanager
    async def running(self, *, port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[FaultProxy]:
        """Serves on loopback, on a free port by default."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls)
            await site.start()
            self.host = f"127.0.0.1:{runner.addresses[0][1]}"
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(auto_decompress=False, connector=connector) as self._session:
                yield self
        finally:
            await runner.cleanup()

    # --- one request -----------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/-/counts":
            counts = {"blob_bytes": self.blob_bytes, "blob_requests": len(self.ranges), "cuts": self.cuts}
            return web.json_response(counts)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        await self._delay(transport)
        self.requests.append(f"{request.method} {request.path}")
        if (answer := self._scripted(request)) is not None:
            return answer
        if self.intercept is not None and (response := await self.intercept(request)) is not None:
            return response
        self._busy.add(transport)
        try:
            return await self._pass_on(request, transport)
        finally:
            self._busy.discard(transport)

    async def _delay(self, transport: asyncio.Transport) -> None:
        trips = 1
        if transport not in self._known:
            self._known.add(transport)
            trips = 2
            if (connection := transport.get_extra_info("socket")) is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if self.latency_s:
            await asyncio.sleep(trips * self.latency_s)

    def _scripted(self, request: web.Request) -> web.StreamResponse | None:
        for answer in self._answers:
            if answer.path in request.path:
                answer.times -= 1
                if answer.times == 0:
                    self._answers.remove(answer)
                return web.Response(status=answer.status, headers=answer.headers, body=answer.body)
        return None

    async def _pass_on(self, request: web.Request, transport: asyncio.Transport) -> web.StreamResponse:
        assert self._session is not None
        headers = {k: v for k, v in request.headers.items() if k.lower() in ("accept", "range", "content-type")}
        is_blob = request.method == "GET" and "/blobs/" in request.path
        if is_blob:
            self.ranges.append(headers.get("Range", ""))
            if self.ignore_ranges:
                headers.pop("Range", None)
        body = request.content if request.can_read_body else None
        async with self._session.request(
            request.method,
            f"http://{self.upstream}{request.path_qs}",
            headers=headers,
            data=body,
            allow_redirects=False,
        ) as upstream:
            kept = ("content-type", "content-range", "content-length", "docker-content-digest", "location")
            response = web.StreamResponse(
                status=upstream.status, headers={k: v for k, v in upstream.headers.items() if k.lower() in kept}
            )
            with contextlib.suppress(ConnectionResetError):  # whoever asked is gone, or was cut off
                await response.prepare(request)
                await self._send(upstream, response, transport, is_blob)
            return response

    async def _send(
        self,
        upstream: aiohttp.ClientResponse,
        response: web.StreamResponse,
        transport: asyncio.Transport,
        is_blob: bool,
    ) -> None:
        found = re.match(r"bytes (\d+)-", upstream.headers.get("Content-Range", ""))
        start = int(found[1]) if found else 0
        sent = 0
        async for chunk in upstream.content.iter_chunked(_CHUNK_BYTES):
            if is_blob:
                if self.before_chunk is not None:
                    await self.before_chunk()
                chunk = self._damaged(chunk, start + sent)
                if self.cut_after_bytes is not None and sent + len(chunk) > self.cut_after_bytes:
                    left = chunk[: self.cut_after_bytes - sent]
                    await response.write(left)
                    self.blob_bytes += len(left)
                    self.cuts += 1
                    transport.close()  # what was written still arrives
                    return
            await self._throttle(len(chunk))
            await response.write(chunk)
            sent += len(chunk)
            if is_blob:
                self._count(len(chunk))

    def _damaged(self, chunk: bytes, offset: int) -> bytes:
        if self.corrupt_at is None or not offset <= self.corrupt_at < offset + len(chunk):
            return chunk
        at = self.corrupt_at - offset
        return chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]

    async def _throttle(self, size_bytes: int) -> None:
        if self.bits_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + size_bytes * 8 / self.bits_per_s
        await asyncio.sleep(self._free_at - now)

    def _count(self, size_bytes: int) -> None:
        before = self.blob_bytes
        self.blob_bytes += size_bytes
        if self.cut_every_bytes is not None:
            every = self.cut_every_bytes
            if before // every != self.blob_bytes // every:
                self.cut()


async def _serve(proxy: FaultProxy, port: int) -> None:
    async with proxy.running(port=port):
        print(proxy.host, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A bad link before a registry; prints its host:port when it is up.")
    parser.add_argument("--upstream", required=True, help="host:port of the registry, spoken to without TLS")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--bits-per-s", type=float, help="for all connections together")
    parser.add_argument("--latency-s", type=float, default=0.0, help="a round trip")
    parser.add_argument("--cut-every-bytes", type=int, help="break all connections whenever so much has passed")
    arguments = parser.parse_args()
    proxy = FaultProxy(
        arguments.upstream,
        bits_per_s=arguments.bits_per_s,
        latency_s=arguments.latency_s,
        cut_every_bytes=arguments.cut_every_bytes,
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(proxy, arguments.port))


if __name__ == "__main__":
    main()
