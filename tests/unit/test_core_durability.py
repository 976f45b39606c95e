"""What an actor has saved, where, and what is left of it after a loss."""

from __future__ import annotations

from typing import Any

import pytest
from core_views import GOLDEN, KEY, RESUMING, S, actor, begin, step, under_way
from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core.errors import FailedPrecondition
from greenroom.core.lifecycle import decide
from greenroom.core.records import ActorState, OnCrash, OperationKind, OperationState, Snapshot, SnapshotState
from greenroom.testing.contracts.store_world import ENDPOINT, FAILURE, snapshot, worker

PRESENT, LOCAL, CORRUPT, CONDEMNED = (
    SnapshotState.PRESENT,
    SnapshotState.LOCAL,
    SnapshotState.CORRUPT,
    SnapshotState.CONDEMNED,
)


def kept(name: str, state: SnapshotState, at: float, **fields: Any) -> Snapshot:
    made = {"actor": "a", "actor_uid": "u", "worker": "w1", "version": 1}
    return snapshot(name, state=state, created_at=at, **made | fields)


def of(view: lc.View, latest: Snapshot | None, before: Snapshot | None, **fields: Any) -> lc.View:
    """The view of an actor that has these two snapshots."""
    assert view.actor
    names = {"snapshot": latest.id if latest else "", "previous_snapshot": before.id if before else ""}
    return replace(view, actor=replace(view.actor, **names, **fields), source=latest, previous=before)


def suspend(latest: Snapshot | None, before: Snapshot | None, new: SnapshotState) -> lc.Change:
    """What comes of a suspend whose snapshot is in that state."""
    view = of(under_way(OperationKind.SUSPEND, S.SUSPENDING, S.RUNNING), latest, before, durable_at=2.0)
    assert view.operation
    view = replace(view, operation=replace(view.operation, snapshot="new"))
    return decide(view, step(lc.FinishSuspend, snapshot=kept("new", new, 8.0)))


def gone(change: lc.Change) -> set[str]:
    return {s.id for s in change.snapshots if s.state is CONDEMNED}


# --- suspending -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [PRESENT, LOCAL])
@pytest.mark.parametrize(
    ("latest", "before", "way_back"),
    [
        (PRESENT, PRESENT, "latest"),
        (PRESENT, LOCAL, "latest"),
        (LOCAL, PRESENT, "before"),  # what only the worker has is no way back from the loss of the worker
        (LOCAL, LOCAL, "latest"),
        (LOCAL, CORRUPT, "latest"),
        (CORRUPT, PRESENT, "before"),
        (CORRUPT, LOCAL, "before"),
        (CORRUPT, CORRUPT, ""),
        (PRESENT, None, "latest"),
        (LOCAL, None, "latest"),
        (None, PRESENT, "before"),  # it has begun anew, and is suspended for the first time
        (None, LOCAL, "before"),
        (None, None, ""),
    ],
)
def test_the_way_back_is_the_latest_that_is_durable(
    latest: SnapshotState | None, before: SnapshotState | None, way_back: str, new: SnapshotState
) -> None:
    change = suspend(latest and kept("latest", latest, 5.0), before and kept("before", before, 2.0), new)
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("new", way_back)
    there = {name for name, state in (("latest", latest), ("before", before)) if state}
    assert gone(change) == there - {way_back}, "nothing is left that nobody would find"
    assert change.snapshots[0].id == "new" and change.snapshots[0].version == 1


def test_nothing_durable_goes_while_what_is_newer_is_not_durable() -> None:
    """However often it is suspended on its worker before an upload comes through."""
    first = kept("s0", PRESENT, 1.0)
    latest, before = first, None
    for number in range(1, 5):
        change = suspend(latest, before, LOCAL)
        assert change.actor and change.actor.previous_snapshot == "s0" and "s0" not in gone(change)
        latest, before = kept(f"s{number}", LOCAL, float(number)), first


def test_durable_at_is_the_time_of_the_latest_in_the_store() -> None:
    change = suspend(kept("latest", PRESENT, 2.0), None, PRESENT)
    assert change.actor and change.actor.durable_at == 8.0
    change = suspend(kept("latest", PRESENT, 2.0), None, LOCAL)
    assert change.actor and change.actor.durable_at == 2.0, "the new one is not there yet"


def test_a_golden_snapshot_is_nobodys_to_condemn() -> None:
    latest = kept("latest", PRESENT, 5.0)
    assert gone(suspend(latest, kept("before", PRESENT, 2.0, golden=True), PRESENT)) == set()


# --- uploads ----------------------------------------------------------------------------------------------

ASLEEP = replace(RESUMING, actor=actor(S.SUSPENDED), operation=None, lease=None)


def upload(view: lc.View, named: Snapshot | None) -> lc.Change:
    return decide(replace(view, named=named), lc.FinishUpload(key=KEY, now=9.0, snapshot_id="new"))


@pytest.mark.parametrize("state", S)
def test_an_upload_makes_it_durable_whatever_the_actor_does(state: ActorState) -> None:
    new = kept("new", LOCAL, 5.0)
    change = upload(of(replace(ASLEEP, actor=actor(state)), new, None), new)
    assert change.actor and (change.actor.state, change.actor.durable_at) == (state, 5.0)
    assert [(s.state, s.version) for s in change.snapshots] == [(PRESENT, 2)]
    assert change.operation is None and change.lease is None and change.slots == ()


def test_an_upload_of_the_one_before_counts_until_the_latest_is_there() -> None:
    latest, before = kept("latest", LOCAL, 5.0), kept("new", LOCAL, 3.0)
    change = upload(of(ASLEEP, latest, before, durable_at=None), before)
    assert change.actor and change.actor.durable_at == 3.0
    change = upload(of(ASLEEP, kept("latest", PRESENT, 5.0), before, durable_at=5.0), before)
    assert change.actor is None and change.snapshots[0].state is PRESENT, "it does not go back"


def test_an_upload_that_nobody_waits_for() -> None:
    new = kept("new", LOCAL, 5.0)
    namesake = of(replace(ASLEEP, actor=actor(S.SUSPENDED, uid="another")), new, None)
    for view in (replace(ASLEEP, actor=None), ASLEEP, namesake):
        change = upload(view, new)
        assert change.actor is None and change.snapshots[0].state is PRESENT
    for state in (PRESENT, CORRUPT, CONDEMNED):  # repeated; lost; superseded while it was under way
        assert upload(of(ASLEEP, new, None), replace(new, state=state)).outcome is lc.Outcome.ALREADY
    assert upload(ASLEEP, None).outcome is lc.Outcome.ALREADY


# --- losses -----------------------------------------------------------------------------------------------


def lose(view: lc.View, named: Snapshot | None) -> lc.Change:
    command = lc.LoseSnapshot(key=KEY, now=9.0, operation_id="loss", snapshot_id="new", message="w1 is gone")
    return decide(replace(view, named=named), command)


@pytest.mark.parametrize("state", [S.SUSPENDED, S.CRASHED])
@pytest.mark.parametrize(
    ("before", "left", "since"),
    [(PRESENT, "before", 2.0), (LOCAL, "before", 2.0), (CORRUPT, "", 1.0), (CONDEMNED, "", 1.0), (None, "", 1.0)],
)
def test_a_lost_snapshot_crashes_who_slept_in_it(
    state: ActorState, before: SnapshotState | None, left: str, since: float
) -> None:
    new = kept("new", LOCAL, 5.0)
    view = of(replace(ASLEEP, actor=actor(state, unsaved_since=7.0)), new, before and kept("before", before, 2.0))
    change = lose(view, new)
    lost = change.actor
    assert lost and (lost.state, lost.reason, lost.message) == (S.CRASHED, "SnapshotLost", "w1 is gone")
    assert (lost.snapshot, lost.previous_snapshot, lost.unsaved_since) == (left, "", since)
    assert [(s.id, s.state) for s in change.snapshots] == [("new", CORRUPT)]
    op = change.operation
    assert op and (op.id, op.kind, op.state) == ("loss", OperationKind.CRASH, OperationState.DONE)
    assert (op.from_state, op.to_state, op.snapshot, op.cause) == (state, S.CRASHED, "new", "recovery")
    assert op.error and (op.error.code, op.error.reason) == ("DATA_LOSS", "SnapshotLost")
    assert change.slots == () and change.lease is None and lost.generation == actor(state).generation


@pytest.mark.parametrize("state", sorted(set(S) - {S.SUSPENDED, S.CRASHED}))
def test_a_lost_snapshot_harms_nobody_who_is_awake(state: ActorState) -> None:
    new = kept("new", LOCAL, 5.0)
    change = lose(of(replace(ASLEEP, actor=actor(state)), new, None), new)
    assert change.actor is None and change.operation is None and change.snapshots[0].state is CORRUPT


def test_a_snapshot_that_is_not_lost_with_its_worker() -> None:
    new = kept("new", LOCAL, 5.0)
    for state in (PRESENT, CORRUPT, CONDEMNED):
        assert lose(of(ASLEEP, new, None), replace(new, state=state)).outcome is lc.Outcome.ALREADY
    assert lose(ASLEEP, None).outcome is lc.Outcome.ALREADY
    namesake = of(replace(ASLEEP, actor=actor(S.SUSPENDED, uid="another")), new, None)
    for view in (of(ASLEEP, kept("latest", PRESENT, 6.0), new), namesake, replace(ASLEEP, actor=None)):
        change = lose(view, new)
        assert change.actor is None and change.operation is None and change.snapshots[0].state is CORRUPT


def test_a_crash_after_the_loss_of_what_it_woke_from_says_so() -> None:
    """In whichever order the two are found: what it did since the snapshot before is lost."""
    lost, before = kept("new", CORRUPT, 5.0), kept("before", PRESENT, 2.0)
    alive = replace(ASLEEP, actor=actor(S.RUNNING, worker="w1", resumed_at=6.0))
    crash = lc.Crash(key=KEY, now=9.0, operation_id="x", uid="u", worker="w1", generation=4, reason="Gone", message="m")
    for latest, way_back, since, left in (
        (replace(lost, state=LOCAL), before, 6.0, ("new", "before")),
        (lost, before, 2.0, ("before", "")),
        (lost, None, 1.0, ("", "")),
    ):
        crashed = decide(of(alive, latest, way_back), crash).actor
        assert crashed and crashed.unsaved_since == since
        assert (crashed.snapshot, crashed.previous_snapshot) == left


def test_backing_out_to_a_snapshot_that_was_lost_meanwhile_is_a_crash() -> None:
    lost, before = kept("new", CORRUPT, 5.0), kept("before", PRESENT, 2.0)
    change = decide(of(RESUMING, lost, before), step(lc.BackOut, to_state=S.SUSPENDED, error=FAILURE))
    assert change.actor and (change.actor.state, change.actor.unsaved_since) == (S.CRASHED, 2.0)
    assert change.actor.snapshot == "before" and change.slots == (("w1", -1),)
    assert change.operation and change.operation.to_state is S.CRASHED
    good = decide(of(RESUMING, before, None), step(lc.BackOut, to_state=S.SUSPENDED, error=FAILURE))
    assert good.actor and (good.actor.state, good.actor.snapshot) == (S.SUSPENDED, "before")


def test_an_incarnation_that_never_ran_is_lost_from_its_beginning() -> None:
    change = decide(RESUMING, step(lc.BackOut, to_state=S.CRASHED, error=FAILURE))
    assert change.actor and change.actor.unsaved_since == 1.0, "when its operation began"


# --- falling back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "durable_at"), [(PRESENT, 2.0), (LOCAL, None)])
def test_a_fall_back_is_as_durable_as_what_it_goes_back_to(before: SnapshotState, durable_at: float | None) -> None:
    bad, older = kept("bad", PRESENT, 5.0), kept("before", before, 2.0)
    view = of(RESUMING, bad, older, durable_at=5.0)
    assert view.operation
    view = replace(view, operation=replace(view.operation, snapshot="bad"))
    change = decide(view, step(lc.FallBack, snapshot_id="bad", detail="short"))
    assert change.actor and (change.actor.snapshot, change.actor.durable_at) == ("before", durable_at)


def test_a_fall_back_to_a_snapshot_of_another_worker_goes_there() -> None:
    bad, older = kept("bad", PRESENT, 5.0), kept("before", LOCAL, 2.0, worker="w2")
    view = of(RESUMING, bad, older)
    assert view.operation
    view = replace(view, operation=replace(view.operation, snapshot="bad"), workers=(worker("w1"), worker("w2")))
    change = decide(view, step(lc.FallBack, snapshot_id="bad", detail="short"))
    assert change.operation and change.operation.worker == "w2" and change.slots == (("w1", -1), ("w2", 1))


# --- what a template says about crashes -------------------------------------------------------------------


def crashed(policy: OnCrash, latest: Snapshot | None, before: Snapshot | None) -> lc.View:
    view = replace(RESUMING, actor=actor(S.CRASHED, unsaved_since=5.0), operation=None, lease=None)
    assert view.template
    template = replace(view.template, spec=replace(view.template.spec, on_crash=policy))
    view = of(replace(view, template=template), latest, before)
    return view if latest else replace(view, source=GOLDEN)


def test_on_crash_boot_begins_anew_and_keeps_what_was_saved() -> None:
    latest, before = kept("latest", PRESENT, 5.0), kept("before", PRESENT, 2.0)
    change = decide(crashed(OnCrash.BOOT, latest, before), begin(lc.BeginResume, hold_crashed=True))
    assert change.operation and change.operation.snapshot == "golden" and change.source == GOLDEN
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("", "latest")
    assert gone(change) == {"before"}, "no actor would ever find it again"
    again = decide(crashed(OnCrash.BOOT, None, latest), begin(lc.BeginResume, hold_crashed=True))
    assert again.actor and (again.actor.snapshot, again.actor.previous_snapshot) == ("", "latest")
    assert gone(again) == set(), "it had not been suspended since: kept as long as there is nothing newer"


def test_on_crash_boot_keeps_what_is_durable_rather_than_what_is_newer() -> None:
    latest, before = kept("latest", LOCAL, 5.0), kept("before", PRESENT, 2.0)
    change = decide(crashed(OnCrash.BOOT, latest, before), begin(lc.BeginResume, hold_crashed=True))
    assert change.actor and change.actor.previous_snapshot == "before" and gone(change) == {"latest"}


def test_a_beginning_anew_that_does_not_come_to_run_has_not_happened() -> None:
    view = under_way(OperationKind.RESUME, S.RESUMING, S.CRASHED)
    view = of(view, None, kept("latest", PRESENT, 5.0), unsaved_since=6.0)
    change = decide(view, step(lc.BackOut, to_state=S.CRASHED, error=FAILURE))
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("latest", "")
    assert change.actor.unsaved_since == 6.0
    ran = decide(view, step(lc.FinishResume, endpoint=ENDPOINT))
    assert ran.actor and (ran.actor.snapshot, ran.actor.previous_snapshot) == ("", "latest")


@pytest.mark.parametrize(("policy", "on_purpose"), [(OnCrash.RESTORE_LAST, False), (OnCrash.HOLD, True)])
def test_on_crash_restore_last_and_a_resume_on_purpose(policy: OnCrash, on_purpose: bool) -> None:
    latest, before = kept("latest", PRESENT, 5.0), kept("before", PRESENT, 2.0)
    change = decide(crashed(policy, latest, before), begin(lc.BeginResume, hold_crashed=not on_purpose))
    assert change.operation and change.operation.snapshot == "latest" and change.snapshots == ()
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("latest", "before")


def test_on_crash_hold_leaves_it_as_it_is() -> None:
    with pytest.raises(FailedPrecondition) as held:
        decide(crashed(OnCrash.HOLD, kept("latest", PRESENT, 5.0), None), begin(lc.BeginResume, hold_crashed=True))
    assert held.value.reason == "ACTOR_CRASHED"
