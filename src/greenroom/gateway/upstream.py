"""Connections to actors: one pool per binding, and the side of the protocol that an actor speaks.

A connection belongs to one binding for its whole life, and so does the pool; both end with it. The actor is taken to be
hostile: whatever it sends that is not exactly one response to the request that is open on this connection costs it the
connection, and never reaches anybody else.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, cast

from msgspec.structs import replace

from greenroom.core.agentapi import Entrance
from greenroom.core.errors import NotFound, ResourceExhausted, Unavailable
from greenroom.core.records import Endpoint
from greenroom.engine.bindings import Binding
from greenroom.gateway import afar
from greenroom.gateway.body import Body, UntilCloseBody, decoder
from greenroom.gateway.heads import BadMessage, ResponseHead, parse_response
from greenroom.gateway.inbox import HeadTooLarge, Inbox
from greenroom.gateway.limits import Limits
from greenroom.sandbox.dial import address, close, make_socket

#: When to try again to connect to a unix socket whose listener is behind with accepting.
_QUEUE_FULL_S: Final = 0.005


class ConnectFailed(Exception):
    """No connection came about; nothing was sent."""


class ResponseSink(Protocol):
    """Who sent the request on a connection, and takes what comes back. The calls are in this order: ``interim``*,
    ``response_head``, ``response_data``*, ``response_end``; or ``upgraded``, ``tunnel_data``*, ``tunnel_eof``.
    ``flush`` comes after those of one read; ``upstream_lost`` instead of what is missing."""

    method: bytes
    upgrade: bytes
    first_byte: float

    def interim(self, response: ResponseHead) -> None: ...
    def response_head(self, response: ResponseHead) -> None: ...
    def response_data(self, data: bytes) -> None: ...
    def response_end(self, trailers: tuple[bytes, ...]) -> None: ...
    def upgraded(self, response: ResponseHead) -> None: ...
    def tunnel_data(self, data: bytes) -> None: ...
    def tunnel_eof(self) -> None: ...
    def flush(self) -> None: ...
    def upstream_paused(self) -> None: ...
    def upstream_resumed(self) -> None: ...
    def upstream_lost(self, why: str) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """``sink`` is set exactly while a request is open on it."""

    __slots__ = (
        "_body", "_inbox", "_interim", "_keep_alive", "_tunnel", "_until_eof", "idle_since", "pool", "port", "reused",
        "sink", "transport", "write_paused",
    )  # fmt: skip
    transport: asyncio.Transport

    def __init__(self, pool: Pool, port: int) -> None:
        self.pool = pool
        self.port = port
        self.sink: ResponseSink | None = None
        #: A request was answered on it before.
        self.reused = False
        self.idle_since = 0.0
        self.write_paused = False
        self._inbox = Inbox()
        self._body: Body | None = None
        self._keep_alive = False
        self._interim = 0
        self._tunnel = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        transport.set_write_buffer_limits(self.pool.limits.write_buffer_bytes)
        self.pool.open.add(self)

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if sink is None:
            self.abort()  # bytes behind a response, or out of turn
            return
        if not sink.first_byte:
            sink.first_byte = time.perf_counter()
        try:
            if self._tunnel:
                sink.tunnel_data(data)
            elif self._body is not None:
                self._read_body(sink, self._body, data)
            else:
                self._inbox.add(data)
                self._read_head(sink)
        except BadMessage as e:
            self._lose(f"its response breaks HTTP: {e}")
        except HeadTooLarge:
            self._lose(f"the head of its response is longer than {self.pool.limits.head_bytes} bytes")
        else:
            sink.flush()

    def _read_head(self, sink: ResponseSink) -> None:
        while True:
            head = self._inbox.take_head(self.pool.limits.head_bytes)
            if head is None:
                return
            response = parse_response(head, sink.method)
            if response.status >= 200:
                break
            if response.status == 101:
                if not sink.upgrade or not response.upgrade:
                    raise BadMessage("it switches protocols unasked")
                self._tunnel = True
                sink.upgraded(response)
                if self._inbox:
                    sink.tunnel_data(self._inbox.take_all())
                return
            self._interim += 1
            if self._interim > self.pool.limits.interim_responses:
                raise BadMessage(f"more than {self.pool.limits.interim_responses} interim responses")
            sink.interim(response)
        self._keep_alive = response.keep_alive
        sink.response_head(response)
        if response.framing == 0:
            self._end(sink, ())
            return
        self._body = decoder(response.framing)
        if self._inbox:
            self._read_body(sink, self._body, self._inbox.take_all())

    def _read_body(self, sink: ResponseSink, body: Body, data: bytes) -> None:
        payload = body.feed(data)
        if payload:
            sink.response_data(payload)
        if body.done:
            self._inbox.add(body.rest)
            self._end(sink, body.trailers)

    def _end(self, sink: ResponseSink, trailers: tuple[bytes, ...]) -> None:
        self.sink = None
        self._body = None
        self._interim = 0
        sink.response_end(trailers)

    def reusable(self) -> bool:
        """Whether the next request may go here: the last response ended where it said, and nothing came after."""
        return (
            self._keep_alive and not self._inbox and self.sink is None and not self._tunnel and not self.write_paused
            and not self.transport.is_closing() and self.transport.get_write_buffer_size() == 0
        )  # fmt: skip

    def eof_received(self) -> bool:
        sink = self.sink
        if sink is not None:
            if self._tunnel:
                sink.tunnel_eof()
                return True
            if isinstance(self._body, UntilCloseBody):
                self._keep_alive = False
                self._end(sink, ())
                sink.flush()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.remove(self)
        if self.sink is not None:
            self._lose(f"it closed the connection{f' ({exc})' if exc else ''}")

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.sink is not None:
            self.sink.upstream_paused()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.sink is not None:
            self.sink.upstream_resumed()

    def _lose(self, why: str) -> None:
        sink, self.sink = self.sink, None
        self.abort()
        if sink is not None:
            sink.upstream_lost(why)

    def revoke(self) -> None:
        """The binding is gone."""
        self._lose("it is being suspended")

    def abort(self) -> None:
        """Closes at once; whoever waits for a response has been told, or does not care."""
        self.sink = None
        self.pool.remove(self)
        self.transport.abort()


async def _connect_socket(sock: socket.socket, endpoint: Endpoint) -> None:
    if not endpoint.path:
        await asyncio.get_running_loop().sock_connect(sock, address(endpoint))
        return
    while True:
        try:
            return sock.connect(endpoint.path)
        except BlockingIOError:
            # The listener's queue is full. There is nothing to wait on: unlike with TCP the attempt does not go on by
            # itself. Source: connect(2), EAGAIN.
            await asyncio.sleep(_QUEUE_FULL_S)


async def directly(binding: Binding) -> Entrance | None:
    """For who has all actors on its own machine."""
    return None


class Pool:
    """The connections of one binding."""

    __slots__ = ("_closed", "_connecting", "_entrance", "_idle", "binding", "limits", "open")

    def __init__(
        self,
        binding: Binding,
        limits: Limits,
        closed: Callable[[Binding], object],
        entrance: Callable[[Binding], Awaitable[Entrance | None]] = directly,
    ) -> None:
        """``closed`` is told when the binding's end has closed the pool. ``entrance``: see
        `greenroom.engine.port.Waker`."""
        self.binding = binding
        self.limits = limits
        self._closed = closed
        self._entrance = entrance
        binding.on_revoke(self.close)
        self.open: set[UpstreamConnection] = set()
        self._idle: dict[int, list[UpstreamConnection]] = {}
        self._connecting: set[asyncio.Timeout] = set()

    def take(self, port: int, max_idle_s: float) -> UpstreamConnection | None:
        """The idle connection that was used last, unless that is longer ago than ``max_idle_s``."""
        idle = self._idle.get(port)
        while idle:
            connection = idle.pop()
            if connection.idle_since + max_idle_s < time.perf_counter():
                idle.append(connection)
                return None
            if connection.reusable():
                return connection
            connection.abort()
        return None

    def give(self, connection: UpstreamConnection) -> None:
        """Keeps it for the next request, or closes it."""
        idle = self._idle.setdefault(connection.port, [])
        if self.binding.revoked or not connection.reusable():
            connection.abort()
            return
        if len(idle) >= self.limits.idle_connections_per_actor:
            idle[0].abort()  # the one that has been idle longest, and is the likeliest to be closed by the actor
        connection.reused = True
        connection.idle_since = time.perf_counter()
        idle.append(connection)

    async def connect(self, port: int) -> UpstreamConnection:
        """A new connection; the caller looks at ``binding.revoked`` before using it.

        Raises:
            ConnectFailed: also at once when the binding is revoked meanwhile.
            ResourceExhausted: the actor has as many as it may have.
            NotFound: the actor has no such port.
        """
        if len(self.open) + len(self._connecting) >= self.limits.connections_per_actor:
            raise ResourceExhausted(
                f"actor {self.binding.key} has {self.limits.connections_per_actor} open connections; try again later",
                reason="ACTOR_BUSY",
            )
        endpoint = self._endpoint(port)
        connection = UpstreamConnection(self, port)
        made = False
        limit = asyncio.timeout(self.limits.connect_s)
        try:
            async with limit:
                self._connecting.add(limit)
                entrance = await self._entrance(self.binding)
                if entrance is None:
                    await self._connect_here(connection, endpoint)
                else:
                    await afar.connect(entrance, self.binding, port, connection)
            made = True
        except (OSError, TimeoutError, Unavailable) as e:
            raise ConnectFailed(str(e) or f"no answer within {self.limits.connect_s:g} s") from e
        finally:
            self._connecting.discard(limit)
            if connection in self.open and not made:
                connection.abort()  # cut off in the moment in which it came about: the socket is the transport's
        if connection.transport.is_closing():
            raise ConnectFailed("the connection was closed at once")
        return connection

    async def _connect_here(self, connection: UpstreamConnection, endpoint: Endpoint) -> None:
        """To an actor on this machine."""
        loop = asyncio.get_running_loop()
        sock = make_socket(endpoint)
        try:
            await _connect_socket(sock, endpoint)
            create = loop.create_unix_connection if endpoint.path else loop.create_connection
            await create(lambda: connection, sock=sock)
        except BaseException:
            if connection not in self.open:  # else the socket is the transport's
                close(sock)
            raise

    def _endpoint(self, port: int) -> Endpoint:
        endpoint = self.binding.endpoint
        if port == 0 or port == endpoint.port:
            return endpoint
        if endpoint.path:
            raise NotFound(
                f"actor {self.binding.key} has no port {port}: it listens on a unix socket; leave the port out",
                reason="NO_SUCH_PORT",
            )
        return replace(endpoint, port=port)

    def remove(self, connection: UpstreamConnection) -> None:
        self.open.discard(connection)
        idle = self._idle.get(connection.port)
        if idle and connection in idle:
            idle.remove(connection)

    def close_idle(self, before: float) -> None:
        """Closes what has been idle since before then."""
        for idle in self._idle.values():
            for connection in [c for c in idle if c.idle_since < before]:
                connection.abort()

    def close(self) -> None:
        """Ends every connection, idle or not, and every attempt to make one."""
        self.binding.forget(self.close)
        self._closed(self.binding)
        for connection in list(self.open):
            connection.revoke()
        self._idle.clear()
        now = asyncio.get_running_loop().time()
        for limit in self._connecting:
            if not limit.expired():
                limit.reschedule(now)
