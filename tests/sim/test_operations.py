"""Operations that are cancelled, that stall, whose worker fails again and again, and workers that are drained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from greenroom.core.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from greenroom.core.placement import FAILURES_TO_QUARANTINE
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Operation,
    OperationState,
    Probe,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.engine.operations import failure_of
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimScript
from greenroom.testing.world import QUICK, SimWorld

#: Never, as far as a test is concerned: what is so slow has to be ended by something else.
NEVER_S = 60.0


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        await world.apply()
        yield world


def script(world: SimWorld, *names: str, **methods: MethodScript) -> None:
    for name in names or world.backends:
        world.backends[name].script = SimScript(methods=methods)


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await check():
            await asyncio.sleep(0.002)


async def under_way(world: SimWorld, key: Key, state: ActorState) -> Operation:
    async def there() -> bool:
        return (await world.actor(key)).state is state

    await until(there)
    return await world.store.get(Operation, (await world.actor(key)).operation)


# --- cancelling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "state", "back_to"),
    [
        ("restore", ActorState.RESUMING, ActorState.SUSPENDED),
        ("checkpoint", ActorState.SUSPENDING, ActorState.RUNNING),
        ("freeze", ActorState.PAUSING, ActorState.RUNNING),
    ],
)
async def test_a_cancelled_operation_is_backed_out(
    world: SimWorld, method: str, state: ActorState, back_to: ActorState
) -> None:
    key = await world.create("a")
    count = (await world.request(key)).count
    if state is ActorState.RESUMING:
        await world.engine.suspend(key)
    script(world, **{method: MethodScript(latency_s=NEVER_S)})
    act = {"restore": world.engine.resume, "checkpoint": world.engine.suspend, "freeze": world.engine.pause}[method]
    call = asyncio.ensure_future(act(key))
    op = await under_way(world, key, state)
    asked = await world.engine.cancel_operation(op.id)
    assert asked.cancel_requested and asked.state is OperationState.RUNNING
    again = await world.engine.cancel_operation(op.id)
    assert again.id == op.id, "asking twice changes nothing"
    done = await call
    assert done.state is OperationState.FAILED and isinstance(failure_of(done), Cancelled)
    assert done.error is not None and (done.error.code, done.error.reason) == ("CANCELLED", "OPERATION_CANCELLED")
    assert (await world.actor(key)).state is back_to and done.to_state is back_to
    script(world)
    await world.settle()
    assert (await world.request(key)).count == count + 1, "it goes on where it was"
    ended = await world.engine.cancel_operation(op.id)
    assert ended.state is OperationState.FAILED, "one that has ended is an answer"


async def test_a_preparation_that_is_cancelled_fails_its_template(world: SimWorld) -> None:
    script(world, start=MethodScript(latency_s=NEVER_S))
    applying = asyncio.ensure_future(world.apply("slow"))

    async def preparations() -> list[Operation]:  # that of the world's own template may not have ended yet
        running = await world.store.list(Operation, where={"kind": "Prepare", "state": "Running"})
        return [op for op in running if op.name == "slow"]

    async def prepared() -> bool:
        return bool(await preparations())

    await until(prepared)
    [op] = await preparations()

    async def boots() -> bool:
        return bool(await world.store.list(Actor, where={"state": "Resuming"}))

    await until(boots)
    await world.engine.cancel_operation(op.id)
    template = await applying
    assert (template.state, template.reason) == (TemplateState.FAILED, "OPERATION_CANCELLED")
    script(world)
    await world.settle()
    assert (await world.apply("slow")).state is TemplateState.READY, "it may be applied again"


async def test_a_delete_can_not_be_taken_back(world: SimWorld) -> None:
    key = await world.create("a")
    await world.request(key)
    script(world, destroy=MethodScript(latency_s=0.1))
    call = asyncio.ensure_future(world.engine.delete(key))
    op = await under_way(world, key, ActorState.DELETING)
    with pytest.raises(FailedPrecondition) as refused:
        await world.engine.cancel_operation(op.id)
    assert refused.value.reason == "NOT_CANCELLABLE"
    assert (await call).state is OperationState.DONE
    with pytest.raises(NotFound):
        await world.engine.cancel_operation("nothing")


async def test_a_delete_does_not_wait_for_a_boot_that_is_never_ready(world: SimWorld) -> None:
    key = await world.create("a")
    script(world, restore=MethodScript(latency_s=NEVER_S))
    waking = asyncio.ensure_future(world.engine.resume(key))
    await under_way(world, key, ActorState.RESUMING)
    async with asyncio.timeout(60):
        assert (await world.engine.delete(key)).state is OperationState.DONE
    assert (await waking).state is OperationState.FAILED
    await world.settle()


# --- stalling and failing ---------------------------------------------------------------------------------


async def test_a_wake_in_which_nothing_moves_goes_to_another_worker(make_world: Callable[..., Any]) -> None:
    async with make_world() as world:
        await world.apply(readyz=Probe(path="/healthz", timeout_s=1.0))
        key = await world.create("a")
        script(world, "w0", restore=MethodScript(latency_s=NEVER_S))
        script(world, "w1")
        for _ in range(2):  # wherever it would have gone first
            world.configure(stall_s=1.2)  # with the probe's second more than a busy machine stands still
            op = await world.engine.resume(key)
            assert op.state is OperationState.DONE, op
            world.configure(stall_s=QUICK.stall_s)
            suspended = await world.engine.suspend(key)
            assert suspended.state is OperationState.DONE, suspended
        assert {op.worker} == {"w1"}
        operations = await world.store.list(Operation, where={"kind": "Resume"})
        tried = [r for o in operations for r in o.rejected if r.worker == "w0"]
        assert any("STALLED" in r.why for r in tried), operations
        script(world)
        await world.settle()


async def test_a_worker_on_which_wakes_fail_goes_to_quarantine_and_comes_back(world: SimWorld) -> None:
    failure = ScriptedFailure(code="INTERNAL", reason="BROKEN", message="the disk is odd")
    script(world, "w0", restore=MethodScript(failures=(failure,)))
    script(world, "w1")
    keys = [await world.create(f"a{n}") for n in range(12)]
    for key in keys:
        assert (await world.engine.resume(key)).state is OperationState.DONE
        assert (await world.actor(key)).worker == "w1"
        await world.engine.suspend(key)

    async def suspected() -> bool:
        return (await world.store.get(Worker, "w0")).failures > 0

    await until(suspected)
    # A suspect comes last; when it is all there is, it fails again, until it is left alone.
    await world.engine.drain_worker("w1")
    assert world.config.attempts >= FAILURES_TO_QUARANTINE
    failed = await world.engine.resume(keys[0])
    assert failed.error is not None and failed.error.reason == "BROKEN"

    async def quarantined() -> bool:
        return (await world.store.get(Worker, "w0")).quarantined_until > world.engine.now()

    await until(quarantined)
    await world.engine.drain_worker("w1", undo=True)
    for key in keys[1:4]:
        op = await world.engine.resume(key)
        assert (op.state, op.worker) == (OperationState.DONE, "w1")
        assert [r.worker for r in op.rejected] == ["w0"], "and why is written down"
        await world.engine.suspend(key)
    script(world)
    await world.engine.drain_worker("w1")
    assert (await world.engine.resume(keys[0])).worker == "w0", "rather than none"

    async def trusted() -> bool:
        return (await world.store.get(Worker, "w0")).failures == 0

    await until(trusted)
    await world.engine.drain_worker("w1", undo=True)
    await world.settle()


# --- draining ---------------------------------------------------------------------------------------------


async def test_a_drained_worker_is_emptied_and_gets_nothing(world: SimWorld) -> None:
    keys = [await world.create(f"a{n}") for n in range(6)]
    for key in keys:
        await world.request(key)
    drained = await world.engine.drain_worker("w0")
    assert drained.state is WorkerState.DRAINING

    async def empty() -> bool:
        return (await world.store.get(Worker, "w0")).used == 0

    await until(empty)
    for key in keys:
        assert (await world.request(key)).count == 2, "nobody lost anything"
    assert {a.worker for a in await world.store.list(Actor) if a.worker} == {"w1"}
    await world.engine.drain_worker("w0")
    assert (await world.engine.drain_worker("w0", undo=True)).state is WorkerState.ACTIVE
    with pytest.raises(NotFound):
        await world.engine.drain_worker("w9")
    await world.settle()


async def test_an_agent_that_was_asked_to_end_is_sent_off_when_its_actors_are_safe(world: SimWorld) -> None:
    keys = [await world.create(f"a{n}") for n in range(6)]
    for key in keys:
        await world.request(key)
    agent = world.agents["w0"]
    agent.leave()
    async with asyncio.timeout(60):
        assert await agent.shutdown, "told to end, and to leave nothing behind"
    on_it = [a for a in await world.store.list(Actor) if a.worker == "w0"]
    assert on_it == []
    await world.kill_agent("w0")
    await world.start_agent("w0")

    async def back() -> bool:
        return (await world.store.get(Worker, "w0")).state is WorkerState.ACTIVE

    await until(back)
    for key in keys:
        assert (await world.request(key)).count == 2
    await world.settle()


# --- requests that are repeated ---------------------------------------------------------------------------


async def test_a_request_id_is_for_one_thing_with_one_set_of_arguments(world: SimWorld) -> None:
    await world.apply("other")
    key, engine = Key("default", "a"), world.engine
    _, first = await engine.create_actor(key, "t", request_id="r1", labels={"x": "1"})
    _, again = await engine.create_actor(key, "t", request_id="r1", labels={"x": "1"})
    assert again == first
    for work in (
        engine.create_actor(key, "other", request_id="r1", labels={"x": "1"}),
        engine.create_actor(key, "t", request_id="r1", labels={"x": "2"}),
        engine.create_actor(Key("default", "b"), "t", request_id="r1", labels={"x": "1"}),
    ):
        with pytest.raises(InvalidArgument, match="r1") as reused:
            await work
        assert reused.value.reason == "REQUEST_ID_REUSED" and reused.value.metadata["operation"] == first.id
    with pytest.raises(InvalidArgument, match="r1"):
        await engine.resume(key, request_id="r1")
    assert (await world.actor(key)).state is ActorState.SUSPENDED
    assert [a.name for a in await world.store.list(Actor) if not a.golden] == ["a"]
