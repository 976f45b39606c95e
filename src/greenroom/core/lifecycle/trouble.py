"""What becomes known of an actor outside any operation: it crashed, it was found alive, a snapshot of it is safe or
lost."""

from __future__ import annotations

from msgspec.structs import replace

from greenroom.core.commands import (
    Change,
    Crash,
    FinishUpload,
    LoseSnapshot,
    Outcome,
    Reunite,
    View,
)
from greenroom.core.lifecycle.ends import UNBOUND, after_loss
from greenroom.core.records import (
    Actor,
    ActorState,
    Failure,
    Operation,
    OperationKind,
    OperationState,
    SnapshotState,
    WorkerState,
)


def crash(view: View, c: Crash) -> Change:
    actor = view.actor
    if (
        actor is None
        or actor.uid != c.uid
        or actor.worker != c.worker
        or actor.generation > c.generation
        or actor.state not in (ActorState.RUNNING, ActorState.PAUSED)
    ):
        return Change(outcome=Outcome.ALREADY, actor=actor)
    if c.lost and view.place is not None and view.place.state not in (WorkerState.STALLED, WorkerState.GONE):
        return Change(outcome=Outcome.ALREADY, actor=actor)  # it has been heard again
    return Change(
        actor=replace(
            actor,
            state=ActorState.CRASHED,
            state_since=c.now,
            reason=c.reason,
            message=c.message,
            last_worker=actor.worker,
            version=actor.version + 1,
            **UNBOUND,
            **after_loss(actor, view, actor.resumed_at),
        ),
        operation=_loss(actor, c.operation_id, c.now, "UNAVAILABLE", c.reason, c.message),
        slots=((actor.worker, -1),),
    )


def _loss(actor: Actor, operation_id: str, now: float, code: str, reason: str, message: str) -> Operation:
    """The row that records that an actor crashed."""
    return Operation(
        id=operation_id,
        kind=OperationKind.CRASH,
        namespace=actor.namespace,
        name=actor.name,
        uid=actor.uid,
        created_at=now,
        updated_at=now,
        finished_at=now,
        deadline_at=now,
        state=OperationState.DONE,
        cause="recovery",
        generation=actor.generation,
        worker=actor.worker,
        snapshot=actor.snapshot,
        from_state=actor.state,
        to_state=ActorState.CRASHED,
        error=Failure(code=code, reason=reason, message=message),
        version=1,
    )


def reunite(view: View, c: Reunite) -> Change:
    actor = view.actor
    if (
        actor is None
        or actor.state is not ActorState.RUNNING
        or (actor.uid, actor.worker, actor.generation) != (c.uid, c.worker, c.generation)
    ):
        return Change(outcome=Outcome.ALREADY, actor=actor)
    return Change(actor=replace(actor, generation=actor.generation + 1, version=actor.version + 1))


def finish_upload(view: View, c: FinishUpload) -> Change:
    actor, snapshot = view.actor, view.named
    if snapshot is None or snapshot.state is not SnapshotState.LOCAL:
        return Change(outcome=Outcome.ALREADY, actor=actor)
    present = replace(snapshot, state=SnapshotState.PRESENT, version=snapshot.version + 1)
    if (
        actor is None
        or actor.uid != snapshot.actor_uid
        or snapshot.id not in (actor.snapshot, actor.previous_snapshot)
        or (actor.durable_at or 0.0) >= snapshot.created_at
    ):
        return Change(snapshots=(present,))
    actor = replace(actor, durable_at=snapshot.created_at, version=actor.version + 1)
    return Change(actor=actor, snapshots=(present,))


def lose_snapshot(view: View, c: LoseSnapshot) -> Change:
    actor, snapshot = view.actor, view.named
    if snapshot is None or snapshot.state is not SnapshotState.LOCAL:
        return Change(outcome=Outcome.ALREADY, actor=actor)
    lost = replace(snapshot, state=SnapshotState.CORRUPT, version=snapshot.version + 1)
    if (
        actor is None
        or actor.uid != snapshot.actor_uid
        or actor.snapshot != snapshot.id
        or actor.state not in (ActorState.SUSPENDED, ActorState.CRASHED)
    ):
        return Change(snapshots=(lost,))  # it lives, or wakes from another one, or is being restored, which fails
    return Change(
        actor=replace(
            actor,
            state=ActorState.CRASHED,
            state_since=c.now,
            reason="SnapshotLost",
            message=c.message,
            version=actor.version + 1,
            **after_loss(actor, replace(view, source=lost), None),
        ),
        operation=_loss(actor, c.operation_id, c.now, "DATA_LOSS", "SnapshotLost", c.message),
        snapshots=(lost,),
    )
