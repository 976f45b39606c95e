"""What an operation says about itself, and what others may do to it."""

from __future__ import annotations

import pytest
from core_views import GOLDEN, KEY, RESUMING, S, actor, begin, step, under_way
from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core.errors import FailedPrecondition, LeaseHeld, LeaseLost, NotFound
from greenroom.core.lifecycle import decide
from greenroom.core.placement import MAX_REJECTIONS
from greenroom.core.records import (
    Actor,
    ActorState,
    OperationKind,
    OperationState,
    Rejection,
    Snapshot,
    SnapshotState,
    WorkerState,
)
from greenroom.testing.contracts.store_world import ENDPOINT, FAILURE, made_by, operation, snapshot, worker

# --- cancelling -------------------------------------------------------------------------------------------

CANCEL = lc.RequestCancel(key=KEY, now=9.0, operation_id="op")


@pytest.mark.parametrize(
    ("kind", "state", "origin"),
    [
        (OperationKind.RESUME, S.RESUMING, S.SUSPENDED),
        (OperationKind.SUSPEND, S.SUSPENDING, S.RUNNING),
        (OperationKind.PAUSE, S.PAUSING, S.RUNNING),
    ],
)
def test_a_cancellation_is_a_request_to_the_driver(kind: OperationKind, state: ActorState, origin: ActorState) -> None:
    change = decide(under_way(kind, state, origin), CANCEL)
    op = change.operation
    assert op and op.cancel_requested and op.state is OperationState.RUNNING and op.version == 2
    assert change.actor is None and change.lease is None and change.drop_lease == "", "only the driver backs it out"
    again = decide(replace(under_way(kind, state, origin), operation=op), CANCEL)
    assert (again.outcome, again.operation) == (lc.Outcome.ALREADY, op)


def test_a_preparation_can_be_cancelled_though_no_actor_is_there() -> None:
    prepare = operation("op", name="t", version=1)
    change = decide(lc.View(operation=prepare), replace(CANCEL, key=prepare.key))
    assert change.operation and change.operation.cancel_requested


@pytest.mark.parametrize("state", [OperationState.DONE, OperationState.FAILED])
def test_what_has_ended_is_an_answer(state: OperationState) -> None:
    assert RESUMING.operation
    ended = replace(RESUMING.operation, state=state)
    change = decide(replace(RESUMING, operation=ended), CANCEL)
    assert (change.outcome, change.operation) == (lc.Outcome.ALREADY, ended)


def test_a_delete_is_not_taken_back() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        decide(under_way(OperationKind.DELETE, S.DELETING, S.RUNNING), CANCEL)
    assert refused.value.reason == "NOT_CANCELLABLE"


def test_a_cancellation_of_nothing() -> None:
    assert RESUMING.operation
    of_another = replace(RESUMING, operation=replace(RESUMING.operation, name="b"))
    for view in (replace(RESUMING, operation=None), of_another):
        with pytest.raises(NotFound) as unknown:
            decide(view, CANCEL)
        assert unknown.value.reason == "OPERATION_NOT_FOUND"


def test_a_cancelled_operation_still_ends_as_its_driver_says() -> None:
    """The request may come when it is all but done."""
    assert RESUMING.operation
    asked = replace(RESUMING, operation=replace(RESUMING.operation, cancel_requested=True))
    done = decide(asked, step(lc.FinishResume, endpoint=ENDPOINT))
    assert done.operation and done.operation.state is OperationState.DONE
    back = decide(asked, step(lc.BackOut, to_state=S.SUSPENDED, error=FAILURE))
    assert back.operation and back.operation.cancel_requested and back.operation.state is OperationState.FAILED


# --- giving the lease away --------------------------------------------------------------------------------

RELEASE = step(lc.ReleaseLease, owner="one")


def test_a_released_lease_can_be_taken_over_at_once() -> None:
    change = decide(RESUMING, RELEASE)
    assert change.lease and change.lease.expires_at == RELEASE.now and change.lease.generation == 4
    assert change.actor is None and change.operation is None, "the operation goes on"
    released = replace(RESUMING, lease=change.lease)
    with pytest.raises(LeaseLost):
        decide(released, step(lc.RenewLease, owner="one"))
    taken = decide(released, lc.TakeOver(key=KEY, now=9.0, operation_id="op", owner="two"))
    assert taken.lease and (taken.lease.owner, taken.lease.generation) == ("two", 5)


def test_a_lease_is_released_by_its_owner_only() -> None:
    assert RESUMING.lease
    for view, command in (
        (RESUMING, replace(RELEASE, owner="stranger")),
        (replace(RESUMING, lease=None), RELEASE),
        (replace(RESUMING, lease=replace(RESUMING.lease, owner="two")), RELEASE),
    ):
        assert decide(view, command) == lc.Change(outcome=lc.Outcome.ALREADY)
    with pytest.raises(LeaseLost):
        decide(RESUMING, replace(RELEASE, generation=3))


# --- what an operation says -------------------------------------------------------------------------------


def test_owner_and_takeovers() -> None:
    view = replace(RESUMING, actor=actor(S.SUSPENDED), operation=None, lease=None)
    op = decide(view, begin(lc.BeginResume)).operation
    assert op and (op.owner, op.takeovers, op.attempts) == ("two", 0, 1)
    taken = decide(RESUMING, lc.TakeOver(key=KEY, now=99.0, operation_id="op", owner="three")).operation
    assert taken and (taken.owner, taken.takeovers, taken.generation) == ("three", 1, 5)
    assert RESUMING.actor and RESUMING.lease
    again = replace(RESUMING, operation=taken, actor=replace(RESUMING.actor, generation=5))
    twice = decide(again, lc.TakeOver(key=KEY, now=99.0, operation_id="op", owner="one")).operation
    assert twice and (twice.owner, twice.takeovers, twice.generation) == ("one", 2, 6)


@pytest.mark.parametrize(
    ("kind", "state", "origin", "end"),
    [
        (OperationKind.RESUME, S.RESUMING, S.SUSPENDED, S.RUNNING),
        (OperationKind.SUSPEND, S.SUSPENDING, S.PAUSED, S.SUSPENDED),
        (OperationKind.PAUSE, S.PAUSING, S.RUNNING, S.PAUSED),
        (OperationKind.DELETE, S.DELETING, S.RUNNING, None),
    ],
)
def test_where_it_came_from_and_where_it_led(
    kind: OperationKind, state: ActorState, origin: ActorState, end: ActorState | None
) -> None:
    view = under_way(kind, state, origin)
    assert view.operation
    view = replace(view, operation=replace(view.operation, snapshot="new"))
    assert view.operation and view.operation.to_state is None
    commands: dict[OperationKind, lc.OperationCommand] = {
        OperationKind.RESUME: step(lc.FinishResume, endpoint=ENDPOINT),
        OperationKind.SUSPEND: step(lc.FinishSuspend, snapshot=made_by(view.operation)),
        OperationKind.PAUSE: step(lc.FinishPause),
        OperationKind.DELETE: step(lc.FinishDelete),
    }
    done = decide(view, commands[kind]).operation
    assert done and (done.from_state, done.to_state) == (origin, end)
    back_to = S.DELETING if end is None else origin
    failed = decide(view, step(lc.BackOut, to_state=back_to, error=FAILURE)).operation
    assert failed and (failed.from_state, failed.to_state, failed.error) == (origin, back_to, FAILURE)


def test_a_crash_is_an_operation_that_has_ended() -> None:
    alive = replace(RESUMING, actor=actor(S.PAUSED, worker="w1", snapshot="last"), operation=None, lease=None)
    crash = lc.Crash(key=KEY, now=9.0, operation_id="x", uid="u", worker="w1", generation=4, reason="Gone", message="m")
    change = decide(alive, crash)
    op = change.operation
    assert op and (op.id, op.kind, op.state, op.cause) == ("x", OperationKind.CRASH, OperationState.DONE, "recovery")
    assert (op.from_state, op.to_state, op.worker, op.snapshot) == (S.PAUSED, S.CRASHED, "w1", "last")
    assert op.created_at == op.finished_at == 9.0 and op.version == 1 and op.generation == 4
    assert op.error and (op.error.code, op.error.reason, op.error.message) == ("UNAVAILABLE", "Gone", "m")
    assert change.actor and change.actor.operation == "" and change.lease is None, "nobody has to go on with it"


# --- which workers it could not have ----------------------------------------------------------------------


def asleep(**fields: object) -> lc.View:
    return replace(RESUMING, actor=actor(S.SUSPENDED, **fields), operation=None, lease=None)


def test_a_resume_says_which_workers_it_could_not_have() -> None:
    workers = (
        worker("full", used=2),
        worker("gone", state=WorkerState.STALLED),
        worker("good"),
        worker("ill", failures=3, quarantined_until=99.0),
        worker("far"),
    )
    view = replace(asleep(), workers=workers)
    op = decide(view, begin(lc.BeginResume, reachable=("full", "gone", "good", "ill"))).operation
    assert op and op.worker == "good"
    said = {r.worker: r.why for r in op.rejected}
    assert set(said) == {"full", "gone", "ill", "far"}
    assert "full" in said["full"] and "Stalled" in said["gone"]
    assert "quarantine" in said["ill"] and "connected" in said["far"]


def test_a_rebind_adds_the_one_that_failed_and_keeps_a_bounded_number() -> None:
    change = decide(RESUMING, step(lc.Rebind, avoid=("w1",), why="UNAVAILABLE: no route"))
    op = change.operation
    assert op and (op.worker, op.attempts) == ("w2", 2)
    assert op.rejected == (Rejection(worker="w1", why="UNAVAILABLE: no route"),)
    assert RESUMING.operation
    many = tuple(Rejection(worker=f"x{i:02}", why="is full") for i in range(MAX_REJECTIONS))
    view = replace(RESUMING, operation=replace(RESUMING.operation, rejected=many))
    op = decide(view, step(lc.Rebind, avoid=("w1",))).operation
    assert op and len(op.rejected) == MAX_REJECTIONS
    assert op.rejected[-1] == Rejection(worker="w1", why="failed") and op.rejected[0].worker == "x01"


def test_rebind_and_fall_back_go_only_where_the_replica_can_reach() -> None:
    view = replace(RESUMING, workers=(worker("w1", used=1), worker("w2"), worker("w3")))
    op = decide(view, step(lc.Rebind, avoid=("w1",), reachable=("w3",))).operation
    assert op and op.worker == "w3"
    assert view.actor and view.operation
    view = replace(
        view,
        actor=replace(view.actor, snapshot="bad"),
        operation=replace(view.operation, snapshot="bad"),
        source=snapshot("bad", version=1),
        golden=replace(GOLDEN, fingerprint="f2"),
        workers=(worker("w1", used=1), worker("w2", fingerprint="f2"), worker("w3", fingerprint="f2")),
    )
    op = decide(view, step(lc.FallBack, snapshot_id="bad", detail="short", reachable=("w3",))).operation
    assert op and op.worker == "w3"


def test_the_labels_of_template_and_actor_both_count() -> None:
    view = asleep(worker_selector={"disk": "ssd"})
    assert view.template
    spec = replace(view.template.spec, worker_selector={"zone": "a"})
    both = worker("w3", labels={"zone": "a", "disk": "ssd"})
    some = (worker("w1", labels={"zone": "a"}), worker("w2", labels={"disk": "ssd"}))
    view = replace(view, template=replace(view.template, spec=spec), workers=(*some, both))
    op = decide(view, begin(lc.BeginResume)).operation
    assert op and op.worker == "w3" and {r.worker for r in op.rejected} == {"w1", "w2"}
    with pytest.raises(FailedPrecondition) as never:
        decide(replace(view, workers=some), begin(lc.BeginResume))
    assert never.value.reason == "NO_COMPATIBLE_WORKER"


def test_a_snapshot_that_is_on_one_worker_wakes_there_or_waits() -> None:
    local: Snapshot = snapshot("s", state=SnapshotState.LOCAL, worker="w2", version=1)
    view = replace(asleep(snapshot="s", last_worker="w1"), source=local)
    woken: Actor | None = decide(view, begin(lc.BeginResume, prefer=("w1",))).actor
    assert woken and woken.worker == "w2"


def test_a_taken_over_operation_is_held_by_its_new_owner() -> None:
    taken = decide(RESUMING, lc.TakeOver(key=KEY, now=30.0, operation_id="op", owner="two", lease_ttl_s=5.0))
    view = replace(RESUMING, actor=taken.actor, operation=taken.operation, lease=taken.lease)
    with pytest.raises(LeaseHeld) as held:
        decide(view, lc.TakeOver(key=KEY, now=31.0, operation_id="op", owner="one"))
    assert held.value.metadata == {"holder": "two", "operation": "op", "until": "35.000"}
