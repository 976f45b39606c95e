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

from greenroom.core.errors import GreenroomError, NotFound, Unavailable
from greenroom.core.records import ActorState, Key, Operation, OperationState, Template, TemplateState
from greenroom.engine.operations import failure_of
from greenroom.store.port import Store
from greenroom.testing.contracts.store_world import list_all
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

    async def check(self, *, may_crash: bool) -> None:
        """It goes on where it was, or says that it was lost and goes back to what was saved; and it can be used."""
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
    world.end_program(subject.key)
    await world.settle()
    assert (await world.actor(subject.key)).state is ActorState.CRASHED
    subject.answered = subject.saved
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
    "resume-crashed": (crashed, lambda world, key: world.engine.resume(key)),
    "thaw": (paused, lambda world, key: world.engine.resume(key)),
    "suspend-running": (running, lambda world, key: world.engine.suspend(key)),
    "suspend-paused": (paused, lambda world, key: world.engine.suspend(key)),
    "pause": (running, lambda world, key: world.engine.pause(key)),
    "delete-sleeping": (sleeping, lambda world, key: world.engine.delete(key)),
    "delete-running": (running, lambda world, key: world.engine.delete(key)),
    "delete-paused": (paused, lambda world, key: world.engine.delete(key)),
    "delete-crashed": (crashed, lambda world, key: world.engine.delete(key)),
}


async def with_a_fault(world: SimWorld, number: int, fault: Fault, work: Callable[[], Awaitable[Any]]) -> Outcome:
    """Does one thing to the world while step ``number`` fails, and waits until the world is at rest. When the control
    plane dies of it, another one is started."""
    world.steps.arm(number, fault)
    doing = asyncio.ensure_future(work())
    dying = asyncio.ensure_future(world.steps.control_dies.wait())
    await asyncio.wait({doing, dying}, return_when=asyncio.FIRST_COMPLETED)
    outcome = Outcome()
    if dying.done():
        doing.cancel()  # who asked is in the same process
        await asyncio.wait({doing})
        outcome.refused = Unavailable("the control plane died")
        await world.crash_control()
    else:
        dying.cancel()
        try:
            outcome.result = await doing
            if isinstance(outcome.result, Operation) and outcome.result.state is not OperationState.DONE:
                outcome.refused = failure_of(outcome.result)
        except GreenroomError as error:
            outcome.refused = error
    await world.settle()
    world.steps.disarm()
    await world.settle()  # the fault may have been done while the world was looked at
    outcome.hit = world.steps.hit
    print(f"step {number}: {outcome.hit or 'none'}: {outcome.refused or 'done'}")
    return outcome


@dataclass
class Outcome:
    """``hit``: the step that failed; "" when there was none of that number."""

    result: Any = None
    refused: GreenroomError | None = None
    hit: str = ""


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("operation", list(OPERATIONS))
async def test_every_step_of_an_operation(
    make_world: Callable[..., Any], any_store: Store, operation: str, fault: Fault
) -> None:
    make, act = OPERATIONS[operation]
    async with make_world(store=any_store) as world:
        assert (await world.apply()).state is TemplateState.READY
        asleep, awake = await sleeping(world, "asleep"), await running(world, "awake")
        for number in range(1, MOST_STEPS):
            subject = await make(world, f"a-{number}")
            outcome = await with_a_fault(world, number, fault, lambda key=subject.key: act(world, key))
            agent_died = bool(outcome.hit) and fault in AGENT_DIES
            if operation.startswith("suspend") and outcome.refused is None:
                subject.saved = subject.answered
            if await exists(world, subject.key):
                assert not (operation.startswith("delete") and outcome.refused is None), (
                    "a delete that said it was done"
                )
                await subject.check(may_crash=agent_died or make is crashed)
            elif operation == "create":
                assert outcome.refused is not None, "a creation that said it was done"
            else:
                assert operation.startswith("delete")
            assert (await world.actor(asleep.key)).state is ActorState.SUSPENDED, "nobody touched it"
            await asleep.request()
            await asleep.suspend()
            await awake.check(may_crash=agent_died)
            await world.settle()
            if not outcome.hit:
                assert outcome.refused is None and number > 1
                return
        raise AssertionError(f"{operation} does not end")


async def exists(world: SimWorld, key: Key) -> bool:
    try:
        await world.actor(key)
    except NotFound:
        return False
    return True


@pytest.mark.parametrize("fault", list(Fault))
async def test_every_step_of_the_preparation_of_a_template(
    make_world: Callable[..., Any], any_store: Store, fault: Fault
) -> None:
    async with make_world(store=any_store) as world:
        for number in range(1, MOST_STEPS):
            name = f"t-{number}"
            outcome = await with_a_fault(world, number, fault, lambda name=name: world.apply(name))
            template = await world.apply(name)  # again, if it failed or was refused
            assert template.state is TemplateState.READY, template
            subject = Subject(world, await world.create(f"a-{number}", name))
            await subject.check(may_crash=False)
            await world.engine.delete(subject.key)
            await world.engine.delete_template(template.key)
            await world.settle()
            assert not await world.snapshots.list(), "nothing of it is left"
            if not outcome.hit:
                assert outcome.refused is None and number > 1
                return
        raise AssertionError("the preparation does not end")


@pytest.mark.parametrize("fault", list(Fault))
async def test_every_step_of_the_deletion_of_a_template(
    make_world: Callable[..., Any], any_store: Store, fault: Fault
) -> None:
    async with make_world(store=any_store) as world:
        for number in range(1, MOST_STEPS):
            name = f"t-{number}"
            key = (await world.apply(name)).key
            outcome = await with_a_fault(world, number, fault, lambda key=key: world.engine.delete_template(key))
            if outcome.refused is not None:
                try:
                    await world.engine.delete_template(key)
                except NotFound:
                    pass  # it was deleted, only the answer was lost
                await world.settle()
            assert not await list_all(world.store, Template) and not await world.snapshots.list()
            if not outcome.hit:
                assert outcome.refused is None and number > 1
                return
        raise AssertionError("the deletion does not end")
