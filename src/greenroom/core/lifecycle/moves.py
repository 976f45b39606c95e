"""What happens to an operation on its way: another worker, the snapshot before, another owner, or a wish that it
end."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from greenroom.core import placement
from greenroom.core.commands import (
    Change,
    FallBack,
    Outcome,
    Rebind,
    RequestCancel,
    TakeOver,
    View,
)
from greenroom.core.errors import (
    FailedPrecondition,
    NotFound,
)
from greenroom.core.lifecycle import fence
from greenroom.core.lifecycle.begin import demand, source_of
from greenroom.core.records import (
    Actor,
    ActorState,
    Lease,
    OperationKind,
    OperationState,
    Rejection,
    Snapshot,
    SnapshotState,
    attempt_id,
)


def rebind(view: View, c: Rebind) -> Change:
    actor, op = fence.current(view, c, OperationKind.RESUME)
    if op.from_state is ActorState.PAUSED:  # its memory is on that worker only
        raise fence.wrong_step(c, op)
    source = source_of(view, actor)
    if op.attempts != c.attempts:
        return Change(outcome=Outcome.REPEATED, actor=actor, operation=op, source=source, template=view.template)
    attempts = op.attempts + 1
    worker, seq, slots = _move(view, actor, source, c)
    bound = {"worker": worker, "sandbox": attempt_id(op.id, attempts), "sandbox_seq": seq}
    tried = (*op.rejected, Rejection(worker=op.worker, why=c.why or "failed"))[-placement.MAX_REJECTIONS :]
    return Change(
        actor=replace(actor, version=actor.version + 1, **bound),
        operation=replace(
            op, worker=worker, attempts=attempts, rejected=tried, updated_at=c.now, version=op.version + 1
        ),
        slots=slots,
        template=view.template,
        source=source,
    )


def _move(
    view: View, actor: Actor, source: Snapshot | None, c: Rebind | FallBack
) -> tuple[str, int, tuple[tuple[str, int], ...]]:
    """Another worker for a resume, the number of the sandbox there, and the slots that change hands; the slot that it
    has counts as free."""
    workers = tuple(replace(w, used=w.used - 1) if w.name == actor.worker else w for w in view.workers)
    chosen, _ = placement.choose(workers, demand(view, actor, source, c), c.now)
    if chosen.name == actor.worker:  # it stays; its number is kept open since the first attempt there
        return chosen.name, actor.sandbox_seq, ()
    return chosen.name, chosen.seq, ((actor.worker, -1), (chosen.name, 1))


def fall_back(view: View, c: FallBack) -> Change:
    actor, op = fence.current(view, c, OperationKind.RESUME)
    if op.from_state is ActorState.PAUSED:
        raise fence.wrong_step(c, op)
    if op.snapshot != c.snapshot_id:  # gone back already
        return Change(outcome=Outcome.REPEATED, actor=actor, operation=op, source=view.source, template=view.template)
    usable = (SnapshotState.PRESENT, SnapshotState.LOCAL)
    good = [s for s in (view.previous, view.golden) if s is not None and s.state in usable]
    if actor.snapshot != c.snapshot_id or not good:
        raise FailedPrecondition(
            f"snapshot {c.snapshot_id} of actor {actor.key} is corrupt ({c.detail}) and none before it is good; "
            f"for a new golden snapshot apply template {actor.template} again",
            reason="SNAPSHOT_CORRUPT",
        )
    source = good[0]
    to = source.id if source is view.previous else ""
    bound: dict[str, Any] = {"worker": actor.worker}
    attempts = op.attempts
    slots: tuple[tuple[str, int], ...] = ()
    elsewhere = source.state is SnapshotState.LOCAL and source.worker != actor.worker
    if elsewhere or not any(w.name == actor.worker and placement.can_run(w, source) for w in view.workers):
        worker, seq, slots = _move(view, actor, source, c)
        attempts += 1
        bound = {"worker": worker, "sandbox": attempt_id(op.id, attempts), "sandbox_seq": seq}
    corrupt = view.source
    assert corrupt is not None and corrupt.id == c.snapshot_id
    return Change(
        actor=replace(
            actor,
            snapshot=to,
            previous_snapshot="",
            durable_at=source.created_at if to and source.state is SnapshotState.PRESENT else None,
            reason="SnapshotCorrupt",
            message=f"snapshot {c.snapshot_id} is corrupt ({c.detail}); went back to {to or 'the golden snapshot'}",
            version=actor.version + 1,
            **bound,
        ),
        operation=replace(
            op,
            worker=bound["worker"],
            attempts=attempts,
            snapshot=source.id,
            chosen=False,
            updated_at=c.now,
            version=op.version + 1,
        ),
        slots=slots,
        snapshots=(replace(corrupt, state=SnapshotState.CORRUPT, version=corrupt.version + 1),),
        source=source,
        template=view.template,
    )


def take_over(view: View, c: TakeOver) -> Change:
    actor, op, lease = view.actor, view.operation, view.lease
    if (
        actor is None
        or op is None
        or op.id != c.operation_id
        or actor.operation != c.operation_id
        or op.state is not OperationState.RUNNING
    ):
        raise NotFound(f"operation {c.operation_id} is not under way")
    if lease is not None and lease.expires_at > c.now and not c.force and lease.owner != c.owner:
        raise fence.held(actor, op, lease)
    generation = actor.generation + 1
    return Change(
        actor=replace(actor, generation=generation, version=actor.version + 1),
        operation=replace(
            op,
            generation=generation,
            owner=c.owner,
            takeovers=op.takeovers + 1,
            updated_at=c.now,
            version=op.version + 1,
        ),
        lease=Lease(
            uid=actor.uid,
            owner=c.owner,
            operation=op.id,
            generation=generation,
            expires_at=c.now + c.lease_ttl_s,
        ),
    )


def request_cancel(view: View, c: RequestCancel) -> Change:
    actor, op = view.actor, view.operation
    if op is None or op.key != c.key:
        raise NotFound(f"operation {c.operation_id} does not exist", reason="OPERATION_NOT_FOUND")
    if op.state is not OperationState.RUNNING or op.cancel_requested:
        return Change(outcome=Outcome.ALREADY, actor=actor, operation=op)
    if op.kind is OperationKind.DELETE:
        raise FailedPrecondition(
            f"operation {op.id} deletes actor {op.key}, which can't be taken back", reason="NOT_CANCELLABLE"
        )
    return Change(operation=replace(op, cancel_requested=True, updated_at=c.now, version=op.version + 1))
