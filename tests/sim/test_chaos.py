"""Everything at once, in an order drawn from a seed: people use actors while parts die; afterwards nothing is lost.

A seed that failed goes into `SEEDS` and stays there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from greenroom.core.errors import GreenroomError, NotFound
from greenroom.core.records import ActorState, Key, OperationState
from greenroom.testing.steps import Fault
from greenroom.testing.world import QUICK, SimWorld

SEEDS = range(30)
ACTORS = 8
ACTS = 12
DEATHS = 12


@dataclass
class Known:
    """What somebody who uses an actor knows of it for sure: it has counted to ``answered`` (as an answer said, and
    nobody has sent it back to what was saved since), it may have counted to ``asked``, and a suspend that was
    acknowledged holds ``saved``."""

    key: Key
    answered: int = 0
    asked: int = 0
    saved: int = 0
    deleted: bool = False


class Chaos:
    def __init__(self, world: SimWorld, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.over = False

    async def use(self, known: Known) -> None:
        """One person and one actor: this and that, whatever comes of it."""
        for _ in range(ACTS):
            await asyncio.sleep(self.random.random() * 0.01)
            act = self.random.choice(["request"] * 5 + ["suspend", "suspend", "pause", "resume", "give up"])
            try:
                async with asyncio.timeout(self.random.random() * 0.02 if act == "give up" else 10):
                    await self.act(known, act)
            except (GreenroomError, TimeoutError):
                pass  # somebody died of it
        if self.random.random() < 0.2:
            try:
                operation = await self.world.engine.delete(known.key)
                known.deleted = operation.state is OperationState.DONE
            except GreenroomError:
                pass

    async def act(self, known: Known, act: str) -> None:
        engine = self.world.engine
        match act:
            case "request":
                known.asked += 1
                count = (await self.world.request(known.key)).count
                assert count > known.answered, f"silently reset to {count}: {known}"
                known.answered = count
            case "suspend":
                counted = known.answered
                operation = await engine.suspend(known.key)
                if operation.state is OperationState.DONE:
                    known.saved = max(known.saved, counted)
            case "pause":
                await engine.pause(known.key)
            case "resume" | "give up":
                known.answered = 0  # on purpose: if it had crashed, it goes back to what was saved
                await engine.resume(known.key)

    async def kill(self) -> None:
        """Parts die, links break, steps fail."""
        world = self.world
        for _ in range(DEATHS):
            await asyncio.sleep(self.random.random() * 0.02)
            match self.random.choice(["control", "agent", "link", "step", "step", "step"]):
                case "control":
                    await world.crash_control()
                case "agent" if world.agents:
                    name = self.random.choice(sorted(world.agents))
                    await world.kill_agent(name)
                    await asyncio.sleep(self.random.random() * 0.01)
                    await world.start_agent(name)
                case "link" if world.agents:
                    name = self.random.choice(sorted(world.agents))
                    world.hub.disconnect(name)
                    await asyncio.sleep(self.random.random() * 0.01)
                    if name in world.agents:
                        world.hub.connect(world.agents[name])
                case _:
                    fault = self.random.choice([Fault.REFUSED, Fault.REPLY_LOST, Fault.REPLY_LATE])
                    world.steps.arm(self.random.randint(1, 20), fault)
        world.steps.disarm()


@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_is_lost(make_world: Callable[..., Any], seed: int) -> None:
    config = replace(QUICK, drain_grace_s=0.005)
    async with make_world(workers=2, slots=3, config=config) as world:
        await world.apply()
        world.steps.random = random.Random(seed)
        chaos = Chaos(world, seed)
        people = [Known(await world.create(f"a{n}")) for n in range(ACTORS)]
        async with asyncio.TaskGroup() as group:
            for known in people:
                group.create_task(chaos.use(known))
            group.create_task(chaos.kill())
        await world.settle()
        for known in people:
            try:
                actor = await world.actor(known.key)
            except NotFound:
                continue
            assert not known.deleted, f"it said that it was deleted: {actor}"
            if actor.state is ActorState.CRASHED:
                assert actor.unsaved_since is not None and actor.reason, actor
                await world.engine.resume(known.key)
            said = await world.request(known.key)
            assert known.saved < said.count <= known.asked + 1, (said, known, actor)
            assert said.count == said.file_count
        await world.settle()
