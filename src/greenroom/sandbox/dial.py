"""Sockets towards actors: the one place that knows how an `Endpoint` is reached.

An endpoint with a ``netns`` lives in a network namespace of its worker, and several actors there share one address;
the interface tells them apart. So the socket is made inside the namespace and bound to the interface
(``SO_BINDTODEVICE``); a socket keeps the namespace it was made in, and the calling thread goes back at once.

    sock = make_socket(endpoint)
    await loop.sock_connect(sock, address(endpoint))

The namespace's file is opened anew each time on purpose: a kept descriptor would save three of thirteen microseconds,
but would hold a removed namespace alive and miss that its path names another one now.
"""

from __future__ import annotations

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
