"""Requests to an API server, and what it means that one is not answered."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, Protocol

import aiohttp
import msgspec

from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    FailedPrecondition,
    GreenroomError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.operator.kubeconfig import Connection

MERGE_PATCH = "application/merge-patch+json"
#: Longest line of a watch: an object and what surrounds it.
MAX_LINE_BYTES = 4 << 20
#: A watch on which nothing comes for this long, not even a bookmark (which come every minute), is broken.
SILENCE_S = 150.0
#: Connections that are kept at most; a few dozen requests are under way at once, and two watches.
MAX_CONNECTIONS = 64
#: After a connection that failed the configuration is read again, but not more often than this: it may run a program.
RENEW_EVERY_S = 10.0
#: Reason of `FailedPrecondition` when a version is too old to be watched from.
EXPIRED = "EXPIRED"


class Reply(NamedTuple):
    """An answer of 200 to 299."""

    status: int
    body: bytes


class Transport(Protocol):
    """Carries requests to one API server.

    What the server refuses is raised as what it means (`refusal`). `Unavailable` is raised when nobody knows whether a
    request took effect, takes effect later, or never: no answer in time, a broken connection, an answer of 5xx.
    """

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout_s: float,
    ) -> Reply:
        """One request. ``body``: plain data or records, sent as JSON. Safe to cancel; then nobody knows either."""

    def lines(
        self, path: str, query: Mapping[str, str]
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterable[bytes]]:
        """The lines of an answer that does not end (a watch), as they come."""


def refusal(status: int, body: bytes, retry_after_s: float = 0.0) -> GreenroomError:
    """The error that an answer stands for. ``metadata``: ``status`` (HTTP) and ``kube_reason``.

    Source: Kubernetes API conventions, "HTTP Status codes" and "Response Status Kind".
    """
    reason, message = "", f"the API server answered {status}"
    with contextlib.suppress(msgspec.DecodeError, ValueError):
        told = msgspec.json.decode(body)
        if isinstance(told, dict):
            reason, message = str(told.get("reason") or ""), str(told.get("message") or message)
    facts = {"status": str(status), "kube_reason": reason}
    match status:
        case 404:
            return NotFound(message, metadata=facts)
        case 409 if reason == "AlreadyExists":
            return AlreadyExists(message, metadata=facts)
        case 409:
            return Conflict(message, metadata=facts)
        case 410:
            return FailedPrecondition(message, reason=EXPIRED, metadata=facts)
        case 429:
            return ResourceExhausted(message, metadata=facts, retry_after_s=retry_after_s or 1.0)
        case 400 | 422:
            return InvalidArgument(message, metadata=facts)
        case 401 | 403 | 405 | 413 | 415:
            return FailedPrecondition(message, metadata=facts)
        case _:
            return Unavailable(message, metadata=facts, retry_after_s=retry_after_s)


class HttpTransport:
    """`Transport` over HTTP. An async context manager.

    Args:
        connect: where the server is; asked again when it says that it does not know us, and when no connection comes
            about, because tokens and certificates are replaced while a process runs.
        agent: what the server's audit log calls us.
    """

    def __init__(self, connect: Callable[[], Connection], agent: str = "greenroom-operator") -> None:
        self._connect = connect
        self._agent = agent
        self._renewed_at = -math.inf

    async def __aenter__(self) -> HttpTransport:
        self._connection = self._connect()
        self._session = self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS, ssl=self._connection.ssl or True)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
            headers={"User-Agent": self._agent, "Accept": "application/json"},
            read_bufsize=MAX_LINE_BYTES,
            trust_env=False,
        )

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout_s: float,
    ) -> Reply:
        data = None if body is None else msgspec.json.encode(body)
        for again in (False, True):
            try:
                async with (
                    asyncio.timeout(timeout_s),
                    self._session.request(
                        method,
                        self._connection.server + path,
                        params=query,
                        data=data,
                        headers={**self._connection.headers, "Content-Type": content_type},
                    ) as response,
                ):
                    answer = await response.read()
                    status, retry_after = response.status, response.headers.get("Retry-After", "")
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                await self._reconsider()
                raise self._unanswered(method, path, error) from error
            if status != 401 or again or not await self._renew():
                break
        if status >= 300:
            raise refusal(status, answer, _seconds(retry_after))
        return Reply(status, answer)

    @contextlib.asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncIterable[bytes]]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=SILENCE_S)
        try:
            async with self._session.get(
                self._connection.server + path, params=query, headers=self._connection.headers, timeout=timeout
            ) as response:
                if response.status >= 300:
                    if response.status == 401:
                        await self._renew()
                    retry_after = _seconds(response.headers.get("Retry-After", ""))
                    raise refusal(response.status, await response.read(), retry_after)
                yield response.content
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            await self._reconsider()
            raise self._unanswered("GET", path, error) from error

    @contextlib.asynccontextmanager
    async def websocket(
        self, path: str, query: Mapping[str, str], protocol: str
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A WebSocket that speaks ``protocol``. Raises what the server refuses it with, as `call`."""
        for again in (False, True):
            try:
                opened = await self._session.ws_connect(
                    self._connection.server + path,
                    params=query,
                    headers={**self._connection.headers, "Accept": "*/*"},  # or some say 406
                    protocols=(protocol,),
                    max_msg_size=MAX_LINE_BYTES,
                    timeout=aiohttp.ClientWSTimeout(ws_close=2.0),
                )
                break
            except aiohttp.WSServerHandshakeError as error:
                if error.status != 401 or again or not await self._renew():
                    raise refusal(error.status, b"") from error
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                await self._reconsider()
                raise self._unanswered("GET", path, error) from error
        async with opened:
            if opened.protocol != protocol:
                raise FailedPrecondition(f"the API server does not speak {protocol} at {path}; is it older than 1.25?")
            yield opened

    async def _reconsider(self) -> None:
        """No connection came about, or it broke: a certificate may have run out, or the server have moved."""
        now = asyncio.get_running_loop().time()
        if now < self._renewed_at + RENEW_EVERY_S:
            return
        self._renewed_at = now
        with contextlib.suppress(GreenroomError):
            await self._renew()

    async def _renew(self) -> bool:
        """Whether there are other credentials by now; then they are used."""
        fresh = await asyncio.to_thread(self._connect)
        if fresh.fingerprint == self._connection.fingerprint:
            return False
        old, self._connection = self._session, fresh
        self._session = self._open()
        await old.close()
        return True

    def _unanswered(self, method: str, path: str, error: Exception) -> Unavailable:
        what = str(error) or type(error).__name__
        return Unavailable(
            f"the API server at {self._connection.server} did not answer {method} {path}: {what}; is it reachable, and "
            "does its certificate fit?"
        )


def _seconds(text: str) -> float:
    """``Retry-After`` in its form of a number; 0 for anything else."""
    return min(float(text), 3600.0) if text.isascii() and text.isdigit() else 0.0
