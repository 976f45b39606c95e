"""`decide`: what needs no store to be seen. What holds across commands is in the contract of stores."""

from __future__ import annotations

import typing

import msgspec
import pytest
from core_views import GOLDEN, KEY, RESUMING, S, actor, begin, step, under_way
from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core.errors import FailedPrecondition, LeaseHeld, LeaseLost, NotFound
from greenroom.core.lifecycle import decide
from greenroom.core.records import ActorState, OnCrash, OperationKind, OperationState, SnapshotState
from greenroom.testing.contracts.store_world import ENDPOINT, FAILURE, snapshot, worker

COMMANDS: tuple[type[lc.Command], ...] = typing.get_args(lc.ActorCommand)


def test_every_command_says_what_it_needs_and_travels_as_json() -> None:
    parts = set(lc.View.__struct_fields__) - {"actor", "operation"}
    known = parts | {"restart"}  # what only an actor that has crashed needs
    for cls in COMMANDS:
        assert cls.needs <= known, cls
        assert "needs" not in cls.__struct_fields__ and "kind" not in cls.__struct_fields__
    command = step(lc.BackOut, to_state=S.CRASHED, error=FAILURE)
    assert msgspec.json.decode(msgspec.json.encode(command), type=lc.BackOut) == command


def test_decide_changes_nothing_that_it_was_given() -> None:
    before = msgspec.json.encode(RESUMING)
    change = decide(RESUMING, step(lc.FinishResume, endpoint=ENDPOINT))
    assert msgspec.json.encode(RESUMING) == before
    assert change.actor and (change.actor.state, change.actor.version) == (S.RUNNING, 8)
    assert change.slots == () and change.drop_lease == "u"


@pytest.mark.parametrize("state", S)
def test_a_lost_operation_row_does_not_wedge_an_actor(state: ActorState) -> None:
    """Even of a busy actor: delete finds its way when nothing says who works on it."""
    view = lc.View(actor=actor(state, worker="w1" if state is not S.SUSPENDED else "", operation="lost"))
    change = decide(view, begin(lc.BeginDelete))
    assert change.actor and change.operation and change.lease
    assert (change.actor.state, change.actor.operation) == (S.DELETING, "op2")
    assert change.operation.generation == change.lease.generation == change.actor.generation == 5
    assert change.slots == (), "freed when the sandbox is gone"


def test_every_begin_bumps_the_generation_and_says_where_it_came_from() -> None:
    for cls, origin in (
        (lc.BeginResume, S.PAUSED),
        (lc.BeginResume, S.CRASHED),
        (lc.BeginSuspend, S.RUNNING),
        (lc.BeginSuspend, S.PAUSED),
        (lc.BeginPause, S.RUNNING),
        (lc.BeginDelete, S.CRASHED),
    ):
        bound = "w1" if origin in (S.PAUSED, S.RUNNING) else ""
        view = replace(RESUMING, actor=actor(origin, worker=bound), operation=None, lease=None)
        change = decide(view, begin(cls, deadline_s=10.0, lease_ttl_s=3.0, cause="idle"))
        op = change.operation
        assert op and change.actor and change.lease
        assert (op.from_state, op.generation, op.deadline_at, op.cause) == (origin, 5, 19.0, "idle")
        assert (change.lease.expires_at, change.lease.owner) == (12.0, "two")
        assert change.slots == ((("w2", 1),) if cls is lc.BeginResume and not bound else ())


@pytest.mark.parametrize("field", ["operation_id", "generation", "state", "actor", "bound"])
def test_the_fence(field: str) -> None:
    view, command = RESUMING, step(lc.FinishResume, endpoint=ENDPOINT)
    assert view.actor and view.operation
    match field:
        case "operation_id":
            command = replace(command, operation_id="other")
        case "generation":
            command = replace(command, generation=3)
        case "state":
            view = replace(view, operation=replace(view.operation, state=OperationState.FAILED))
        case "actor":
            view = replace(view, actor=None)
        case _:
            view = replace(view, actor=replace(view.actor, operation="newer"))
    with pytest.raises(LeaseLost, match="operation"):
        decide(view, command)


def test_a_repeated_end_is_no_failure_only_for_who_made_it() -> None:
    assert RESUMING.operation and RESUMING.actor
    done = replace(RESUMING.operation, state=OperationState.DONE)
    for now in (actor(S.RUNNING), actor(S.DELETING, generation=6, operation="delete"), None):
        view = replace(RESUMING, actor=now, operation=done)
        change = decide(view, step(lc.FinishResume, endpoint=ENDPOINT))
        assert (change.outcome, change.operation, change.actor) == (lc.Outcome.REPEATED, done, now)
    namesake = replace(RESUMING, actor=actor(S.RUNNING, uid="other"), operation=done)
    assert decide(namesake, step(lc.FinishResume, endpoint=ENDPOINT)).actor is None
    for command in (
        step(lc.BackOut, to_state=S.SUSPENDED, error=FAILURE),
        step(lc.FinishPause),
        replace(step(lc.FinishResume, endpoint=ENDPOINT), generation=3),
    ):
        with pytest.raises(LeaseLost):
            decide(replace(RESUMING, actor=actor(S.RUNNING), operation=done), command)


def test_finish_suspend_condemns_only_what_nobody_wants() -> None:
    view = under_way(OperationKind.SUSPEND, S.SUSPENDING, S.RUNNING)
    assert view.actor and view.operation
    view = replace(
        view,
        actor=replace(view.actor, snapshot="last", previous_snapshot="older"),
        operation=replace(view.operation, snapshot="new"),
        source=snapshot("last", version=1),
    )
    command = step(lc.FinishSuspend, snapshot=snapshot("new"))
    older = snapshot("older", version=1)
    change = decide(replace(view, previous=older), command)
    assert [(s.id, s.state) for s in change.snapshots] == [
        ("new", SnapshotState.PRESENT),
        ("older", SnapshotState.CONDEMNED),
    ]
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("new", "last")
    assert change.slots == (("w1", -1),) and change.actor.last_worker == "w1"
    for kept in (None, replace(older, golden=True), replace(older, state=SnapshotState.CONDEMNED)):
        assert [s.id for s in decide(replace(view, previous=kept), command).snapshots] == ["new"]


def test_what_may_have_run_on_after_its_snapshot_is_crashed_and_says_since_when() -> None:
    view = under_way(OperationKind.SUSPEND, S.SUSPENDING, S.RUNNING)
    assert view.actor and view.operation
    view = replace(view, operation=replace(view.operation, snapshot="new"))
    made = snapshot("new")
    command = step(lc.FinishSuspend, snapshot=made, ran_on=FAILURE)
    change = decide(view, command)
    assert change.actor and change.operation
    assert (change.actor.state, change.actor.snapshot, change.actor.worker) == (S.CRASHED, "new", "")
    assert (change.actor.unsaved_since, change.actor.reason) == (made.created_at, FAILURE.reason)
    assert (change.operation.state, change.operation.error) == (OperationState.FAILED, FAILURE)
    # Its reply was lost, and it is sent again.
    again = decide(replace(view, actor=change.actor, operation=change.operation, lease=None), command)
    assert (again.outcome, again.operation) == (lc.Outcome.REPEATED, change.operation)
    with pytest.raises(LeaseLost):
        decide(replace(view, actor=change.actor, operation=change.operation, lease=None), replace(command, ran_on=None))


def test_finish_delete_condemns_what_is_left_but_golden_ones() -> None:
    view = under_way(OperationKind.DELETE, S.DELETING, S.PAUSED)
    owned = (
        snapshot("a", version=1),
        snapshot("b", version=1, state=SnapshotState.CORRUPT),
        snapshot("c", version=1, state=SnapshotState.CONDEMNED),
        replace(GOLDEN, id="d"),
    )
    change = decide(replace(view, owned=owned), step(lc.FinishDelete))
    assert {(s.id, s.state) for s in change.snapshots} == {
        ("a", SnapshotState.CONDEMNED),
        ("b", SnapshotState.CONDEMNED),
    }
    assert change.delete_actor and change.slots == (("w1", -1),)
    never_bound = replace(view, actor=actor(S.DELETING, operation="op"))
    assert decide(never_bound, step(lc.FinishDelete)).slots == ()


def test_a_fall_back_never_goes_to_a_snapshot_that_is_not_good() -> None:
    assert RESUMING.actor and RESUMING.operation
    view = replace(
        RESUMING,
        actor=replace(RESUMING.actor, snapshot="bad", previous_snapshot="before"),
        operation=replace(RESUMING.operation, snapshot="bad"),
        source=snapshot("bad", version=1),
    )
    command = step(lc.FallBack, snapshot_id="bad", detail="short")
    for state in (SnapshotState.CORRUPT, SnapshotState.CONDEMNED):
        change = decide(replace(view, previous=snapshot("before", version=1, state=state)), command)
        assert change.source == GOLDEN and change.actor and change.actor.snapshot == ""
        assert change.operation and change.operation.snapshot == "golden"
    with pytest.raises(FailedPrecondition) as end:
        decide(replace(view, golden=replace(GOLDEN, state=SnapshotState.CORRUPT)), command)
    assert end.value.reason == "SNAPSHOT_CORRUPT"


def test_backing_out_keeps_where_the_actor_is_reached() -> None:
    view = under_way(OperationKind.SUSPEND, S.SUSPENDING, S.RUNNING)
    assert view.actor
    view = replace(view, actor=replace(view.actor, endpoint=ENDPOINT))
    change = decide(view, step(lc.BackOut, to_state=S.RUNNING, error=FAILURE))
    assert change.actor and change.actor.endpoint == ENDPOINT
    moved = replace(ENDPOINT, port=9)
    change = decide(view, step(lc.BackOut, to_state=S.RUNNING, error=FAILURE, endpoint=moved))
    assert change.actor and change.actor.endpoint == moved
    change = decide(view, step(lc.BackOut, to_state=S.CRASHED, error=FAILURE, endpoint=moved))
    assert change.actor and change.actor.endpoint is None and change.slots == (("w1", -1),)


def test_take_over() -> None:
    take = lc.TakeOver(key=KEY, now=9.0, operation_id="op", owner="two", lease_ttl_s=5.0)
    with pytest.raises(LeaseHeld):
        decide(RESUMING, take)
    expired, lost = replace(take, now=30.0), replace(RESUMING, lease=None)
    own = replace(take, owner="one")
    for view, command in (
        (RESUMING, expired),
        (lost, take),
        (RESUMING, replace(take, force=True)),
        (RESUMING, own),
    ):
        change = decide(view, command)
        assert change.lease and change.actor and change.operation
        assert change.lease.generation == change.actor.generation == change.operation.generation == 5
        assert change.lease.expires_at == command.now + 5.0 and change.actor.state is S.RESUMING
    assert RESUMING.operation
    over = replace(RESUMING, operation=replace(RESUMING.operation, state=OperationState.DONE))
    elsewhere = replace(RESUMING, actor=actor(S.RUNNING))
    for view in (over, elsewhere, replace(RESUMING, actor=None), replace(RESUMING, operation=None)):
        with pytest.raises(NotFound):
            decide(view, expired)


def test_rebind_counts_the_slot_it_has_as_free() -> None:
    full = (worker("w1", used=2), worker("w2", used=2))
    change = decide(replace(RESUMING, workers=full), step(lc.Rebind, avoid=("w1",)))
    assert change.slots == () and change.operation and change.operation.worker == "w1"
    gone = replace(RESUMING, workers=(worker("w2"),))
    assert decide(gone, step(lc.Rebind)).slots == (("w1", -1), ("w2", 1))


def test_a_crashed_actor_is_held_or_woken_as_its_template_says() -> None:
    crashed = replace(RESUMING, actor=actor(S.CRASHED, unsaved_since=5.0), operation=None, lease=None)
    assert crashed.template
    with pytest.raises(FailedPrecondition, match=r"greenroom resume a -n ns") as held:
        decide(crashed, begin(lc.BeginResume, hold_crashed=True))
    assert held.value.reason == "ACTOR_CRASHED" and held.value.metadata["unsaved_since"] == "5.0"
    on_purpose = decide(crashed, begin(lc.BeginResume))
    spec = replace(crashed.template.spec, on_crash=OnCrash.RESTORE_LAST)
    by_policy = replace(crashed, template=replace(crashed.template, spec=spec))
    for change in (on_purpose, decide(by_policy, begin(lc.BeginResume, hold_crashed=True))):
        assert change.actor and change.actor.state is S.RESUMING


def test_an_actor_goes_back_to_its_last_worker_unless_another_is_preferred() -> None:
    asleep = replace(RESUMING, actor=actor(S.SUSPENDED, last_worker="w1"), operation=None, lease=None)
    for prefer, name in (((), "w1"), (("w2",), "w2")):
        change = decide(asleep, begin(lc.BeginResume, prefer=prefer))
        assert change.operation and change.operation.worker == name and change.slots == ((name, 1),)
