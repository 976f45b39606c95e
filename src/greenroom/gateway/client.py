"""The side of the gateway that clients speak to: one object per connection, one request at a time, in order."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, cast

from greenroom.core.errors import NotFound
from greenroom.gateway import replies
from greenroom.gateway.body import Body, decoder
from greenroom.gateway.exchange import Exchange
from greenroom.gateway.heads import BadMessage, RequestHead, parse_request
from greenroom.gateway.inbox import HeadTooLarge, Inbox
from greenroom.gateway.limits import NEVER

if TYPE_CHECKING:
    from greenroom.gateway.gateway import Gateway

#: Closes a socket with a reset: what arrived so far is not the whole response. Source: socket(7), SO_LINGER.
_RESET: Final = struct.pack("ii", 1, 0)
#: When a client is silent this long, ask whether it is still there (it may be waiting for an actor for hours).
_KEEPALIVE_IDLE_S: Final = 60


class ClientConnection(asyncio.Protocol):
    """
    Attributes:
        deadline: when `expire` is to be called, in `time.perf_counter` seconds; set anew at each step, and looked at
            once a second by the gateway, which costs less than a timer per request.
        write_paused: the client takes less than is sent to it.
        body_paused: the actor takes less of the request's body than the client sends.
    """

    __slots__ = (
        "_advancing", "_body", "_inbox", "_linger_bytes", "_lingering", "_on_loopback", "_reading_paused", "_tunnel",
        "_unsent", "body_paused", "deadline", "exchange", "gateway", "peer", "transport", "write_paused",
    )  # fmt: skip
    transport: asyncio.Transport

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.exchange: Exchange | None = None
        self.deadline = NEVER
        self.peer = b"unknown"
        self.write_paused = False
        self.body_paused = False
        self._reading_paused = False
        self._inbox = Inbox()
        self._body: Body | None = None
        self._tunnel: asyncio.Transport | None = None
        self._advancing = False
        self._lingering = False
        self._linger_bytes = 0
        self._unsent = 0
        self._on_loopback = False

    # --- the connection -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        limits = self.gateway.limits
        transport.set_write_buffer_limits(limits.write_buffer_bytes)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = str(peer[0]).encode()
            self._on_loopback = str(peer[0]).startswith("127.") or peer[0] == "::1"
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        if self.gateway.arrived(self):
            self.deadline = time.perf_counter() + limits.keep_alive_s
        else:
            transport.write(replies.TOO_MANY_CLIENTS)
            self._linger()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gateway.left(self)
        if self.exchange is not None:
            self.exchange.abandon()

    def eof_received(self) -> bool:
        """A client that closes its side gives up its request, as with nginx: the end of its connection looks the same.
        In a tunnel either side may end before the other."""
        if self._tunnel is not None and self.exchange is not None:
            self.exchange.client_eof()
            return not self.transport.is_closing()
        if self.exchange is not None:
            self.exchange.abandon()
        return False

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.write(data)
        elif self._lingering:
            self._linger_bytes += len(data)
            if self._linger_bytes > self.gateway.limits.linger_bytes:
                self.transport.abort()
        elif self._body is not None:
            assert self.exchange is not None
            self._read_body(self.exchange, self._body, data)
            self._update_reading()
        else:
            if not self._inbox and self.exchange is None:
                self.deadline = time.perf_counter() + self.gateway.limits.head_s
            self._inbox.add(data)
            self._advance()

    # --- requests -----------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Starts the next request if none is open. A loop, not a recursion: a thousand pipelined requests may be
        answered on the spot."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self.exchange is None and self._inbox and not self.write_paused and not self.transport.is_closing():
                if self._lingering or not self._next_request():
                    break
        finally:
            self._advancing = False
        self._update_reading()

    def _next_request(self) -> bool:
        """False when there is no whole head."""
        gateway = self.gateway
        try:
            head = self._inbox.take_head(gateway.limits.head_bytes)
            if head is None:
                return False
            request = parse_request(head)
        except HeadTooLarge:
            self._refuse(replies.head_too_large(gateway.limits.head_bytes))
            return False
        except BadMessage as e:
            self._refuse(replies.bad_request(e))
            return False
        started = time.perf_counter()
        try:
            route = gateway.route(request, self._on_loopback)
        except NotFound as e:
            self._refuse(replies.refusal(e), request)
            return True
        self.deadline = NEVER
        self.exchange = exchange = Exchange(self, request, route, started)
        if request.framing:
            self._body = body = decoder(request.framing)
            if self._inbox:
                self._read_body(exchange, body, self._inbox.take_all())
        if self.exchange is exchange:
            exchange.start()
        return True

    def _read_body(self, exchange: Exchange, body: Body, data: bytes) -> None:
        try:
            payload = body.feed(data)
        except BadMessage as e:
            exchange.refuse(replies.bad_request(e))
            return
        if payload:
            exchange.request_data(payload)
        if body.done and self.exchange is exchange:
            self._body = None
            self._inbox.add(body.rest)
            exchange.request_end(body.trailers)

    def _refuse(self, refusal: replies.Refusal, request: RequestHead | None = None) -> None:
        """Answers without an exchange. After a head that was not understood the connection can't go on."""
        keep_alive = request is not None and request.keep_alive and request.framing == 0
        head_only = request is not None and request.method == b"HEAD"
        self.transport.write(refusal.render(head_only=head_only, keep_alive=keep_alive))
        if keep_alive:
            self.deadline = time.perf_counter() + self.gateway.limits.keep_alive_s
        else:
            self._linger()

    def exchange_done(self, keep_alive: bool | None) -> None:
        """The exchange has ended and all of its response is written; None: the connection is closing already."""
        self.exchange = None
        unread_body, self._body = self._body, None
        self._tunnel = None
        self.body_paused = False
        if keep_alive is None:
            return
        if not keep_alive or unread_body is not None:
            self._linger()
            return
        now = time.perf_counter()
        limits = self.gateway.limits
        self.deadline = now + (limits.head_s if self._inbox else limits.keep_alive_s)
        self._unsent = self.transport.get_write_buffer_size() + 1
        if self._inbox:
            self._advance()
        elif self._reading_paused:
            self._update_reading()

    # --- flow control -------------------------------------------------------------------------------------

    def pause_body(self) -> None:
        self.body_paused = True
        self._update_reading()

    def resume_body(self) -> None:
        if self.body_paused:
            self.body_paused = False
            self._update_reading()

    def _update_reading(self) -> None:
        pause = self.body_paused or (
            len(self._inbox) > self.gateway.limits.read_ahead_bytes and (self.exchange is not None or self.write_paused)
        )
        if pause != self._reading_paused and not self.transport.is_closing():
            self._reading_paused = pause
            if pause:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.write_paused = True
        self.deadline = self.stall_deadline()
        self._unsent = self.transport.get_write_buffer_size() + 1
        if self.exchange is not None:
            self.exchange.client_paused()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.exchange is not None:
            self.exchange.client_resumed()
        elif not self._lingering:
            self.deadline = time.perf_counter() + self.gateway.limits.keep_alive_s
            self._advance()

    def stall_deadline(self) -> float:
        return time.perf_counter() + self.gateway.limits.stall_s

    def begin_tunnel(self, upstream: asyncio.Transport) -> None:
        """From now on bytes are only passed on; those that came behind the request's head first."""
        self._tunnel = upstream
        if self._inbox:
            upstream.write(self._inbox.take_all())
        self._update_reading()

    # --- endings ------------------------------------------------------------------------------------------

    def expire(self) -> None:
        if self._taken():  # whatever else it is waited for, it is there, and slow
            self.deadline = self.stall_deadline()
        elif self.exchange is not None:
            self.deadline = NEVER
            self.exchange.expired()
        elif self._lingering or self.write_paused or not self._inbox:
            self.transport.abort()
        else:
            self._refuse(replies.too_slow("the request's head"))

    def _taken(self) -> bool:
        """Whether the client has taken some of what is left to send since the last time."""
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        return 0 < self._unsent < before

    def cut_off(self, *, hard: bool) -> None:
        """Ends the connection inside a response; ``hard``: with a reset, since otherwise nobody could tell."""
        if hard:
            sock = self.transport.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        else:
            self._linger()

    def _linger(self) -> None:
        """Closes so that the client still gets what was written: were it to send on meanwhile, the kernel would answer
        with a reset, which makes the client's kernel drop what it has received."""
        if self.transport.is_closing():
            return
        self._lingering = True
        self._inbox.take_all()
        self.body_paused = False
        self._update_reading()
        self.deadline = time.perf_counter() + self.gateway.limits.linger_s
        self._unsent = self.transport.get_write_buffer_size() + 1
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def shut_down(self) -> None:
        """Closes unless a request is open."""
        if self.exchange is None:
            self.transport.close()
