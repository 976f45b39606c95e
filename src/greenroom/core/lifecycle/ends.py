"""How an operation ends: where it led, or back where the actor came from."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from greenroom.core import keeping, states
from greenroom.core.commands import (
    BackOut,
    Change,
    FinishDelete,
    FinishResume,
    FinishSuspend,
    View,
)
from greenroom.core.errors import (
    FailedPrecondition,
)
from greenroom.core.gc import blobs
from greenroom.core.lifecycle import fence
from greenroom.core.records import (
    Actor,
    ActorState,
    Failure,
    Operation,
    OperationKind,
    OperationState,
    PhaseTime,
    Snapshot,
    SnapshotState,
)

#: What an actor has no more that is on no worker.
UNBOUND: dict[str, Any] = {"worker": "", "endpoint": None, "sandbox": "", "sandbox_seq": 0}


def end(
    actor: Actor,
    op: Operation,
    now: float,
    to: ActorState,
    *,
    phases: tuple[PhaseTime, ...],
    error: Failure | None = None,
    snapshots: tuple[Snapshot, ...] = (),
    **fields: Any,
) -> Change:
    """Ends an operation: the actor reaches ``to`` and its lease is dropped. Its slot is freed unless ``to`` is bound;
    while DELETING it keeps it, because the sandbox may still be there."""
    states.check(str(actor.key), actor.state, to)
    slots: tuple[tuple[str, int], ...] = ()
    if to not in states.BOUND and to is not ActorState.DELETING and actor.worker:
        slots = ((actor.worker, -1),)
        fields |= UNBOUND | {"last_worker": actor.worker}
    actor = replace(actor, state=to, state_since=now, operation="", version=actor.version + 1, **fields)
    op = replace(
        op,
        state=OperationState.FAILED if error else OperationState.DONE,
        to_state=to,
        error=error,
        phases=phases,
        updated_at=now,
        finished_at=now,
        version=op.version + 1,
    )
    return Change(actor=actor, operation=op, drop_lease=actor.uid, slots=slots, snapshots=snapshots)


def finish_resume(view: View, c: FinishResume) -> Change:
    actor, op = fence.current(view, c, OperationKind.RESUME)
    fresh = op.from_state is not ActorState.PAUSED  # a thaw loses nothing and saves nothing
    return end(
        actor,
        op,
        c.now,
        ActorState.RUNNING,
        phases=c.phases,
        endpoint=c.endpoint,
        wakes=actor.wakes + 1,
        resumed_at=c.now if fresh else actor.resumed_at,
        unsaved_since=None,
    )


def finish_suspend(view: View, c: FinishSuspend) -> Change:
    actor, op = fence.current(view, c, OperationKind.SUSPEND)
    assert c.snapshot.id == op.snapshot, "a suspend publishes the snapshot that it announced"
    made = replace(c.snapshot, parent=actor.snapshot, golden=actor.golden, tags=(), version=1)
    needed = (view.source if actor.snapshot else None, view.previous)
    if missing := blobs.not_there(made, [s for s in needed if s is not None]):
        raise FailedPrecondition(
            f"snapshot {made.id} of actor {actor.key} refers to {missing[0].name} of an upload that is not kept any "
            "more; suspend it again",
            reason="BLOBS_MISSING",
        )
    kept, over = way_back(actor, view)
    if c.keeps:
        over = ()
    fields: dict[str, Any] = {"suspended_at": c.now, "resumed_at": None}
    if c.ran_on is not None:
        fields = {"unsaved_since": made.created_at, "reason": c.ran_on.reason, "message": c.ran_on.message}
    return end(
        actor,
        op,
        c.now,
        ActorState.CRASHED if c.ran_on is not None else ActorState.SUSPENDED,
        phases=c.phases,
        error=c.ran_on,
        snapshots=(made, *over),
        snapshot=made.id,
        previous_snapshot=kept.id if kept else "",
        durable_at=made.created_at if made.state is not SnapshotState.LOCAL else actor.durable_at,
        **fields,
    )


def finish_delete(view: View, c: FinishDelete) -> Change:
    actor, op = fence.current(view, c, OperationKind.DELETE)
    condemned = keeping.condemned(replace(s, tags=()) for s in view.owned)
    change = end(actor, op, c.now, ActorState.DELETING, phases=c.phases, snapshots=condemned)
    assert change.operation is not None
    op = replace(change.operation, to_state=None)
    return replace(change, operation=op, delete_actor=True, slots=((actor.worker, -1),) if actor.worker else ())


def back_out(view: View, c: BackOut) -> Change:
    actor, op = fence.current(view, c)
    legal = {op.from_state, ActorState.CRASHED}
    if op.kind is OperationKind.DELETE:
        legal = {ActorState.DELETING}
    elif op.kind is OperationKind.SUSPEND:
        legal.add(ActorState.RUNNING)
    if c.to_state not in legal:
        raise FailedPrecondition(
            f"operation {op.id} ({op.kind} of {op.key} from {op.from_state}) can't be backed out to {c.to_state}",
            reason="WRONG_STATE",
            metadata={"state": actor.state},
        )
    to: ActorState = c.to_state
    fields: dict[str, Any] = {}
    if to is ActorState.CRASHED and op.from_state is not ActorState.CRASHED:
        fields = after_loss(actor, view, actor.resumed_at if actor.resumed_at is not None else op.created_at)
    elif to is ActorState.SUSPENDED and is_lost(actor, view):  # while it was to be resumed from it
        to, fields = ActorState.CRASHED, after_loss(actor, view, None)
    elif op.chosen and actor.snapshot == op.snapshot and actor.previous_snapshot and to is op.from_state:
        fields = {"snapshot": actor.previous_snapshot, "previous_snapshot": actor.snapshot}
    elif to is ActorState.CRASHED and not actor.snapshot and actor.previous_snapshot:
        fields = {"snapshot": actor.previous_snapshot, "previous_snapshot": ""}  # it did not begin anew
    return end(
        actor,
        op,
        c.now,
        to,
        phases=c.phases,
        error=c.error,
        **{"endpoint": c.endpoint or actor.endpoint, "reason": c.error.reason, "message": c.error.message} | fields,
    )


def way_back(actor: Actor, view: View) -> tuple[Snapshot | None, tuple[Snapshot, ...]]:
    """Which of its snapshots an actor keeps when it goes on from another one, and the others, condemned. It is the
    latest that is durable, because one that is on a worker's disk only is no way back from the loss of that worker;
    without any it is the latest that is good."""
    have = [s for s in (view.source if actor.snapshot else None, view.previous) if s is not None]
    good = [s for state in (SnapshotState.PRESENT, SnapshotState.LOCAL) for s in have if s.state is state]
    kept = good[0] if good else None
    return kept, keeping.condemned(s for s in have if s is not kept)


def is_lost(actor: Actor, view: View) -> bool:
    """Whether the snapshot that the actor would wake from is no more."""
    return bool(actor.snapshot) and view.source is not None and view.source.state is SnapshotState.CORRUPT


def after_loss(actor: Actor, view: View, since: float | None) -> dict[str, Any]:
    """Of an actor that crashes: since when what it did is lost. That is ``since``, unless the snapshot that it woke
    from is lost as well; then it goes back to the one before that, and what it did after that one is lost."""
    if not is_lost(actor, view):
        return {"unsaved_since": since}
    before = view.previous
    if before is None or before.state not in (SnapshotState.PRESENT, SnapshotState.LOCAL):
        return {"unsaved_since": actor.created_at, "snapshot": "", "previous_snapshot": ""}
    return {"unsaved_since": before.created_at, "snapshot": before.id, "previous_snapshot": ""}
