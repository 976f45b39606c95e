"""Sockets for endpoints: plain, unix, and inside a network namespace."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenroom.core.errors import InvalidArgument, Unavailable
from greenroom.core.records import Endpoint
from greenroom.sandbox import dial


def own_netns() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


@pytest.fixture
def netns() -> Iterator[str]:
    """The path of a fresh network namespace, held by a descriptor."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace needs root")
    fds: list[int] = []

    def make() -> None:
        assert ctypes.CDLL(None).unshare(dial.CLONE_NEWNET) == 0
        fds.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    yield f"/proc/self/fd/{fds[0]}"
    os.close(fds[0])


def test_unix_endpoint_reaches_its_listener(tmp_path: Path) -> None:
    endpoint = Endpoint(path=str(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(endpoint.path)
        server.listen()
        with dial.make_socket(endpoint) as client:
            assert not client.getblocking()
            client.connect(dial.address(endpoint))
            server.accept()[0].close()


def test_plain_endpoint_reaches_its_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint(host="127.0.0.1", port=server.getsockname()[1])
        with dial.make_socket(endpoint) as client:
            assert not client.getblocking()
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            client.setblocking(True)
            client.connect(dial.address(endpoint))
            server.accept()[0].close()


def test_ipv6_host_makes_an_ipv6_socket() -> None:
    with dial.make_socket(Endpoint(host="::1", port=1)) as sock:
        assert sock.family == socket.AF_INET6


def test_endpoint_without_a_place_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        dial.make_socket(Endpoint(port=80))


def test_socket_is_made_inside_the_namespace_and_bound_to_the_device(netns: str) -> None:
    home = own_netns()
    with dial.make_socket(Endpoint(host="10.0.0.1", port=1, netns=netns, device="lo")) as sock:
        assert own_netns() == home
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
        # lo of a fresh namespace is down, so nothing is reachable: the socket is not in this namespace.
        sock.setblocking(True)
        with pytest.raises(OSError, match="unreachable"):
            sock.connect(("127.0.0.1", 1))


def test_gone_namespace_or_device_is_unavailable_and_the_thread_returns(netns: str) -> None:
    home = own_netns()
    for endpoint in (
        Endpoint(host="10.0.0.1", port=1, netns="/run/netns/there-is-none"),
        Endpoint(host="10.0.0.1", port=1, netns=netns, device="nodevice0"),
    ):
        with pytest.raises(Unavailable) as caught:
            dial.make_socket(endpoint)
        assert caught.value.reason == "ENDPOINT_GONE"
        assert own_netns() == home


def test_block_that_fails_inside_a_namespace_returns_home(netns: str) -> None:
    home = own_netns()
    with pytest.raises(ZeroDivisionError), dial.inside_netns(netns):
        assert own_netns() != home
        raise ZeroDivisionError
    assert own_netns() == home


def test_no_descriptor_is_left_open(netns: str) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        dial.make_socket(Endpoint(host="10.0.0.1", port=1, netns=netns, device="lo")).close()
        with pytest.raises(Unavailable):
            dial.make_socket(Endpoint(host="10.0.0.1", port=1, netns=netns, device="nodevice0"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
