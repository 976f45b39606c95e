"""The control socket of a gVisor sandbox, spoken directly.

A `runsc` process costs some 25 ms for what a call on the sandbox's own socket does in 0.2. The protocol is one JSON
object a request, ``{"method", "arg"}``, with file descriptors beside it (SCM_RIGHTS), and one a reply,
``{"success", "err", "result"}``. Source: gVisor, pkg/urpc and runsc/boot/controller.go. It is private to gVisor, so a
worker's self-test proves it before it is used.

Every call opens a connection of its own: the server drops connections when it restores, and after an error with
descriptors.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

#: For calls that only ask or switch. They take 0.2 ms; a sandbox whose host is starved of CPU may take seconds.
CALL_TIMEOUT_S = 30.0
#: For writing and reading memory: 10 GB at 20 MB/s.
TRANSFER_TIMEOUT_S = 600.0
#: A reply is a few hundred bytes; a process list of a full sandbox some 100 kB.
MAX_REPLY_BYTES = 8 << 20
#: The server's accept queue is rarely full, and never for long.
_CONNECT_RETRY_S = 0.002


class UrpcError(Exception):
    """The sandbox refused: ``message`` is its own text."""

    def __init__(self, method: str, message: str) -> None:
        super().__init__(f"{method}: {message}")
        self.method = method
        self.message = message


class UrpcClosed(UrpcError):
    """The sandbox is gone, or went while it was working on the call."""


class _Reply(msgspec.Struct):
    success: bool
    err: str = ""
    result: Any = None


_decoder = msgspec.json.Decoder(_Reply)


async def call(
    path: Path, method: str, arg: Any = None, fds: Sequence[int] = (), *, timeout_s: float | None = CALL_TIMEOUT_S
) -> Any:
    """Calls ``method`` at the socket ``path`` (of any length) and returns its result.

    Cancelling leaves: the sandbox finishes what it was asked to do.

    Args:
        fds: sent along; they stay the caller's.
        timeout_s: None waits for ever.

    Raises:
        UrpcError: the sandbox answered with an error.
        UrpcClosed: there is no sandbox, or it closed the connection.
        TimeoutError: no answer in time.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        async with asyncio.timeout(timeout_s):
            try:
                await _connect(sock, path)
                request = msgspec.json.encode({"method": method, "arg": arg})
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = sock.sendmsg([request], rights)
                if sent < len(request):
                    await loop.sock_sendall(sock, request[sent:])
                return await _receive(sock, method)
            except (ConnectionError, FileNotFoundError) as e:
                raise UrpcClosed(method, f"the sandbox is gone ({e})") from e


async def _connect(sock: socket.socket, path: Path) -> None:
    # Through a descriptor of the directory, because a socket's address holds 107 bytes only.
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                return sock.connect(f"/proc/self/fd/{directory}/{path.name}")
            except BlockingIOError:
                await asyncio.sleep(_CONNECT_RETRY_S)
    finally:
        os.close(directory)


async def _receive(sock: socket.socket, method: str) -> Any:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < MAX_REPLY_BYTES:
        chunk = await loop.sock_recv(sock, 1 << 16)
        if not chunk:
            raise UrpcClosed(method, "the sandbox closed the connection")
        data += chunk
        try:
            reply = _decoder.decode(data)
        except msgspec.DecodeError:
            continue  # not all of it yet
        if not reply.success:
            raise UrpcError(method, reply.err)
        return reply.result
    raise UrpcError(method, f"reply of more than {MAX_REPLY_BYTES} bytes")
