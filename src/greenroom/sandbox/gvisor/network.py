"""The network of a worker's sandboxes: one named namespace, and one slot (a veth pair) for each sandbox.

    worker's namespace gr-1a2b3c4d                     the slot's own, nameless namespace
        gr1x2y3z  169.254.77.1/30  ------ veth ------  eth0, no address
                                                         ^ packet socket, handed to the sandbox: guest 169.254.77.2/30

- Nothing of this is in the host's own namespace, so no firewall is needed: in the worker's namespace nothing listens,
  nothing is forwarded, and there is no way out. Every guest has the same address; the interface tells them apart.
- The guest's end is in a namespace of the slot alone, which nothing but the packet socket refers to. Whoever broke out
  of gVisor's own stack would hold that raw socket, and in a shared namespace could send on every other actor's
  interface with it. And the slot takes itself down: with the sandbox's last process the socket, the namespace and both
  interfaces are gone, even when no agent is left to clean up.
- Interface names are never used twice, so a stale endpoint can't reach another actor: a counter, kept below the state
  directory, that begins at the time of day so as not to repeat itself when that directory is lost.
- The addresses of the link layer are constants and known to both ends from the start, so that neither ever asks for
  the other, nor can be deceived about it.

One thread lives in the worker's namespace and does everything here (a namespace belongs to a thread).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from greenroom.sandbox.dial import CLONE_NEWNET, set_netns

GUEST_ADDRESS, HOST_ADDRESS, PREFIX_LENGTH = "169.254.77.2", "169.254.77.1", 30
HOST_MAC, GUEST_MAC = "02:67:72:00:00:01", "02:67:72:00:00:02"
#: Not where `ip netns` keeps its own: its first ``add`` mounts that directory over itself, and what was there before
#: can't be removed any more.
NETNS_DIRECTORY = Path("/run/greenroom/netns")
DEVICE_PREFIX = "gr"
GUEST_DEVICE = "eth0"
MTU = 1500
#: Frames that wait for a guest that is busy or frozen, as runsc itself sets it.
PACKET_BUFFER_BYTES = 4 << 20
#: Slot numbers are set aside on disk in blocks of so many, to write (and sync) rarely.
COUNTER_BLOCK = 256

_ETH_P_ALL = 3
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_NUD_PERMANENT = 0x80
_MS_BIND, _MNT_DETACH = 4096, 2
#: Since Linux 5.2; the numbers of these system calls are the same on every architecture.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC, _FSCONFIG_CMD_CREATE, _FSMOUNT_CLOEXEC = 1, 6, 1
#: States of a connection whose next packet is the guest's: it is being opened, or closed and what came before the end
#: is not acknowledged. Source: the kernel's include/net/tcp_states.h.
_SYN_SENT, _FIN_WAIT1, _LAST_ACK, _CLOSING = 2, 4, 9, 11
_IN_MOTION = 1 << _SYN_SENT | 1 << _FIN_WAIT1 | 1 << _LAST_ACK | 1 << _CLOSING
#: A guest answers within a millisecond if it gets any processor at all; but gVisor may overlook an answer until it
#: repeats its own packet, after a second.
SETTLE_S = 1.5
_SETTLE_AGAIN_S = 0.002
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


@dataclass
class Slot:
    """One sandbox's network. The descriptors are closed when the sandbox holds the socket itself."""

    device: str
    packet_socket: socket.socket
    #: The guest end's namespace, for the command line, which looks the network up by itself; else -1.
    netns: int = -1

    def release(self) -> None:
        self.packet_socket.close()
        if self.netns >= 0:
            os.close(self.netns)
            self.netns = -1


class Network:
    """Open it once; every method may be called from the event loop. ``name`` is that of the namespace."""

    def __init__(self, name: str, counter: Path) -> None:
        self.path = NETNS_DIRECTORY / name
        self._counter = Counter(counter)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._netlink: Any = None
        self._diag: Any = None

    async def open(self) -> None:
        """Makes the namespace, or enters the one that an earlier agent left."""
        await self._run(self._open)

    async def make_slot(self, *, with_netns: bool = False) -> Slot:
        """``with_netns``: for the command line; it finds address, route and neighbour on the guest's interface."""
        return await self._run(self._make_slot, with_netns)

    async def drop_slot(self, device: str) -> None:
        """Removes the slot's interfaces; unknown is success."""
        await self._run(self._drop_slot, device)

    async def settle(self, device: str) -> None:
        """Waits, `SETTLE_S` at most, until no connection to the guest is just being opened or closed. gVisor can't save
        a guest with one that is in the middle of its handshake, and by trying to it breaks that one: until it gives it
        up, two minutes later, every other try fails too. Source: gVisor's pull request 12567, and trying."""
        until = time.monotonic() + SETTLE_S
        while await self._run(self._is_in_motion, device) and time.monotonic() < until:  # noqa: ASYNC110  # the kernel's
            await asyncio.sleep(_SETTLE_AGAIN_S)

    async def devices(self) -> set[str]:
        """The slots that exist."""
        return await self._run(self._devices)

    async def close(self, *, remove: bool) -> None:
        await self._run(self._close, remove)
        self._thread.shutdown()

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    # --- in the thread ------------------------------------------------------------------------------------

    def _open(self) -> None:
        from pyroute2.iproute.linux import IPRoute  # takes a quarter of a second; only workers need it

        if not self._enter():
            _check(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
            self._make_quiet()
            self._bind()
        self._netlink = IPRoute()

    def _enter(self) -> bool:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            set_netns(fd)
            return True
        except OSError:
            self.path.unlink()  # an empty file: the machine was restarted, or an agent died between its two steps
            return False
        finally:
            os.close(fd)

    def _make_quiet(self) -> None:
        _sysctl("ipv4/ip_forward", "0")
        for scope in ("all", "default"):
            # Every slot has the same addresses, so replies come in by "another" way than the first route.
            _sysctl(f"ipv4/conf/{scope}/rp_filter", "0")
        _no_ipv6()

    def _bind(self) -> None:
        NETNS_DIRECTORY.mkdir(parents=True, exist_ok=True)
        self.path.touch(mode=0o444, exist_ok=False)
        source = b"/proc/thread-self/ns/net"
        _check(_libc.mount(source, os.fsencode(self.path), b"none", _MS_BIND, None), f"mount {self.path}")

    def _make_slot(self, with_netns: bool) -> Slot:
        device = DEVICE_PREFIX + self._counter.next()
        home = _own_netns()
        guest = -1
        try:
            _check(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
            guest = _own_netns()
            _no_ipv6()
            peer: dict[str, Any] = {"ifname": GUEST_DEVICE, "net_ns_fd": guest}
            if with_netns:
                peer["address"] = GUEST_MAC  # else its own: frames to the guest then end at the packet socket
            self._netlink.link("add", ifname=device, kind="veth", address=HOST_MAC, mtu=MTU, peer=peer)
            _set_up(GUEST_DEVICE)
            packet_socket = _packet_socket(GUEST_DEVICE)
            if with_netns:
                _configure_guest_end()
        except BaseException:
            if guest >= 0:
                os.close(guest)  # and with it the pair
            raise
        finally:
            set_netns(home)
            os.close(home)
        self._configure_host_end(device)
        if not with_netns:
            os.close(guest)
        return Slot(device, packet_socket, guest if with_netns else -1)

    def _configure_host_end(self, device: str) -> None:
        index = socket.if_nametoindex(device)
        self._netlink.addr("add", index=index, address=HOST_ADDRESS, prefixlen=PREFIX_LENGTH)
        self._netlink.link("set", index=index, state="up")
        self._netlink.neigh("add", ifindex=index, dst=GUEST_ADDRESS, lladdr=GUEST_MAC, state=_NUD_PERMANENT)

    def _drop_slot(self, device: str) -> None:
        with contextlib.suppress(OSError):  # gone by itself
            index = socket.if_nametoindex(device)
            from pyroute2.netlink.exceptions import NetlinkError

            with contextlib.suppress(NetlinkError):  # gone between the two
                self._netlink.link("del", index=index)

    def _is_in_motion(self, device: str) -> bool:
        from pyroute2.netlink.diag import DiagSocket

        try:
            index = socket.if_nametoindex(device)
        except OSError:
            return False
        if self._diag is None:
            self._diag = DiagSocket()
        found = self._diag.get_sock_stats(family=socket.AF_INET, states=_IN_MOTION)
        return any(connection["idiag_if"] == index for connection in found)

    def _devices(self) -> set[str]:
        return {name for _, name in socket.if_nameindex() if name.startswith(DEVICE_PREFIX)}

    def _close(self, remove: bool) -> None:
        for sock in (self._netlink, self._diag):
            if sock is not None:
                sock.close()
        if remove:
            with contextlib.suppress(FileNotFoundError):
                _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
                self.path.unlink()


class Counter:
    """Numbers in base 36 that never repeat, also after a crash or the loss of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0
        self._reserved = 0

    def next(self) -> str:
        if self._next == self._reserved:
            self._reserve()
        self._next += 1
        return base36(self._next - 1)

    def _reserve(self) -> None:
        if not self._next:
            kept = int(self._path.read_text()) if self._path.exists() else 0
            self._next = max(kept, int(time.time() * 1000))
        self._reserved = self._next + COUNTER_BLOCK
        draft = self._path.with_suffix(".new")
        with open(draft, "w") as file:
            file.write(str(self._reserved))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._path)


def base36(number: int) -> str:
    digits = ""
    while True:
        number, rest = divmod(number, 36)
        digits = _DIGITS[rest] + digits
        if not number:
            return digits


def links_and_routes() -> dict[str, Any]:
    """The argument of ``Network.CreateLinksAndRoutes``: loopback, and eth0 on the packet socket that goes with it.

    Source: gVisor, runsc/boot/network.go. Names that a release does not know are ignored by it: ``DisconnectOk`` and
    ``AllowConnectedOnSave`` are the same wish in different releases, that open connections be reset by a snapshot
    rather than forbid it.
    """
    nowhere = {"Route": {"Destination": {"IP": "", "Mask": None}, "Gateway": ""}, "Name": ""}
    return {
        "LoopbackLinks": [
            {
                "Name": "lo",
                "Addresses": [{"Address": "127.0.0.1", "PrefixLen": 8}, {"Address": "::1", "PrefixLen": 128}],
                "Routes": [_route("127.0.0.0/8"), _route("::1/128")],
                "GVisorGRO": False,
            }
        ],
        "FDBasedLinks": [
            {
                "Name": GUEST_DEVICE,
                "InterfaceIndex": 0,
                "MTU": MTU,
                "Addresses": [{"Address": GUEST_ADDRESS, "PrefixLen": PREFIX_LENGTH}],
                "Routes": [_route(f"{HOST_ADDRESS}/{PREFIX_LENGTH}")],
                "GSOMaxSize": 0,
                "GVisorGSOEnabled": False,
                "GVisorGRO": False,
                "TXChecksumOffload": False,
                "RXChecksumOffload": True,  # frames never leave the machine
                "LinkAddress": _base64(bytes.fromhex(GUEST_MAC.replace(":", ""))),
                "QDisc": 1,  # first in, first out
                "Neighbors": [{"IP": HOST_ADDRESS, "HardwareAddr": _base64(bytes.fromhex(HOST_MAC.replace(":", "")))}],
                "NumChannels": 1,
                "ProcessorsPerChannel": 0,
            }
        ],
        "XDPLinks": None,
        "Defaultv4Gateway": {
            "Route": {"Destination": {"IP": "0.0.0.0", "Mask": _base64(bytes(4))}, "Gateway": HOST_ADDRESS},
            "Name": GUEST_DEVICE,
        },
        "Defaultv6Gateway": nowhere,
        "PCAP": False,
        "LogPackets": False,
        "NATBlob": False,
        "DisconnectOk": True,
        "AllowConnectedOnSave": True,
    }


def _route(destination: str) -> dict[str, Any]:
    network = ipaddress.ip_network(destination, strict=False)
    mask = _base64(network.netmask.packed)
    return {"Destination": {"IP": str(network.network_address), "Mask": mask}, "Gateway": ""}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _own_netns() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _sysctl(name: str, value: str) -> None:
    """Of this thread's network. In a container /proc/sys is mounted over itself, read-only; another procfs is not."""
    try:
        Path("/proc/sys/net", name).write_text(value)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        proc = _own_procfs()
        try:
            fd = os.open(f"sys/net/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
            with open(fd, "w") as file:
                file.write(value)
        finally:
            os.close(proc)


def _own_procfs() -> int:
    """A procfs that is mounted nowhere, and ends with this descriptor. Linux 5.2 or newer, and CAP_SYS_ADMIN."""
    context = _check(_libc.syscall(_SYS_FSOPEN, b"proc", _FSOPEN_CLOEXEC), "fsopen(proc)")
    try:
        _check(_libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig(proc)")
        return _check(_libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0), "fsmount(proc)")
    finally:
        os.close(context)


def _no_ipv6() -> None:
    for scope in ("all", "default"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            _sysctl(f"ipv6/conf/{scope}/disable_ipv6", "1")


def _set_up(device: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", device.encode(), 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", device.encode(), flags | _IFF_UP))


def _packet_socket(device: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, PACKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, PACKET_BUFFER_BYTES)
        sock.bind((device, _ETH_P_ALL))
    except BaseException:
        sock.close()
        raise
    return sock


def _configure_guest_end() -> None:
    """Gives the guest's interface what `runsc start` and `runsc restore` look for, and then take off it."""
    from pyroute2.iproute.linux import IPRoute

    with IPRoute() as netlink:
        index = socket.if_nametoindex(GUEST_DEVICE)
        netlink.link("set", index=1, state="up")
        netlink.addr("add", index=index, address=GUEST_ADDRESS, prefixlen=PREFIX_LENGTH)
        netlink.neigh("add", ifindex=index, dst=HOST_ADDRESS, lladdr=HOST_MAC, state=_NUD_PERMANENT)
        netlink.route("add", dst="default", gateway=HOST_ADDRESS, oif=index)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
