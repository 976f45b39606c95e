"""What is found and settled when parts die at moments that no step of an operation is."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, ResidentState, SandboxExited
from greenroom.core.commands import ActorCommand, Change, FinishResume, FinishSuspend, TakeOver
from greenroom.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    LeaseLost,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Record,
    Snapshot,
    Template,
    Worker,
    WorkerState,
)
from greenroom.engine.operations import failure_of
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimScript
from greenroom.testing.contracts.snapshots import key_of
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.world import QUICK, SimWorld

#: Long for what takes milliseconds, also on a machine that stands still for a second.
LEASE_S = 2.0


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        await world.apply()
        yield world


#: How long a worker may be away where a test waits for it to be given up.
SOON_S = 0.4


def gives_up_soon(world: SimWorld) -> None:
    """From now on the control plane does; the agents have been told another time, so that one that is there does not
    freeze what runs on it when this process stands still."""
    world.configure(worker_return_s=SOON_S)


def script(world: SimWorld, **methods: MethodScript) -> None:
    for backend in world.backends.values():
        backend.script = SimScript(methods=methods)


def failing(**fields: Any) -> MethodScript:
    return MethodScript(failures=(ScriptedFailure(**fields),))


async def reached(world: SimWorld, key: Key, state: ActorState) -> Actor:
    async with asyncio.timeout(60):
        while True:
            if (actor := await world.actor(key)).state is state:
                return actor
            await asyncio.sleep(0.001)


async def running(world: SimWorld, name: str) -> tuple[Key, Actor]:
    """Saved at 1, and at 2 now."""
    key = await world.create(name)
    await world.request(key)
    await world.engine.suspend(key)
    await world.request(key)
    return key, await world.actor(key)


def resident(world: SimWorld, actor: Actor) -> api.Resident | None:
    found = [r for r in world.agents[actor.worker].hello().residents if r.actor_uid == actor.uid]
    return found[0] if found else None


class Interposed:
    """Puts ``around`` between the engine and its store or hub, from now on."""

    def __init__(self, world: SimWorld, around: Callable[[Any, Callable[[], Awaitable[Any]]], Awaitable[Any]]) -> None:
        store, hub = world.engine.store, world.engine.hub
        apply, call = store.apply, hub.call

        async def applied(command: ActorCommand) -> Change:
            return await around(command, lambda: apply(command))  # type: ignore[no-any-return]

        async def called(worker: str, what: AgentCall, on_progress: Any = None) -> Record:
            return await around(what, lambda: call(worker, what, on_progress))  # type: ignore[no-any-return]

        store.apply = applied  # type: ignore[method-assign]
        hub.call = called  # type: ignore[method-assign]


# --- workers that go and come -----------------------------------------------------------------------------------


async def test_a_lost_connection_interrupts_nobody(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    world.hub.disconnect(actor.worker)
    assert (await world.request(key)).count == 3
    world.hub.connect(world.agents[actor.worker])
    await world.settle()
    assert (await world.request(key)).count == 4
    assert (await world.actor(key)).generation == actor.generation


async def test_a_restart_of_the_control_plane_interrupts_nobody(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    for _ in range(3):
        await world.crash_control()
        await world.settle()
        assert (await world.request(key)).count
    assert (await world.request(key)).count == 6
    assert (await world.actor(key)).generation == actor.generation, "the very incarnation"


async def test_agents_that_connect_before_the_engine_has_started(world: SimWorld) -> None:
    key, _ = await running(world, "a")
    await world.crash_control(restart=False)
    starting = asyncio.ensure_future(world.start_control(connect=False))
    while world.hub.listener is None:
        await asyncio.sleep(0)
    for agent in world.agents.values():
        world.hub.connect(agent)
    await starting
    await world.settle()
    assert {w.state for w in await list_all(world.store, Worker)} == {WorkerState.ACTIVE}
    assert (await world.request(key)).count == 3


async def test_a_request_before_the_worker_has_come_back_waits_for_it(world: SimWorld) -> None:
    key, _ = await running(world, "a")
    await world.crash_control(restart=False)
    await world.start_control(connect=False)
    waiting = [asyncio.ensure_future(world.request(key)) for _ in range(10)]
    await asyncio.sleep(0.05)
    assert not any(w.done() for w in waiting)
    operations = len(await list_all(world.store, Operation))
    for agent in world.agents.values():
        world.hub.connect(agent)
    assert sorted(a.count for a in await asyncio.gather(*waiting)) == list(range(3, 13))
    assert len(await list_all(world.store, Operation)) == operations, "it ran all the time"


async def test_a_worker_that_does_not_come_back(make_world: Callable[..., Any]) -> None:
    async with make_world() as world:
        await world.apply()
        key, actor = await running(world, "a")
        gives_up_soon(world)
        away = world.agents.pop(actor.worker)
        world.hub.disconnect(actor.worker)
        with pytest.raises(Unavailable):
            await world.engine.stats(key)
        crashed = await reached(world, key, ActorState.CRASHED)
        assert (crashed.reason, crashed.worker) == ("WorkerLost", "") and crashed.unsaved_since == actor.resumed_at
        with pytest.raises(FailedPrecondition, match="crashed"):
            await world.engine.wake(key)
        await world.engine.resume(key)
        assert (await world.request(key)).count == 2, "from what was saved"
        moved = await world.actor(key)
        assert moved.worker != actor.worker

        # The worker was not dead after all, and the old incarnation lives there. Nobody is led to it, and it is ended.
        assert any(r.actor_uid == actor.uid for r in away.hello().residents)
        world.agents[actor.worker] = away
        world.hub.connect(away)
        await world.settle()
        assert not away.hello().residents and (await world.request(key)).count == 3
        assert (await world.actor(key)).generation == moved.generation


async def test_a_worker_that_is_back_and_can_not_be_registered_is_lost_all_the_same(
    make_world: Callable[..., Any],
) -> None:
    """Its disk takes no papers. What runs there is frozen before its actor is anybody else's."""
    async with make_world(config=replace(QUICK, worker_return_s=1.0)) as world:
        await world.apply()
        key, actor = await running(world, "a")
        bad = world.agents[actor.worker]
        present = bad._enrolment.present
        del world.agents[actor.worker]

        def read_only(_: int) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        bad._enrolment.present = read_only  # type: ignore[assignment,method-assign]
        world.hub.disconnect(actor.worker)
        world.hub.connect(bad)
        assert (await reached(world, key, ActorState.CRASHED)).reason == "WorkerLost"
        assert actor.worker in world.hub.connected()
        assert [r.state for r in bad.hello().residents] == [ResidentState.FROZEN]
        await world.engine.resume(key)
        assert (await world.request(key)).count == 2, "from what was saved"
        assert (await world.actor(key)).worker != actor.worker
        bad._enrolment.present = present  # type: ignore[method-assign]
        world.agents[actor.worker] = bad
        await world.settle()
        assert not bad.hello().residents and (await world.request(key)).count == 3


async def test_a_worker_that_is_slow_to_register_loses_nothing(make_world: Callable[..., Any]) -> None:
    """A control plane that has just begun gives all of them the time to."""
    async with make_world(config=replace(QUICK, worker_return_s=2.0)) as world:
        await world.apply()
        key, _ = await running(world, "a")
        await world.crash_control(restart=False)
        handlers = {agent: agent.handle for agent in world.agents.values()}
        for agent, handle in handlers.items():

            async def slow(call: Any, reporter: Any, handle: Any = handle) -> Record:
                if isinstance(call, api.Present):
                    await asyncio.sleep(0.5)
                return await handle(call, reporter)  # type: ignore[no-any-return]

            agent.handle = slow  # type: ignore[method-assign]
        await world.start_control()
        for _ in range(3):
            await world.engine.census._sweep()
        await world.settle()
        assert (await world.request(key)).count == 3


async def test_a_revenant_on_the_worker_of_its_successor(make_world: Callable[..., Any]) -> None:
    """The link was away, the worker was not: the old sandbox is still there when the actor is resumed there again."""
    async with make_world(workers=1) as world:
        await world.apply()
        key, actor = await running(world, "a")
        gives_up_soon(world)
        world.hub.disconnect("w0")
        await reached(world, key, ActorState.CRASHED)
        world.configure(worker_return_s=QUICK.worker_return_s)
        resuming = asyncio.ensure_future(world.engine.resume(key))
        await asyncio.sleep(0.01)
        world.hub.connect(world.agents["w0"])
        assert (await resuming).state is OperationState.DONE
        assert (await world.request(key)).count == 2
        await world.settle()
        for stale in (api.Discard, api.Thaw, api.Freeze):
            call = stale(operation_id="old", actor_uid=actor.uid, generation=actor.generation)
            with pytest.raises(LeaseLost):
                await world.hub.call("w0", call)
        assert (await world.request(key)).count == 3


@pytest.mark.parametrize("method", ["restore", "checkpoint", "freeze", "thaw", "destroy"])
async def test_a_worker_that_goes_for_good_in_an_operation(make_world: Callable[..., Any], method: str) -> None:
    async with make_world() as world:
        await world.apply()
        key, actor = await running(world, "a")
        if method == "restore":
            await world.engine.suspend(key)
        if method == "thaw":
            await world.engine.pause(key)
        gives_up_soon(world)
        script(world, **{method: MethodScript(latency_s=60.0)})
        act = {
            "restore": world.engine.resume,
            "checkpoint": world.engine.suspend,
            "freeze": world.engine.pause,
            "thaw": world.engine.resume,
            "destroy": world.engine.delete,
        }[method]
        calls = world.backends[actor.worker].calls
        before = calls[method]
        acting = asyncio.ensure_future(act(key))
        async with asyncio.timeout(60):
            while calls[method] == before:
                await asyncio.sleep(0.001)
        script(world)
        world.hub.disconnect(actor.worker)
        agent = world.agents.pop(actor.worker)
        await agent.close(wipe=True)
        operation = await acting
        await world.settle()
        if method == "restore":
            assert (operation.state, operation.attempts) == (OperationState.DONE, 2)
            assert (await world.request(key)).count == 3, "on the other worker"
        elif method == "destroy":
            assert operation.state is OperationState.DONE
        else:
            assert operation.state is OperationState.FAILED
            lost = await world.actor(key)
            assert lost.state is ActorState.CRASHED and lost.unsaved_since == actor.resumed_at
            await world.engine.resume(key)
            assert (await world.request(key)).count == 2


async def test_a_worker_away_again_and_again_is_not_given_up_early(make_world: Callable[..., Any]) -> None:
    async with make_world(config=replace(QUICK, worker_return_s=2.0)) as world:
        await world.apply()
        key, actor = await running(world, "a")
        for _ in range(6):  # together longer than it may be away
            world.hub.disconnect(actor.worker)
            await asyncio.sleep(0.4)
            world.hub.connect(world.agents[actor.worker])
        await world.settle()
        assert (await world.request(key)).count == 3


async def test_a_link_that_breaks_again_and_again_is_looked_after_once(world: SimWorld) -> None:
    await world.settle()
    agent = world.agents["w0"]
    for _ in range(20):
        world.hub.disconnect("w0")
        world.hub.connect(agent)
        await world.settle()

    def keepers() -> int:
        return sum(task.get_name() == "keep-w0" for task in asyncio.all_tasks())

    async with asyncio.timeout(60):
        while keepers() != 1:
            await asyncio.sleep(QUICK.reconcile_s)


# --- what runs and what should ----------------------------------------------------------------------------------


async def test_a_sandbox_that_ends_is_told(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    binding = world.engine.bindings.get(key)
    world.end_program(key, 7)
    crashed = await reached(world, key, ActorState.CRASHED)
    assert crashed.reason == "Exited" and "status 7" in crashed.message
    assert crashed.unsaved_since == actor.resumed_at and binding is not None
    await world.settle()
    assert binding.revoked


async def test_how_it_ended_is_said_also_when_it_is_missed_at_that_moment(world: SimWorld) -> None:
    key, _ = await running(world, "a")
    lives = world.engine.reconciler._lives

    async def asked_in_between(actor: Actor) -> bool:
        await world.engine.reconciler.compare(actor.worker, anew=True)
        return await lives(actor)

    world.engine.reconciler._lives = asked_in_between  # type: ignore[method-assign]
    world.end_program(key, 7)
    crashed = await reached(world, key, ActorState.CRASHED)
    assert crashed.reason == "Exited" and "status 7" in crashed.message
    assert not world.engine.reconciler._exiting
    await world.settle()


async def test_a_sandbox_that_ended_while_the_worker_was_away(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    world.hub.disconnect(actor.worker)
    world.end_program(key)
    await asyncio.sleep(0)
    world.hub.connect(world.agents[actor.worker])
    assert (await reached(world, key, ActorState.CRASHED)).reason == "SandboxLost"
    await world.settle()


async def test_an_exit_whose_message_is_lost_is_found(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    world.agents[actor.worker].on_exit = lambda event: None
    world.end_program(key)
    assert (await reached(world, key, ActorState.CRASHED)).reason == "SandboxLost"
    await world.settle()


async def test_an_exit_between_the_workers_answer_and_the_commit(world: SimWorld) -> None:
    """The actor is RESUMING when its exit is told, and RUNNING a moment later: it must not stay so."""
    key = await world.create("a")

    async def around(what: Any, go_on: Callable[[], Awaitable[Any]]) -> Any:
        if isinstance(what, FinishResume) and what.key == key:
            world.end_program(key, 9)
            await asyncio.sleep(0.02)
        return await go_on()

    Interposed(world, around)
    assert (await world.engine.resume(key)).state is OperationState.DONE
    assert "status 9" in (await reached(world, key, ActorState.CRASHED)).message
    await world.settle()


async def test_an_agent_that_dies_between_its_answer_and_the_commit(make_world: Callable[..., Any]) -> None:
    async with make_world(config=replace(QUICK, reconcile_s=60.0)) as world:
        await world.apply()
        key = await world.create("a")

        async def around(what: Any, go_on: Callable[[], Awaitable[Any]]) -> Any:
            if isinstance(what, FinishResume) and what.key == key:
                worker = (await world.actor(key)).worker
                await world.kill_agent(worker)
                await world.start_agent(worker)
                await asyncio.sleep(0.02)  # it has been welcomed
            return await go_on()

        Interposed(world, around)
        assert (await world.engine.resume(key)).state is OperationState.DONE
        assert (await reached(world, key, ActorState.CRASHED)).reason == "SandboxLost"
        await world.settle()


async def test_the_exit_of_an_older_incarnation_is_not_the_new_ones(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    event = SandboxExited(actor_uid=actor.uid, generation=actor.generation, code=1)
    await world.engine.suspend(key)
    await world.engine.resume(key)
    now = await world.actor(key)
    world.engine.census.sandbox_exited(now.worker, event)
    await world.settle()
    assert (await world.actor(key)).state is ActorState.RUNNING
    assert (await world.request(key)).count == 3


async def test_a_stray_sandbox_is_ended(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    await world.engine.suspend(key)
    await world.settle()
    template = await world.store.get(Template, f"{key.namespace}/t")
    snapshot = await world.store.get(Snapshot, (await world.actor(key)).snapshot)
    identity = api.Identity(namespace=key.namespace, name=key.name, uid=actor.uid, generation=actor.generation + 1)
    call = api.Restore(
        operation_id="a late one",
        actor_uid=actor.uid,
        generation=actor.generation + 1,
        identity=identity,
        spec=template.spec,
        image_digest=template.image_digest,
        snapshot=snapshot,
    )
    await world.hub.call("w1", call)
    assert world.agents["w1"].hello().residents
    await world.settle()
    assert not world.agents["w1"].hello().residents
    assert (await world.request(key)).count == 3


async def test_a_frozen_sandbox_of_a_running_actor_goes_on_and_a_running_one_of_a_paused_is_frozen(
    world: SimWorld,
) -> None:
    (awake, awake_actor), (paused, _) = await running(world, "awake"), await running(world, "paused")
    await world.engine.pause(paused)
    paused_actor = await world.actor(paused)
    for actor, call in ((awake_actor, api.Freeze), (paused_actor, api.Thaw)):
        await world.hub.call(actor.worker, call(operation_id="odd", actor_uid=actor.uid, generation=actor.generation))
    for name in world.agents:  # also found without this, by the next sweep
        world.hub.disconnect(name)
        world.hub.connect(world.agents[name])
    await world.settle()
    assert (await world.request(awake)).count == 3
    found = resident(world, paused_actor)
    assert found is not None and found.state is ResidentState.FROZEN
    assert (await world.request(paused)).count == 3


async def test_one_actor_that_can_not_be_settled_keeps_nobody_waiting(world: SimWorld) -> None:
    keys = [(await running(world, f"a{n}"))[0] for n in range(3)]
    actors = [await world.actor(key) for key in keys]
    for actor in actors:
        freeze = api.Freeze(operation_id="odd", actor_uid=actor.uid, generation=actor.generation)
        await world.hub.call(actor.worker, freeze)
    await world.crash_control(restart=False)
    bad = actors[0].uid
    await world.start_control(connect=False)

    async def around(what: Any, go_on: Callable[[], Awaitable[Any]]) -> Any:
        if isinstance(what, api.Thaw) and what.actor_uid == bad:
            raise DeadlineExceeded("this one can't be thawed")
        return await go_on()

    Interposed(world, around)
    for agent in world.agents.values():
        world.hub.connect(agent)
    for key in keys[1:]:
        assert (await world.request(key)).count == 3
    bad = ""
    assert (await world.request(keys[0])).count == 3


# --- operations that nobody drives ------------------------------------------------------------------------------


async def test_more_operations_than_a_page_are_taken_up(make_world: Callable[..., Any]) -> None:
    many = 1050
    patient = replace(QUICK, operation_deadline_s=120.0, worker_return_s=60.0)
    async with make_world(workers=1, slots=many, config=patient) as world:
        await world.apply()
        keys = [await world.create(f"a{n:04}") for n in range(many)]
        script(world, restore=MethodScript(latency_s=30.0))
        begun = await asyncio.gather(*(world.engine.resume(key, wait_s=0.0) for key in keys), return_exceptions=True)
        assert len(begun) == many
        async with asyncio.timeout(60):
            while len(await list_all(world.store, Operation, where={"state": OperationState.RUNNING})) < many:
                await asyncio.sleep(0.01)
        await world.crash_control(restart=False)
        await world.kill_agent("w0")
        await world.start_control()
        assert len(world.engine.ops.running) == many
        await world.start_agent("w0")
        await world.settle()
        states = {a.state for a in await list_all(world.store, Actor)}
        assert states == {ActorState.RUNNING}


async def test_an_operation_whose_driver_gave_up_in_this_process(world: SimWorld) -> None:
    """The disk is full at the commit: the caller is told, and the janitor ends the operation when there is room."""
    key = await world.create("a")
    full = True

    async def around(what: Any, go_on: Callable[[], Awaitable[Any]]) -> Any:
        if full and isinstance(what, FinishResume):
            raise ResourceExhausted("the disk is full", reason="DISK_FULL")
        return await go_on()

    Interposed(world, around)
    with pytest.raises(ResourceExhausted) as told:
        await world.engine.resume(key)
    assert told.value.reason == "DISK_FULL"
    waiting = asyncio.ensure_future(world.engine.wake(key))
    await asyncio.sleep(0.1)
    assert (await world.actor(key)).state is ActorState.RESUMING
    full = False
    await asyncio.wait([waiting])
    await world.settle()
    assert (await world.request(key)).count == 1
    starts = sum(b.calls["restore"] for b in world.backends.values())
    assert starts == 1, "the worker answered from its journal"


async def test_a_full_disk_at_the_commit_of_a_suspend_loses_nothing(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    full = True

    async def around(what: Any, go_on: Callable[[], Awaitable[Any]]) -> Any:
        if full and isinstance(what, FinishSuspend):
            raise ResourceExhausted("the disk is full", reason="DISK_FULL")
        return await go_on()

    Interposed(world, around)
    with pytest.raises(ResourceExhausted):
        await world.engine.suspend(key)
    full = False
    await world.settle()
    assert (await world.actor(key)).state is ActorState.SUSPENDED
    assert (await world.request(key)).count == 3 and (await world.actor(key)).unsaved_since is None
    assert actor.uid == (await world.actor(key)).uid


async def test_a_lease_that_ran_out_under_a_living_driver(make_world: Callable[..., Any]) -> None:
    """A clock that jumped: the driver is stopped, the operation taken up again, and the caller sees only its end."""
    async with make_world(config=replace(QUICK, lease_ttl_s=LEASE_S)) as world:
        await world.apply()
        key = await world.create("a")
        script(world, restore=MethodScript(latency_s=0.8 * LEASE_S))
        resuming = asyncio.ensure_future(world.engine.resume(key))
        begun = await reached(world, key, ActorState.RESUMING)
        leases = world.store._rows.table(Lease)
        leases[begun.uid] = msgspec.structs.replace(leases[begun.uid], expires_at=0.0)
        operation = await resuming
        assert operation.state is OperationState.DONE and operation.generation > begun.generation
        assert (await world.request(key)).count == 1
        assert sum(b.calls["restore"] for b in world.backends.values()) == 1, "the new driver joined the call"
        await world.settle()


async def test_a_long_operation_keeps_its_lease(make_world: Callable[..., Any]) -> None:
    lease_s = 4.0  # renewed so early that two seconds of standstill in between lose none
    async with make_world(config=replace(QUICK, lease_ttl_s=lease_s)) as world:
        await world.apply()
        key = await world.create("a")
        go = asyncio.Event()
        for backend in world.backends.values():
            backend.gates["restore"] = go
        resuming = asyncio.ensure_future(world.engine.resume(key))
        begun = await reached(world, key, ActorState.RESUMING)
        await asyncio.sleep(1.25 * lease_s)
        assert (await world.store.get(Lease, begun.uid)).expires_at > world.engine.now(), "nobody else can take it up"
        go.set()
        operation = await resuming
        assert (operation.state, operation.generation) == (OperationState.DONE, 1)


async def test_an_owner_that_lost_its_lease_changes_nothing(make_world: Callable[..., Any]) -> None:
    """Another control plane has taken the operation over: this one stops, and its callers wait for the other one."""
    async with make_world(config=replace(QUICK, lease_ttl_s=LEASE_S)) as world:
        await world.apply()
        key = await world.create("a")
        script(world, restore=MethodScript(latency_s=0.8 * LEASE_S))
        resuming = asyncio.ensure_future(world.engine.resume(key))
        actor = await reached(world, key, ActorState.RESUMING)
        theirs = await world.store.apply(
            TakeOver(key=key, now=1.0, operation_id=actor.operation, owner="them", lease_ttl_s=1e12, force=True)
        )
        assert theirs.operation is not None and theirs.actor is not None
        await asyncio.sleep(1.3 * LEASE_S)
        now = await world.actor(key)
        assert (now.state, now.generation) == (ActorState.RESUMING, theirs.actor.generation) and not resuming.done()
        residents = [r for agent in world.agents.values() for r in agent.hello().residents]
        assert len(residents) == 1 and residents[0].endpoint is not None
        finish = FinishResume(
            key=key,
            now=2.0,
            operation_id=actor.operation,
            generation=theirs.actor.generation,
            endpoint=residents[0].endpoint,
        )
        await world.store.apply(finish)
        assert (await resuming).state is OperationState.DONE
        await world.settle()


# --- failures that are no deaths --------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_a_failed_checkpoint_leaves_the_actor_as_it_was(world: SimWorld, paused: bool) -> None:
    key, actor = await running(world, "a")
    if paused:
        await world.engine.pause(key)
    script(world, checkpoint=failing(code="RESOURCE_EXHAUSTED", reason="DISK_FULL"))
    operation = await world.engine.suspend(key)
    assert operation.state is OperationState.FAILED and failure_of(operation).reason == "DISK_FULL"
    await world.settle()
    found = resident(world, actor)
    assert found is not None and found.state is (ResidentState.FROZEN if paused else ResidentState.RUNNING)
    assert (await world.actor(key)).state is (ActorState.PAUSED if paused else ActorState.RUNNING)
    assert (await world.request(key)).count == 3
    script(world)
    await world.engine.suspend(key)
    assert (await world.request(key)).count == 4


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_a_failed_publication_leaves_the_actor_as_it_was(
    world: SimWorld, paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, actor = await running(world, "a")
    if paused:
        await world.engine.pause(key)

    async def full(*arguments: Any) -> Snapshot:
        raise ResourceExhausted("no room for snapshots", reason="DISK_FULL")

    monkeypatch.setattr(world.snapshots, "publish", full)
    operation = await world.engine.suspend(key)
    assert operation.state is OperationState.FAILED
    await world.settle()
    found = resident(world, actor)
    assert found is not None and found.state is (ResidentState.FROZEN if paused else ResidentState.RUNNING)
    assert (await world.request(key)).count == 3


async def test_the_agent_makes_true_that_after_a_failed_checkpoint_the_sandbox_runs(world: SimWorld) -> None:
    key, _ = await running(world, "a")
    await world.engine.pause(key)
    actor = await world.actor(key)
    script(world, checkpoint=failing(code="INTERNAL"))
    announced = await world.store.get(Snapshot, actor.snapshot)
    call = api.Checkpoint(
        operation_id="x",
        actor_uid=actor.uid,
        generation=actor.generation,
        snapshot=msgspec.structs.replace(announced, id="f" * 32),
    )
    with pytest.raises(GreenroomError):
        await world.hub.call(actor.worker, call)
    found = resident(world, actor)
    assert found is not None and found.state is ResidentState.RUNNING
    await world.settle()


async def test_a_thaw_that_fails_for_the_moment_leaves_the_actor_paused(world: SimWorld) -> None:
    key, _ = await running(world, "a")
    await world.engine.pause(key)
    script(world, thaw=failing(code="INTERNAL"))
    operation = await world.engine.resume(key)
    assert operation.state is OperationState.FAILED
    assert (await world.actor(key)).state is ActorState.PAUSED
    script(world)
    assert (await world.request(key)).count == 3
    await world.settle()


async def test_a_paused_actor_whose_sandbox_is_gone_is_no_dead_end(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    await world.engine.pause(key)
    world.agents[actor.worker].on_exit = lambda event: None
    world.end_program(key)
    await asyncio.sleep(0)
    assert (await world.engine.resume(key)).state is OperationState.FAILED or (
        await world.actor(key)
    ).state is ActorState.RUNNING
    await world.settle()
    if (await world.actor(key)).state is ActorState.CRASHED:
        await world.engine.resume(key)
    assert (await world.request(key)).count == 2


async def test_a_wake_past_its_deadline_leaves_no_sandbox_behind(world: SimWorld) -> None:
    """The worker is still at it when the operation is given up: what it makes late is ended."""
    key = await world.create("a")
    script(world, restore=MethodScript(latency_s=0.4))
    world.configure(operation_deadline_s=0.1)
    operation = await world.engine.resume(key)
    assert failure_of(operation).reason == "OPERATION_DEADLINE"
    assert (await world.actor(key)).state is ActorState.SUSPENDED
    assert not any(agent.hello().residents for agent in world.agents.values())
    await asyncio.sleep(0.5)  # by now it would have been there
    await world.settle()
    script(world)
    world.configure(operation_deadline_s=20.0)
    assert (await world.request(key)).count == 1


async def test_a_suspend_past_its_deadline_leaves_the_actor_awake(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    script(world, checkpoint=MethodScript(latency_s=60.0))
    world.configure(operation_deadline_s=0.1)
    operation = await world.engine.suspend(key)
    assert failure_of(operation).reason == "OPERATION_DEADLINE"
    await world.settle()
    assert (await world.request(key)).count == 3
    assert (await world.actor(key)).worker == actor.worker


async def test_what_was_published_before_the_sandbox_was_lost_counts(world: SimWorld) -> None:
    """The snapshot is complete, its worker dies before it can say so: nothing happened since, so nothing is lost."""
    key, _ = await running(world, "a")

    async def around(what: Any, go_on: Callable[[], Awaitable[Any]]) -> Any:
        done = await go_on()
        if isinstance(what, api.Publish):
            worker = (await world.actor(key)).worker
            await world.kill_agent(worker)
            await world.start_agent(worker)
            raise Unavailable("the connection broke", reason="WORKER_DISCONNECTED")
        return done

    Interposed(world, around)
    operation = await world.engine.suspend(key)
    assert operation.state is OperationState.DONE
    assert (await world.request(key)).count == 3
    await world.settle()


async def test_what_was_published_before_the_actor_was_let_run_again_is_not_all_that_there_was(
    make_world: Callable[..., Any],
) -> None:
    """Its suspend failed after it was published, it was put back and ran on, and then it was lost: it is CRASHED, goes
    on from that snapshot, and says that what it did since then is lost."""
    async with make_world() as world:
        await world.apply()
        key, actor = await running(world, "a")
        gives_up_soon(world)

        async def around(what: Any, go_on: Callable[[], Awaitable[Any]]) -> Any:
            done = await go_on()
            if isinstance(what, api.Publish):
                raise Unavailable("the snapshot store's answer did not come")
            if isinstance(what, api.Thaw) and actor.worker in world.agents:
                world.hub.disconnect(actor.worker)
                await world.agents.pop(actor.worker).close(wipe=True)
                raise Unavailable("the connection broke", reason="WORKER_DISCONNECTED")
            return done

        Interposed(world, around)
        operation = await world.engine.suspend(key)
        assert operation.state is OperationState.FAILED
        lost = await world.actor(key)
        made = await world.store.get(Snapshot, operation.snapshot)
        assert lost.state is ActorState.CRASHED and lost.snapshot == operation.snapshot
        assert lost.unsaved_since == made.created_at and lost.worker == ""
        await world.engine.resume(key)
        assert (await world.request(key)).count == 3
        await world.settle()


async def test_a_snapshot_published_after_the_suspend_had_failed_is_removed(make_world: Callable[..., Any]) -> None:
    async with make_world() as world:
        await world.apply()
        key, actor = await running(world, "a")
        gives_up_soon(world)
        publish = world.snapshots.publish
        published = asyncio.Event()

        async def slowly(snapshot: Snapshot, source: Any, progress: Any = None, base: Any = ()) -> Snapshot:
            world.hub.disconnect(actor.worker)
            await reached(world, key, ActorState.CRASHED)
            written = await publish(snapshot, source, progress, base)
            published.set()
            return written

        world.snapshots.publish = slowly  # type: ignore[method-assign]
        operation = await world.engine.suspend(key)
        assert operation.state is OperationState.FAILED
        await asyncio.wait_for(published.wait(), 60)
        world.hub.connect(world.agents[actor.worker])
        await world.settle()
        await world.engine.resume(key)
        assert (await world.request(key)).count == 2


async def test_a_missing_snapshot_is_never_a_cold_boot(world: SimWorld) -> None:
    key = await world.create("a")
    script(world, restore=MethodScript(latency_s=0.2))
    boots = sum(b.calls["start"] for b in world.backends.values())
    begun = await world.engine.resume(key, wait_s=0.01)
    await world.crash_control(restart=False)
    await world.store.remove(await world.store.get(Snapshot, begun.snapshot))
    await world.start_control()
    ended = await world.engine.wait_operation(begun.id)
    assert failure_of(ended).reason == "SNAPSHOT_NOT_FOUND"
    assert sum(b.calls["start"] for b in world.backends.values()) == boots
    assert (await world.actor(key)).state is ActorState.SUSPENDED


async def test_a_corrupt_snapshot_goes_back_to_the_one_before_and_says_so(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    await world.engine.suspend(key)
    latest = (await world.actor(key)).snapshot
    path = world.root / "snapshots" / key_of(await world.store.get(Snapshot, latest), "actor.json")
    path.write_bytes(path.read_bytes().replace(b'"count":2', b'"count":9'))
    assert (await world.request(key)).count == 2, "from the one before"
    back = await world.actor(key)
    assert back.snapshot == actor.snapshot and back.reason == "SnapshotCorrupt" and latest in back.message


async def test_a_worker_that_refuses_is_changed_for_another(world: SimWorld) -> None:
    key, actor = await running(world, "a")
    await world.engine.suspend(key)
    world.backends[actor.worker].script = SimScript(methods={"restore": failing(code="INTERNAL")})
    assert (await world.request(key)).count == 3
    moved = await world.actor(key)
    assert moved.worker not in ("", actor.worker)
    operation = [o for o in await list_all(world.store, Operation) if o.kind is OperationKind.RESUME][-1]
    assert (operation.attempts, operation.worker) == (2, moved.worker)
    await world.settle()


async def test_a_worker_whose_disk_fails_is_changed_for_another_and_gets_no_more(world: SimWorld) -> None:
    await world.engine.drain_worker("w1")
    keys = [(await running(world, name))[0] for name in "abcd"]
    for key in keys:
        await world.engine.suspend(key)
    await world.engine.drain_worker("w1", undo=True)

    async def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    world.agents["w0"]._waker.wake = read_only  # type: ignore[assignment,method-assign]
    woken = await asyncio.gather(*map(world.request, keys))
    assert [said.count for said in woken] == [3] * len(keys)
    assert {(await world.actor(key)).worker for key in keys} == {"w1"}
    async with asyncio.timeout(60):
        while (await world.store.get(Worker, "w0")).quarantined_until <= world.engine.now():
            await asyncio.sleep(0.002)
    await world.settle()
