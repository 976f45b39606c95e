"""Streams to actors on other machines, through their agent's entrance (`greenroom.agent.entrance` has the protocol).

The agent is known by the fingerprint of its certificate, which it has announced over its own link; the ticket is sent
to nobody else. A stream begins when the agent has answered: before that nothing of a request is sent, so it may be sent
another way.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import ssl
from typing import Any, cast

from greenroom.core.agentapi import Entrance
from greenroom.engine.bindings import Binding

#: An agent's answer is a short line.
MAX_LINE_BYTES = 512


class NotLetIn(ConnectionError):
    """The agent refuses, or is not the one that it should be."""


async def connect(entrance: Entrance, binding: Binding, port: int, protocol: asyncio.Protocol) -> None:
    """Connects ``protocol`` to the actor. Cancelled, it leaves nothing open.

    Raises:
        OSError: there is no stream; nothing has been sent on it.
    """
    loop = asyncio.get_running_loop()
    line = f"GREENROOM/1 {entrance.ticket} {binding.uid} {binding.generation} {port}\n".encode()
    greeting = _Greeting(entrance, line, loop.create_future())
    transport, _ = await loop.create_connection(lambda: greeting, entrance.host, entrance.port, ssl=_context())
    try:
        early = await greeting.answered
    except BaseException:
        transport.abort()
        raise
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    if early:
        protocol.data_received(early)


@functools.cache
def _context() -> ssl.SSLContext:
    """It trusts nobody by name: whom it has met is looked at afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class _Greeting(asyncio.Protocol):
    """``answered``: what came behind the agent's line, when it was a yes."""

    def __init__(self, entrance: Entrance, line: bytes, answered: asyncio.Future[bytes]) -> None:
        self._entrance = entrance
        self._line = line
        self._inbox = bytearray()
        self.answered = answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tls: Any = transport.get_extra_info("ssl_object")
        shown = hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()
        if not hmac.compare_digest(shown, self._entrance.fingerprint):
            where = f"{self._entrance.host}:{self._entrance.port}"
            self._fail(NotLetIn(f"{where} is not the agent that it should be: it shows another certificate"))
            cast("asyncio.Transport", transport).abort()
            return
        cast("asyncio.Transport", transport).write(self._line)

    def data_received(self, data: bytes) -> None:
        self._inbox += data
        line, end, rest = self._inbox.partition(b"\n")
        if not end and len(line) <= MAX_LINE_BYTES:
            return
        if end and line == b"OK":
            if not self.answered.done():
                self.answered.set_result(bytes(rest))
            return
        self._fail(NotLetIn(f"its agent lets nobody in: {bytes(line[3:MAX_LINE_BYTES]).decode('latin-1')}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(NotLetIn(f"its agent closed the connection{f' ({exc})' if exc else ''}"))

    def _fail(self, error: NotLetIn) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)
            self.answered.exception()  # whoever waited may have gone
