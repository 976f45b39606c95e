"""What each command does to an actor: pure decisions over what a store loaded in one transaction.

A store's `apply` loads a `View` of the actor that a command names, calls `decide`, and writes the `Change` in the
same transaction. Everything that must hold together is decided here once, for every store: the state table, the lease
and its generation, the binding of actor, worker slot and operation.

Fencing: a command that goes on with an operation (`OperationCommand`) carries the operation's id and generation and
changes nothing unless both are the actor's current ones. A command whose reply was lost may be sent again: what it did
is answered as REPEATED, not done twice.

Slots: an actor holds one slot of the worker that ``actor.worker`` names, and none when that is "". A worker's count
changes only together with that field.
"""

from __future__ import annotations

from typing import assert_never

from msgspec.structs import replace

from greenroom.core import keeping
from greenroom.core.commands import (
    ActorCommand,
    Advance,
    BackOut,
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Change,
    Crash,
    CreateActor,
    Expire,
    FallBack,
    FinishDelete,
    FinishPause,
    FinishResume,
    FinishSuspend,
    FinishUpload,
    LoseSnapshot,
    OperationCommand,
    Outcome,
    Rebind,
    ReleaseLease,
    RenewLease,
    RequestCancel,
    Reunite,
    TagSnapshot,
    TakeOver,
    View,
)
from greenroom.core.lifecycle import begin, ends, fence, moves, trouble
from greenroom.core.records import (
    ActorState,
    OperationKind,
)


def decide(view: View, command: ActorCommand) -> Change:
    """Raises `GreenroomError` when the command is refused; then nothing is to be written."""
    if isinstance(command, OperationCommand) and (done := fence.done_before(view, command)):
        return done
    match command:
        case CreateActor():
            return begin.create(view, command)
        case BeginResume() | BeginSuspend() | BeginPause() | BeginDelete():
            return begin.begin(view, command)
        case FinishResume():
            return ends.finish_resume(view, command)
        case FinishSuspend():
            return ends.finish_suspend(view, command)
        case FinishPause():
            actor, op = fence.current(view, command, OperationKind.PAUSE)
            return ends.end(actor, op, command.now, ActorState.PAUSED, phases=command.phases)
        case FinishDelete():
            return ends.finish_delete(view, command)
        case BackOut():
            return ends.back_out(view, command)
        case Rebind():
            return moves.rebind(view, command)
        case FallBack():
            return moves.fall_back(view, command)
        case Advance():
            _, op = fence.current(view, command)
            op = replace(
                op,
                phase=command.phase,
                layers=command.layers,
                done_bytes=command.done_bytes,
                total_bytes=command.total_bytes,
                updated_at=command.now,
                version=op.version + 1,
            )
            return Change(operation=op)
        case TakeOver():
            return moves.take_over(view, command)
        case RenewLease():
            actor, op = fence.current(view, command)
            if view.lease is None or view.lease.owner != command.owner or view.lease.expires_at <= command.now:
                raise fence.lost(actor, command)
            return Change(lease=replace(view.lease, expires_at=command.now + command.lease_ttl_s), current=op)
        case ReleaseLease():
            fence.current(view, command)
            if view.lease is None or view.lease.owner != command.owner:
                return Change(outcome=Outcome.ALREADY)
            return Change(lease=replace(view.lease, expires_at=command.now))
        case RequestCancel():
            return moves.request_cancel(view, command)
        case Crash():
            return trouble.crash(view, command)
        case Reunite():
            return trouble.reunite(view, command)
        case FinishUpload():
            return trouble.finish_upload(view, command)
        case LoseSnapshot():
            return trouble.lose_snapshot(view, command)
        case Expire():
            return keeping.expire(view, command)
        case TagSnapshot():
            return keeping.tag(view, command)
        case _:
            assert_never(command)
