"""Of the contract of stores: repeated requests, fencing, leases."""

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
    CreateActor,
    FallBack,
    Outcome,
    Rebind,
    RenewLease,
    TakeOver,
)
from greenroom.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LeaseHeld,
    LeaseLost,
)
from greenroom.core.records import (
    ActorState,
    Key,
    Lease,
    OperationKind,
    OperationState,
)
from greenroom.testing.contracts.store_life import BUSY
from greenroom.testing.contracts.store_world import (
    FAILURE,
    World,
    dump,
    template,
)


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
