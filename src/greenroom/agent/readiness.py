"""The readiness probe: asks a sandbox over HTTP until it answers."""

from __future__ import annotations

import asyncio
import contextlib

from greenroom.core.agentapi import Identity
from greenroom.core.errors import DeadlineExceeded
from greenroom.core.records import Endpoint, Probe
from greenroom.sandbox import dial

#: Between attempts: short at first, for actors that boot in milliseconds, then doubling up to the last.
FIRST_PAUSE_S = 0.005
LAST_PAUSE_S = 0.25
#: One attempt; a probe that hangs longer counts as a no.
ATTEMPT_S = 2.0
_MAX_STATUS_LINE = 4096


async def wait_ready(endpoint: Endpoint, probe: Probe, identity: Identity) -> None:
    """Returns when GET ``probe.path`` answers 200 to 399.

    Raises:
        DeadlineExceeded: not within ``probe.timeout_s``; says what the last attempt saw (reason ``NOT_READY``).
    """
    seen = "nothing was tried"
    pause = FIRST_PAUSE_S
    try:
        async with asyncio.timeout(probe.timeout_s):
            while True:
                try:
                    status = await _attempt(endpoint, probe.path, identity)
                    if 200 <= status < 400:
                        return
                    seen = f"status {status}"
                except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                    seen = f"{type(error).__name__}: {error}".rstrip(": ")
                await asyncio.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE_S)
    except TimeoutError:
        raise DeadlineExceeded(
            f"readiness probe GET {probe.path} on port {endpoint.port} did not answer within {probe.timeout_s:g} s "
            f"(last attempt: {seen}); check the command, the port and the path, or raise readyz.timeout",
            reason="NOT_READY",
        ) from None


async def _attempt(endpoint: Endpoint, path: str, identity: Identity) -> int:
    """The status of one GET, with the header by which the gateway names the actor. Raises OSError or ValueError."""
    sock = dial.make_socket(endpoint)
    try:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ATTEMPT_S):
            await loop.sock_connect(sock, dial.address(endpoint))
            request = (
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: greenroom-readyz\r\n"
                f"Greenroom-Actor: {identity.namespace}/{identity.name}\r\nConnection: close\r\n\r\n"
            )
            await loop.sock_sendall(sock, request.encode())
            head = b""
            while b"\r\n" not in head:
                data = await loop.sock_recv(sock, _MAX_STATUS_LINE)
                if not data or len(head) > _MAX_STATUS_LINE:
                    raise ValueError("connection closed before an answer" if not data else "no HTTP answer")
                head += data
    finally:
        with contextlib.suppress(OSError):
            dial.close(sock)
    version, _, rest = head.partition(b" ")
    if not version.startswith(b"HTTP/"):
        raise ValueError("no HTTP answer")
    return int(rest[:3])
