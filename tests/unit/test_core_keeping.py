"""Which snapshots an actor keeps, and from which it wakes: `greenroom.core.keeping`, and `lifecycle` with it."""

from __future__ import annotations

from typing import Any

import pytest
from core_views import GOLDEN, KEY, S, actor, begin, step, under_way
from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core import keeping
from greenroom.core.errors import FailedPrecondition, LeaseHeld, NotFound, ResourceExhausted
from greenroom.core.lifecycle import decide
from greenroom.core.records import (
    ActorState,
    FileDigest,
    OnCrash,
    OperationKind,
    Retention,
    Snapshot,
    SnapshotState,
    Template,
)
from greenroom.testing.contracts.store_world import FAILURE, snapshot, template, worker

PRESENT, LOCAL, CORRUPT, CONDEMNED = (
    SnapshotState.PRESENT,
    SnapshotState.LOCAL,
    SnapshotState.CORRUPT,
    SnapshotState.CONDEMNED,
)
KEEPS = Retention(keep_last=4)


def made(name: str, at: float = 1.0, **fields: Any) -> Snapshot:
    return snapshot(name, **{"actor": "a", "actor_uid": "u", "created_at": at, "version": 1} | fields)


OLD, BEFORE, LAST = made("old", 1.0), made("before", 2.0), made("last", 3.0)


def kept(retention: Retention = KEEPS, **spec: Any) -> Template:
    plain = template()
    return replace(plain, spec=replace(plain.spec, retention=retention, **spec))


def asleep(state: ActorState = S.SUSPENDED, **fields: Any) -> lc.View:
    sleeper = actor(state, snapshot="last", previous_snapshot="before")
    view = lc.View(actor=sleeper, template=template(), source=LAST, previous=BEFORE, golden=GOLDEN, named=OLD)
    return replace(replace(view, workers=(worker("w1"),), owned=(OLD, BEFORE, LAST)), **fields)


def gone(change: lc.Change) -> set[str]:
    return {s.id for s in change.snapshots if s.state is CONDEMNED}


# --- from an older one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [S.SUSPENDED, S.CRASHED])
@pytest.mark.parametrize("retention", [Retention(), KEEPS])
def test_it_wakes_from_an_older_one_and_the_present_one_is_its_way_back(state: S, retention: Retention) -> None:
    change = decide(asleep(state, template=kept(retention)), begin(lc.BeginResume, snapshot_id="old"))
    assert change.actor and change.operation
    assert (change.actor.snapshot, change.actor.previous_snapshot) == ("old", "last")
    assert change.operation.snapshot == "old" and change.operation.chosen and change.source == OLD
    assert gone(change) == (set() if retention is KEEPS else {"before"})


@pytest.mark.parametrize("state", [S.SUSPENDED, S.CRASHED])
def test_backed_out_it_would_wake_from_the_present_one_again(state: S) -> None:
    begun = decide(asleep(state), begin(lc.BeginResume, snapshot_id="old"))
    view = lc.View(actor=begun.actor, operation=begun.operation, lease=begun.lease, source=OLD, previous=LAST)
    out = lc.BackOut(key=KEY, now=9.0, operation_id="op2", generation=5, to_state=state, error=FAILURE)
    change = decide(view, out)
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("last", "old")


def test_gone_back_because_it_was_corrupt_it_stays_where_it_is() -> None:
    begun = decide(asleep(), begin(lc.BeginResume, snapshot_id="old"))
    view = replace(asleep(), actor=begun.actor, operation=begun.operation, lease=begun.lease, source=OLD, previous=LAST)
    step = {"key": KEY, "now": 9.0, "operation_id": "op2", "generation": 5}
    back = decide(view, lc.FallBack(**step, snapshot_id="old", detail="bad"))
    assert back.actor and back.operation and not back.operation.chosen
    assert (back.actor.snapshot, back.actor.previous_snapshot) == ("last", "")
    view = replace(view, actor=back.actor, operation=back.operation, source=LAST, previous=None)
    out = decide(view, lc.BackOut(**step, to_state=S.SUSPENDED, error=FAILURE))
    assert out.actor and (out.actor.snapshot, out.actor.previous_snapshot) == ("last", "")


def test_the_present_one_may_be_named_and_changes_nothing() -> None:
    change = decide(asleep(named=LAST), begin(lc.BeginResume, snapshot_id="last"))
    assert change.actor and change.operation and not change.operation.chosen
    assert (change.actor.snapshot, change.actor.previous_snapshot) == ("last", "before") and not change.snapshots


def test_the_way_back_may_be_named() -> None:
    change = decide(asleep(named=BEFORE), begin(lc.BeginResume, snapshot_id="before"))
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("before", "last")
    assert not change.snapshots


def test_a_present_one_that_is_corrupt_is_no_way_back() -> None:
    change = decide(asleep(source=replace(LAST, state=CORRUPT)), begin(lc.BeginResume, snapshot_id="old"))
    assert change.actor and (change.actor.snapshot, change.actor.previous_snapshot) == ("old", "before")
    assert gone(change) == {"last"}


@pytest.mark.parametrize(
    ("named", "error", "reason"),
    [
        (None, NotFound, "SNAPSHOT_NOT_FOUND"),
        (replace(OLD, actor_uid="another"), NotFound, "SNAPSHOT_NOT_FOUND"),
        (GOLDEN, NotFound, "SNAPSHOT_NOT_FOUND"),
        (replace(OLD, state=CORRUPT), FailedPrecondition, "SNAPSHOT_CORRUPT"),
        (replace(OLD, state=CONDEMNED), FailedPrecondition, "SNAPSHOT_CONDEMNED"),
    ],
)
def test_what_it_can_not_wake_from(named: Snapshot | None, error: type[Exception], reason: str) -> None:
    with pytest.raises(error) as refused:
        decide(asleep(named=named), begin(lc.BeginResume, snapshot_id="old"))
    assert getattr(refused.value, "reason", "") == reason and "old" in str(refused.value)


def test_who_is_awake_or_busy_is_not_set_back() -> None:
    for state in (S.RUNNING, S.PAUSED):
        view = asleep(actor=actor(state, worker="w1", snapshot="last"))
        with pytest.raises(FailedPrecondition, match="suspend a -n ns` first") as awake:
            decide(view, begin(lc.BeginResume, snapshot_id="old"))
        assert awake.value.reason == "ACTOR_AWAKE"
    busy = replace(under_way(OperationKind.RESUME, S.RESUMING, S.SUSPENDED), named=OLD)
    with pytest.raises(LeaseHeld):
        decide(busy, begin(lc.BeginResume, snapshot_id="old"))


# --- the commit -------------------------------------------------------------------------------------------


def file(upload: str) -> FileDigest:
    return FileDigest(name="f", size_bytes=5, sha256="0" * 64, upload=upload)


def suspending(**fields: Any) -> lc.View:
    view = under_way(OperationKind.SUSPEND, S.SUSPENDING, S.RUNNING)
    assert view.actor and view.operation
    sleeper = replace(view.actor, snapshot="last", previous_snapshot="before")
    view = replace(view, actor=sleeper, operation=replace(view.operation, snapshot="new"))
    return replace(view, source=LAST, previous=BEFORE, **fields)


def test_a_commit_of_what_is_kept() -> None:
    base = replace(LAST, files=(file("last.1"), file("before.1")))
    done = made("new", files=(file("new.1"), *base.files))
    change = decide(replace(suspending(), source=base), step(lc.FinishSuspend, snapshot=done))
    assert change.actor and change.actor.snapshot == "new"


@pytest.mark.parametrize(
    "base",
    [LAST, *(replace(LAST, files=(file("last.1"),), state=state) for state in (LOCAL, CORRUPT, CONDEMNED))],
    ids=["another upload", "local", "corrupt", "condemned"],
)
def test_a_commit_of_what_may_be_gone_is_refused(base: Snapshot) -> None:
    done = made("new", files=(file("last.1"),))
    with pytest.raises(FailedPrecondition) as refused:
        decide(replace(suspending(), source=base), step(lc.FinishSuspend, snapshot=done))
    assert refused.value.reason == "BLOBS_MISSING"


def test_a_suspend_begins_with_what_the_actor_woke_from() -> None:
    view = asleep(actor=actor(S.RUNNING, worker="w1", snapshot="last"))
    assert decide(view, begin(lc.BeginSuspend)).source == LAST
    fresh = replace(view, actor=actor(S.RUNNING, worker="w1"), source=GOLDEN)
    assert decide(fresh, begin(lc.BeginSuspend)).source is None, "the golden one is not its own"


def test_a_commit_condemns_what_is_over_unless_the_template_keeps_more() -> None:
    done = made("new")
    assert gone(decide(suspending(), step(lc.FinishSuspend, snapshot=done))) == {"before"}
    assert gone(decide(suspending(), step(lc.FinishSuspend, snapshot=done, keeps=True))) == set()
    tagged = replace(suspending(), previous=replace(BEFORE, tags=("x",)))
    assert gone(decide(tagged, step(lc.FinishSuspend, snapshot=done))) == set()


def test_begun_anew_after_a_crash_a_template_that_keeps_more_condemns_nothing() -> None:
    for retention, over in ((Retention(), {"before"}), (KEEPS, set())):
        view = asleep(S.CRASHED, template=kept(retention, on_crash=OnCrash.BOOT))
        assert gone(decide(view, begin(lc.BeginResume, hold_crashed=True))) == over


# --- retention and tags -----------------------------------------------------------------------------------


def expire(view: lc.View, uid: str = "u") -> set[str]:
    change = decide(view, lc.Expire(key=KEY, now=10.0, uid=uid))
    assert (change.outcome is lc.Outcome.CHANGED) == bool(change.snapshots)
    return gone(change)


def test_expire() -> None:
    view = asleep(owned=(made("oldest", 0.0), OLD, BEFORE, LAST))
    assert expire(view) == {"oldest", "old"}, "what it needs stays"
    assert expire(replace(view, template=None)) == {"oldest", "old"}
    assert expire(replace(view, template=kept(Retention(keep_last=3)))) == {"oldest"}
    assert expire(replace(view, template=kept(Retention(keep_for_s=9.5)))) == {"oldest"}
    assert expire(view, uid="another") == set() and expire(replace(view, actor=None)) == set()
    pinned = (made("golden", golden=True), made("tagged", tags=("x",)), made("bad", state=CORRUPT), LAST)
    assert expire(replace(view, owned=pinned)) == set()
    busy = under_way(OperationKind.SUSPEND, S.SUSPENDING, S.RUNNING)
    assert busy.operation is not None
    busy = replace(busy, operation=replace(busy.operation, snapshot="old"), owned=view.owned)
    assert expire(busy) == {"oldest", "before", "last"}, "nor what an operation speaks of"


def tag(view: lc.View, name: str = "old", undo: bool = False, label: str = "x") -> lc.Change:
    return decide(view, lc.TagSnapshot(key=KEY, now=10.0, snapshot_id=name, tag=label, undo=undo))


def test_tags() -> None:
    change = tag(asleep())
    [tagged] = change.snapshots
    assert (tagged.tags, tagged.version, change.source) == (("x",), 2, tagged)
    view = asleep(owned=(tagged, BEFORE, LAST))
    assert tag(view).outcome is lc.Outcome.ALREADY and tag(asleep(), undo=True).outcome is lc.Outcome.ALREADY
    [twice] = tag(view, label="a").snapshots
    assert twice.tags == ("a", "x")
    [once] = tag(asleep(owned=(twice, BEFORE, LAST)), undo=True).snapshots
    assert (once.tags, once.state) == (("a",), PRESENT)
    [over] = tag(view, undo=True).snapshots
    assert (over.tags, over.state, over.version) == ((), CONDEMNED, 3), "nothing else keeps it"
    [stays] = tag(replace(view, template=kept()), undo=True).snapshots
    assert stays.state is PRESENT


def test_what_can_not_be_tagged() -> None:
    with pytest.raises(NotFound, match="no snapshot unknown"):
        tag(asleep(), "unknown")
    with pytest.raises(NotFound, match="ns/a does not exist"):
        tag(asleep(actor=None))
    with pytest.raises(FailedPrecondition, match="being deleted"):
        tag(asleep(owned=(replace(OLD, state=CONDEMNED),)))
    full = replace(OLD, tags=tuple(f"t{n}" for n in range(keeping.MAX_TAGS)))
    with pytest.raises(ResourceExhausted, match="untag snapshot old NAME"):
        tag(asleep(owned=(full,)))


def test_deleting_the_actor_takes_all_of_it() -> None:
    view = under_way(OperationKind.DELETE, S.DELETING, S.SUSPENDED)
    owned = (made("tagged", tags=("x",)), LAST, made("bad", state=CORRUPT), replace(OLD, state=CONDEMNED))
    assert gone(decide(replace(view, owned=owned), step(lc.FinishDelete))) == {"tagged", "last", "bad"}
