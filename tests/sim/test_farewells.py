"""Agents, and servers, that are asked to end: what runs there is suspended first, and what somebody else has said about
their workers still holds afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from greenroom.agent.agent import Agent
from greenroom.cli.server import _empty_workers
from greenroom.core.records import ActorState, Worker, WorkerState
from greenroom.engine.members import ASKED, LEAVING, RETIRING
from greenroom.testing.world import QUICK, SimWorld


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        await world.apply()
        yield world


async def record(world: SimWorld, name: str) -> Worker:
    return await world.store.get(Worker, name)


async def test_a_drain_outlives_the_agent_that_is_to_end(world: SimWorld) -> None:
    await world.engine.drain_worker("w0")
    world.agents["w0"].leave()
    assert await asyncio.wait_for(world.agents["w0"].shutdown, 60)
    assert (await record(world, "w0")).cordon == ASKED
    await world.kill_agent("w0")
    await world.start_agent("w0")
    await registered(world, "w0")
    there = await record(world, "w0")
    assert (there.cordon, there.state) == (ASKED, WorkerState.DRAINING), "somebody's maintenance is not over"


async def registered(world: SimWorld, name: str) -> None:
    async with asyncio.timeout(60):
        while name not in world.engine.members.enrolled():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("cordon", [ASKED, RETIRING])
async def test_a_server_that_ends_takes_back_nobodys_word(world: SimWorld, cordon: str) -> None:
    world.engine.decommission.begin = lambda name: None  # type: ignore[assignment,method-assign,return-value]
    await world.engine.members.cordon("w0", cordon)
    await world.engine.members.cordon("w0", LEAVING)
    await world.engine.members.cordon("w1", LEAVING)
    assert [(await record(world, name)).cordon for name in ("w0", "w1")] == [cordon, LEAVING]


async def test_a_gone_worker_keeps_no_other_from_being_emptied(make_world: Callable[..., Any]) -> None:
    """As a server does that ends while others go on."""
    async with make_world(config=replace(QUICK, exclusive=False, worker_return_s=1.0)) as world:
        await world.apply()
        key = await world.create("a")
        await world.request(key)
        kept = (await world.actor(key)).worker
        gone = next(name for name in world.agents if name != kept)
        await world.kill_agent(gone)
        there = await record(world, gone)
        await world.store.put(msgspec.structs.replace(there, state=WorkerState.GONE))
        flushed: list[str] = []

        async def flush(worker: str) -> None:
            flushed.append(worker)

        world.engine.uploads.flush = flush
        await _empty_workers(world.engine, sorted([gone, kept]))
        assert (await world.actor(key)).state is ActorState.SUSPENDED
        assert kept in flushed and (await record(world, kept)).cordon == LEAVING


async def test_one_that_ends_before_it_is_registered_gets_no_actor(
    world: SimWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so on its first welcome, which comes before its registration."""
    await world.kill_agent("w0")
    await world.kill_agent("w1")
    connect = world.hub.connect

    def leaves_at_once(agent: Agent) -> None:
        agent.leave()
        connect(agent)

    monkeypatch.setattr(world.hub, "connect", leaves_at_once)
    await world.start_agent("w0")
    assert await asyncio.wait_for(world.agents["w0"].shutdown, 10), "it has nothing, and is told so"
    assert (await record(world, "w0")).cordon == LEAVING
