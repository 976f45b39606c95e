"""Ports for servers that are told theirs and bind it later, or again: nobody else gets one of them meanwhile.

Each process has a block of ports of its own, below those that the kernel gives out by itself: to who binds port 0, and
to every connection that goes out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

#: Above what services usually listen on.
_FIRST = 20480
_BLOCK, _MIN_BLOCKS = 128, 64


def free_port() -> int:
    """On loopback. The same one comes again only after all others of this process's block."""
    for port in itertools.islice(_mine(os.getpid()), _BLOCK):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError(f"this process has no free port left; end some of its {_BLOCK} servers")


@functools.cache
def _mine(pid: int) -> Iterator[int]:
    """Ports of a block that this process takes: by a name that is as local to a network namespace as ports are, and
    free again when the process ends."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    blocks = max((low - _FIRST) // _BLOCK, _MIN_BLOCKS)  # where the kernel begins lower, it may take some of ours
    for number in range(blocks):
        block = (pid + number) % blocks
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0greenroom-test-ports-{block}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        start = _FIRST + block * _BLOCK
        return itertools.cycle(range(start, start + _BLOCK))
    raise RuntimeError(f"{blocks} processes have blocks of ports; end some of them")


_claims: list[socket.socket] = []
