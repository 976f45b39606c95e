"""Sockets for endpoints: plain, unix, and inside a network namespace."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

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


async def test_a_handshake_is_not_given_up() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        server.setblocking(False)
        endpoint = Endpoint(host="127.0.0.1", port=server.getsockname()[1])
        first, second = dial.make_socket(endpoint), dial.make_socket(endpoint)
        await loop.sock_connect(first, dial.address(endpoint))
        with pytest.raises(TimeoutError):  # the queue of those that wait for `accept` is full
            async with asyncio.timeout(0.05):
                await loop.sock_connect(second, dial.address(endpoint))
        mine = second.getsockname()
        dial.close(second)
        assert second.fileno() == -1
        dial.close(first)
        accepted = [await asyncio.wait_for(loop.sock_accept(server), 60) for _ in range(2)]
        assert accepted[1][1] == mine
        for connection, _ in accepted:
            assert await asyncio.wait_for(loop.sock_recv(connection, 1), 60) == b"", "opened, and closed in order"
            connection.close()


@pytest.mark.parametrize("policy", [asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def test_who_is_cut_off_at_any_moment_of_a_connection_hears_that(policy: type[asyncio.DefaultEventLoopPolicy]) -> None:
    """And not of a socket that a loop has closed already."""

    async def connect(endpoint: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        sock = dial.make_socket(endpoint)
        try:
            await loop.sock_connect(sock, dial.address(endpoint))
            await loop.create_connection(asyncio.Protocol, sock=sock)
        except BaseException:
            dial.close(sock)
            raise

    async def main() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        endpoint = Endpoint(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
        for moment in range(10_000):
            connecting = asyncio.ensure_future(connect(endpoint))
            for _ in range(moment):
                await asyncio.sleep(0)
            if not connecting.cancel():
                break  # it was connected by then
            with pytest.raises(asyncio.CancelledError):
                await connecting
        else:
            pytest.fail("it never came about")
        server.close()

    loop = policy().new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
