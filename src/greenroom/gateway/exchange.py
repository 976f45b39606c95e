"""One request and its response: held until its actor runs, sent, answered.

    start -> [held: waker.wake] -> [connecting] -> sent -> answering -> done
                 ^                      |            |
                 +--- binding revoked --+------------+   (a request that may be repeated; else 502)

The way through the brackets needs a task. A request for a running actor with an idle connection needs none: everything
happens in the callbacks of its two connections, and so between taking a binding from the table and acquiring it, or
between looking at ``revoked`` and writing, nothing else can run.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from greenroom.core.errors import DeadlineExceeded, GreenroomError, Internal, ResourceExhausted, Unavailable
from greenroom.engine.bindings import Binding, Wake
from greenroom.gateway import replies
from greenroom.gateway.body import chunk, last_chunk
from greenroom.gateway.heads import (
    CHUNKED,
    IDEMPOTENT,
    SAFE,
    UNTIL_CLOSE,
    RequestHead,
    ResponseHead,
    forward_interim,
    forward_request,
    forward_response,
)
from greenroom.gateway.limits import NEVER
from greenroom.gateway.route import Route
from greenroom.gateway.timing import server_timing
from greenroom.gateway.upstream import ConnectFailed, Pool, UpstreamConnection

if TYPE_CHECKING:
    from greenroom.gateway.client import ClientConnection
    from greenroom.gateway.gateway import Gateway

log = structlog.get_logger(__name__)


class BadGateway(GreenroomError):
    """The actor did not answer as it should; a 502."""

    code = "UNAVAILABLE"
    default_reason = "BAD_GATEWAY"


class Exchange:
    """Implements `greenroom.gateway.upstream.ResponseSink`. The client connection calls ``start``, ``request_data`` and
    ``request_end`` (before or after ``start``), and ``abandon``; every exchange ends with exactly one
    ``client.exchange_done``, and with the binding released."""

    __slots__ = (
        "_binding", "_body_sent", "_chunked", "_connection", "_delimited", "_done", "_fresh_only", "_hold_left_s",
        "_keep_alive", "_obtained", "_out", "_pending", "_pending_bytes", "_request_end", "_responding", "_rewakes",
        "_status", "_task", "_tunnel_eofs", "_wake", "client", "first_byte", "gateway", "method", "request",
        "request_complete", "route", "started", "upgrade",
    )  # fmt: skip

    def __init__(self, client: ClientConnection, request: RequestHead, route: Route, started: float) -> None:
        self.client = client
        self.gateway: Gateway = client.gateway
        self.request = request
        self.method = request.method
        self.upgrade = request.upgrade
        self.route = route
        self.started = started
        self.first_byte = 0.0
        self.request_complete = request.framing == 0
        self._request_end = b""
        self._binding: Binding | None = None
        self._connection: UpstreamConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake: Wake | None = None
        self._obtained = 0.0
        self._hold_left_s = self.gateway.limits.hold_s
        #: Payload of the request that could not be sent yet.
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._body_sent = False
        self._fresh_only = False
        self._rewakes = 0
        self._responding = False
        self._chunked = False
        self._delimited = True
        self._keep_alive = False
        self._status = 0
        self._tunnel_eofs = 0
        self._done = False
        self._out: list[bytes] = []

    # --- towards the actor --------------------------------------------------------------------------------

    def start(self) -> None:
        binding = self.gateway.waker.bindings.get(self.route.key)
        if binding is None or binding.revoked:
            self._task = asyncio.create_task(self._obtain())
            return
        pool = self._acquire(binding)
        connection = pool.take(self.route.port, self._max_idle_s())
        if connection is None:
            self._task = asyncio.create_task(self._obtain())
        else:
            self._send(connection)

    def _acquire(self, binding: Binding) -> Pool:
        binding.acquire()
        self._binding = binding
        return self.gateway.pool(binding)

    def _release(self) -> None:
        binding, self._binding = self._binding, None
        if binding is not None:
            binding.release()

    def _max_idle_s(self) -> float:
        limits = self.gateway.limits
        return limits.upstream_idle_s if self._repeatable() else limits.fresh_enough_s

    def _repeatable(self) -> bool:
        """Whether it may be sent again after a connection broke without an answer: one that is harmless to repeat, or
        that the actor can't have got whole."""
        if self.request.framing == 0:
            return self.method in IDEMPOTENT
        return not self._body_sent and not self._pending_bytes and not self.request_complete

    async def _obtain(self, closed: str = "") -> None:
        """The slow path: a binding if there is none yet, and a connection; then sends the request. ``closed``: see
        `_look`."""
        try:
            if closed and self._binding is not None:
                await self._look(self._binding, closed)
            self._send(await self._connect())
        except GreenroomError as e:
            self._fail(e)
        except asyncio.CancelledError:
            if not self._done:  # the server ends; nobody else tells the client
                self._fail(Unavailable("the server is ending; try again", reason="SERVER_CLOSING"))
            raise
        except Exception:
            log.exception("gateway.request_failed", actor=str(self.route.key))
            self._fail(Internal("the gateway failed on this request; its log says why"))

    async def _connect(self) -> UpstreamConnection:
        reresolved = False
        while True:
            binding = self._binding or await self._woken()
            if binding.revoked:  # it was put to sleep again between the last turn of the loop and this one
                self._release()
                self._count_rewake()
                continue
            pool = self.gateway.pool(binding) if self._binding else self._acquire(binding)
            connection = None if self._fresh_only else pool.take(self.route.port, self._max_idle_s())
            if connection is not None:
                return connection
            try:
                connection = await pool.connect(self.route.port)
            except ConnectFailed as e:
                over = await self.gateway.waker.is_over(binding)
                self._release()
                if over:
                    self._count_rewake()
                elif reresolved:
                    port = f"port {self.route.port}" if self.route.port else "its port"
                    raise BadGateway(
                        f"actor {self.route.key} runs but takes no connection on {port} ({e}); "
                        "does its server listen there?",
                        reason="CONNECT_FAILED",
                    ) from e
                else:
                    reresolved = True
                continue
            if not binding.revoked:
                return connection
            connection.abort()
            self._release()
            self._count_rewake()

    async def _woken(self) -> Binding:
        """Holds the request until its actor runs."""
        gateway, key = self.gateway, self.route.key
        gateway.hold(key)
        since = time.perf_counter()
        try:
            async with asyncio.timeout(self._hold_left_s):
                wake = await gateway.waker.wake(key)
        except TimeoutError as e:
            raise DeadlineExceeded(
                f"actor {key} was not running after {gateway.limits.hold_s:g} s; its operation goes on: "
                "try again later",
                reason="HOLD_TIMEOUT",
            ) from e
        finally:
            gateway.unhold(key)
            self._obtained = time.perf_counter()
            self._hold_left_s -= self._obtained - since
        if wake.operation_id:
            self._wake = wake
        return wake.binding

    def _count_rewake(self) -> None:
        self._rewakes += 1
        if self._rewakes > self.gateway.limits.rewakes:
            raise self._suspended()

    def _suspended(self) -> GreenroomError:
        return BadGateway(
            f"actor {self.route.key} was suspended before it answered; what the request did in it is kept: "
            "look before sending it again",
            reason="ACTOR_SUSPENDED",
        )

    def _send(self, connection: UpstreamConnection) -> None:
        """The head, and what there is of the body. No await between the look at ``revoked`` and here."""
        assert self._binding is connection.pool.binding and not self._binding.revoked
        client, request = self.client, self.request
        self._task = None
        self._connection = connection
        connection.sink = self
        head = forward_request(request, self.route.key, self.gateway.domain, client.peer, self.gateway.trust_forwarded)
        if self._pending or self._request_end:
            head = b"".join((head, *(map(chunk, self._pending) if request.framing == CHUNKED else self._pending)))
            self._body_sent = self._body_sent or bool(self._pending)
            self._drop_pending()
            head += self._request_end
        connection.transport.write(head)
        if client.write_paused:
            connection.transport.pause_reading()
        if not connection.write_paused:
            client.resume_body()
        self._watch()

    def _watch(self) -> None:
        limits = self.gateway.limits
        self.client.deadline = time.perf_counter() + (limits.answer_s if self.request_complete else limits.stall_s)

    def request_data(self, data: bytes) -> None:
        """More of the request's body."""
        connection = self._connection
        if connection is not None:
            self._body_sent = True
            connection.transport.write(chunk(data) if self.request.framing == CHUNKED else data)
            if not self._responding:
                self._watch()
            return
        gateway = self.gateway
        if gateway.held_body_bytes + len(data) > gateway.limits.held_body_bytes:
            self._fail(
                ResourceExhausted("too many uploads wait for their actors; try again later", reason="GATEWAY_BUSY")
            )
            return
        self._pending.append(data)
        self._pending_bytes += len(data)
        gateway.held_body_bytes += len(data)
        if self._pending_bytes >= gateway.limits.read_ahead_bytes:
            self.client.pause_body()

    def request_end(self, trailers: tuple[bytes, ...]) -> None:
        self.request_complete = True
        end = last_chunk(trailers) if self.request.framing == CHUNKED else b""
        if self._connection is None:
            self._request_end = end
            return
        if end:
            self._connection.transport.write(end)
        if not self._responding:
            self._watch()

    def _drop_pending(self) -> None:
        self.gateway.held_body_bytes -= self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    # --- towards the client -------------------------------------------------------------------------------

    def interim(self, response: ResponseHead) -> None:
        if self.request.http11 and (response.status != 100 or self.request.expect_continue):
            self._out.append(forward_interim(response))

    def response_head(self, response: ResponseHead) -> None:
        http11 = self.request.http11
        unknown_length = response.framing in (CHUNKED, UNTIL_CLOSE)
        self._chunked = unknown_length and http11
        self._delimited = self._chunked or not unknown_length
        self._keep_alive = (
            self.request.keep_alive and self.request_complete and not self.gateway.closing and self._delimited
        )
        extra = b""
        if self._wake is not None:
            timing = server_timing(self.started, self._obtained, self.first_byte, self._wake.phases)
            extra = b"Server-Timing: %b\r\nGreenroom-Operation: %b\r\n" % (timing, self._wake.operation_id.encode())
        self._out.append(
            forward_response(response, extra, http11=http11, keep_alive=self._keep_alive, chunked=self._chunked)
        )
        self._status = response.status
        self._responding = True
        self.client.deadline = self.client.stall_deadline() if self.client.write_paused else NEVER

    def response_data(self, data: bytes) -> None:
        self._out.append(chunk(data) if self._chunked else data)

    def response_end(self, trailers: tuple[bytes, ...]) -> None:
        if self._chunked:
            self._out.append(last_chunk(trailers))
        self.flush()
        connection, self._connection = self._connection, None
        assert connection is not None
        if self.request_complete and not self._done:
            if self.client.write_paused:
                connection.transport.resume_reading()
            connection.pool.give(connection)
        else:
            connection.abort()
        self._finish(self._keep_alive)

    def flush(self) -> None:
        out = self._out
        if out:
            self.client.transport.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    # --- tunnels ------------------------------------------------------------------------------------------

    def upgraded(self, response: ResponseHead) -> None:
        assert self._connection is not None
        self._status = 101
        self._responding = True
        self._out.append(forward_interim(response))
        self.flush()
        self.client.deadline = NEVER
        self.client.begin_tunnel(self._connection.transport)

    def tunnel_data(self, data: bytes) -> None:
        self._out.append(data)
        if self._tunnel_eofs:
            self.client.deadline = self.client.stall_deadline()

    def tunnel_eof(self) -> None:
        """The actor sends no more; the client still may."""
        if self.client.transport.can_write_eof():
            self.client.transport.write_eof()
        self._tunnel_half_closed()

    def client_eof(self) -> None:
        assert self._connection is not None
        if self._connection.transport.can_write_eof():
            self._connection.transport.write_eof()
        self._tunnel_half_closed()

    def _tunnel_half_closed(self) -> None:
        # One direction that lasts though the other has ended must move: its peer may be gone without a word.
        self.client.deadline = self.client.stall_deadline()
        self._tunnel_eofs += 1
        if self._tunnel_eofs == 2:
            connection, self._connection = self._connection, None
            assert connection is not None
            connection.sink = None
            connection.transport.close()
            self.client.transport.close()
            self._finish(None)

    # --- flow control -------------------------------------------------------------------------------------

    def upstream_paused(self) -> None:
        self.client.pause_body()

    def upstream_resumed(self) -> None:
        self.client.resume_body()

    def client_paused(self) -> None:
        if self._connection is not None:
            self._connection.transport.pause_reading()

    def client_resumed(self) -> None:
        if self._responding:
            self.client.deadline = NEVER
        if self._connection is not None:
            self._connection.transport.resume_reading()

    # --- endings ------------------------------------------------------------------------------------------

    def upstream_lost(self, why: str) -> None:
        """The connection is closed. Repeats the request if that is right."""
        connection, self._connection = self._connection, None
        assert connection is not None and self._binding is not None
        if self._responding:
            self._fail(BadGateway(why))
        elif self._binding.revoked:
            try:
                self._taken_away()
            except GreenroomError as e:
                self._fail(e)
            else:
                self._repeat()
        elif self.first_byte:
            self._fail(self._no_response(why, "BAD_RESPONSE"))
        elif connection.reused and not self._fresh_only and self._repeatable():
            self._fresh_only = True
            self._repeat()
        else:
            self._repeat(why)

    async def _look(self, binding: Binding, why: str) -> None:
        """After a connection was closed without a word: the actor did that itself, or another replica has suspended it.
        Returns when the request may be sent again."""
        closed = self._no_response(why, "CONNECTION_CLOSED")
        try:
            over = await self.gateway.waker.is_over(binding)
        except GreenroomError as unknown:
            raise (unknown if self.method in SAFE else closed) from None  # nobody can say; the client may ask again
        if not over:
            raise closed
        self._taken_away()

    def _no_response(self, why: str, reason: str) -> BadGateway:
        return BadGateway(f"actor {self.route.key} gave no proper response: {why}", reason=reason)

    def _taken_away(self) -> None:
        """The actor was suspended under the request, which may have reached it. Returns when it may be sent again."""
        self._release()
        if self.first_byte or self.method not in SAFE or self.request.framing != 0:
            raise self._suspended()
        self._count_rewake()

    def _repeat(self, closed: str = "") -> None:
        """``closed``: why, when that is to be looked into first."""
        self._out.clear()
        self.client.deadline = NEVER
        self._task = asyncio.create_task(self._obtain(closed))

    def expired(self) -> None:
        """The client connection's deadline has passed."""
        if self._responding:
            self._fail(BadGateway("the client takes no more"))
        elif self.request_complete:
            self._fail(
                DeadlineExceeded(
                    f"actor {self.route.key} did not answer within {self.gateway.limits.answer_s:g} s",
                    reason="ANSWER_TIMEOUT",
                )
            )
        elif self.client.body_paused:
            self._fail(DeadlineExceeded(f"actor {self.route.key} does not read the request", reason="ANSWER_TIMEOUT"))
        else:
            self.refuse(replies.too_slow("the request's body"))

    def _fail(self, error: GreenroomError) -> None:
        self.refuse(replies.refusal(error))

    def refuse(self, refusal: replies.Refusal) -> None:
        """Ends it with an answer of the gateway's, or, when the actor's has begun, by cutting that off visibly."""
        if self._done:
            return
        self._drop_connection()
        if self._responding:
            self.flush()
            # Without a length or chunks the end of the connection would look like the end of the response.
            self.client.cut_off(hard=not self._delimited)
            self._finish(None)
            return
        self._out.clear()
        self._status = refusal.status
        keep_alive = self.request.keep_alive and self.request_complete and not self.gateway.closing
        self.client.transport.write(refusal.render(head_only=self.method == b"HEAD", keep_alive=keep_alive))
        self._finish(keep_alive)

    def abandon(self) -> None:
        """The client is gone: drops everything."""
        if not self._done:
            self._drop_connection()
            self._finish(None)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _finish(self, keep_alive: bool | None) -> None:
        """``keep_alive`` None: the client's connection is gone or going already."""
        self._done = True
        self._drop_pending()
        self._release()
        gateway = self.gateway
        gateway.requests += 1
        if gateway.access_log:
            log.debug(
                "gateway.request",
                actor=str(self.route.key),
                method=self.method.decode(),
                status=self._status,
                ms=round((time.perf_counter() - self.started) * 1e3, 2),
                operation=self._wake.operation_id if self._wake else "",
            )
        self.client.exchange_done(keep_alive)
