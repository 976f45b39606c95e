"""Every operation with its Nth step failing, for N = 1, 2, ... until it runs clean, in every way a step can fail.

Afterwards, whatever failed: nothing is under way, everything agrees (`SimWorld.problems`), every actor can be used, and
nobody has lost what was acknowledged: an actor goes on exactly where it was, or it is CRASHED and says since when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from greenroom.core.errors import GreenroomError
from greenroom.core.records import ActorState, Key, TemplateState
from greenroom.testing.steps import Fault
from greenroom.testing.world import NAMESPACE, SimWorld

#: No operation has as many steps; one that seems to have does not end.
MOST_STEPS = 80
AGENT_DIES = (Fault.AGENT_DIES_BEFORE, Fault.AGENT_DIES_AFTER)


@dataclass
class Subject:
    """An actor and what is known of it: how far it counted as acknowledged by an answer, and as acknowledged by a
    suspend (or by the creation, which is at 0)."""

    world: SimWorld
    key: Key
    answered: int = 0
    saved: int = 0
    boot: str = ""

    async def request(self) -> None:
        said = await self.world.request(self.key)
        assert said.count == said.file_count == self.answered + 1, (said, self)
        assert self.boot in ("", said.boot), "it was booted anew"
        self.answered, self.boot = said.count, said.boot

    async def suspend(self) -> None:
        await self.world.engine.suspend(self.key)
        self.saved = self.answered

    async def check(self, may_crash: bool) -> None:
        """It goes on where it was, or says that it was lost and goes back to what was saved."""
        actor = await self.world.actor(self.key)
        if actor.state is ActorState.CRASHED:
            assert may_crash, f"nobody killed it: {actor}"
            assert actor.reason and actor.message and actor.unsaved_since is not None, actor
            with pytest.raises(GreenroomError) as held:
                await self.world.request(self.key)
            assert held.value.reason == "ACTOR_CRASHED", "nothing is silently reset"
            await self.world.engine.resume(self.key)
            said = await self.world.request(self.key, "/info")
            assert self.saved <= said.count <= self.answered, (said, self)
            self.answered = said.count
        await self.request()
        await self.suspend()
        await self.request()


async def sleeping(world: SimWorld, name: str) -> Subject:
    subject = await running(world, name)
    await subject.suspend()
    return subject


async def created(world: SimWorld, name: str) -> Subject:
    return Subject(world, await world.create(name))


async def running(world: SimWorld, name: str) -> Subject:
    """With something to lose: saved at 1, answered 2."""
    subject = await created(world, name)
    await subject.request()
    await subject.suspend()
    await subject.request()
    return subject


async def paused(world: SimWorld, name: str) -> Subject:
    subject = await running(world, name)
    await world.engine.pause(subject.key)
    return subject


async def crashed(world: SimWorld, name: str) -> Subject:
    subject = await running(world, name)
    with pytest.raises(GreenroomError):
        await world.request(subject.key, "/exit?code=3") and await world.request(subject.key)
    return subject


async def nobody(world: SimWorld, name: str) -> Subject:
    return Subject(world, Key(NAMESPACE, name))


Make = Callable[[SimWorld, str], Awaitable[Subject]]
Act = Callable[[SimWorld, Key], Awaitable[Any]]

OPERATIONS: dict[str, tuple[Make, Act]] = {
    "create": (nobody, lambda world, key: world.engine.create_actor(key, "t")),
    "resume-golden": (created, lambda world, key: world.engine.resume(key)),
    "resume-snapshot": (sleeping, lambda world, key: world.engine.resume(key)),
    "wake": (sleeping, lambda world, key: world.engine.wake(key)),
    "thaw": (paused, lambda world, key: world.engine.resume(key)),
    "suspend-running": (running, lambda world, key: world.engine.suspend(key)),
    "suspend-paused": (paused, lambda world, key: world.engine.suspend(key)),
    "pause": (running, lambda world, key: world.engine.pause(key)),
    "delete-sleeping": (sleeping, lambda world, key: world.engine.delete(key)),
    "delete-running": (running, lambda world, key: world.engine.delete(key)),
    "delete-paused": (paused, lambda world, key: world.engine.delete(key)),
}


async def until_it_ends_or_dies(world: SimWorld, work: Awaitable[Any]) -> GreenroomError | None:
    """Does one thing to the world. When that kills the control plane, starts another one. Returns what it was refused
    with."""
    doing = asyncio.ensure_future(work)
    dying = asyncio.ensure_future(world.steps.control_dies.wait())
    await asyncio.wait({doing, dying}, return_when=asyncio.FIRST_COMPLETED)
    if dying.done():
        await world.crash_control()
    dying.cancel()
    try:
        await doing
    except GreenroomError as error:
        return error
    return None


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("operation", list(OPERATIONS))
async def test_every_step_of_an_operation(make_world: Callable[..., Any], operation: str, fault: Fault) -> None:
    make, act = OPERATIONS[operation]
    async with make_world() as world:
        assert (await world.apply()).state is TemplateState.READY
        asleep, awake = await sleeping(world, "asleep"), await running(world, "awake")
        for number in range(1, MOST_STEPS):
            subject = await make(world, f"a-{number}")
            world.steps.arm(number, fault)
            refused = await until_it_ends_or_dies(world, act(world, subject.key))
            if world.steps.control_dies.is_set():
                await world.crash_control()
            await world.settle()
            world.steps.disarm()
            if hit := world.steps.hit:
                print(f"step {number}: {hit}: {refused or 'no error'}")
            await after(world, subject, operation, refused)
            await asleep_is_untouched(world, asleep)
            await awake.check(may_crash=bool(hit) and fault in AGENT_DIES)
            await world.settle()
            if not hit:
                assert refused is None, "without a fault it works"
                break
        else:
            raise AssertionError(f"{operation} does not end")
        assert number > 1


async def asleep_is_untouched(world: SimWorld, asleep: Subject) -> None:
    assert (await world.actor(asleep.key)).state is ActorState.SUSPENDED
    await asleep.request()
    await asleep.suspend()


async def after(world: SimWorld, subject: Subject, operation: str, refused: GreenroomError | None) -> None:
    raise NotImplementedError
