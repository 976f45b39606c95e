"""Ports of tests' servers."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from greenroom.testing import ports


def test_another_process_gets_others() -> None:
    program = "from greenroom.testing.ports import free_port; print(*(free_port() for _ in range(200)), flush=True)"
    others = [
        subprocess.Popen(
            [sys.executable, "-c", program + "; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    given = [{ports.free_port() for _ in range(200)}]
    for other in others:
        assert other.stdout is not None
        given.append({*map(int, other.stdout.readline().split())})
    for other in others:
        other.communicate("\n")
        assert other.returncode == 0
    assert all(given) and all(a.isdisjoint(b) for a, b in itertools.combinations(given, 2))


def test_the_kernel_gives_none_of_them_to_others() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if low < 32768:
        pytest.skip("this machine's kernel begins lower than Linux does")
    assert all(1024 < ports.free_port() < low for _ in range(200))


def test_one_that_is_listened_on_is_passed_over() -> None:
    first = ports.free_port()
    with socket.create_server(("127.0.0.1", first)):
        assert first not in {ports.free_port() for _ in range(200)}
    assert first in {ports.free_port() for _ in range(200)}
