"""Who waits, for what, and what they get: one wake-up for all, in turn behind other operations, told when it ends."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from greenroom.core.errors import FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from greenroom.core.records import ActorState, Key, Operation, OperationKind, OperationState
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimScript
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.world import QUICK, SimWorld


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        await world.apply()
        yield world


def slow(world: SimWorld, **latency_s: float) -> None:
    script = SimScript(methods={name: MethodScript(latency_s=seconds) for name, seconds in latency_s.items()})
    for backend in world.backends.values():
        backend.script = script


def held(world: SimWorld, method: str) -> asyncio.Event:
    """Calls of that method wait until it is set."""
    go = asyncio.Event()
    for backend in world.backends.values():
        backend.gates[method] = go
    return go


async def reached(world: SimWorld, key: Key, state: ActorState) -> None:
    async def there() -> bool:
        return (await world.actor(key)).state is state

    await until(there)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.001)


async def resuming(world: SimWorld, key: Key) -> Operation:
    """A wake-up that has begun and is driven, and that nobody waits for. (Who waits for it too short a time to begin
    gets no operation.)"""
    world.engine.spawn(world.engine.resume(key), "begun")

    async def driven() -> bool:
        return (await world.actor(key)).operation in world.engine.ops.running

    await until(driven)
    return await world.store.get(Operation, (await world.actor(key)).operation)


async def operations(world: SimWorld, key: Key, kind: OperationKind) -> list[Operation]:
    return [o for o in await list_all(world.store, Operation, where={"kind": kind}) if o.key == key]


async def test_a_hundred_wakes_at_once_are_one(world: SimWorld) -> None:
    key = await world.create("a")
    slow(world, restore=0.02)
    answers = await asyncio.gather(*(world.request(key) for _ in range(100)))
    assert sorted(a.count for a in answers) == list(range(1, 101))
    assert len({a.boot for a in answers}) == 1
    assert len(await operations(world, key, OperationKind.RESUME)) == 1
    wakes = await asyncio.gather(*(world.engine.wake(key) for _ in range(100)))
    assert len({id(w.binding) for w in wakes}) == 1 and not any(w.operation_id for w in wakes)


async def test_resume_and_wake_join_each_other(world: SimWorld) -> None:
    key = await world.create("a")
    slow(world, restore=0.02)
    wake, resumed = await asyncio.gather(world.engine.wake(key), world.engine.resume(key))
    assert wake.operation_id == resumed.id and resumed.state is OperationState.DONE
    assert len(await operations(world, key, OperationKind.RESUME)) == 1
    again = await world.engine.resume(key)
    assert (again.state, again.cause) == (OperationState.DONE, "already")


async def test_a_caller_that_gives_up_does_not_cancel(world: SimWorld) -> None:
    key = await world.create("a")
    go = held(world, "restore")
    callers = [asyncio.ensure_future(world.engine.wake(key)) for _ in range(3)]
    await reached(world, key, ActorState.RESUMING)
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert all(c.cancelled() for c in callers)
    go.set()
    await reached(world, key, ActorState.RUNNING)
    assert (await world.request(key)).count == 1
    still = await world.engine.suspend(key, wait_s=0)
    assert still.state is OperationState.RUNNING or still.cause == "already"
    await reached(world, key, ActorState.SUSPENDED)


async def test_giving_up_the_wait_returns_the_operation_as_it_is(world: SimWorld) -> None:
    key = await world.create("a")
    go = held(world, "restore")
    begun = await resuming(world, key)
    joined = await world.engine.resume(key, wait_s=0.01)
    assert (joined.id, joined.state) == (begun.id, OperationState.RUNNING)
    assert (await world.engine.wait_operation(begun.id, wait_s=0.001)).state is OperationState.RUNNING
    go.set()
    ended = await world.engine.wait_operation(begun.id, wait_s=60)
    assert ended.state is OperationState.DONE and ended.id == begun.id
    with pytest.raises(NotFound):
        await world.engine.wait_operation("0" * 32)


async def test_a_repeated_request_id_waits_for_the_operation_of_the_first_time(world: SimWorld) -> None:
    key = await world.create("a")
    go = held(world, "restore")
    first = asyncio.ensure_future(world.engine.resume(key, request_id="r"))
    await reached(world, key, ActorState.RESUMING)
    joining = asyncio.ensure_future(world.engine.resume(key, request_id="r"))
    await asyncio.sleep(0.01)
    go.set()
    second = await joining
    assert second.state is OperationState.DONE and second.id == (await first).id
    assert (await world.engine.resume(key, request_id="r")).id == second.id


async def test_a_wake_while_suspending_waits_and_then_wakes(world: SimWorld) -> None:
    key = await world.create("a")
    await world.request(key)
    go = held(world, "checkpoint")
    suspending = asyncio.ensure_future(world.engine.suspend(key))
    await reached(world, key, ActorState.SUSPENDING)
    requests = [asyncio.ensure_future(world.request(key)) for _ in range(5)]
    await asyncio.sleep(0.03)
    go.set()
    answers = await asyncio.gather(*requests)
    assert sorted(a.count for a in answers) == [2, 3, 4, 5, 6]
    assert (await suspending).state is OperationState.DONE
    assert len(await operations(world, key, OperationKind.RESUME)) == 2
    await world.settle()


async def test_a_wake_while_requests_in_flight_are_waited_for(world: SimWorld) -> None:
    """The actor is about to be suspended and runs still: the wake waits for that, and does not spin."""
    world.configure(drain_grace_s=60.0)
    key = await world.create("a")
    binding = (await world.engine.wake(key)).binding
    binding.acquire()
    suspending = asyncio.ensure_future(world.engine.suspend(key))

    async def draining() -> bool:
        return world.engine.bindings.get(key) is None

    await until(draining)
    steps = len(await list_all(world.store, Operation))
    waking = asyncio.ensure_future(world.engine.wake(key))
    await asyncio.sleep(0.05)
    assert not waking.done() and len(await list_all(world.store, Operation)) == steps
    binding.release()
    assert (await suspending).state is OperationState.DONE
    assert (await waking).binding.generation > binding.generation and binding.revoked


async def test_suspend_pause_and_delete_while_resuming(world: SimWorld) -> None:
    acts = [world.engine.suspend, world.engine.pause, world.engine.delete]
    for number, act in enumerate(acts):
        key = await world.create(f"a{number}")
        go = held(world, "restore")
        waking = asyncio.ensure_future(world.engine.wake(key))
        await reached(world, key, ActorState.RESUMING)
        acting = asyncio.ensure_future(act(key))
        await asyncio.sleep(0.03)
        go.set()
        assert (await acting).state is OperationState.DONE
        await asyncio.wait([waking])
        if act == world.engine.delete:
            with pytest.raises(NotFound):
                await world.actor(key)
            with pytest.raises(NotFound):
                await world.engine.wake(key)
        else:
            assert (await world.request(key)).count == 1
    await world.settle()


async def test_delete_in_every_busy_state_and_twice(world: SimWorld) -> None:
    for number, (state, act) in enumerate(
        {
            ActorState.SUSPENDING: world.engine.suspend,
            ActorState.PAUSING: world.engine.pause,
            ActorState.DELETING: world.engine.delete,
        }.items()
    ):
        key = await world.create(f"a{number}")
        await world.request(key)
        slow(world, checkpoint=60.0, freeze=60.0)
        go = held(world, "destroy")
        first = asyncio.ensure_future(act(key))
        await reached(world, key, state)
        deleting = asyncio.ensure_future(world.engine.delete(key))
        await reached(world, key, ActorState.DELETING)
        for _ in range(50):  # until it waits for the deletion that is under way
            await asyncio.sleep(0)
        go.set()
        await deleting
        done = await first  # what was under way is given up for the delete
        cancelled = done.error is not None and done.error.reason == "OPERATION_CANCELLED"
        assert cancelled if act != world.engine.delete else done.state is OperationState.DONE, done
        with pytest.raises(NotFound):
            await world.actor(key)
    await world.settle()
    assert len(await world.snapshots.list()) == 1, "the golden one"


async def test_an_actor_of_the_same_name_is_another_one(world: SimWorld) -> None:
    key = await world.create("a")
    first = await world.request(key)
    await world.engine.delete(key)
    await world.create("a")
    second = await world.request(key)
    assert (first.count, second.count) == (1, 1)
    await world.settle()


async def test_a_failed_wake_says_why_and_leaves_the_actor_asleep(world: SimWorld) -> None:
    key = await world.create("a")
    failure = ScriptedFailure(code="FAILED_PRECONDITION", reason="NO_COMMAND", message="no such command")
    for backend in world.backends.values():
        backend.script = SimScript(methods={"restore": MethodScript(failures=(failure,))})
    with pytest.raises(FailedPrecondition, match="no such command") as error:
        await world.engine.wake(key)
    assert error.value.metadata["operation"]
    await world.settle()
    slow(world)
    assert (await world.request(key)).count == 1


async def test_who_waits_when_the_engine_closes_is_told_so(world: SimWorld) -> None:
    """Not by a cancellation, which would look to a server as if the caller had gone."""
    running, other, doomed = [await world.create(name) for name in ("a", "b", "c")]
    await world.request(running)
    await world.request(doomed)
    gates = [held(world, method) for method in ("restore", "checkpoint", "destroy")]
    begun = await resuming(world, other)
    waiting = {
        "wake": asyncio.ensure_future(world.engine.wake(other)),
        "resume": asyncio.ensure_future(world.engine.resume(other)),
        "suspend": asyncio.ensure_future(world.engine.suspend(running)),
        "delete": asyncio.ensure_future(world.engine.delete(doomed)),
        "pause": asyncio.ensure_future(world.engine.pause(running)),
        "operation": asyncio.ensure_future(world.engine.wait_operation(begun.id)),
    }
    await reached(world, running, ActorState.SUSPENDING)
    await reached(world, doomed, ActorState.DELETING)
    await world.engine.close()
    for name, task in waiting.items():
        with pytest.raises(Unavailable, match="stopping") as told:
            await task
        assert told.value.reason == "SHUTTING_DOWN", name
    for late in (world.engine.wake(other), world.engine.suspend(running), world.engine.wait_operation(begun.id)):
        with pytest.raises(Unavailable):
            await late
    await world.crash_control()  # a new one
    for go in gates:
        go.set()
    await world.settle()
    assert await world.request(running) and await world.request(other)


async def test_who_waits_for_a_worker_or_for_others_when_the_engine_closes_is_told_so(world: SimWorld) -> None:
    draining, away = await world.create("draining"), await world.create("away")
    (await world.engine.wake(draining)).binding.acquire()
    await world.request(away)
    await world.crash_control(restart=False)
    await world.start_control(connect=False)
    waiting = [asyncio.ensure_future(world.engine.wake(away))]
    world.hub.connect(world.agents[(await world.actor(draining)).worker])
    binding = (await world.engine.wake(draining)).binding
    binding.acquire()
    suspending = asyncio.ensure_future(world.engine.suspend(draining))

    async def hidden() -> bool:
        return world.engine.bindings.get(draining) is None

    await until(hidden)
    waiting.append(asyncio.ensure_future(world.engine.wake(draining)))
    await asyncio.sleep(0)
    await world.engine.close()
    async with asyncio.timeout(60):
        for task in (*waiting, suspending):
            with pytest.raises(Unavailable):
                await task
    await world.crash_control()


async def test_a_caller_that_is_cancelled_while_the_engine_closes_is_cancelled(world: SimWorld) -> None:
    key = await world.create("a")
    go = held(world, "restore")
    caller = asyncio.ensure_future(world.engine.wake(key))
    await reached(world, key, ActorState.RESUMING)
    caller.cancel()
    await world.engine.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go.set()
    await world.crash_control()


async def test_watchers_of_those_who_gave_up_are_gone(world: SimWorld) -> None:
    """Without a collection of garbage: else each of them would gather every event until then."""
    key = await world.create("a")
    go = held(world, "restore")
    begun = await resuming(world, key)
    operation = world.engine.ops.running.pop(begun.id)  # as if another process drove it: then its end is watched for
    assert world.engine.ops.claim(begun.id)  # the janitor is not to take it up meanwhile
    gc.disable()
    try:
        before = len(world.store._broadcast._watchers)
        impatient = [world.engine.wait_operation(begun.id, wait_s=0.02) for _ in range(5)]
        waiting = [asyncio.ensure_future(world.engine.ops.outcome(begun)) for _ in range(5)]
        assert all(o.state is OperationState.RUNNING for o in await asyncio.gather(*impatient))
        async with asyncio.timeout(60):
            while len(world.store._broadcast._watchers) != before + 5:
                await asyncio.sleep(0.001)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        waiting.clear()
        del task
        await asyncio.sleep(0)
        assert len(world.store._broadcast._watchers) == before
    finally:
        gc.enable()
        world.engine.ops.running[begun.id] = operation
        world.engine.ops.release(begun.id)
    go.set()
    await world.settle()


async def test_an_end_between_the_look_and_the_watch_is_not_missed(world: SimWorld) -> None:
    """Whatever the interleaving: each of these begins to wait at another moment of the operation's life."""
    for number in range(30):
        key = await world.create(f"a{number}")
        resuming = asyncio.ensure_future(world.engine.resume(key))
        for _ in range(6):
            await asyncio.sleep(0)  # begun, and far from done
        begun = await operations(world, key, OperationKind.RESUME)
        for _ in range(number):
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            assert (await world.engine.ops._watch_end(begun[0].id)).state is OperationState.DONE
        await resuming
        await world.engine.delete(key)


async def test_a_watcher_that_is_too_slow_looks_again(world: SimWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = world.store.watch
    monkeypatch.setattr(world.store, "watch", lambda capacity=0: watch(capacity=1))
    key = await world.create("a")
    go = held(world, "restore")
    begun = await resuming(world, key)
    ended = asyncio.ensure_future(world.engine.ops._watch_end(begun.id))
    await asyncio.sleep(0)
    for number in range(5):
        await world.create(f"b{number}")  # faster than it reads
    go.set()
    assert (await ended).state is OperationState.DONE


# --- slots ------------------------------------------------------------------------------------------------------


async def test_few_slots_and_many_actors(make_world: Callable[..., Any]) -> None:
    """Everybody gets in, one after the other, by suspending who is idle; and nobody loses a count."""
    async with make_world(workers=2, slots=1, config=replace(QUICK, drain_grace_s=0.0)) as world:
        await world.apply()
        keys = [await world.create(f"a{n:02}") for n in range(20)]
        for round_number in (1, 2):
            answers = await asyncio.gather(*(world.request(key) for key in keys))
            assert [a.count for a in answers] == [round_number] * 20
        await world.settle()
        assert sum(a.state is ActorState.RUNNING for a in [await world.actor(k) for k in keys]) <= 2


async def test_no_slot_becomes_free_in_time(make_world: Callable[..., Any]) -> None:
    async with make_world(workers=1, slots=1) as world:
        await world.apply()
        world.configure(capacity_wait_s=0.1)
        busy, other = await world.create("busy"), await world.create("other")
        binding = (await world.engine.wake(busy)).binding
        binding.acquire()
        began = time.monotonic()
        with pytest.raises(ResourceExhausted, match="open requests") as full:
            await world.engine.wake(other)
        assert full.value.reason == "NO_CAPACITY" and 0.05 < time.monotonic() - began < 9
        world.configure(capacity_wait_s=10.0)
        waiting = asyncio.ensure_future(world.engine.wake(other))
        await asyncio.sleep(0.01)
        binding.release()
        assert (await waiting).binding.key == other
        await world.settle()
        assert (await world.actor(busy)).state is ActorState.SUSPENDED


async def test_a_turn_that_is_not_used_is_passed_on(make_world: Callable[..., Any]) -> None:
    """The first in the queue was deleted while it waited: its turn must not be lost with it."""
    config = replace(QUICK, capacity_wait_s=5.0, idle_scan_s=60.0)
    async with make_world(workers=1, slots=1, config=config) as world:
        await world.apply()
        busy, first, second = [await world.create(n) for n in ("busy", "first", "second")]
        binding = (await world.engine.wake(busy)).binding
        binding.acquire()
        waiting = [asyncio.ensure_future(world.engine.wake(first))]
        await asyncio.sleep(0.01)
        waiting.append(asyncio.ensure_future(world.engine.wake(second)))
        await asyncio.sleep(0.01)
        await world.engine.delete(first)
        await world.engine.delete(busy)  # frees the slot, and there is no other event than that
        with pytest.raises(NotFound):
            await waiting[0]
        async with asyncio.timeout(60):
            assert (await waiting[1]).binding.key == second
        await world.settle()


async def test_a_worker_that_comes_lets_all_in_that_fit(make_world: Callable[..., Any]) -> None:
    config = replace(QUICK, idle_scan_s=60.0)
    async with make_world(workers=1, slots=4, config=config) as world:
        await world.apply()
        await world.kill_agent("w0")
        await world.engine.census.wait_for_worker("w0", 0)
        keys = [await world.create(f"a{n}") for n in range(4)]
        waiting = [asyncio.ensure_future(world.engine.wake(key)) for key in keys]

        async def all_wait() -> bool:
            return sum(map(len, world.engine.wakes._queues.values())) == 4

        await until(all_wait)
        await world.start_agent("w0")
        async with asyncio.timeout(60):
            await asyncio.gather(*waiting)
        await world.settle()


async def test_an_idle_actor_is_suspended(world: SimWorld) -> None:
    await world.apply("lazy", idle_timeout_s=0.05)
    key = await world.create("a", "lazy")
    binding = (await world.engine.wake(key)).binding
    binding.acquire()
    await asyncio.sleep(0.1)
    assert (await world.actor(key)).state is ActorState.RUNNING, "it has an open request"
    binding.release()
    await reached(world, key, ActorState.SUSPENDED)
    assert (await operations(world, key, OperationKind.SUSPEND))[0].cause == "idle"
