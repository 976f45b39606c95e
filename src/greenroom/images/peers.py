"""Agents that give each other the blobs that they have, so that an image crosses the link to its registry once.

A peer serves whole, verified blobs by digest (manifests and configs are blobs, too), and nothing else::

    GET /blobs/sha256/<hex>        200, 206 (ranges), 404

Who fetches checks the digest and falls back to the registry, so a peer can be slow or gone but not harmful. Who knows a
digest may read the blob; a token, if there is one, keeps everybody else away.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import abc, web
from yarl import URL

from greenroom.core.errors import DataLoss, NotFound
from greenroom.images.blobs import BlobStore
from greenroom.images.config import MAX_JSON_BYTES, Descriptor, invalid
from greenroom.images.download import Interrupted
from greenroom.images.pieces import PIECE_BYTES

#: A peer is near: one that does not answer at once is not worth waiting for.
CONNECT_TIMEOUT_S = 2.0
SILENCE_TIMEOUT_S = 10.0
#: Requests that a peer serves at a time; more wait. A piece each, so that actors' disks keep some time for themselves.
MAX_REQUESTS = 16
#: Peers that are asked for one blob at most: of a large pool somebody near the front has it, or nobody.
MAX_PEERS = 16
#: A request that takes longer has a reader that does not read; pieces take a moment.
SERVE_TIMEOUT_S = 120.0
_BROKEN = (aiohttp.ClientError, TimeoutError, ConnectionError)


class PeerServer:
    """Serves the blobs of a store.

    Args:
        root: the image store's root.
        token: who fetches must know it; "" lets everybody.
    """

    def __init__(self, root: Path, *, token: str = "") -> None:
        self._blobs = BlobStore(root)
        self._token = token.encode()
        self._turns = asyncio.Semaphore(MAX_REQUESTS)
        self._runner: web.AppRunner | None = None
        self.address = ""

    async def start(self, host: str, port: int = 0) -> str:
        """Listens; returns the base URL (also in ``address``).

        Raises:
            OSError: the address can't be had.
        """
        app = web.Application()
        app.router.add_get("/blobs/sha256/{hex:[0-9a-f]{64}}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        bound = self._runner.addresses[0]
        self.address = str(URL.build(scheme="http", host=bound[0], port=bound[1]))
        return self.address

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        said = request.headers.get("Authorization", "").encode()
        if self._token and not hmac.compare_digest(said, b"Bearer " + self._token):
            raise web.HTTPUnauthorized
        # Only what is under its final name, so whole and verified. An open file stays readable when it is evicted.
        path = self._blobs.path(f"sha256:{request.match_info['hex']}")
        if not await asyncio.to_thread(path.is_file):
            raise web.HTTPNotFound
        return _Blob(path, self._turns)


class _Blob(web.FileResponse):
    """A file that is sent when it is its turn, and not for ever."""

    def __init__(self, path: Path, turns: asyncio.Semaphore) -> None:
        super().__init__(path, chunk_size=PIECE_BYTES)
        self._turns = turns

    async def prepare(self, request: web.BaseRequest) -> abc.AbstractStreamWriter | None:
        async with self._turns, asyncio.timeout(SERVE_TIMEOUT_S):
            return await super().prepare(request)


class PeerSource:
    """`greenroom.images.origins.Source` of what other agents have. An async context manager.

    Pieces of one blob are taken from all who have it. A peer that fails is not asked again by this source.

    Args:
        peers: base URLs as `PeerServer.start` returns them; from the `MAX_PEERS` first.
        digest: of the manifest that is wanted; "" for a tag, which peers don't know.
        token: theirs.
    """

    def __init__(self, peers: Sequence[str], *, digest: str = "", token: str = "") -> None:
        self._peers = [peer.rstrip("/") for peer in peers[:MAX_PEERS]]
        self._digest = digest
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._lacking: set[tuple[str, str]] = set()  # (peer, digest)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> PeerSource:
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def resolve(self) -> tuple[str, bytes, str]:
        if not self._digest:
            raise NotFound("peers know no tags", reason="IMAGE_NOT_FOUND")
        return self._digest, await self._small(self._digest), ""

    async def manifest(self, descriptor: Descriptor) -> bytes:
        return await self._small(descriptor.digest)

    @asynccontextmanager
    async def open_blob(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        async with self._get(descriptor.digest, start // PIECE_BYTES, f"bytes={start}-{end - 1}") as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status != 206 or total != str(descriptor.size):
                raise DataLoss(
                    f"a peer has {total or 'no range'} of blob {descriptor.digest}, which has {descriptor.size} bytes",
                    reason="SIZE_MISMATCH",
                )
            yield start, response.content.iter_chunked(PIECE_BYTES)

    async def _small(self, digest: str) -> bytes:
        """A manifest."""
        async with self._get(digest, 0, f"bytes=0-{MAX_JSON_BYTES - 1}") as response:
            data = bytearray()
            async for chunk in response.content.iter_chunked(PIECE_BYTES):
                data += chunk
                if len(data) > MAX_JSON_BYTES:
                    raise invalid(f"manifest {digest} is larger than {MAX_JSON_BYTES} bytes")
            return bytes(data)

    def _choose(self, digest: str, number: int) -> str:
        usable = [peer for peer in self._peers if (peer, digest) not in self._lacking]
        if not usable:
            raise NotFound(f"no peer has blob {digest}", reason="IMAGE_NOT_FOUND")
        return usable[number % len(usable)]

    @asynccontextmanager
    async def _get(self, digest: str, number: int, part: str) -> AsyncIterator[aiohttp.ClientResponse]:
        """From the first peer, beginning with the ``number``-th, that answers and has it."""
        assert self._session is not None
        while True:
            peer = self._choose(digest, number)
            async with AsyncExitStack() as stack:
                try:
                    url = f"{peer}/blobs/{digest.replace(':', '/')}"
                    request = self._session.get(url, headers={"Range": part}, allow_redirects=False)
                    response = await stack.enter_async_context(request)
                except _BROKEN:
                    self._peers = [other for other in self._peers if other != peer]
                    continue
                if response.status not in (200, 206):
                    self._lacking.add((peer, digest))
                    continue
                try:
                    yield response
                except _BROKEN as error:
                    self._lacking.add((peer, digest))
                    raise Interrupted(f"peer {peer}: {str(error) or type(error).__name__}") from error
                return
