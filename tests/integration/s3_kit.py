"""What may stand before an S3 server and make it worse: a proxy on loopback that lists late, refuses, and carries out
deletions later than it was asked to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import aiohttp
from aiohttp import web

_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"
_AWAY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
#: Of an answer, made anew by whoever sends it on.
_OWN = ("transfer-encoding", "content-length", "connection", "date", "server")


class Asked(NamedTuple):
    """A request as it came; its signature is good for a quarter of an hour."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def deletes(self) -> bool:
        return self.method == "DELETE" or (self.method == "POST" and "?delete" in self.path)

    @property
    def lists(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.path


class S3Proxy:
    """Attributes:
    endpoint: its base URL while it runs.
    refuses: which requests are answered "access denied".
    postpones: which requests are put off until `carry_out`; whoever asked hears that the server is busy.
    lists_late: a list is answered as it was when this was set.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.endpoint = ""
        self.refuses: Callable[[Asked], bool] = lambda asked: False
        self.postpones: Callable[[Asked], bool] = lambda asked: False
        self.lists_late = False
        self._lists: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self._postponed: list[Asked] = []
        self._session: aiohttp.ClientSession | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[S3Proxy]:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with aiohttp.ClientSession(auto_decompress=False) as self._session:
                yield self
        finally:
            await runner.cleanup()

    async def carry_out(self) -> int:
        """What was put off arrives now; returns how many requests that were."""
        postponed, self._postponed = self._postponed, []
        for asked in postponed:
            status, _, answer = await self._send(asked)
            assert status < 300, answer
        return len(postponed)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        asked = Asked(request.method, request.raw_path, dict(request.headers), await request.read())
        if self.refuses(asked):
            return web.Response(status=403, body=_DENIED, content_type="application/xml")
        if self.postpones(asked):
            self._postponed.append(asked)
            return web.Response(status=503, body=_AWAY, content_type="application/xml")
        if asked.lists and self.lists_late and asked.path in self._lists:
            status, headers, body = self._lists[asked.path]
        else:
            status, headers, body = await self._send(asked)
        if asked.lists:
            self._lists[asked.path] = status, headers, body
        length = {"Content-Length": headers["Content-Length"]} if asked.method == "HEAD" else {}
        kept = {k: v for k, v in headers.items() if k.lower() not in _OWN}
        return web.Response(status=status, headers=kept | length, body=body)

    async def _send(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        assert self._session is not None
        url = aiohttp.client.URL(f"{self._upstream}{asked.path}", encoded=True)
        async with self._session.request(
            asked.method, url, headers=asked.headers, data=asked.body, allow_redirects=False
        ) as answer:
            return answer.status, dict(answer.headers), await answer.read()
