"""Templates that are prepared, deleted and applied again while parts die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.errors import FailedPrecondition, NotFound
from greenroom.core.records import (
    Key,
    Operation,
    OperationKind,
    OperationState,
    Probe,
    Snapshot,
    Template,
    TemplateSpec,
    TemplateState,
)
from greenroom.engine.operations import failure_of
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimScript
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.world import NAMESPACE, SimWorld

T = Key(NAMESPACE, "t")
SPEC = TemplateSpec(image="sim:t", readyz=Probe(path="/healthz", timeout_s=5.0))


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world() as world:
        yield world


def script(world: SimWorld, **methods: MethodScript) -> None:
    world.script = SimScript(methods=methods)  # of agents to come, too
    for backend in world.backends.values():
        backend.script = world.script


async def preparing(world: SimWorld, **latency_s: float) -> Operation:
    """A preparation that is as far as that."""
    script(world, **{name: MethodScript(latency_s=seconds) for name, seconds in latency_s.items()})
    template, operation = await world.engine.apply_template(T, SPEC)
    assert template.state is TemplateState.PREPARING and operation is not None
    async with asyncio.timeout(60):
        while not all(any(b.calls[name] for b in world.backends.values()) for name in latency_s):
            await asyncio.sleep(0.001)
    return operation


async def ended(world: SimWorld, operation: Operation) -> Operation:
    return await world.engine.wait_operation(operation.id, wait_s=60)


async def nothing_left(world: SimWorld) -> None:
    await world.settle()
    assert not await list_all(world.store, Template) and not await world.snapshots.list()
    assert not await list_all(world.store, Snapshot)


@pytest.mark.parametrize("phase", ["start", "checkpoint"])
@pytest.mark.parametrize("agents_too", [False, True], ids=["control", "control-and-agents"])
async def test_it_goes_on_after_a_restart(world: SimWorld, phase: str, agents_too: bool) -> None:
    operation = await preparing(world, **{phase: 0.2})
    if agents_too:
        for name in list(world.agents):
            await world.kill_agent(name)
    script(world)
    await world.crash_control()
    if agents_too:
        for name in world.names:
            await world.start_agent(name)
    assert (await ended(world, operation)).state is OperationState.DONE
    assert (await world.template()).state is TemplateState.READY
    assert (await world.request(await world.create("a"))).count == 1
    await world.settle()
    assert len(await world.snapshots.list()) == 1, "only its own golden one"
    assert (await list_all(world.store, Operation, where={"kind": OperationKind.PREPARE}))[0].id == operation.id


@pytest.mark.parametrize("phase", ["start", "checkpoint", "destroy"])
async def test_deleted_while_it_is_prepared(world: SimWorld, phase: str) -> None:
    operation = await preparing(world, **{phase: 0.1})
    await world.engine.delete_template(T)
    failed = await ended(world, operation)
    assert failed.state is OperationState.DONE or failure_of(failed).reason == "TEMPLATE_DELETED"
    script(world)
    await nothing_left(world)
    assert (await world.apply()).state is TemplateState.READY, "and applied again"


async def test_deleted_while_it_is_prepared_and_the_control_plane_dies(world: SimWorld) -> None:
    operation = await preparing(world, start=0.2)
    deleting = asyncio.ensure_future(world.engine.delete_template(T))
    async with asyncio.timeout(60):
        while (await world.store.get(Template, str(T))).state is TemplateState.PREPARING:
            await asyncio.sleep(0)
    await world.crash_control()
    await asyncio.wait([deleting])
    script(world)
    assert (await world.store.get(Template, str(T))).reason == "Deleting"
    assert (await ended(world, operation)).state is OperationState.FAILED
    async with asyncio.timeout(30):  # it is gone on with by itself
        while await list_all(world.store, Template):
            await asyncio.sleep(0.01)
    await nothing_left(world)


async def test_a_deletion_that_was_cut_short_before_it_met_an_actor_is_given_back(world: SimWorld) -> None:
    template = await world.apply()
    await world.create("a")
    long_ago = world.engine.now() - 2 * world.engine.config.lease_ttl_s
    await world.store.put(replace(template, state=TemplateState.FAILED, reason="Deleting", state_since=long_ago))
    async with asyncio.timeout(30):
        while (await world.store.get(Template, str(T))).state is not TemplateState.READY:
            await asyncio.sleep(0.01)
    assert (await world.request(Key(NAMESPACE, "a"))).count == 1


async def test_a_caller_of_delete_that_goes_away_stops_nothing(world: SimWorld) -> None:
    await preparing(world, start=0.1)
    deleting = asyncio.ensure_future(world.engine.delete_template(T))
    await asyncio.sleep(0.01)
    deleting.cancel()
    async with asyncio.timeout(60):
        while await list_all(world.store, Template):
            await asyncio.sleep(0.001)
    await nothing_left(world)


async def test_applied_again_while_it_is_prepared_joins(world: SimWorld) -> None:
    operation = await preparing(world, start=0.1)
    for _ in range(3):
        _, again = await world.engine.apply_template(T, SPEC)
        assert again is not None and again.id == operation.id
    assert (await ended(world, operation)).state is OperationState.DONE
    ready, none = await world.engine.apply_template(T, SPEC)
    assert ready.state is TemplateState.READY and none is None
    with pytest.raises(FailedPrecondition) as other:
        await world.engine.apply_template(T, TemplateSpec(image="sim:other"))
    assert other.value.reason == "TEMPLATE_IMMUTABLE"


async def test_many_who_apply_it_at_once_prepare_it_once(world: SimWorld) -> None:
    await asyncio.gather(*(world.engine.apply_template(T, SPEC) for _ in range(10)))
    assert (await world.template()).state is TemplateState.READY
    await world.settle()
    done = await list_all(world.store, Operation, where={"kind": OperationKind.PREPARE})
    assert [o.state for o in done].count(OperationState.DONE) >= 1
    assert len(await world.snapshots.list()) == 1


async def test_a_failure_says_why_and_applying_again_tries_again(world: SimWorld) -> None:
    failure = ScriptedFailure(code="FAILED_PRECONDITION", reason="COMMAND_NOT_FOUND", message="no such command")
    script(world, start=MethodScript(failures=(failure,)))
    template = await world.apply()
    assert (template.state, template.reason) == (TemplateState.FAILED, "COMMAND_NOT_FOUND")
    with pytest.raises(FailedPrecondition, match="no such command"):
        await world.create("a")
    await world.settle()
    assert not await world.snapshots.list()
    script(world)
    assert (await world.apply()).state is TemplateState.PREPARING or await world.template()
    assert (await world.template()).state is TemplateState.READY
    assert (await world.request(await world.create("a"))).count == 1


async def test_a_template_in_use_is_not_deleted(world: SimWorld) -> None:
    await world.apply()
    key = await world.create("a")
    with pytest.raises(FailedPrecondition) as used:
        await world.engine.delete_template(T)
    assert used.value.reason == "TEMPLATE_IN_USE"
    assert (await world.template()).state is TemplateState.READY
    assert (await world.request(key)).count == 1
    await world.engine.delete(key)
    await world.engine.delete_template(T)
    with pytest.raises(NotFound):
        await world.engine.delete_template(T)
    await nothing_left(world)


async def test_namesakes_in_two_namespaces_have_nothing_to_do_with_each_other(world: SimWorld) -> None:
    other = Key("other", "t")
    await world.apply()
    await world.engine.apply_template(other, SPEC)
    async with asyncio.timeout(60):
        while (await world.store.get(Template, str(other))).state is not TemplateState.READY:
            await asyncio.sleep(0.001)
    key = Key("other", "a")
    await world.engine.create_actor(key, "t")
    await world.engine.delete_template(T)
    assert (await world.request(key)).count == 1
    await world.settle()
    assert len(await world.snapshots.list()) == 1


async def test_the_first_worker_may_come_later(world: SimWorld) -> None:
    for name in list(world.agents):
        await world.kill_agent(name)
    _, operation = await world.engine.apply_template(T, SPEC)
    assert operation is not None
    await asyncio.sleep(0.02)
    await world.start_agent("w1")
    assert (await ended(world, operation)).state is OperationState.DONE
    await world.start_agent("w0")
    await world.settle()


@pytest.mark.parametrize("state", [TemplateState.PENDING, TemplateState.PREPARING])
async def test_one_that_nobody_prepares_is_taken_up(world: SimWorld, state: TemplateState) -> None:
    """Who applied it died before the preparation began, or its operation has ended and the template was not told."""
    long_ago = world.engine.now() - 2 * world.engine.config.lease_ttl_s
    abandoned = Template(
        namespace=NAMESPACE, name="t", uid="left", spec=SPEC, state=state, created_at=long_ago, state_since=long_ago,
        operation="" if state is TemplateState.PENDING else "gone",
    )  # fmt: skip
    await world.store.put(abandoned)
    template = await world.template()
    assert (template.state, template.uid) == (TemplateState.READY, "left")
    await world.settle()
