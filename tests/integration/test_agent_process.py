"""``greenroom agent`` as a process of its own, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent_kit import SPEC, short_directory, until
from link_kit import Replica

from greenroom.cli.agent import END_SIGNAL, WIPE_SIGNAL
from greenroom.core import agentapi as api
from greenroom.core.gc.records import Registered
from greenroom.testing.ports import free_port

#: Longer than any of these tests waits, so that an agent that ends does not end because of it.
LONG_S = 60


@pytest.fixture
async def replicas() -> AsyncIterator[list[Replica]]:
    with short_directory() as root:
        replicas = [Replica(root, f"r{number}") for number in range(2)]
        yield replicas
        for replica in replicas:
            await replica.kill()


@asynccontextmanager
async def agent(
    replicas: list[Replica], *options: str, drain_s: float = LONG_S, enrols: bool = True
) -> AsyncIterator[asyncio.subprocess.Process]:
    root = _root(replicas)
    controls = [f"--control={replica.address}" for replica in replicas]
    places = [f"--state-dir={root}/w", f"--images={root}/images", f"--snapshots={root}/store"]
    for replica in replicas:
        replica.enrols = enrols
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "greenroom", "agent", "--worker=w", "--pool=default", "--backend=sim", "--slots=4"),
        *(*controls, *places, f"--drain-timeout={drain_s}", *options),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _root(replicas: list[Replica]) -> Path:
    return Path(replicas[0].address.removeprefix("unix:")).parent


async def ended(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(60):
        return await process.wait()


async def connected(*replicas: Replica) -> None:
    await until(lambda: all(replica.enrolled and replica.heartbeats for replica in replicas))


async def test_says_who_it_is_to_every_replica(replicas: list[Replica]) -> None:
    for replica in replicas:
        await replica.start()
    async with agent(replicas, "--label=zone=a", "--label=disk=fast=yes") as process:
        await connected(*replicas)
        for replica in replicas:
            assert replica.connects[0].labels == {"zone": "a", "disk": "fast=yes"}
        process.send_signal(END_SIGNAL)
        assert await ended(process) == 0


async def test_leaves_in_order_and_ends_when_it_is_told_to(replicas: list[Replica]) -> None:
    for replica in replicas:
        await replica.start()
    async with agent(replicas) as process:
        await connected(*replicas)
        process.send_signal(signal.SIGTERM)
        await until(lambda: all(replica.leaving for replica in replicas))
        assert await replicas[0].hub.call("w", api.ListResident()) == api.Residents()  # it goes on working
        assert process.returncode is None
        assert await replicas[1].hub.call("w", api.Shutdown(wipe=True)) == api.Done()
        assert await ended(process) == 0


@pytest.mark.parametrize("hurry", [signal.SIGTERM, signal.SIGINT, END_SIGNAL, WIPE_SIGNAL], ids=lambda s: s.name)
async def test_a_second_signal_hurries(replicas: list[Replica], hurry: signal.Signals) -> None:
    await replicas[0].start()
    async with agent(replicas) as process:
        await connected(replicas[0])
        process.send_signal(signal.SIGTERM)
        await until(lambda: replicas[0].leaving)
        process.send_signal(hurry)
        assert await ended(process) == 0


async def test_ends_when_nobody_suspends_its_actors_in_time(replicas: list[Replica]) -> None:
    await replicas[0].start()
    async with agent(replicas, drain_s=0.5) as process:
        await connected(replicas[0])
        process.send_signal(signal.SIGTERM)
        await until(lambda: replicas[0].leaving)
        assert await ended(process) == 0


async def test_ends_at_once_when_nobody_is_connected(replicas: list[Replica]) -> None:
    async with agent(replicas) as process:
        await until((_root(replicas) / "w" / "sandboxes" / "sim.sock").exists)
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0


async def test_a_worker_that_nobody_has_registered_waits_for_nobody(replicas: list[Replica]) -> None:
    await replicas[0].start()
    async with agent(replicas, "--pod-uid=p", enrols=False) as process:
        await until(lambda: replicas[0].heartbeats)
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0


async def test_a_pod_with_an_actor_waits_for_a_control_plane_that_is_away(replicas: list[Replica]) -> None:
    """Its actors end with it, so they are suspended first."""
    await replicas[0].start()
    async with agent(replicas, "--pod-uid=p") as process:
        await connected(replicas[0])
        identity = api.Identity(namespace="ns", name="a", uid="a", generation=1)
        start = api.Start(operation_id="op", actor_uid="a", generation=1, identity=identity, spec=SPEC, image_digest="")
        await replicas[0].hub.call("w", start)
        await replicas[0].kill()
        process.send_signal(signal.SIGTERM)
        again = replicas[1]
        await again.start()
        await until(lambda: again.leaving)
        assert process.returncode is None
        await again.hub.call("w", api.Shutdown(wipe=True))
        assert await ended(process) == 0


async def test_says_whether_it_lives_and_is_ready(replicas: list[Replica]) -> None:
    async def status(path: str) -> int:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status

    async def is_ready() -> bool:
        try:
            return await status("/readyz") == 200
        except aiohttp.ClientError:
            return False

    port = free_port()
    await replicas[0].start()
    async with agent(replicas, f"--health=127.0.0.1:{port}", enrols=False) as process:
        await until(lambda: replicas[0].heartbeats)
        assert (await status("/livez"), await status("/readyz"), await status("/")) == (200, 503, 404)
        said: Any = await replicas[0].hub.call("w", api.Present())
        await replicas[0].hub.call("w", api.Enrol(registered=Registered(claim=said.claim, epoch=1, closed_seq=0)))
        assert await is_ready()
        await replicas[0].kill()
        async with asyncio.timeout(60):
            while await is_ready():
                await asyncio.sleep(0.01)
        assert await status("/livez") == 200
        process.send_signal(END_SIGNAL)
        assert await ended(process) == 0


@pytest.mark.parametrize("number", [END_SIGNAL, WIPE_SIGNAL, signal.SIGINT], ids=lambda s: s.name)
async def test_who_is_connected_does_not_hold_up_a_server_that_ends_its_agents(
    replicas: list[Replica], number: signal.Signals
) -> None:
    await replicas[0].start()
    async with agent(replicas) as process:
        await connected(replicas[0])
        process.send_signal(number)
        assert await ended(process) == 0
        assert not replicas[0].leaving
