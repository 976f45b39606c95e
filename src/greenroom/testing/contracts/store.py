"""The contract of `greenroom.store.port.Store`. An adapter's test is its factory:

class TestMyStore(StoreContract):
    @pytest.fixture
    async def store(self): ...
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.commands import (
    Advance,
    BackOut,
    Begin,
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Change,
    Crash,
    CreateActor,
    FallBack,
    Outcome,
    Rebind,
    RenewLease,
    TakeOver,
)
from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    FailedPrecondition,
    InvalidArgument,
    LeaseHeld,
    LeaseLost,
    NotFound,
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
    Pool,
    PoolSpec,
    Snapshot,
    SnapshotState,
    Template,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.store.port import MAX_PAGE, Event, EventType, Store
from greenroom.testing.contracts.store_world import (
    ENDPOINT,
    FAILURE,
    World,
    audit,
    dump,
    list_all,
    operation,
    snapshot,
    template,
    worker,
)

__all__ = ["StoreContract", "World", "audit", "dump", "list_all"]

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


class StoreContract:
    """What every store does. The subclass has a fixture ``store`` that makes an empty one and closes it."""

    @pytest.fixture
    async def world(self, store: Store) -> World:
        return await World(store).setup()

    # single records

    async def test_put_inserts_and_replaces_the_version_that_was_read(self, store: Store) -> None:
        one = await store.put(Pool(name="p", uid="u", spec=PoolSpec(replicas=1), created_at=1.0))
        assert one.version == 1 and await store.get(Pool, "p") == one
        two = await store.put(replace(one, spec=PoolSpec(replicas=3)))
        assert two.version == 2 and (await store.get(Pool, "p")).spec.replicas == 3
        with pytest.raises(AlreadyExists):
            await store.put(replace(one, version=0))
        with pytest.raises(Conflict) as stale:
            await store.put(one)
        assert stale.value.reason == "VERSION_CONFLICT"
        assert await store.get(Pool, "p") == two

    async def test_remove_is_conditional_and_repeatable(self, store: Store) -> None:
        one = await store.put(template())
        two = await store.put(replace(one, reason="Changed"))
        with pytest.raises(Conflict):
            await store.remove(one)
        await store.remove(two)
        await store.remove(two)
        with pytest.raises(NotFound) as gone:
            await store.get(Template, "ns/t")
        assert "template ns/t" in gone.value.message and gone.value.reason == "TEMPLATE_NOT_FOUND"
        with pytest.raises(Conflict):
            await store.put(two)

    async def test_of_many_writers_of_one_version_one_wins(self, store: Store) -> None:
        one = await store.put(template())
        tries = [store.put(replace(one, reason=f"r{i}")) for i in range(20)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        won = [r for r in results if isinstance(r, Template)]
        assert len(won) == 1 and sum(isinstance(r, Conflict) for r in results) == 19
        assert await store.get(Template, "ns/t") == won[0]

    async def test_every_kind_comes_back_as_it_was(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(labels={"team": "ü"}))
        await world.store.put(operation("prepare"))
        await world.store.put(Pool(name="p", uid="u", spec=PoolSpec(), created_at=1.5))
        for name, record in (await dump(world.store)).items():
            assert await world.store.get(type(record), record.pk) == record, name
        assert (await world.store.get(Lease, op.uid)).operation == op.id
        assert (await world.actor(op.key)).labels == {"team": "ü"}

    async def test_used_slots_belong_to_the_lifecycle(self, world: World) -> None:
        before = await world.store.get(Worker, "w1")
        await world.do(BeginResume, await world.create(), prefer=("w1",))
        kept = await world.store.put(replace(before, used=0, last_seen=9.0))
        assert kept.used == 1, "a slot that was taken since does not conflict, and is not lost"
        await audit(world.store)
        await world.store.remove(kept)
        again = await world.store.put(worker("w1", used=7))
        assert again.used == 1, "a worker that comes back has the slots that its actors hold"
        await audit(world.store)

    # lists

    async def test_lists_are_ordered_paged_and_filtered(self, world: World) -> None:
        names = [f"a{i:02}" for i in range(7)]
        for name in reversed(names):
            await world.create(name)
        await world.begin(BeginResume, Key("ns", "a03"), operation_id="op-r", prefer=("w2",))
        store = world.store
        assert [a.name for a in await store.list(Actor)] == names
        assert [a.name for a in await store.list(Actor, after="ns/a04")] == ["a05", "a06"]
        assert [a.name for a in await store.list(Actor, limit=2)] == ["a00", "a01"]
        assert [a.name for a in await list_all(store, Actor, limit=3)] == names
        assert [a.name for a in await store.list(Actor, where={"state": "Resuming"})] == ["a03"]
        assert [a.name for a in await store.list(Actor, where={"worker": "w2", "template": "t"})] == ["a03"]
        assert len(await store.list(Actor, where={"worker": ""})) == 6
        uid = (await world.actor(Key("ns", "a05"))).uid
        assert [a.name for a in await store.list(Actor, where={"uid": uid})] == ["a05"]
        assert [o.id for o in await store.list(Operation, where={"kind": "Resume", "state": "Running"})] == ["op-r"]
        assert [lease.operation for lease in await store.list(Lease, where={"owner": "one"})] == ["op-r"]
        assert [w.name for w in await store.list(Worker, where={"pool": "default", "state": "Active"})] == ["w1", "w2"]
        assert [s.id for s in await store.list(Snapshot, where={"actor_uid": "uid-x", "template": "t"})] == ["golden"]

    async def test_a_namespace_is_not_the_beginning_of_another(self, store: Store) -> None:
        for namespace in ("team", "team-a", "tea", "team0"):
            await store.put(template(namespace=namespace))
            await store.put(snapshot(f"s-{namespace}", namespace=namespace))
            await store.put(operation(f"o-{namespace}", namespace=namespace))
        assert [t.pk for t in await store.list(Template, namespace="team")] == ["team/t"]
        assert await store.list(Template, namespace="team", after="team/t") == []
        assert [s.id for s in await store.list(Snapshot, namespace="team")] == ["s-team"]
        assert [o.id for o in await store.list(Operation, namespace="team")] == ["o-team"]
        assert [t.namespace for t in await store.list(Template)] == ["tea", "team-a", "team", "team0"]

    async def test_a_list_refuses_what_it_can_not_do(self, store: Store) -> None:
        with pytest.raises(InvalidArgument, match="only by: state, template, uid, worker"):
            await store.list(Actor, where={"reason": "x"})
        for limit in (0, -1, MAX_PAGE + 1):
            with pytest.raises(InvalidArgument, match=f"limit {limit}"):
                await store.list(Actor, limit=limit)

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
            assert held.value.metadata["holder"] == "one"
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

    # idempotency

    async def test_a_repeated_request_gets_the_first_operation(self, world: World) -> None:
        key = await world.create(request_id="r1", request_digest="d1")
        before = await dump(world.store)
        create = CreateActor(
            key=key,
            now=world.now,
            operation_id="other",
            uid="other",
            template="t",
            request_id="r1",
            request_digest="d1",
        )
        assert (await world.apply(create)).outcome is Outcome.REPEATED
        assert await dump(world.store) == before
        op = await world.begin(BeginResume, key, request_id="r2")
        again = await world.apply(world.begin_command(BeginResume, key, request_id="r2"))
        assert again.outcome is Outcome.REPEATED and again.operation == op
        await world.finish(op)
        await world.do(BeginSuspend, key)
        again = await world.apply(world.begin_command(BeginResume, key, request_id="r2"))
        assert again.outcome is Outcome.REPEATED and again.operation and again.operation.state is OperationState.DONE
        assert (await world.actor(key)).state is ActorState.SUSPENDED
        await world.do(BeginDelete, key, request_id="r3")
        gone = await world.apply(world.begin_command(BeginDelete, key, request_id="r3"))
        assert gone.outcome is Outcome.REPEATED and gone.actor is None

    async def test_a_request_id_is_for_one_thing_only(self, world: World) -> None:
        """In its namespace: kind, name and arguments must be those of the first time."""
        key = await world.create(request_id="r1", request_digest="d1")
        other = await world.create("b")
        first = await world.begin(BeginResume, key, request_id="r2")
        before = await dump(world.store)
        create: dict[str, Any] = {"now": world.now, "operation_id": "new", "uid": "new", "template": "t"}
        for command, used_by in (
            (world.begin_command(BeginResume, key, request_id="r1"), "Create"),  # of another kind
            (world.begin_command(BeginResume, other, request_id="r2"), first.id),  # of another actor
            (CreateActor(key=Key("ns", "c"), request_id="r1", request_digest="d1", **create), "Create"),
            (CreateActor(key=key, request_id="r1", request_digest="d2", **create), "other arguments"),
            (CreateActor(key=key, request_id="r2", **create), first.id),
        ):
            with pytest.raises(InvalidArgument) as reused:
                await world.apply(command)
            assert reused.value.reason == "REQUEST_ID_REUSED"
            assert used_by in f"{reused.value.message} {reused.value.metadata}"
        assert await dump(world.store) == before
        await world.store.put(template(namespace="ns2"))
        elsewhere = CreateActor(key=Key("ns2", "a"), request_id="r1", request_digest="d2", **create)
        assert (await world.apply(elsewhere)).outcome is Outcome.CHANGED, "another namespace, another request"

    async def test_a_command_whose_reply_was_lost_may_be_sent_again(self, world: World) -> None:
        create = CreateActor(key=Key("ns", "a"), now=1.0, operation_id="op-c", uid="u", template="t")
        assert (await world.apply(create)).outcome is Outcome.CHANGED
        assert (await world.apply(create)).outcome is Outcome.REPEATED
        for cls in (BeginResume, BeginPause, BeginResume, BeginSuspend, BeginDelete):
            begin = world.begin_command(cls, create.key)
            op = (await world.apply(begin)).operation
            assert op is not None
            again = await world.apply(begin)
            assert (again.outcome, again.operation) == (Outcome.REPEATED, op)
            finish = world.finish_command(op)
            done = await world.apply(finish)
            before = await dump(world.store)
            again = await world.apply(finish)
            assert (again.outcome, again.operation) == (Outcome.REPEATED, done.operation)
            again = await world.apply(begin)
            assert (again.outcome, again.operation) == (Outcome.REPEATED, done.operation)
            assert await dump(world.store) == before
        with pytest.raises(AlreadyExists, match="op-c"):
            await world.begin(BeginResume, await world.create("b"), operation_id="op-c")

    async def test_a_repeated_end_is_known_after_the_actor_went_on(self, world: World) -> None:
        key, op = await world.in_state(ActorState.RESUMING)
        assert op is not None
        finish = world.finish_command(op)
        await world.apply(finish)
        await world.do(BeginSuspend, key)
        again = await world.apply(finish)
        assert again.outcome is Outcome.REPEATED and again.actor and again.actor.state is ActorState.SUSPENDED
        failed = await world.begin(BeginResume, key)
        back_out = world.step(BackOut, failed, to_state=ActorState.SUSPENDED, error=FAILURE)
        await world.apply(back_out)
        assert (await world.apply(back_out)).outcome is Outcome.REPEATED
        with pytest.raises(LeaseLost):
            await world.finish(failed)

    # fencing

    @pytest.mark.parametrize("state", sorted(BUSY))
    async def test_a_stale_owner_changes_nothing(self, world: World, state: ActorState) -> None:
        key, op = await world.in_state(state)
        assert op is not None
        taken = await world.apply(TakeOver(key=key, now=world.now, operation_id=op.id, owner="two", force=True))
        assert taken.operation is not None and taken.operation.generation == op.generation + 1
        before = await dump(world.store)
        for stale in (op, replace(taken.operation, id="another")):
            for command in (
                world.finish_command(stale),
                world.step(BackOut, stale, to_state=ActorState.RUNNING, error=FAILURE),
                world.step(Rebind, stale),
                world.step(FallBack, stale, snapshot_id="golden", detail="x"),
                world.step(Advance, stale, phase="later"),
                world.step(RenewLease, stale, owner="one"),
                world.step(RenewLease, stale, owner="two"),
            ):
                with pytest.raises(LeaseLost) as lost:
                    await world.apply(command)
                assert lost.value.metadata["operation"] == stale.id
        assert await dump(world.store) == before
        await world.finish(taken.operation)

    async def test_a_step_of_another_kind_is_refused(self, world: World) -> None:
        _, op = await world.in_state(ActorState.SUSPENDING)
        assert op is not None
        before = await dump(world.store)
        for command in (
            world.finish_command(replace(op, kind=OperationKind.RESUME)),
            world.finish_command(replace(op, kind=OperationKind.DELETE)),
            world.step(Rebind, op),
            world.step(FallBack, op, snapshot_id="golden", detail="x"),
        ):
            with pytest.raises(FailedPrecondition) as refused:
                await world.apply(command)
            assert refused.value.reason == "WRONG_STEP"
        assert await dump(world.store) == before

    # leases

    async def test_a_held_lease_is_not_taken_over_before_it_runs_out(self, world: World) -> None:
        key = await world.create()
        op = await world.begin(BeginResume, key, lease_ttl_s=30.0)
        take = TakeOver(key=key, now=world.now + 29.9, operation_id=op.id, owner="two", lease_ttl_s=30.0)
        with pytest.raises(LeaseHeld) as held:
            await world.apply(take)
        assert held.value.metadata == {"holder": "one", "operation": op.id, "until": f"{world.now + 30:.3f}"}
        change = await world.apply(replace(take, now=world.now + 30.0))
        lease = await world.store.get(Lease, op.uid)
        assert change.lease == lease and (lease.owner, lease.generation) == ("two", op.generation + 1)
        with pytest.raises(LeaseLost):
            await world.finish(op)
        assert change.operation is not None
        await world.finish(change.operation)

    async def test_renewal(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), lease_ttl_s=30.0)
        world.now += 20
        await world.apply(world.step(RenewLease, op, owner="one"))
        assert (await world.store.get(Lease, op.uid)).expires_at == world.now + 30
        before = await dump(world.store)
        with pytest.raises(LeaseLost):
            await world.apply(world.step(RenewLease, op, owner="stranger"))
        world.now += 30
        with pytest.raises(LeaseLost):  # it ran out, though nobody took it
            await world.apply(world.step(RenewLease, op, owner="one"))
        assert await dump(world.store) == before
        await world.apply(TakeOver(key=op.key, now=world.now, operation_id=op.id, owner="one"))

    async def test_a_lease_that_is_renewed_outlives_its_ttl(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), lease_ttl_s=3.0)
        for _ in range(30):
            world.now += 1
            await world.apply(world.step(RenewLease, op, owner="one", lease_ttl_s=3.0))
            with pytest.raises(LeaseHeld):
                await world.apply(TakeOver(key=op.key, now=world.now, operation_id=op.id, owner="two"))
        await world.finish(op)
        assert await world.store.list(Lease) == []

    # slots

    async def test_the_last_slot_is_taken_once(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1})
        keys = [await world.create(f"a{i}") for i in range(8)]
        commands = [world.begin_command(BeginResume, key) for key in keys]
        results = await asyncio.gather(*map(store.apply, commands), return_exceptions=True)
        refused = [r for r in results if isinstance(r, ResourceExhausted)]
        assert len(refused) == 7 and {r.reason for r in refused} == {"NO_CAPACITY"}
        assert (await store.get(Worker, "w1")).used == 1
        await audit(store)

    async def test_full_draining_and_disconnected_workers_take_nobody(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1, "w2": 5, "w3": 5})
        await store.put(replace(await store.get(Worker, "w2"), state=WorkerState.DRAINING))
        await store.put(replace(await store.get(Worker, "w3"), state=WorkerState.DISCONNECTED))
        assert (await world.begin(BeginResume, await world.create("a"))).worker == "w1"
        with pytest.raises(ResourceExhausted):
            await world.begin(BeginResume, await world.create("b"))

    async def test_rebind_moves_the_slot(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), prefer=("w1",))
        change = await world.apply(world.step(Rebind, op, avoid=("w1",)))
        assert change.operation is not None and change.actor is not None and change.source is not None
        assert (change.actor.worker, change.operation.worker, change.operation.attempts) == ("w2", "w2", 2)
        assert {w.name: w.used for w in await world.store.list(Worker)} == {"w1": 0, "w2": 1}
        await world.finish(change.operation)

    async def test_rebind_to_the_only_worker_keeps_its_slot(self, store: Store) -> None:
        world = await World(store).setup({"w1": 1})
        op = await world.begin(BeginResume, await world.create())
        change = await world.apply(world.step(Rebind, op, avoid=("w1",)))
        assert change.operation and change.operation.worker == "w1" and (await store.get(Worker, "w1")).used == 1

    async def test_a_paused_actor_is_never_rebound(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.PAUSED)
        op = await world.begin(BeginResume, key)
        assert op.worker == (await world.actor(key)).worker and op.snapshot == ""
        for command in (world.step(Rebind, op), world.step(FallBack, op, snapshot_id="golden", detail="x")):
            with pytest.raises(FailedPrecondition):
                await world.apply(command)
        await world.finish(op)

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
        assert (await world.crash(key)).outcome is Outcome.ALREADY
        op = await world.begin(BeginResume, key)
        assert op.snapshot == actor.snapshot and (await world.actor(key)).unsaved_since == resumed_at
        await world.finish(op)
        assert (await world.actor(key)).unsaved_since is None

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

    # corrupt snapshots

    async def test_fall_back_to_the_snapshot_before(self, world: World) -> None:
        key = await world.create()
        kept = []
        for _ in range(2):
            await world.do(BeginResume, key)
            kept.append((await world.do(BeginSuspend, key)).snapshot)
        good, bad = kept
        op = await world.begin(BeginResume, key)
        fall = world.step(FallBack, op, snapshot_id=bad, detail="memory.img: wrong digest")
        change = await world.apply(fall)
        assert change.source and change.source.id == good and change.operation and change.operation.snapshot == good
        assert (await world.store.get(Snapshot, bad)).state is SnapshotState.CORRUPT
        again = await world.apply(fall)
        assert again.outcome is Outcome.REPEATED and again.source and again.source.id == good
        await world.finish(change.operation)
        actor = await world.actor(key)
        assert actor.reason == "SnapshotCorrupt" and "wrong digest" in actor.message
        new = (await world.do(BeginSuspend, key)).snapshot
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (new, good), "the corrupt one is no way back"
        found = {s.id: s.state for s in await world.store.list(Snapshot, where={"actor_uid": actor.uid})}
        assert found == {
            good: SnapshotState.PRESENT,
            bad: SnapshotState.CORRUPT,
            new: SnapshotState.PRESENT,
        }
        await world.do(BeginDelete, key)
        found = {s.id: s.state for s in await world.store.list(Snapshot, where={"actor_uid": actor.uid})}
        assert set(found.values()) == {SnapshotState.CONDEMNED}

    async def test_fall_back_to_the_golden_snapshot_and_no_further(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.RUNNING)
        bad = (await world.do(BeginSuspend, key)).snapshot
        op = await world.begin(BeginResume, key)
        change = await world.apply(world.step(FallBack, op, snapshot_id=bad, detail="short"))
        assert change.source and change.source.id == "golden" and change.operation
        assert (await world.actor(key)).snapshot == "" and "golden" in (await world.actor(key)).message
        with pytest.raises(FailedPrecondition) as end:
            await world.apply(world.step(FallBack, op, snapshot_id="golden", detail="short too"))
        assert end.value.reason == "SNAPSHOT_CORRUPT"
        await world.back_out(change.operation, ActorState.SUSPENDED)

    async def test_fall_back_moves_to_a_worker_that_can_run_the_older_snapshot(self, store: Store) -> None:
        world = await World(store).setup({"old": 1})
        key = await world.create()
        for _ in range(2):
            await world.do(BeginResume, key)
            await world.do(BeginSuspend, key)
        latest = await store.get(Snapshot, (await world.actor(key)).snapshot)
        await store.put(replace(latest, fingerprint="f2"))
        await store.put(worker("new", fingerprint="f2"))
        op = await world.begin(BeginResume, key)
        assert op.worker == "new"
        change = await world.apply(world.step(FallBack, op, snapshot_id=latest.id, detail="short"))
        assert change.operation and change.operation.worker == "old"
        await world.finish(change.operation)

    async def test_a_condemned_snapshot_is_not_resumed_from(self, world: World) -> None:
        key = await world.create()
        golden = await world.store.get(Snapshot, "golden")
        await world.store.put(replace(golden, state=SnapshotState.CONDEMNED))
        with pytest.raises(FailedPrecondition) as refused:
            await world.begin(BeginResume, key)
        assert refused.value.reason == "SNAPSHOT_CONDEMNED"

    async def test_the_golden_actor_boots_and_leaves_its_snapshot(self, store: Store) -> None:
        world = World(store)
        await store.put(worker("w1"))
        await store.put(template(state=TemplateState.PREPARING, golden_snapshot=""))
        key = await world.create("_golden", golden=True)
        boot = await world.do(BeginResume, key)
        assert boot.snapshot == ""
        made = await world.do(BeginSuspend, key)
        await world.do(BeginDelete, key)
        left = await store.get(Snapshot, made.snapshot)
        assert left.golden and left.state is SnapshotState.PRESENT

    async def test_advance_records_the_phase(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create())
        world.now += 5
        await world.apply(world.step(Advance, op, phase="restore"))
        stored = await world.store.get(Operation, op.id)
        assert (stored.phase, stored.updated_at, stored.version) == ("restore", world.now, 2)

    # watching, trimming, closing

    async def test_watchers_see_every_write_in_order_once_it_can_be_read(self, world: World) -> None:
        watch = world.store.watch()
        key = await world.create()
        op = await world.begin(BeginResume, key, prefer=("w1",))
        with pytest.raises(LeaseHeld):
            await world.begin(BeginDelete, key)
        await world.finish(op)
        await world.do(BeginDelete, key)
        await world.store.remove(await world.store.get(Template, "ns/t"))
        seen: list[Event] = []
        while not seen or not isinstance(seen[-1].record, Template):
            seen.append(await anext(watch))
        assert [e.sequence for e in seen] == list(range(seen[0].sequence, seen[0].sequence + len(seen)))
        actors = [(e.type, e.record.state) for e in seen if isinstance(e.record, Actor)]
        S, put, deleted = ActorState, EventType.PUT, EventType.DELETED
        assert actors == [
            (put, S.SUSPENDED),
            (put, S.RESUMING),
            (put, S.RUNNING),
            (put, S.DELETING),
            (deleted, S.DELETING),
        ]
        assert [e.record.used for e in seen if isinstance(e.record, Worker)] == [1, 0]
        assert seen[-1].type is deleted

    async def test_an_event_comes_after_its_write_can_be_read(self, world: World) -> None:
        async def reader() -> None:
            async for event in watch:
                if isinstance(event.record, Operation) and event.record.state is OperationState.DONE:
                    assert (await world.store.get(Operation, event.record.id)).version >= event.record.version
                    if event.record.kind is OperationKind.SUSPEND:
                        assert (await world.actor(event.record.key)).state is ActorState.SUSPENDED
                        return

        watch = world.store.watch()
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(reader())
            key, _ = await world.in_state(ActorState.RUNNING)
            await world.do(BeginSuspend, key)

    async def test_a_slow_watcher_is_told(self, store: Store) -> None:
        slow, quick = store.watch(capacity=3), store.watch()
        for i in range(4):
            await store.put(operation(f"o{i}"))
        with pytest.raises(ResourceExhausted) as error:
            await anext(slow)
        assert error.value.reason == "WATCH_TOO_SLOW"
        assert [(await anext(quick)).record.pk for _ in range(4)] == ["o0", "o1", "o2", "o3"]

    async def test_trim_drops_the_oldest_finished_operations(self, world: World) -> None:
        key = await world.create("z")
        running = await world.begin(BeginResume, key)
        for i in range(10):
            await world.create(f"a{i}", request_id=f"r{i}")
        assert await world.store.trim(keep=4) == 7  # ten and that of "z" are finished
        left = await world.store.list(Operation)
        assert len(left) == 5 and running.id in {o.id for o in left}
        assert {o.name for o in left} == {"z", "a6", "a7", "a8", "a9"}
        assert await world.store.trim(keep=4) == 0
        await audit(world.store)
        with pytest.raises(AlreadyExists):  # its request is forgotten
            await world.create("a0", request_id="r0")

    async def test_after_close_every_call_is_refused(self, world: World) -> None:
        store, watch = world.store, world.store.watch()
        key = await world.create()
        await store.close()
        await store.close()
        seen = [await anext(watch), await anext(watch)]
        assert [type(e.record) for e in seen] == [Actor, Operation]
        with pytest.raises(Unavailable):
            await anext(watch)
        for call in (
            lambda: store.get(Actor, str(key)),
            lambda: store.list(Actor),
            lambda: store.apply(world.begin_command(BeginDelete, key)),
            lambda: store.put(template("x")),
            lambda: store.remove(template("x")),
            lambda: store.trim(),
        ):
            with pytest.raises(Unavailable):
                await call()
        with pytest.raises(Unavailable):
            store.watch()

    async def test_a_cancelled_caller_harms_nobody(self, world: World) -> None:
        keys = [await world.create(f"a{i:02}") for i in range(40)]
        commands = [world.begin_command(BeginDelete, key) for key in keys]
        tasks = [asyncio.ensure_future(world.store.apply(c)) for c in commands]
        await asyncio.sleep(0)  # all are submitted
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, Change) for r in results[1::2])
        await audit(world.store)
        for command in commands[::2]:  # it may or may not have happened; it can be asked again
            assert (await world.store.apply(command)).operation is not None
        assert len(await world.store.list(Actor, where={"state": "Deleting"})) == 40
