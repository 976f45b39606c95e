"""The way in to the actors of this worker, for gateways on other machines.

A gateway learns over its link where the entrance is, the fingerprint of its certificate and a ticket
(`greenroom.core.agentapi.Entrance`). It connects over TLS, says one line, is answered by one, and has a byte stream to
the actor from then on::

    GREENROOM/1 TICKET UID GENERATION PORT
    OK                                          or: NO, and why

Key and certificate are made at the start, live in memory only, and are known by their fingerprint alone: there is
nothing to sign, to renew or to steal from a disk. Who is not told the ticket gets nowhere; who is reaches an actor only
as the incarnation that he means, and only while it is awake. Before an actor is frozen, moved or destroyed everything
that is open to it is closed (`Lodger.shut_out`): a request reaches its actor or nobody.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import os
import secrets
import ssl
from collections.abc import Callable
from typing import cast

import structlog
from msgspec.structs import replace

from greenroom.agent.residents import Lodger
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Endpoint
from greenroom.sandbox.dial import address, close, make_socket, notice_silence

log = structlog.get_logger(__name__)

#: TLS and the line, together; a gateway sends the line at once.
GREETING_TIMEOUT_S = 5.0
MAX_LINE_BYTES = 512
#: An actor that does not accept for so long takes no connections.
CONNECT_TIMEOUT_S = 5.0
#: Connections at a time, with those that have not said their line; further ones are closed at once.
MAX_CONNECTIONS = 4096
#: Of these to one actor, whatever it does with them; more than a gateway makes (`connections_per_actor`). And no more
#: than are free: when several take all that they get, as many are left for others as each of them has.
MAX_TO_ONE = 1024
#: An actor that takes nothing for so long is cut off; its gateway has given up by then (`greenroom.gateway.limits`).
STALL_S = 150.0
#: What a gateway that has gone has sent, the actor may still take for so long.
LINGER_S = 5.0
#: How often it is said at most that connections are refused.
SAY_EVERY_S = 10.0
#: What may wait to be sent, each way, before the other side is not read any more.
BUFFER_BYTES = 256 << 10
#: How long the certificate is good for: longer than any agent lives. Nobody looks, it is held to its fingerprint.
_LIFE = datetime.timedelta(days=3650)
_BACKLOG = 1024


class Refused(Exception):
    """Why there is no stream."""


class EntranceServer:
    """``find``: who lives here, by uid; ``seen``: the highest generation that was seen of an actor."""

    def __init__(self, find: Callable[[str], Lodger | None], seen: Callable[[str], int]) -> None:
        self._find = find
        self._seen = seen
        self._ticket = secrets.token_urlsafe(32)
        self._server: asyncio.Server | None = None
        self.open: set[_Visitor] = set()
        self._refusals = 0
        self._say_at = 0.0

    async def start(self, host: str, port: int, told_host: str) -> api.Entrance:
        """Listens (port 0: any free one). ``told_host``: where others reach this machine.

        Raises:
            OSError: the address can't be had.
        """
        context, fingerprint = await asyncio.to_thread(_make_identity)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Visitor(self),
            host,
            port,
            ssl=context,
            backlog=_BACKLOG,
            ssl_handshake_timeout=GREETING_TIMEOUT_S,
        )
        at = self._server.sockets[0].getsockname()[1]
        log.info("actors are reached from other machines", host=told_host, port=at)
        return api.Entrance(host=told_host, port=at, fingerprint=fingerprint, ticket=self._ticket)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for visitor in list(self.open):
            visitor.close()

    def refused(self, why: str) -> None:
        """Says so now and then: who is refused may come again and again."""
        self._refusals += 1
        now = asyncio.get_running_loop().time()
        if now >= self._say_at:
            log.info("refused connections to actors", number=self._refusals, why=why)
            self._refusals, self._say_at = 0, now + SAY_EVERY_S

    def admit(self, line: bytes) -> tuple[Lodger, Endpoint]:
        """To whom a line leads. Raises `Refused`."""
        parts = line.decode("latin-1").split(" ")
        if len(parts) != 5 or parts[0] != "GREENROOM/1":
            raise Refused("not a line of GREENROOM/1")
        _, ticket, uid, generation, port = parts
        if not hmac.compare_digest(ticket.encode("latin-1"), self._ticket.encode()):
            raise Refused("a foreign ticket")
        if not (generation.isdecimal() and port.isdecimal() and int(port) <= 65535):
            raise Refused("generation and port are numbers")
        lodger = self._find(uid)
        if lodger is not None and len(lodger.doors) >= min(MAX_TO_ONE, MAX_CONNECTIONS - len(self.open)):
            raise Refused(f"{len(lodger.doors)} connections to that actor are open, {len(self.open)} in all")
        if lodger is None or lodger.shut or lodger.state is not ResidentState.RUNNING:
            raise Refused("that actor is not awake here")
        if int(generation) < max(self._seen(uid), lodger.identity.generation):
            raise Refused("that incarnation of the actor is over")
        return lodger, _at_port(lodger.endpoint, int(port))


def _at_port(endpoint: Endpoint, port: int) -> Endpoint:
    if port in (0, endpoint.port):
        return endpoint
    if endpoint.path:
        raise Refused(f"that actor has no port {port}: it listens on a unix socket")
    return replace(endpoint, port=port)


class _Visitor(asyncio.Protocol):
    """A gateway's connection: a line, then the stream."""

    def __init__(self, server: EntranceServer) -> None:
        self._server = server
        self._line = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._inner: _Inner | None = None
        self._lodger: Lodger | None = None
        self._gone = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if len(self._server.open) >= MAX_CONNECTIONS:
            self._server.refused(f"there are {MAX_CONNECTIONS} already")
            self.transport.abort()
            return
        self._server.open.add(self)
        notice_silence(transport.get_extra_info("socket"))
        self.transport.set_write_buffer_limits(BUFFER_BYTES)
        self._timer = asyncio.get_running_loop().call_later(GREETING_TIMEOUT_S, self.close)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.transport.write(data)
        elif self._task is None:
            self._line += data
            self._greet()
        else:
            self.close()  # it may not say more before it is answered

    def _greet(self) -> None:
        line, end, rest = self._line.partition(b"\n")
        if not end and len(line) <= MAX_LINE_BYTES:
            return
        try:
            if len(line) > MAX_LINE_BYTES or rest:
                raise Refused("not a line of GREENROOM/1")
            lodger, endpoint = self._server.admit(bytes(line))
        except Refused as refused:
            self._refuse(str(refused))
            return
        # From here on it is closed with the actor, also while it is being connected.
        self._lodger = lodger
        lodger.doors.add(self.close)
        self._task = asyncio.create_task(self._connect(endpoint), name="entrance")

    def _refuse(self, why: str) -> None:
        self._server.refused(why)
        self.transport.write(f"NO {why}\n".encode())
        self.transport.close()

    async def _connect(self, endpoint: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock = make_socket(endpoint)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await loop.sock_connect(sock, address(endpoint))
                    create = loop.create_unix_connection if endpoint.path else loop.create_connection
                    _, inner = await create(lambda: _Inner(self), sock=sock)
            except BaseException:
                close(sock)
                raise
        except (GreenroomError, OSError, TimeoutError) as error:
            self._refuse(f"it takes no connection: {error}".replace("\n", " "))
            return
        if self.transport.is_closing():
            inner.transport.abort()
            return
        if self._timer is not None:
            self._timer.cancel()
        self._inner = inner
        self.transport.write(b"OK\n")
        inner.start()

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._inner is not None and not self._inner.transport.is_closing():
            self._inner.transport.resume_reading()

    def hold(self) -> None:
        """The actor takes nothing more for now. Should the gateway go meanwhile nobody notices, as nothing is read of
        it; so this ends after a while."""
        self.transport.pause_reading()
        self._timer = asyncio.get_running_loop().call_later(STALL_S, self.close)

    def go_on(self) -> None:
        if self._timer is not None and not self._gone:
            self._timer.cancel()
        if not self.transport.is_closing():
            self.transport.resume_reading()

    # --- ends ---

    def connection_lost(self, exc: Exception | None) -> None:
        """The gateway has gone: so does what it had to the actor, as soon as that has taken what was sent before. Until
        then it is open, and is closed with the actor."""
        self._gone = True
        if self._timer is not None:
            self._timer.cancel()
        if self._inner is not None and not self._inner.gone:
            self._inner.transport.close()
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self.close)
        else:
            self._leave()

    def inner_lost(self, exc: Exception | None) -> None:
        """The actor's end is closed: so is the gateway's, as soon as that has taken what was sent before."""
        self._leave_doors()
        if self._timer is not None:
            self._timer.cancel()
        if self._gone:
            self._leave()
        elif exc is None:
            self.transport.close()
        else:
            self.transport.abort()  # the gateway must not take it for a proper end

    def close(self) -> None:
        """At once, both ways: the actor has nothing open any more when this returns."""
        self._leave()
        if self._inner is not None:
            self._inner.transport.abort()
        self.transport.abort()

    def _leave_doors(self) -> None:
        if self._lodger is not None:
            self._lodger.doors.discard(self.close)

    def _leave(self) -> None:
        self._server.open.discard(self)
        self._leave_doors()
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and self._inner is None:
            self._task.cancel()


class _Inner(asyncio.Protocol):
    """The actor's end."""

    transport: asyncio.Transport

    def __init__(self, outer: _Visitor) -> None:
        self._outer = outer
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(BUFFER_BYTES)
        self.transport.pause_reading()  # until the gateway has been answered

    def start(self) -> None:
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._outer.transport.write(data)

    def eof_received(self) -> bool:
        # TLS knows no half-closed connections. What the actor has sent arrives before the end.
        self._outer.transport.close()
        return False

    def pause_writing(self) -> None:
        self._outer.hold()

    def resume_writing(self) -> None:
        self._outer.go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._outer.inner_lost(exc)


# --- who this is ------------------------------------------------------------------------------------------------


def _make_identity() -> tuple[ssl.SSLContext, str]:
    """A key that nobody else has, and the SHA-256 of the certificate that shows it (hexadecimal)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "greenroom-agent")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + _LIFE)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    memory = os.memfd_create("greenroom-entrance", os.MFD_CLOEXEC)  # OpenSSL reads files only; this one is on no disk
    try:
        os.write(memory, pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return context, hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()
