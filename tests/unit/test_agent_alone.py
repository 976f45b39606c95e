"""An agent that hears no control plane freezes what runs, and nobody but a control plane thaws it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from agent_kit import PATIENCE_S, Bench, short_directory, until

from greenroom.agent.agent import Agent
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState, Welcome
from greenroom.core.errors import LeaseLost
from greenroom.core.records import SnapshotState
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimScript
from greenroom.testing.local_hub import LocalHub

#: Long enough that a busy machine does what it has to in between.
ALONE_S = 0.3


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with short_directory() as root:
        async with Bench(root) as bench:
            yield bench


def hear(agent: Agent, alone_s: float = ALONE_S) -> None:
    agent.heard(Welcome(replica="r", alone_s=alone_s), asyncio.get_running_loop().time())


async def frozen(bench: Bench, uid: str = "a") -> None:
    await until(lambda: bench.state(uid) is ResidentState.FROZEN)


async def test_what_runs_is_frozen_when_nobody_is_heard_and_not_before(bench: Bench) -> None:
    await bench.boot("one", uid="a")
    await bench.boot("two", uid="b")
    began = asyncio.get_running_loop().time()
    hear(bench.agent)
    await frozen(bench, "a")
    await frozen(bench, "b")
    assert asyncio.get_running_loop().time() - began >= ALONE_S
    assert {r.state for r in bench.agent.heartbeat().residents} == {ResidentState.FROZEN}
    hear(bench.agent)  # to be heard again is not enough: it may be that it runs elsewhere by now
    await bench.boot("three", uid="c")
    assert bench.state("a") is ResidentState.FROZEN and bench.state("c") is ResidentState.RUNNING
    await bench.call(api.Thaw(**bench.ids("thaw")))
    assert bench.state("a") is ResidentState.RUNNING and bench.state("b") is ResidentState.FROZEN


async def test_a_replica_that_is_heard_on_any_link_is_enough(bench: Bench) -> None:
    hubs = [LocalHub(), LocalHub()]
    for number, hub in enumerate(hubs):
        hub.welcome = Welcome(replica=f"r{number}", alone_s=ALONE_S)
        hub.connect(bench.agent)
    await bench.boot()
    hubs[0].disconnect("w")
    until_then = asyncio.get_running_loop().time() + 3 * ALONE_S
    while asyncio.get_running_loop().time() < until_then:
        hubs[1].heartbeat("w")
        await asyncio.sleep(ALONE_S / 10)
        assert bench.state() is ResidentState.RUNNING
    await frozen(bench)  # connected, and silent


async def test_never_is_never_and_the_latest_word_counts(bench: Bench) -> None:
    await bench.boot()
    hear(bench.agent, alone_s=0.05)
    hear(bench.agent, alone_s=0.0)
    await asyncio.sleep(0.2)
    assert bench.state() is ResidentState.RUNNING
    hear(bench.agent, alone_s=0.05)
    await frozen(bench)


async def test_what_counts_is_when_the_replica_was_asked_not_when_its_answer_came(bench: Bench) -> None:
    await bench.boot()
    asked = asyncio.get_running_loop().time() - 60
    bench.agent.heard(Welcome(alone_s=30), asyncio.get_running_loop().time())
    bench.agent.heard(Welcome(alone_s=30), asked)  # was on the way for a minute
    await asyncio.sleep(0.05)
    assert bench.state() is ResidentState.RUNNING
    async with Bench(bench.root / "other") as late:
        await late.boot()
        late.agent.heard(Welcome(alone_s=30), asked)
        assert late.state() is ResidentState.RUNNING  # its own beginning counts as well
    bench.agent.heard(Welcome(alone_s=0.01), asked)
    await frozen(bench)


async def test_a_call_under_way_is_not_stopped_and_what_it_leaves_running_is_frozen(bench: Bench) -> None:
    await bench.boot()
    bench.backend.script = SimScript(methods={"checkpoint": MethodScript(latency_s=3 * ALONE_S)})
    snapshot = bench.manifest()
    hear(bench.agent)
    await bench.checkpoint(snapshot)  # it ends well though the agent is alone for most of it
    assert bench.agent._alone.alone and bench.state() is ResidentState.FROZEN
    assert (await bench.publish(snapshot)).state is SnapshotState.LOCAL
    await bench.discard()
    bench.backend.script = SimScript(methods={"start": MethodScript(latency_s=0.05)})
    await bench.boot("late", generation=3)  # while alone
    await frozen(bench)


async def test_a_call_that_comes_while_it_freezes_waits_for_that(bench: Bench) -> None:
    await bench.boot()
    bench.backend.script = SimScript(methods={"freeze": MethodScript(latency_s=0.2)})
    hear(bench.agent, alone_s=0.01)
    await until(lambda: bench.backend.calls["freeze"])
    assert bench.state() is ResidentState.RUNNING
    hear(bench.agent, alone_s=60)
    await bench.call(api.Thaw(**bench.ids("thaw", 2)))
    assert bench.backend.calls["freeze"] == 1 and bench.state() is ResidentState.RUNNING
    with pytest.raises(LeaseLost):
        await bench.call(api.Thaw(**bench.ids("old", 1)))


async def test_a_freeze_that_fails_is_tried_again(bench: Bench) -> None:
    await bench.boot()
    failures = tuple(ScriptedFailure(call=number) for number in (1, 2))
    bench.backend.script = SimScript(methods={"freeze": MethodScript(failures=failures)})
    hear(bench.agent, alone_s=0.01)
    await frozen(bench)
    assert bench.backend.calls["freeze"] == 3


async def test_an_agent_that_begins_alone_remembers_for_how_long(bench: Bench) -> None:
    await bench.boot()
    hear(bench.agent)
    await bench.restart()
    assert bench.state() is ResidentState.RUNNING
    await frozen(bench)
    await bench.restart()
    assert bench.state() is ResidentState.FROZEN
    (bench.root / "w" / "welcome.json").write_text("{torn")
    await bench.restart()


async def test_what_is_paused_or_ended_meanwhile_is_left_alone(bench: Bench) -> None:
    await bench.boot("one", uid="a")
    await bench.boot("two", uid="b")
    await bench.call(api.Freeze(**bench.ids("pause", 2)))
    ends: list[Any] = []
    bench.agent.on_exit = ends.append
    hear(bench.agent)
    bench.backend._leave(bench.backend._resident["ns/b"], 3)
    async with asyncio.timeout(PATIENCE_S):
        while not bench.agent._alone.alone:
            await asyncio.sleep(0.01)
    await until(lambda: ends)
    assert bench.backend.calls["freeze"] == 1 and bench.state("b") is None
