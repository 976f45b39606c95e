"""Whose turn it is: what a command must prove before it may go on with an operation, and what one is told that comes
again, comes too late, or finds somebody else at work."""

from __future__ import annotations

from greenroom.core.commands import (
    BackOut,
    Change,
    FinishDelete,
    FinishPause,
    FinishResume,
    FinishSuspend,
    OperationCommand,
    Outcome,
    View,
)
from greenroom.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LeaseHeld,
    LeaseLost,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Lease,
    Operation,
    OperationKind,
    OperationState,
)

#: The command that ends a kind of operation well.
_ENDS: dict[type[OperationCommand], OperationKind] = {
    FinishResume: OperationKind.RESUME,
    FinishSuspend: OperationKind.SUSPEND,
    FinishPause: OperationKind.PAUSE,
    FinishDelete: OperationKind.DELETE,
}


def done_before(view: View, c: OperationCommand) -> Change | None:
    """What to answer when the step that ends an operation is sent again because its reply was lost: the operation as it
    ended, so that its driver sees no failure. None for every other command."""
    op = view.operation
    if op is None or op.state is OperationState.RUNNING or op.id != c.operation_id or op.generation != c.generation:
        return None
    done = op.state is OperationState.DONE and _ENDS.get(type(c)) is op.kind
    if isinstance(c, FinishSuspend) and c.ran_on is not None:
        done = op.state is OperationState.FAILED and op.to_state is ActorState.CRASHED
    if done or (op.state is OperationState.FAILED and isinstance(c, BackOut)):
        return repeated(view, op, c.key, op.kind)
    return None


def current(view: View, c: OperationCommand, kind: OperationKind | None = None) -> tuple[Actor, Operation]:
    """The fence: actor and operation, if the command's operation and generation are the current ones.

    Raises:
        LeaseLost: they are not.
        FailedPrecondition: the operation is not of the kind that this command is a step of.
    """
    actor, operation = view.actor, view.operation
    if (
        actor is None
        or operation is None
        or actor.operation != c.operation_id
        or operation.id != c.operation_id
        or actor.generation != c.generation
        or operation.state is not OperationState.RUNNING
    ):
        raise lost(actor, c)
    if kind is not None and operation.kind is not kind:
        raise wrong_step(c, operation)
    return actor, operation


def repeated(view: View, prior: Operation, key: Key, kind: OperationKind, request_digest: str = "") -> Change:
    if prior.kind is not kind or prior.key != key or prior.request_digest != request_digest:
        if prior.request_id:
            raise InvalidArgument(
                f"request id {prior.request_id!r} was used for {prior.kind} of {prior.key} already, "
                + ("with other arguments" if (prior.kind, prior.key) == (kind, key) else f"not for {kind} of {key}")
                + "; use a new random id for each thing that is wanted",
                reason="REQUEST_ID_REUSED",
                metadata={"operation": prior.id},
            )
        raise AlreadyExists(
            f"operation id {prior.id} is taken by {prior.kind} of {prior.key}; use an id for one operation only",
            reason="OPERATION_ID_TAKEN",
        )
    actor = view.actor if view.actor is not None and view.actor.uid == prior.uid else None
    return Change(outcome=Outcome.REPEATED, actor=actor, operation=prior)


def wrong_step(c: OperationCommand, op: Operation) -> FailedPrecondition:
    origin = f" from {op.from_state}" if op.from_state else ""
    return FailedPrecondition(
        f"{type(c).__name__} is no step of operation {op.id}, which is {op.kind} of {op.key}{origin}",
        reason="WRONG_STEP",
    )


def held(actor: Actor, operation: Operation, lease: Lease | None) -> LeaseHeld:
    holder = lease.owner if lease else "nobody"
    until = f"{lease.expires_at:.3f}" if lease else ""
    return LeaseHeld(
        f"actor {actor.key} is {actor.state}: operation {operation.id} ({operation.kind}, phase {operation.phase}) is "
        f"under way; wait for it with `greenroom wait operation {operation.id}`",
        metadata={"holder": holder, "operation": operation.id, "until": until},
    )


def lost(actor: Actor | None, c: OperationCommand) -> LeaseLost:
    now_at = f"generation {actor.generation}, operation {actor.operation or 'none'}" if actor else "gone"
    return LeaseLost(
        f"operation {c.operation_id} (generation {c.generation}) no longer holds actor {c.key}: it is at {now_at}",
        metadata={"operation": c.operation_id, "generation": str(c.generation)},
    )
