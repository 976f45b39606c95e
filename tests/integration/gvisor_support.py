"""What the gVisor tests share: real sandboxes of this machine's own Python, and questions about the world outside."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import greenroom.testing.counter_app
from greenroom.core.agentapi import Identity
from greenroom.core.errors import GreenroomError
from greenroom.core.records import Endpoint, Resources
from greenroom.sandbox import dial
from greenroom.sandbox.gvisor import GvisorBackend, binary
from greenroom.sandbox.gvisor.network import NETNS_DIRECTORY
from greenroom.sandbox.port import ExecSession, SandboxClass
from greenroom.testing.python_rootfs import build_python_rootfs

READY_TIMEOUT_S = 20.0


def skip_unless_possible() -> None:
    """Skips with the reason where gVisor can't run; never in CI, where `GREENROOM_RUNSC` or PATH has it."""
    if os.geteuid() != 0:
        pytest.skip("gVisor sandboxes need root")
    try:
        asyncio.run(binary.find())
    except GreenroomError as e:
        pytest.skip(f"no usable runsc: {e}")


def make_rootfs(directory: Path) -> Path:
    app = Path(greenroom.testing.counter_app.__file__)
    build_python_rootfs(directory, {"/app.py": app})
    return directory


def python_class(rootfs: Path, *argv: str, **changes: Any) -> SandboxClass:
    """The counter, or ``python3 argv...``."""
    return SandboxClass(
        rootfs=rootfs,
        image_digest="sha256:test",
        argv=("python3", *(argv or ("/app.py",))),
        env=(("COUNT_FILE", "/data/count.txt"),),
        **{"resources": Resources(memory_bytes=128 << 20, cpus=2.0, pids=64), **changes},
    )


def identity(name: str, generation: int = 1) -> Identity:
    return Identity(namespace="tests", name=name, uid=f"uid-{name}", generation=generation)


async def connect(endpoint: Endpoint) -> socket.socket:
    """A connected, non-blocking socket."""
    sock = dial.make_socket(endpoint)
    try:
        await asyncio.get_running_loop().sock_connect(sock, dial.address(endpoint))
    except BaseException:
        sock.close()
        raise
    return sock


async def request(sock: socket.socket, path: str, method: str = "GET", body: bytes = b"") -> bytes:
    """One exchange on a connection that stays open; the body of the answer."""

    def exchange() -> bytes:
        sock.settimeout(READY_TIMEOUT_S)
        connection = http.client.HTTPConnection("actor")
        connection.sock = sock
        connection.request(method, path, body)
        return connection.getresponse().read()

    return await asyncio.to_thread(exchange)


async def get(endpoint: Endpoint, path: str = "/info") -> Any:
    """Waits until the actor answers, on a connection of its own."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            try:
                sock = await connect(endpoint)
            except ConnectionRefusedError:
                await asyncio.sleep(0.002)
                continue
            with sock:
                return json.loads(await request(sock, path))


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what nobody announces."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.002)


async def run(session: ExecSession, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """A command to its end: exit status, standard output, standard error."""
    if stdin:
        await session.write(stdin)
    await session.write(b"")
    streams = {1: b"", 2: b""}
    async for stream, data in session.output():
        streams[stream] += data
    return await session.wait(), streams[1], streams[2]


@contextlib.asynccontextmanager
async def opened(state_dir: Path) -> AsyncIterator[GvisorBackend]:
    """A backend that is closed with everything that it made, and then has left nothing on the machine."""
    backend = GvisorBackend()
    await backend.open(state_dir, "test")
    assert await backend.reconcile() == []
    try:
        yield backend
    finally:
        await backend.close(keep_running=False)
    assert_nothing_left(state_dir, worker_name(backend))


def worker_name(backend: GvisorBackend) -> str:
    return backend._network.path.name


def assert_nothing_left(state_dir: Path, worker: str) -> None:
    assert sandbox_processes(state_dir) == []
    assert not (NETNS_DIRECTORY / worker).exists()
    assert worker not in Path("/proc/self/mountinfo").read_text()
    assert list(Path("/sys/fs/cgroup").glob(f"*/greenroom/{worker}")) == []
    assert list((state_dir / "sandboxes").iterdir()) == []


def sandbox_processes(state_dir: Path) -> list[str]:
    """The processes that were made for sandboxes below ``state_dir``, and zombies that this process failed to reap."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            name = (process / "comm").read_text().strip()
            if f"--bundle={state_dir}" in command or (state == "Z" and name == "exe" and parent == str(os.getpid())):
                found.append(f"{process.name} {name} {command}")
    return found


def mount_tmpfs(directory: Path, size: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)


def unmount(directory: Path) -> None:
    subprocess.run(["umount", str(directory)], check=True)
