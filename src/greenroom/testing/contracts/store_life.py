"""Of the contract of stores: the life of an actor, from one state to the next."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from greenroom.core.commands import (
    Begin,
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Crash,
    CreateActor,
    Outcome,
    TakeOver,
)
from greenroom.core.errors import AlreadyExists, FailedPrecondition, LeaseHeld, NotFound
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.testing.contracts.store_world import ENDPOINT, FAILURE, World, dump

BEGIN: dict[OperationKind, type[Begin]] = {
    OperationKind.RESUME: BeginResume,
    OperationKind.SUSPEND: BeginSuspend,
    OperationKind.PAUSE: BeginPause,
    OperationKind.DELETE: BeginDelete,
}
BUSY = {
    ActorState.RESUMING: OperationKind.RESUME,
    ActorState.SUSPENDING: OperationKind.SUSPEND,
    ActorState.PAUSING: OperationKind.PAUSE,
    ActorState.DELETING: OperationKind.DELETE,
}
IDLE = [s for s in ActorState if s not in BUSY]


class Life:
    """What the commands do."""

    # the life of an actor

    async def test_a_life(self, world: World) -> None:
        key = await world.create()
        resumed = await world.do(BeginResume, key, prefer=("w2",))
        actor = await world.actor(key)
        assert (actor.state, actor.worker, actor.wakes, actor.resumed_at) == (ActorState.RUNNING, "w2", 1, world.now)
        assert actor.endpoint == ENDPOINT and resumed.snapshot == "golden" and resumed.state is OperationState.DONE
        first = await world.do(BeginSuspend, key)
        actor = await world.actor(key)
        assert (actor.state, actor.worker, actor.last_worker) == (ActorState.SUSPENDED, "", "w2")
        assert (actor.snapshot, actor.endpoint, actor.suspended_at) == (first.snapshot, None, world.now)
        assert actor.durable_at == (await world.store.get(Snapshot, first.snapshot)).created_at
        assert (first.from_state, first.to_state, first.owner) == (ActorState.RUNNING, ActorState.SUSPENDED, "one")
        again = await world.do(BeginResume, key)
        assert again.snapshot == first.snapshot and again.generation == 3
        second = await world.do(BeginSuspend, key)
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (second.snapshot, first.snapshot)
        assert (await world.store.get(Snapshot, second.snapshot)).parent == first.snapshot
        await world.do(BeginResume, key)
        await world.do(BeginPause, key)
        assert (await world.actor(key)).state is ActorState.PAUSED
        third = await world.do(BeginSuspend, key)
        states_now = {s.id: s.state for s in await world.store.list(Snapshot)}
        assert states_now[first.snapshot] is SnapshotState.CONDEMNED
        assert states_now[second.snapshot] is states_now[third.snapshot] is SnapshotState.PRESENT
        await world.do(BeginDelete, key)
        with pytest.raises(NotFound):
            await world.actor(key)
        states_now = {s.id: s.state for s in await world.store.list(Snapshot)}
        assert states_now.pop("golden") is SnapshotState.PRESENT
        assert set(states_now.values()) == {SnapshotState.CONDEMNED}
        assert await world.store.list(Lease) == []

    @pytest.mark.parametrize("state", IDLE)
    async def test_delete_from_every_idle_state(self, world: World, state: ActorState) -> None:
        key, _ = await world.in_state(state)
        bound = (await world.actor(key)).worker
        op = await world.begin(BeginDelete, key)
        assert op.worker == bound, "its driver learns where the sandbox is"
        assert sum(w.used for w in await world.store.list(Worker)) == (1 if bound else 0), "until it is gone"
        await world.finish(op)
        assert await world.store.list(Actor) == []
        again = await world.create()
        assert (await world.actor(again)).generation == 0

    async def test_a_delete_that_failed_keeps_the_slot_and_is_begun_again(self, world: World) -> None:
        key, op = await world.in_state(ActorState.DELETING)
        assert op is not None
        await world.back_out(op, ActorState.DELETING)
        actor = await world.actor(key)
        assert (actor.state, actor.operation, actor.reason) == (ActorState.DELETING, "", FAILURE.reason)
        assert actor.worker and sum(w.used for w in await world.store.list(Worker)) == 1
        with pytest.raises(FailedPrecondition):
            await world.begin(BeginResume, key)
        await world.do(BeginDelete, key)
        assert sum(w.used for w in await world.store.list(Worker)) == 0

    @pytest.mark.parametrize("state", sorted(BUSY))
    @pytest.mark.parametrize("kind", sorted(BEGIN))
    async def test_what_begins_on_a_busy_actor(self, world: World, state: ActorState, kind: OperationKind) -> None:
        key, op = await world.in_state(state)
        assert op is not None
        before = await dump(world.store)
        command = world.begin_command(BEGIN[kind], key, owner="two")
        if kind is BUSY[state]:
            change = await world.apply(command)
            assert change.outcome is Outcome.JOINED and change.operation == op
        else:
            with pytest.raises(LeaseHeld) as held:
                await world.apply(command)
            assert held.value.code == "ABORTED" and held.value.metadata["holder"] == "one"
            assert held.value.metadata["operation"] == op.id
            assert float(held.value.metadata["until"]) == (await world.store.get(Lease, op.uid)).expires_at
        assert await dump(world.store) == before

    @pytest.mark.parametrize(
        ("cls", "state", "outcome"),
        [
            (BeginResume, ActorState.RUNNING, Outcome.ALREADY),
            (BeginSuspend, ActorState.SUSPENDED, Outcome.ALREADY),
            (BeginPause, ActorState.PAUSED, Outcome.ALREADY),
            (BeginPause, ActorState.SUSPENDED, "WRONG_STATE"),
            (BeginSuspend, ActorState.CRASHED, "WRONG_STATE"),
            (BeginPause, ActorState.CRASHED, "WRONG_STATE"),
        ],
    )
    async def test_what_needs_no_operation_and_what_is_not_legal(
        self, world: World, cls: type[Begin], state: ActorState, outcome: str
    ) -> None:
        key, _ = await world.in_state(state)
        before = await dump(world.store)
        if isinstance(outcome, Outcome):
            assert (await world.apply(world.begin_command(cls, key))).outcome is outcome
        else:
            with pytest.raises(FailedPrecondition) as refused:
                await world.apply(world.begin_command(cls, key))
            assert refused.value.reason == outcome and refused.value.metadata["state"] == state
        assert await dump(world.store) == before

    async def test_refusals_name_what_is_wrong(self, world: World) -> None:
        key = await world.create()
        ghost = Key("ns", "ghost")
        before = await dump(world.store)
        for command, error, reason in (
            (world.begin_command(BeginResume, ghost), NotFound, "ACTOR_NOT_FOUND"),
            (world.begin_command(BeginDelete, key, uid="uid-of-a-namesake"), NotFound, "ACTOR_NOT_FOUND"),
            (CreateActor(key=key, now=1.0, operation_id="c1", uid="u", template="t"), AlreadyExists, ""),
            (CreateActor(key=ghost, now=1.0, operation_id="c2", uid="u", template="x"), NotFound, "TEMPLATE_NOT_FOUND"),
            (TakeOver(key=key, now=1.0, operation_id="o", owner="two"), NotFound, ""),
        ):
            with pytest.raises(error) as refused:
                await world.apply(command)
            assert refused.value.reason == (reason or refused.value.default_reason)
            assert str(command.key) in refused.value.message or "o" in refused.value.message
        assert await dump(world.store) == before

    async def test_templates_that_are_not_ready_or_gone(self, world: World) -> None:
        key = await world.create()
        ready = await world.store.get(Template, "ns/t")
        await world.store.put(replace(ready, state=TemplateState.PREPARING, golden_snapshot=""))
        with pytest.raises(FailedPrecondition) as pending:
            await world.begin(BeginResume, key)
        assert pending.value.reason == "TEMPLATE_NOT_READY" and pending.value.metadata["template_state"] == "Preparing"
        preparing = await world.store.get(Template, "ns/t")
        await world.store.put(replace(preparing, state=TemplateState.FAILED, message="no such image"))
        with pytest.raises(FailedPrecondition, match="no such image"):
            await world.create("b")
        await world.store.remove(await world.store.get(Template, "ns/t"))
        with pytest.raises(FailedPrecondition) as gone:
            await world.begin(BeginResume, key)
        assert gone.value.reason == "TEMPLATE_NOT_FOUND"
        await world.do(BeginDelete, key)

    # backing out and crashing

    @pytest.mark.parametrize(
        ("origin", "cls", "to"),
        [
            (ActorState.SUSPENDED, BeginResume, ActorState.SUSPENDED),
            (ActorState.PAUSED, BeginResume, ActorState.PAUSED),
            (ActorState.PAUSED, BeginResume, ActorState.CRASHED),
            (ActorState.CRASHED, BeginResume, ActorState.CRASHED),
            (ActorState.RUNNING, BeginSuspend, ActorState.RUNNING),
            (ActorState.RUNNING, BeginSuspend, ActorState.CRASHED),
            (ActorState.PAUSED, BeginSuspend, ActorState.PAUSED),
            (ActorState.PAUSED, BeginSuspend, ActorState.RUNNING),
            (ActorState.RUNNING, BeginPause, ActorState.RUNNING),
            (ActorState.RUNNING, BeginPause, ActorState.CRASHED),
        ],
    )
    async def test_backing_out(self, world: World, origin: ActorState, cls: type[Begin], to: ActorState) -> None:
        key, _ = await world.in_state(origin)
        was = await world.actor(key)
        op = await world.begin(cls, key)
        change = await world.back_out(op, to)
        actor = await world.actor(key)
        assert (actor.state, actor.reason, actor.operation) == (to, FAILURE.reason, "")
        assert change.operation and (change.operation.state, change.operation.error) == (OperationState.FAILED, FAILURE)
        assert actor.snapshot == was.snapshot and actor.endpoint == (was.endpoint if actor.worker else None)
        crashed = to is ActorState.CRASHED
        assert (actor.unsaved_since == was.resumed_at) if crashed else (actor.unsaved_since is None)
        assert await world.store.list(Lease) == []
        if to is not ActorState.RUNNING:
            await world.do(BeginResume, key)
        await world.do(BeginSuspend, key)

    @pytest.mark.parametrize(
        ("origin", "cls", "to"),
        [
            (ActorState.PAUSED, BeginResume, ActorState.SUSPENDED),  # would lose its memory
            (ActorState.CRASHED, BeginResume, ActorState.SUSPENDED),  # would hide the loss
            (ActorState.SUSPENDED, BeginResume, ActorState.RUNNING),  # that is FinishResume
            (ActorState.RUNNING, BeginSuspend, ActorState.SUSPENDED),  # that is FinishSuspend
            (ActorState.RUNNING, BeginDelete, ActorState.RUNNING),
            (ActorState.RUNNING, BeginPause, ActorState.DELETING),
        ],
    )
    async def test_backing_out_elsewhere_is_refused(
        self, world: World, origin: ActorState, cls: type[Begin], to: ActorState
    ) -> None:
        key, _ = await world.in_state(origin)
        op = await world.begin(cls, key)
        with pytest.raises(FailedPrecondition) as refused:
            await world.back_out(op, to)
        assert refused.value.reason == "WRONG_STATE"
        await world.finish(op)

    async def test_a_crash_is_kept_until_the_actor_runs_again(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.RUNNING)
        await world.do(BeginSuspend, key)
        await world.do(BeginResume, key)
        resumed_at = (await world.actor(key)).resumed_at
        world.now += 50
        assert (await world.crash(key)).outcome is Outcome.CHANGED
        actor = await world.actor(key)
        assert (actor.state, actor.unsaved_since, actor.worker) == (ActorState.CRASHED, resumed_at, "")
        [recorded] = await world.store.list(Operation, where={"kind": OperationKind.CRASH})
        assert (recorded.uid, recorded.worker, recorded.state) == (actor.uid, actor.last_worker, OperationState.DONE)
        assert (recorded.from_state, recorded.to_state) == (ActorState.RUNNING, ActorState.CRASHED)
        assert recorded.error and recorded.error.reason == "SandboxGone" and recorded.finished_at == world.now
        assert (await world.crash(key)).outcome is Outcome.ALREADY
        op = await world.begin(BeginResume, key)
        assert op.snapshot == actor.snapshot and (await world.actor(key)).unsaved_since == resumed_at
        await world.finish(op)
        assert (await world.actor(key)).unsaved_since is None

    async def test_a_loss_counts_only_while_the_worker_is_not_heard(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.RUNNING)
        actor = await world.actor(key)
        report = Crash(
            operation_id=world.id("op-"),
            key=key,
            now=world.now,
            uid=actor.uid,
            worker=actor.worker,
            generation=actor.generation,
            reason="WorkerLost",
            message="late",
            lost=True,
        )
        assert (await world.apply(report)).outcome is Outcome.ALREADY, "it has been heard again"
        worker = await world.store.get(Worker, actor.worker)
        await world.store.put(replace(worker, state=WorkerState.STALLED))
        assert (await world.apply(report)).outcome is Outcome.CHANGED

    async def test_a_late_crash_report_changes_nothing(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.RUNNING)
        old = await world.actor(key)
        await world.do(BeginSuspend, key)
        await world.do(BeginResume, key, prefer=(old.worker,))
        report = Crash(
            operation_id=world.id("op-"),
            key=key,
            now=world.now,
            uid=old.uid,
            worker=old.worker,
            generation=old.generation,
            reason="Gone",
            message="late",
        )
        before = await dump(world.store)
        for crash in (report, replace(report, generation=99, worker="w9"), replace(report, generation=99, uid="x")):
            assert (await world.apply(crash)).outcome is Outcome.ALREADY
        assert await dump(world.store) == before
