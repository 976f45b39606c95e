"""Registries on loopback: Debian's docker-registry, and a front for it that is slow, breaks off or wants a login."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
from aiohttp import web

_TOOLS = Path(__file__).resolve().parents[2] / ".tools" / "bin"
#: A registry is up in about a second; this is for a busy machine.
_START_TIMEOUT_S = 30.0


def find_tool(name: str) -> str | None:
    """A program that scripts/setup.sh brought, or one on PATH."""
    return shutil.which(name, path=f"{_TOOLS}{os.pathsep}{os.environ.get('PATH', '')}")


def find_registry() -> str | None:
    return find_tool("docker-registry")


@contextlib.contextmanager
def docker_registry(directory: Path) -> Iterator[str]:
    """Runs one with its data in ``directory``; yields ``host:port``."""
    program = find_registry()
    assert program is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(f"http://127.0.0.1:{port}/v2/"):
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, "the registry does not come up"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


Handler = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


class Front:
    """A server before a registry. ``intercept`` may answer a request itself or return None to pass it on; what was
    passed on is counted, and each blob's body cut or slowed down as told."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.host = ""
        self.intercept: Handler | None = None
        self.ranges: list[str] = []  # the Range header of each request for a blob ("" without)
        self.blob_bytes = 0  # sent of blobs
        self.cut_after: int | None = None  # break blob bodies off after so many bytes
        self.flip_byte: int | None = None  # damage the byte at this offset of a blob's body
        self.ignore_ranges = False
        self.before_chunk: Callable[[], Awaitable[None]] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Front]:
        app = web.Application()
        app.router.add_route("GET", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.host = f"127.0.0.1:{runner.addresses[0][1]}"
            async with aiohttp.ClientSession(auto_decompress=False) as self._session:
                yield self
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.intercept is not None and (answer := await self.intercept(request)) is not None:
            return answer
        headers = {k: v for k, v in request.headers.items() if k.lower() in ("accept", "range")}
        is_blob = "/blobs/" in request.path
        if is_blob:
            self.ranges.append(headers.get("Range", ""))
            if self.ignore_ranges:
                headers.pop("Range", None)
        async with self._session.get(f"http://{self.upstream}{request.path_qs}", headers=headers) as upstream:
            kept = ("content-type", "content-range", "content-length", "docker-content-digest")
            response = web.StreamResponse(
                status=upstream.status, headers={k: v for k, v in upstream.headers.items() if k.lower() in kept}
            )
            await response.prepare(request)
            await self._pass_on(request, upstream, response, is_blob)
            return response

    async def _pass_on(
        self, request: web.Request, upstream: aiohttp.ClientResponse, response: web.StreamResponse, is_blob: bool
    ) -> None:
        sent = 0
        async for chunk in upstream.content.iter_chunked(64 << 10):
            if is_blob:
                if self.before_chunk is not None:
                    await self.before_chunk()
                if self.flip_byte is not None and sent <= self.flip_byte < sent + len(chunk):
                    at = self.flip_byte - sent
                    chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
                if self.cut_after is not None and sent + len(chunk) > self.cut_after:
                    await response.write(chunk[: self.cut_after - sent])
                    self.blob_bytes += self.cut_after - sent
                    assert request.transport is not None
                    request.transport.close()
                    return
                self.blob_bytes += len(chunk)
            sent += len(chunk)
            await response.write(chunk)
