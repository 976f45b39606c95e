"""Of the contract of stores: repeated requests, fencing, leases."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.commands import (
    Advance,
    BackOut,
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Change,
    CreateActor,
    FallBack,
    Outcome,
    Rebind,
    ReleaseLease,
    RenewLease,
    RequestCancel,
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
)
from greenroom.core.records import ActorState, Key, Lease, Operation, OperationKind, OperationState
from greenroom.testing.contracts.store_life import BUSY
from greenroom.testing.contracts.store_world import FAILURE, World, audit, dump, operation, template


class Leases:
    """Who may change an actor, and what is done once only."""

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

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("state", sorted(BUSY))
    async def test_a_stale_owner_changes_nothing(self, world: World, state: ActorState, force: bool) -> None:
        """Whether its lease ran out, or it was known to be dead and was not."""
        key, op = await world.in_state(state)
        assert op is not None
        if not force:
            world.now += 30
        taken = await world.apply(TakeOver(key=key, now=world.now, operation_id=op.id, owner="two", force=force))
        assert taken.operation is not None and taken.operation.generation == op.generation + 1
        assert (taken.operation.owner, taken.operation.takeovers) == ("two", 1)
        before = await dump(world.store)
        for stale in (op, replace(taken.operation, id="another")):
            for command in steps_of(world, stale):
                with pytest.raises(LeaseLost) as lost:
                    await world.apply(command)
                assert lost.value.metadata["operation"] == stale.id and lost.value.code == "ABORTED"
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
        assert held.value.code == "ABORTED"
        assert held.value.metadata == {"holder": "one", "operation": op.id, "until": f"{world.now + 30:.3f}"}
        change = await world.apply(replace(take, now=world.now + 30.0))
        lease = await world.store.get(Lease, op.uid)
        assert change.lease == lease and (lease.owner, lease.generation) == ("two", op.generation + 1)
        with pytest.raises(LeaseLost):
            await world.finish(op)
        assert change.operation is not None
        await world.finish(change.operation)

    async def test_a_refresh_by_its_owner_extends_a_lease(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), lease_ttl_s=30.0)
        world.now += 20
        await world.apply(world.step(RenewLease, op, owner="one"))
        lease = await world.store.get(Lease, op.uid)
        assert (lease.expires_at, lease.owner, lease.generation) == (world.now + 30, "one", op.generation)
        world.now += 29
        with pytest.raises(LeaseHeld):
            await world.apply(TakeOver(key=op.key, now=world.now, operation_id=op.id, owner="two"))

    async def test_a_refresh_after_a_lease_has_run_out_finds_it_lost(self, world: World) -> None:
        """Though nobody has taken it: somebody may be about to."""
        op = await world.begin(BeginResume, await world.create(), lease_ttl_s=30.0)
        before = await dump(world.store)
        for late in (30.0, 31.0, 3000.0):
            with pytest.raises(LeaseLost):
                await world.apply(world.step(RenewLease, op, owner="one", now=world.now + late))
        assert await dump(world.store) == before
        world.now += 30
        again = await world.apply(TakeOver(key=op.key, now=world.now, operation_id=op.id, owner="one"))
        assert again.operation and again.operation.generation == op.generation + 1
        await world.finish(again.operation)

    async def test_a_refresh_by_a_stranger_neither_extends_nor_steals_a_lease(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), lease_ttl_s=30.0)
        before = await dump(world.store)
        for later in (0.0, 29.0, 30.0, 31.0):
            with pytest.raises(LeaseLost):
                await world.apply(world.step(RenewLease, op, owner="stranger", now=world.now + later))
        assert await dump(world.store) == before
        world.now += 29
        await world.apply(world.step(RenewLease, op, owner="one"))
        await world.finish(op)

    async def test_a_lease_that_is_renewed_outlives_its_ttl(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create(), lease_ttl_s=3.0)
        for _ in range(30):
            world.now += 1
            await world.apply(world.step(RenewLease, op, owner="one", lease_ttl_s=3.0))
            with pytest.raises(LeaseHeld):
                await world.apply(TakeOver(key=op.key, now=world.now, operation_id=op.id, owner="two"))
        await world.finish(op)
        assert await world.store.list(Lease) == []

    async def test_a_released_lease_is_taken_over_at_once(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create())
        stranger = await world.apply(world.step(ReleaseLease, op, owner="two"))
        assert stranger.outcome is Outcome.ALREADY
        take = TakeOver(key=op.key, now=world.now, operation_id=op.id, owner="two")
        with pytest.raises(LeaseHeld):
            await world.apply(take)
        await world.apply(world.step(ReleaseLease, op, owner="one"))
        with pytest.raises(LeaseLost):
            await world.apply(world.step(RenewLease, op, owner="one"))
        taken = await world.apply(take)
        assert taken.operation is not None and taken.operation.owner == "two"
        with pytest.raises(LeaseLost):
            await world.finish(op)
        await world.finish(taken.operation)

    async def test_of_many_who_take_over_one_wins(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create())
        world.now += 30
        takes = [TakeOver(key=op.key, now=world.now, operation_id=op.id, owner=f"o{i}") for i in range(20)]
        results = await asyncio.gather(*map(world.store.apply, takes), return_exceptions=True)
        [won] = [r for r in results if isinstance(r, Change)]
        assert sum(isinstance(r, LeaseHeld) for r in results) == 19
        stored = await world.store.get(Operation, op.id)
        assert won.operation == stored and (stored.generation, stored.takeovers) == (op.generation + 1, 1)
        assert (await world.store.get(Lease, op.uid)).owner == stored.owner
        await audit(world.store)

    async def test_of_many_who_begin_one_holds_the_actor(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.RUNNING)
        kinds = (BeginSuspend, BeginPause, BeginDelete)
        commands = [world.begin_command(kinds[i % 3], key, owner=f"o{i}") for i in range(30)]
        results = await asyncio.gather(*map(world.store.apply, commands), return_exceptions=True)
        assert all(isinstance(r, Change | LeaseHeld) for r in results)
        changes = [r for r in results if isinstance(r, Change)]
        [won] = [c for c in changes if c.outcome is Outcome.CHANGED]
        joined = [c for c in changes if c.outcome is Outcome.JOINED]
        assert won.operation is not None and {c.operation for c in joined} <= {won.operation} and len(joined) == 9
        held = [r for r in results if isinstance(r, LeaseHeld)]
        assert len(held) == 20 and {h.metadata["operation"] for h in held} == {won.operation.id}
        await audit(world.store)
        await world.finish(won.operation)

    async def test_namesakes_in_two_namespaces_never_block_each_other(self, world: World) -> None:
        await world.store.put(template(namespace="ns2"))
        one, two = await world.create(), await world.create(namespace="ns2")
        first = await world.begin(BeginResume, one)
        second = await world.begin(BeginResume, two, owner="two")
        leases = {lease.uid: lease.owner for lease in await world.store.list(Lease)}
        assert leases == {first.uid: "one", second.uid: "two"}
        before = await dump(world.store)
        with pytest.raises(NotFound):  # the other's operation is not this one's
            await world.apply(TakeOver(key=two, now=world.now, operation_id=first.id, owner="x", force=True))
        with pytest.raises(NotFound):
            await world.apply(RequestCancel(key=two, now=world.now, operation_id=first.id))
        for command in steps_of(world, first):
            with pytest.raises(LeaseLost):
                await world.apply(replace(command, key=two))
        assert await dump(world.store) == before
        await world.finish(first)
        assert (await world.actor(two)).state is ActorState.RESUMING
        await world.finish(second)
        await world.do(BeginDelete, one)
        assert (await world.actor(two)).state is ActorState.RUNNING

    # cancelling

    @pytest.mark.parametrize("state", sorted(BUSY))
    async def test_a_cancellation_is_seen_by_whoever_drives(self, world: World, state: ActorState) -> None:
        key, op = await world.in_state(state)
        assert op is not None
        cancel = RequestCancel(key=key, now=world.now, operation_id=op.id)
        if state is ActorState.DELETING:
            with pytest.raises(FailedPrecondition) as refused:
                await world.apply(cancel)
            assert refused.value.reason == "NOT_CANCELLABLE"
            return
        actor = await world.actor(key)
        change = await world.apply(cancel)
        stored = await world.store.get(Operation, op.id)
        assert change.operation == stored and stored.cancel_requested and stored.state is OperationState.RUNNING
        assert await world.actor(key) == actor, "its driver backs it out"
        assert (await world.apply(cancel)).outcome is Outcome.ALREADY
        await world.apply(world.step(RenewLease, op, owner="one"))
        assert (await world.store.get(Operation, op.id)).cancel_requested, "what the driver writes keeps it"
        await world.apply(world.step(Advance, op, phase="later"))
        assert (await world.store.get(Operation, op.id)).cancel_requested
        taken = await world.apply(TakeOver(key=key, now=world.now, operation_id=op.id, owner="two", force=True))
        assert taken.operation and taken.operation.cancel_requested, "and whoever takes it over knows"
        assert op.from_state is not None
        await world.back_out(taken.operation, op.from_state)
        ended = await world.apply(cancel)
        assert ended.outcome is Outcome.ALREADY and ended.operation and ended.operation.state is OperationState.FAILED

    async def test_a_cancellation_of_what_does_not_exist(self, world: World) -> None:
        key = await world.create()
        before = await dump(world.store)
        with pytest.raises(NotFound) as unknown:
            await world.apply(RequestCancel(key=key, now=world.now, operation_id="ghost"))
        assert unknown.value.reason == "OPERATION_NOT_FOUND"
        assert await dump(world.store) == before

    async def test_a_preparation_can_be_cancelled(self, world: World) -> None:
        """Which has no actor."""
        prepare = await world.store.put(operation("prepare"))
        await world.store.apply(RequestCancel(key=prepare.key, now=world.now, operation_id="prepare"))
        stored = await world.store.get(Operation, "prepare")
        assert stored.cancel_requested and stored.version == prepare.version + 1
        with pytest.raises(Conflict):  # its driver reads again, and sees it
            await world.store.put(prepare)
        ended = replace(stored, state=OperationState.FAILED, finished_at=world.now)
        await world.store.put(ended)


def steps_of(world: World, op: Operation) -> list[Any]:
    """Every command that goes on with an operation."""
    return [
        world.finish_command(op),
        world.step(BackOut, op, to_state=ActorState.RUNNING, error=FAILURE),
        world.step(Rebind, op),
        world.step(FallBack, op, snapshot_id="golden", detail="x"),
        world.step(Advance, op, phase="later"),
        world.step(RenewLease, op, owner="one"),
        world.step(RenewLease, op, owner="two"),
        world.step(ReleaseLease, op, owner="one"),
        world.step(ReleaseLease, op, owner="two"),
    ]
