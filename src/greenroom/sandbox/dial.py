"""Sockets towards actors: the one place that knows how an `Endpoint` is reached.

An endpoint with a ``netns`` lives in a network namespace of its worker, and several actors there share one address;
the interface tells them apart. So the socket is made inside the namespace and bound to the interface
(``SO_BINDTODEVICE``); a socket keeps the namespace it was made in, and the calling thread goes back at once.

    sock = make_socket(endpoint)
    await loop.sock_connect(sock, address(endpoint))
    ...
    close(sock)

The namespace's file is opened anew each time on purpose: a kept descriptor would save three of thirteen microseconds,
but would hold a removed namespace alive and miss that its path names another one now.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from greenroom.core.errors import InvalidArgument, Unavailable
from greenroom.core.records import Endpoint

CLONE_NEWNET = 0x40000000
_OWN_NETNS = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)

#: Source: the kernel's include/net/tcp_states.h.
_SYN_SENT = 2
#: Who has not answered by then is not going to be saved with that connection either.
HANDSHAKE_S = 5.0


def make_socket(endpoint: Endpoint) -> socket.socket:
    """A non-blocking stream socket that can connect to ``address(endpoint)``; not connected yet.

    Takes some ten microseconds, makes no blocking call, and leaves the calling thread in the network namespace that it
    came from, whatever happens. Needs CAP_SYS_ADMIN (`setns`) for an endpoint with a ``netns``.

    Raises:
        Unavailable: the endpoint's namespace or interface is gone (reason ``ENDPOINT_GONE``): its sandbox has ended.
        InvalidArgument: the endpoint names no place.
    """
    if endpoint.path:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    if not endpoint.host:
        raise InvalidArgument(f"endpoint {endpoint} has neither a host nor a path")
    if not endpoint.netns:
        return _tcp_socket(endpoint)
    try:
        with inside_netns(endpoint.netns):
            return _tcp_socket(endpoint)
    except FileNotFoundError as e:
        raise Unavailable(f"network namespace {endpoint.netns} is gone", reason="ENDPOINT_GONE") from e


def address(endpoint: Endpoint) -> tuple[str, int] | str:
    """What to connect a socket of `make_socket` to."""
    return endpoint.path or (endpoint.host, endpoint.port)


def close(sock: socket.socket) -> None:
    """Closes a socket of `make_socket`, for a caller in an event loop. One that is in the middle of its handshake is
    closed when that is over: given up, it may stay half open for a second at the other end, where gVisor can't save it
    (`greenroom.sandbox.gvisor.network.Network.settle`). Nothing is left to do for one that the loop has taken over and
    closed: uvloop's, when a connection is cut off in the moment in which it comes about."""
    if sock.fileno() < 0:
        return
    if sock.family == socket.AF_INET and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _SYN_SENT:
        _close_later(sock.dup())  # of its own: the loop may not be done with the other one yet
    sock.close()


def notice_silence(sock: socket.socket) -> None:
    """A TCP connection whose other end has gone without a word is broken off after a minute, also when nothing is
    sent."""
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _close_later(sock: socket.socket) -> None:
    def over() -> None:
        loop.remove_writer(sock)
        timer.cancel()
        sock.close()

    loop = asyncio.get_running_loop()
    timer = loop.call_later(HANDSHAKE_S, over)
    loop.add_writer(sock, over)


def place() -> str:
    """Names this machine, and what of it this process sees: whoever is at the same place can connect to the endpoints
    of its sandboxes. That takes the same kernel, network namespace and root directory.

    Source: proc(5), /proc/sys/kernel/random/boot_id; namespaces(7) for what the inode of a namespace means.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    network, root = Path(_OWN_NETNS).stat(), Path("/").stat()
    return f"{boot_id}/{network.st_dev}:{network.st_ino}/{root.st_dev}:{root.st_ino}"


@contextmanager
def inside_netns(path: str | Path) -> Iterator[None]:
    """Runs the block with the calling thread in the network namespace at ``path``. The block must not await or
    yield.

    Raises:
        FileNotFoundError: there is none.
        OSError: ``path`` is no network namespace, or CAP_SYS_ADMIN is missing.
    """
    home = os.open(_OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            set_netns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            set_netns(home)
    finally:
        os.close(home)


def set_netns(fd: int) -> None:
    """Moves the calling thread into the network namespace that ``fd`` is of. Source: setns(2); `os.setns` came in
    3.12."""
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"setns: {os.strerror(errno)}")


def _tcp_socket(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The gateway forwards small messages both ways: waiting to fill a segment would cost 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if endpoint.device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, endpoint.device.encode())
    except BaseException as e:
        sock.close()
        if isinstance(e, OSError) and endpoint.device:
            raise Unavailable(f"interface {endpoint.device} is gone: {e}", reason="ENDPOINT_GONE") from e
        raise
    return sock
