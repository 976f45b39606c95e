"""Serves the API on unix sockets and TCP ports.

There is no authentication: whoever can connect may do everything. A unix socket is therefore only for the user that
started the server (mode 0600), and a TCP address must be on the loopback interface unless `ApiServer` is told
otherwise.

Keepalive, both ways, so that a peer that vanished without a word is noticed on every open stream:
    client -> server   a ping after 30 s without data while a call is open, 10 s for the answer
    server -> client   a ping after 60 s without data, 20 s for the answer; clients may ping every 10 s
Source: https://github.com/grpc/grpc/blob/master/doc/keepalive.md
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
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
        allow_remote: permits TCP addresses that other machines can reach.
    """

    def __init__(self, control: ControlPlane, *, info: ServerInfo | None = None, allow_remote: bool = False) -> None:
        self._control = control
        self._info = msgspec.structs.replace(info or ServerInfo(), version=version("greenroom"), started_at=time.time())
        self._allow_remote = allow_remote
        self._server: grpc.aio.Server | None = None
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
        assert self._server is None, "a server is started once"
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS)
        self._register(server)
        try:
            self.addresses = [self._listen(server, address) for address in addresses]
            await server.start()
        except BaseException:
            await server.stop(None)
            self._release()
            raise
        self._server = server
        for name in ("", *_service_names()):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("api listens", addresses=self.addresses)

    async def close(self, grace_s: float) -> None:
        """Takes no new calls, ends streams and waits with ``SERVER_CLOSING``, lets the rest finish for ``grace_s``."""
        server, self._server = self._server, None
        if server is None:
            return
        await self._health.enter_graceful_shutdown()
        self._streams.close()
        await stop(server, grace_s)
        self._release()

    def _register(self, server: grpc.aio.Server) -> None:
        control, streams = self._control, self._streams
        for kind in SERVICES:
            _add(kind(control, streams, self._info), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_service_names(), health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    def _listen(self, server: grpc.aio.Server, address: str) -> str:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            self._held.append(_SocketLock(path))
            with _umask(0o177):  # bound within the call, so the socket is never open to others
                _add_port(server, address)
            path.chmod(0o600)
            return address
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise InvalidArgument(f"address {address!r} is neither unix:/path nor host:port", reason="INVALID_ADDRESS")
        if not self._allow_remote and not _is_loopback(host):
            raise InvalidArgument(
                f"the API has no authentication, so it does not listen on {host}: use 127.0.0.1, or a unix socket",
                reason="ADDRESS_NOT_LOOPBACK",
            )
        return f"{host}:{_add_port(server, address)}"

    def _release(self) -> None:
        for lock in self._held:
            lock.release()
        self._held.clear()


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


def _add_port(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPrecondition(
            f"can't listen on {address}: another program does, or it is not an address of this machine; "
            "end that program or choose another address",
            reason="PORT_IN_USE",
            metadata={"address": address},
        ) from error
    assert isinstance(port, int)
    return port


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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
