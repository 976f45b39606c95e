"""Serves the API on unix sockets and TCP ports.

Whoever may call may do everything. A unix socket is therefore only for the user that started the server (mode 0600). A
TCP address asks for a token, over TLS (`greenroom.api.access`); without, it must be on the loopback interface.

Keepalive, both ways, so that a peer that vanished without a word is noticed on every open stream:
    client -> server   a ping after 30 s without data while a call is open, 10 s for the answer
    server -> client   a ping after 60 s without data, 20 s for the answer; clients may ping every 10 s
Source: https://github.com/grpc/grpc/blob/master/doc/keepalive.md
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import grpc
import msgspec
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from greenroom.api import actors, fleet, images, service, system
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2_grpc as pb_grpc
from greenroom.api.access import Guard, is_loopback
from greenroom.api.client import MAX_MESSAGE_BYTES
from greenroom.api.service import ServerInfo
from greenroom.core.errors import FailedPrecondition, InvalidArgument
from greenroom.engine.port import ControlPlane

log = structlog.get_logger(__name__)

#: Calls open at once, most of them waiting; further ones are answered RESOURCE_EXHAUSTED.
MAX_CONCURRENT_CALLS = 4096
#: Beyond the grace that open calls get.
STOP_MARGIN_S = 2.0
#: Length of ``sun_path``, without the closing NUL. Source: unix(7).
MAX_SOCKET_PATH_BYTES = 107

SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),  # otherwise a second server on the same port would silently share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),  # or an agent's connection without a call is told to be calm
    ("grpc.http2.max_pings_without_data", 0),
]


SERVICES = (
    actors.Actors,
    fleet.Templates,
    fleet.Pools,
    fleet.Workers,
    fleet.Snapshots,
    images.Images,
    system.Operations,
    system.System,
)


class ApiServer:
    """The public API of one control plane.

    Args:
        control: what answers.
        info: what `GetServerInfo` tells; version and start time are filled in.
        guard: what TCP addresses show and ask for; without, they have to be on the loopback interface.
    """

    def __init__(self, control: ControlPlane, *, info: ServerInfo | None = None, guard: Guard | None = None) -> None:
        self._control = control
        self._info = msgspec.structs.replace(info or ServerInfo(), version=version("greenroom"), started_at=time.time())
        self._guard = guard
        self._servers: list[grpc.aio.Server] = []
        self._streams = service.Streams()
        self._health = health.aio.HealthServicer()
        self._held: list[_SocketLock] = []
        #: What is listened on, with the ports that were chosen for port 0.
        self.addresses: list[str] = []

    async def start(self, addresses: Sequence[str]) -> None:
        """Listens on ``unix:/absolute/path`` (socket 0600; its directory is made 0700 if there is none) and
        ``host:port`` (port 0: any free one, see `addresses`).

        Raises:
            FailedPrecondition: one is in use (reason ``PORT_IN_USE``). Nothing is listened on then.
            InvalidArgument: an address can't be used.
        """
        assert not self._servers, "a server is started once"
        # Two of gRPC's: a call does not tell its interceptors where it came in.
        sockets = self._new_server([])
        ports = self._new_server(self._guard.interceptors() if self._guard else [])
        servers = [sockets, ports] if any(not address.startswith("unix:") for address in addresses) else [sockets]
        try:
            self.addresses = [
                self._listen_unix(sockets, address) if address.startswith("unix:") else self._listen_tcp(ports, address)
                for address in addresses
            ]
            for server in servers:
                await server.start()
        except BaseException:
            for server in servers:
                await server.stop(None)
            self._release()
            raise
        self._servers = servers
        for name in ("", *_service_names()):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("api listens", addresses=self.addresses)

    async def close(self, grace_s: float) -> None:
        """Takes no new calls, ends streams and waits with ``SERVER_CLOSING``, lets the rest finish for ``grace_s``."""
        servers, self._servers = self._servers, []
        if not servers:
            return
        await self._health.enter_graceful_shutdown()
        self._streams.close()
        await asyncio.gather(*(stop(server, grace_s) for server in servers))
        self._release()

    def _new_server(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS, interceptors=interceptors
        )
        self._register(server)
        return server

    def _register(self, server: grpc.aio.Server) -> None:
        control, streams = self._control, self._streams
        for kind in SERVICES:
            _add(kind(control, streams, self._info), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_service_names(), health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    def _listen_unix(self, server: grpc.aio.Server, address: str) -> str:
        path = Path(address.removeprefix("unix:"))
        self._held.append(_SocketLock(path))
        with _umask(0o177):  # bound within the call, so the socket is never open to others
            _add_port(server, address, None)
        path.chmod(0o600)
        return address

    def _listen_tcp(self, server: grpc.aio.Server, address: str) -> str:
        return listen_tcp(server, address, self._guard, "--api", "--api-token-file")

    def _release(self) -> None:
        for lock in self._held:
            lock.release()
        self._held.clear()


def listen_tcp(server: grpc.aio.Server, address: str, guard: Guard | None, option: str, tokens_option: str) -> str:
    """Listens on ``host:port``, and returns it with the port that was chosen for port 0.

    Raises:
        FailedPrecondition: it is in use, or the guard's certificate can't be used.
        InvalidArgument: others could reach it, and nothing guards it (reason ``ADDRESS_NOT_LOOPBACK``).
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"address {address!r} is neither unix:/path nor host:port", reason="INVALID_ADDRESS")
    if not is_loopback(host) and (guard is None or guard.tokens is None):
        lacks = "--tls-cert, --tls-key and " if guard is None else ""
        raise InvalidArgument(
            f"{option} {address}: others could reach it, and it would let in whoever comes; add "
            f"{lacks}{tokens_option}, or listen on 127.0.0.1",
            reason="ADDRESS_NOT_LOOPBACK",
        )
    return f"{host}:{_add_port(server, address, guard)}"


async def stop(server: grpc.aio.Server, grace_s: float) -> None:
    """Stops a server, and does not wait for ever: grpcio's own end sometimes never comes after a call that its client
    gave up in the same moment (seen in two of ten runs of a test on a busy machine, grpcio 1.85)."""
    try:
        async with asyncio.timeout(grace_s + STOP_MARGIN_S):
            await server.stop(grace_s)
    except TimeoutError:
        log.warning("gRPC did not say that it has stopped")


def _add(servicer: object, server: grpc.aio.Server) -> None:
    getattr(pb_grpc, f"add_{type(servicer).__name__}Servicer_to_server")(servicer, server)


def _service_names() -> list[str]:
    return [s.full_name for s in pb.DESCRIPTOR.services_by_name.values()]


def _add_port(server: grpc.aio.Server, address: str, guard: Guard | None) -> int:
    credentials = guard.credentials() if guard else None
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPrecondition(
            f"can't listen on {address}: another program does, or it is not an address of this machine; "
            "end that program or choose another address",
            reason="PORT_IN_USE",
            metadata={"address": address},
        ) from error
    assert isinstance(port, int)
    return port


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


class _SocketLock:
    """The right to a socket path: gRPC takes the path of a live server's socket away without a word
    (https://github.com/grpc/grpc/issues/17122), so a lock file beside it decides. It ends with the process, however
    that ends."""

    def __init__(self, path: Path) -> None:
        if not path.is_absolute() or len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise InvalidArgument(
                f"socket path {path} must be absolute and at most {MAX_SOCKET_PATH_BYTES} bytes long",
                reason="INVALID_ADDRESS",
            )
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise FailedPrecondition(
                f"another Greenroom server listens on {path}; use that one, or end it first",
                reason="PORT_IN_USE",
                metadata={"address": f"unix:{path}"},
            ) from None

    def release(self) -> None:
        os.close(self._fd)
