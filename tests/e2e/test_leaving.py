"""An agent that is asked to end, as a pod is, loses nothing; and a server that ends waits for no agent's drain."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from agent_kit import short_directory
from kit import Kit, until

from greenroom.cli.agent import DRAIN_TIMEOUT_S
from greenroom.core.records import ActorState
from greenroom.testing.live import LiveServer


@pytest.fixture
def kit() -> Iterator[Kit]:
    with short_directory() as root:
        live = LiveServer(root / "d", backend="sim", workers=2)
        live.start()
        yield Kit(live, "sim:t")
        live.stop()


def agents(kit: Kit) -> dict[str, int]:
    """Process ids by worker."""
    found = {}
    for pid in kit.live.pids()[1:]:
        with suppress(OSError):  # it has just ended
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            found |= {a.removeprefix(b"--worker=").decode(): pid for a in arguments if a.startswith(b"--worker=")}
    return found


def count(kit: Kit, name: str) -> int:
    answer = until(lambda: kit.live.request(f"default/{name}"), lambda answer: answer.status == 200)
    counted: int = msgspec.json.decode(answer.body)["count"]
    return counted


def test_its_actors_are_suspended_and_go_on_where_they_were(kit: Kit) -> None:
    kit.apply("t")
    kit.create("a", "b", template="t")
    before = {name: count(kit, name) for name in ("a", "b")}
    worker = kit.actor("a").worker
    pid = agents(kit)[worker]
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    until(lambda: agents(kit), lambda now: now.get(worker, pid) != pid)
    assert time.monotonic() - began < DRAIN_TIMEOUT_S - 10, "it did not wait for its time to run out"
    assert kit.actor("a").state in (ActorState.SUSPENDED, ActorState.RUNNING)
    assert {name: count(kit, name) for name in before} == {name: number + 1 for name, number in before.items()}
    until(lambda: kit.workers(), lambda workers: all(w.state == "Active" for w in workers))


def test_a_server_that_ends_does_not_wait_for_agents_that_leave(kit: Kit) -> None:
    """Also for those that have just been asked to leave, and for those that it is not connected to."""
    kit.apply("t")
    kit.create("a", template="t")
    count(kit, "a")
    leaving, stuck = agents(kit).values()
    os.kill(leaving, signal.SIGTERM)
    os.kill(stuck, signal.SIGSTOP)
    resumed = False
    began = time.monotonic()
    assert kit.live.process is not None
    kit.live.process.send_signal(signal.SIGINT)
    while kit.live.process.poll() is None:
        if not resumed and time.monotonic() - began > 2:
            os.kill(stuck, signal.SIGCONT)
            resumed = True
        time.sleep(0.05)
    assert time.monotonic() - began < DRAIN_TIMEOUT_S - 10
    assert "agent does not end" not in kit.live.log_tail(1000), "each ended by itself"
