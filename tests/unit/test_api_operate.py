"""What an operator asks of the API: cancel, drain, replicas, selectors, explanations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_control import FakeControl, serving
from msgspec.structs import replace

from greenroom.api import convert, explain
from greenroom.api._gen.greenroom.v1alpha1 import api_pb2 as pb
from greenroom.api._gen.greenroom.v1alpha1 import resources_pb2 as res
from greenroom.api.client import AioClient
from greenroom.core.errors import FailedPrecondition, InvalidArgument, NotFound
from greenroom.core.explanation import Explanation
from greenroom.core.records import (
    Actor,
    ActorState,
    Durability,
    Key,
    OnCrash,
    Operation,
    OperationKind,
    OperationState,
    Replica,
    Template,
    TemplateSpec,
    Worker,
)

A = Key("default", "a")


class Rig:
    def __init__(self, control: FakeControl, client: AioClient) -> None:
        self.control, self.client, self.store = control, client, control.store

    async def begin(self, method: str = "ResumeActor") -> Operation:
        """An operation of actor a that is under way, and stays so."""
        self.control.gate.clear()
        call = getattr(self.client.actors, method)
        return convert.from_message(Operation, await call(pb.ActorRequest(name="a", wait=convert.duration(0.0))))

    async def cancel(self, operation_id: str) -> Operation:
        answer = await self.client.operations.CancelOperation(pb.GetOperationRequest(id=operation_id))
        return convert.from_message(Operation, answer)

    async def ended(self, operation_id: str) -> Operation:
        answer = await self.client.operations.WaitOperation(pb.WaitOperationRequest(id=operation_id), timeout=10)
        return convert.from_message(Operation, answer)

    async def explain(self, **more: Any) -> Explanation:
        answer = await self.client.actors.ExplainActor(pb.ExplainActorRequest(name="a", **more))
        return convert.from_message(Explanation, answer)

    async def change_worker(self, name: str, **fields: Any) -> None:
        await self.store.put(replace(await self.store.get(Worker, name), **fields))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with serving(tmp_path) as (control, address), AioClient(address) as client:
        await control.furnish()
        await control.create_actor(A, "counter")
        yield Rig(control, client)


# --- cancel -----------------------------------------------------------------------------------------------------


async def test_an_operation_is_backed_out_when_it_is_cancelled(rig: Rig) -> None:
    operation = await rig.begin()
    asked = await rig.cancel(operation.id)
    assert asked.cancel_requested and asked.id == operation.id
    ended = await rig.ended(operation.id)
    assert ended.state is OperationState.FAILED and ended.error is not None
    assert (ended.error.code, ended.error.reason) == ("CANCELLED", "OPERATION_CANCELLED")
    assert (await rig.store.get(Actor, "default/a")).state is ActorState.SUSPENDED
    assert await rig.cancel(operation.id) == ended, "one that has ended is an answer"


async def test_the_preparation_of_a_template_can_be_cancelled(rig: Rig) -> None:
    rig.control.gate.clear()
    spec = convert.to_message(TemplateSpec(image="example.org/x:1"))
    request = pb.ApplyTemplateRequest(name="t", spec=spec, wait=convert.duration(0))
    operation = (await rig.client.templates.ApplyTemplate(request)).operation
    assert (await rig.cancel(operation.id)).kind is OperationKind.PREPARE
    ended = await rig.ended(operation.id)
    assert ended.error is not None and ended.error.code == "CANCELLED" and ended.cancel_requested


async def test_what_can_not_be_cancelled(rig: Rig) -> None:
    with pytest.raises(NotFound):
        await rig.cancel("op-none")
    delete = await rig.begin("DeleteActor")
    with pytest.raises(FailedPrecondition) as caught:
        await rig.cancel(delete.id)
    assert caught.value.reason == "NOT_CANCELLABLE"
    assert not (await rig.store.get(Operation, delete.id)).cancel_requested


# --- drain ------------------------------------------------------------------------------------------------------


async def test_drain_and_undo(rig: Rig) -> None:
    await rig.client.actors.ResumeActor(pb.ActorRequest(name="a"))
    worker = (await rig.store.get(Actor, "default/a")).worker
    answer = await rig.client.workers.DrainWorker(pb.DrainWorkerRequest(name=worker))
    assert answer.state == res.WORKER_STATE_DRAINING
    async with asyncio.timeout(60):
        while (await rig.store.get(Worker, worker)).used:
            await asyncio.sleep(0.01)
    assert (await rig.store.get(Actor, "default/a")).state is ActorState.SUSPENDED
    answer = await rig.client.workers.DrainWorker(pb.DrainWorkerRequest(name=worker, undo=True))
    assert answer.state == res.WORKER_STATE_ACTIVE
    with pytest.raises(NotFound):
        await rig.client.workers.DrainWorker(pb.DrainWorkerRequest(name="none"))


# --- selectors and templates ------------------------------------------------------------------------------------


async def test_a_worker_selector_of_actor_and_template(rig: Rig) -> None:
    spec = TemplateSpec(
        image="example.org/x:1",
        durability=Durability.LOCAL,
        evictable=False,
        on_crash=OnCrash.BOOT,
        worker_selector={"example.org/gpu": "a100", "zone": ""},
    )
    await rig.client.templates.ApplyTemplate(pb.ApplyTemplateRequest(name="t", spec=convert.to_message(spec)))
    assert (await rig.store.get(Template, "default/t")).spec == spec
    made = await rig.client.actors.CreateActor(
        pb.CreateActorRequest(name="b", template="t", worker_selector={"disk": "fast"})
    )
    assert dict(made.actor.worker_selector) == {"disk": "fast"}
    assert (await rig.store.get(Actor, "default/b")).worker_selector == {"disk": "fast"}


# --- replicas ---------------------------------------------------------------------------------------------------


async def test_replicas_without_what_is_in_use(rig: Rig) -> None:
    for name in ("one", "two"):
        await rig.store.put(
            Replica(name=name, incarnation=f"{name}-1", link="unix:/x", started_at=5.0, seen_at=7.0, uses={"u": 6.0})
        )
    page = await rig.client.system.ListReplicas(pb.ListReplicasRequest(page_size=1))
    assert page.next_page_token == "one"
    rest = await rig.client.system.ListReplicas(pb.ListReplicasRequest(page_token=page.next_page_token))
    assert convert.from_message(Replica, rest.replicas[0]) == Replica(
        name="two", incarnation="two-1", link="unix:/x", started_at=5.0, seen_at=7.0, version=1
    )


# --- explain ----------------------------------------------------------------------------------------------------


async def test_an_actor_that_sleeps(rig: Rig) -> None:
    await rig.change_worker("default-1", capacity=0)
    found = await rig.explain()
    assert found.actor == await rig.store.get(Actor, "default/a")
    assert found.template == await rig.store.get(Template, "default/counter")
    assert [op.kind for op in found.operations] == [OperationKind.CREATE] and found.older_operations == 0
    assert found.lease is None and found.snapshot is not None and found.snapshot.id == "golden-counter"
    assert found.wakes_on == ("default-0",)
    assert [(r.worker, r.why) for r in found.rejected] == [("default-1", "is full (0 of 0 slots)")]
    assert abs(found.read_at - rig.store.clock()) < 10


async def test_an_actor_that_somebody_holds(rig: Rig) -> None:
    operation = await rig.begin()
    found = await rig.explain()
    assert found.lease is not None
    assert (found.lease.owner, found.lease.operation) == ("me", operation.id)
    assert found.lease.expires_at > found.read_at
    assert found.operations[-1] == await rig.store.get(Operation, operation.id)
    assert found.wakes_on == () and found.rejected == (), "it has a worker"


async def test_the_latest_operations_and_how_many_more(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        await rig.client.actors.ResumeActor(pb.ActorRequest(name="a"))
        await rig.client.actors.SuspendActor(pb.ActorRequest(name="a"))
    found = await rig.explain(operations=2)
    assert [op.kind for op in found.operations] == [OperationKind.RESUME, OperationKind.SUSPEND]
    assert found.older_operations == 5
    assert found.snapshot is not None and found.snapshot.id == found.actor.snapshot
    monkeypatch.setattr(explain, "MAX_PAGE", 1)  # no page is the last one
    assert (await explain.read(rig.store, "default/a", 2)).operations == found.operations
    for wrong in (-1, 101):
        with pytest.raises(InvalidArgument, match="between 1 and 100"):
            await rig.explain(operations=wrong)


async def test_what_is_gone_is_absent(rig: Rig) -> None:
    await rig.store.remove(await rig.store.get(Template, "default/counter"))
    found = await rig.explain()
    assert found.template is None and found.snapshot is None and found.wakes_on == ()
    with pytest.raises(NotFound, match="default/none"):
        await rig.client.actors.ExplainActor(pb.ExplainActorRequest(name="none"))


async def test_an_actor_that_moves_on_meanwhile_is_read_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = explain._operations
    reads = 0

    async def disturbed(*args: Any) -> Any:
        nonlocal reads
        reads += 1
        found = await whole(*args)
        if reads == 1:
            await rig.control.resume(A)
        return found

    monkeypatch.setattr(explain, "_operations", disturbed)
    found = await explain.read(rig.store, "default/a", 10)
    assert reads == 2 and found.actor.state is ActorState.RUNNING
    assert found.operations[-1].to_state is ActorState.RUNNING
