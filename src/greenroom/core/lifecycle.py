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

from datetime import UTC, datetime
from typing import Any, assert_never

from msgspec.structs import replace

from greenroom.core import keeping, placement, states
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
from greenroom.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LeaseHeld,
    LeaseLost,
    NotFound,
)
from greenroom.core.gc import blobs
from greenroom.core.records import (
    Actor,
    ActorState,
    Failure,
    Key,
    Lease,
    OnCrash,
    Operation,
    OperationKind,
    OperationState,
    PhaseTime,
    Rejection,
    Snapshot,
    SnapshotState,
    Template,
    TemplateState,
    WorkerState,
    attempt_id,
)

#: What an actor has no more that is on no worker.
UNBOUND: dict[str, Any] = {"worker": "", "endpoint": None, "sandbox": "", "sandbox_seq": 0}

# --- decisions --------------------------------------------------------------------------------------------


def decide(view: View, command: ActorCommand) -> Change:
    """Raises `GreenroomError` when the command is refused; then nothing is to be written."""
    if isinstance(command, OperationCommand) and (done := _done_before(view, command)):
        return done
    match command:
        case CreateActor():
            return _create(view, command)
        case BeginResume() | BeginSuspend() | BeginPause() | BeginDelete():
            return _begin(view, command)
        case FinishResume():
            return _finish_resume(view, command)
        case FinishSuspend():
            return _finish_suspend(view, command)
        case FinishPause():
            actor, op = _current(view, command, OperationKind.PAUSE)
            return _end(actor, op, command.now, ActorState.PAUSED, phases=command.phases)
        case FinishDelete():
            return _finish_delete(view, command)
        case BackOut():
            return _back_out(view, command)
        case Rebind():
            return _rebind(view, command)
        case FallBack():
            return _fall_back(view, command)
        case Advance():
            _, op = _current(view, command)
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
            return _take_over(view, command)
        case RenewLease():
            actor, op = _current(view, command)
            if view.lease is None or view.lease.owner != command.owner or view.lease.expires_at <= command.now:
                raise _lost(actor, command)
            return Change(lease=replace(view.lease, expires_at=command.now + command.lease_ttl_s), current=op)
        case ReleaseLease():
            _current(view, command)
            if view.lease is None or view.lease.owner != command.owner:
                return Change(outcome=Outcome.ALREADY)
            return Change(lease=replace(view.lease, expires_at=command.now))
        case RequestCancel():
            return _request_cancel(view, command)
        case Crash():
            return _crash(view, command)
        case Reunite():
            return _reunite(view, command)
        case FinishUpload():
            return _finish_upload(view, command)
        case LoseSnapshot():
            return _lose_snapshot(view, command)
        case Expire():
            return keeping.expire(view, command)
        case TagSnapshot():
            return keeping.tag(view, command)
        case _:
            assert_never(command)


def _create(view: View, c: CreateActor) -> Change:
    if view.prior is not None:
        return _repeated(view, view.prior, c.key, OperationKind.CREATE, c.request_digest)
    if view.actor is not None:
        raise AlreadyExists(f"actor {c.key} exists already; choose another name or delete it first")
    if view.template is None:
        raise NotFound(
            f"template {c.key.namespace}/{c.template} does not exist; `greenroom get templates` lists those there are",
            reason="TEMPLATE_NOT_FOUND",
        )
    if view.template.state is TemplateState.FAILED and not c.golden:
        raise _template_not_ready(view.template)
    actor = Actor(
        namespace=c.key.namespace,
        name=c.key.name,
        uid=c.uid,
        template=c.template,
        state=ActorState.SUSPENDED,
        reason="Created",
        created_at=c.now,
        state_since=c.now,
        labels=c.labels,
        worker_selector=c.worker_selector,
        golden=c.golden,
        version=1,
    )
    operation = Operation(
        id=c.operation_id,
        kind=OperationKind.CREATE,
        namespace=c.key.namespace,
        name=c.key.name,
        uid=c.uid,
        created_at=c.now,
        updated_at=c.now,
        finished_at=c.now,
        deadline_at=c.now,
        state=OperationState.DONE,
        to_state=ActorState.SUSPENDED,
        request_id=c.request_id,
        request_digest=c.request_digest,
        version=1,
    )
    return Change(actor=actor, operation=operation, template=view.template)


def _repeated(view: View, prior: Operation, key: Key, kind: OperationKind, request_digest: str = "") -> Change:
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


#: What begins -> (state while it is under way, state that it leads to, first phase).
_COURSE = {
    BeginResume: (ActorState.RESUMING, ActorState.RUNNING, "bind"),
    BeginSuspend: (ActorState.SUSPENDING, ActorState.SUSPENDED, "checkpoint"),
    BeginPause: (ActorState.PAUSING, ActorState.PAUSED, "freeze"),
    BeginDelete: (ActorState.DELETING, None, "discard"),
}


def _begin(view: View, c: BeginResume | BeginSuspend | BeginPause | BeginDelete) -> Change:
    kind, (doing, goal, phase) = c.kind, _COURSE[type(c)]
    if view.prior is not None:
        return _repeated(view, view.prior, c.key, kind)
    actor = view.actor
    if actor is None or (c.uid and actor.uid != c.uid):
        raise NotFound(
            f"actor {c.key} does not exist; `greenroom get actors` lists those there are", reason="ACTOR_NOT_FOUND"
        )
    asked_for = isinstance(c, BeginResume) and c.snapshot_id != ""
    if asked_for and actor.state in (ActorState.RUNNING, ActorState.PAUSED):
        raise FailedPrecondition(
            f"actor {actor.key} is {actor.state}, and wakes from another snapshot only when it sleeps; "
            f"`greenroom suspend {actor.name} -n {actor.namespace}` first",
            reason="ACTOR_AWAKE",
        )
    if actor.state is goal:
        return Change(outcome=Outcome.ALREADY, actor=actor)
    if view.operation is not None and actor.state in states.BUSY:
        if view.operation.kind is kind and not asked_for:
            return Change(outcome=Outcome.JOINED, actor=actor, operation=view.operation)
        raise _held(actor, view.operation, view.lease)
    states.check(str(actor.key), actor.state, doing)

    slots: tuple[tuple[str, int], ...] = ()
    worker, snapshot = actor.worker, ""
    source: Snapshot | None = None
    rejected: tuple[Rejection, ...] = ()
    over: tuple[Snapshot, ...] = ()
    if isinstance(c, BeginResume) and actor.state is not ActorState.PAUSED:
        if c.hold_crashed and actor.state is ActorState.CRASHED:
            actor, view, over = _by_policy(actor, view)
        if c.snapshot_id:
            actor, view, over = _from(c.snapshot_id, actor, view)
        source = _source(view, actor)
        prefer = c.prefer or (actor.last_worker,)
        chosen, rejected = placement.choose(view.workers, demand(view, actor, source, c, prefer), c.now)
        worker = chosen.name
        actor = replace(actor, sandbox=c.operation_id, sandbox_seq=chosen.seq)
        slots, snapshot = ((worker, 1),), source.id if source else ""
    elif isinstance(c, BeginSuspend):
        snapshot = c.snapshot_id
        source = view.source if actor.snapshot else None

    generation = actor.generation + 1
    operation = Operation(
        id=c.operation_id,
        kind=kind,
        namespace=actor.namespace,
        name=actor.name,
        uid=actor.uid,
        created_at=c.now,
        updated_at=c.now,
        deadline_at=c.now + c.deadline_s,
        phase=phase,
        request_id=c.request_id,
        cause=c.cause,
        generation=generation,
        worker=worker,
        snapshot=snapshot,
        from_state=actor.state,
        owner=c.owner,
        rejected=rejected,
        chosen=asked_for and view.actor is not None and actor.snapshot != view.actor.snapshot,
        version=1,
    )
    lease = Lease(
        uid=actor.uid,
        owner=c.owner,
        operation=c.operation_id,
        generation=generation,
        expires_at=c.now + c.lease_ttl_s,
    )
    actor = replace(
        actor,
        state=doing,
        reason="",
        message="",
        state_since=c.now,
        generation=generation,
        worker=worker,
        operation=c.operation_id,
        version=actor.version + 1,
    )
    return Change(
        actor=actor,
        operation=operation,
        lease=lease,
        slots=slots,
        snapshots=over,
        template=view.template,
        source=source,
    )


def _source(view: View, actor: Actor) -> Snapshot | None:
    """The snapshot to resume from; None boots (only the golden actor's very first time)."""
    template = view.template
    if template is None:
        raise FailedPrecondition(
            f"actor {actor.key} was made from template {actor.template!r}, which is gone; apply it again",
            reason="TEMPLATE_NOT_FOUND",
        )
    source = view.source
    if source is not None and source.state is SnapshotState.CONDEMNED:
        raise FailedPrecondition(
            f"actor {actor.key}: its snapshot {source.id} is being deleted; "
            + ("delete the actor" if actor.snapshot else f"apply template {template.key} again"),
            reason="SNAPSHOT_CONDEMNED",
        )
    if source is not None or (actor.golden and not actor.snapshot):
        return source
    if actor.snapshot:
        raise FailedPrecondition(
            f"actor {actor.key}: the record of its snapshot {actor.snapshot} is missing; delete the actor",
            reason="SNAPSHOT_NOT_FOUND",
        )
    raise _template_not_ready(template)


def demand(
    view: View, actor: Actor, source: Snapshot | None, c: BeginResume | Rebind | FallBack, prefer: tuple[str, ...] = ()
) -> placement.Demand:
    """What a worker must offer to an actor that is to be restored from ``source``."""
    assert view.template is not None
    return placement.Demand(
        pool=view.template.spec.pool,
        snapshot=source,
        selector=placement.selector(view.template.spec.worker_selector, actor.worker_selector),
        image_digest=view.template.image_digest,
        prefer=prefer,
        avoid=() if isinstance(c, FallBack) else c.avoid,
        reachable=c.reachable,
    )


def _by_policy(actor: Actor, view: View) -> tuple[Actor, View, tuple[Snapshot, ...]]:
    """A crashed actor that nobody resumes on purpose: held, restored, or begun anew; and the snapshots that are not
    wanted then."""
    if view.template is None:
        return actor, view, ()  # refused later, with a reason of its own
    match view.template.spec.on_crash:
        case OnCrash.HOLD:
            raise _crashed_and_held(actor)
        case OnCrash.RESTORE_LAST:
            return actor, view, ()
        case OnCrash.BOOT:
            kept, over = _way_back(actor, view)
            actor = replace(actor, snapshot="", previous_snapshot=kept.id if kept else "")
            return actor, replace(view, source=view.golden), () if keeping.keeps_more(view.template) else over


def _from(snapshot_id: str, actor: Actor, view: View) -> tuple[Actor, View, tuple[Snapshot, ...]]:
    """A sleeping or crashed actor that is to wake from this one of its snapshots: what it would have woken from is its
    way back now, and the snapshots that are not wanted then."""
    named = view.named
    if named is None or named.actor_uid != actor.uid:
        raise keeping.no_snapshot(actor, snapshot_id)
    if named.state not in (SnapshotState.PRESENT, SnapshotState.LOCAL):
        raise FailedPrecondition(
            f"actor {actor.key} can't wake from snapshot {snapshot_id}, which is {named.state}; "
            f"`greenroom get snapshots -n {actor.namespace}` lists those there are",
            reason=f"SNAPSHOT_{named.state.upper()}",
        )
    if named.id == actor.snapshot:
        return actor, view, ()
    have = [s for s in (view.source if actor.snapshot else None, view.previous) if s is not None and s.id != named.id]
    kept = next((s for s in have if s.state in (SnapshotState.PRESENT, SnapshotState.LOCAL)), None)
    over = () if keeping.keeps_more(view.template) else keeping.condemned(s for s in have if s is not kept)
    actor = replace(actor, snapshot=named.id, previous_snapshot=kept.id if kept else "")
    return actor, replace(view, source=named), over


def _crashed_and_held(actor: Actor) -> FailedPrecondition:
    what = f"actor {actor.key} crashed ({actor.reason}: {actor.message})"
    return FailedPrecondition(
        f"{what} and what it did since {_utc(actor.unsaved_since)} is lost; "
        f"`greenroom resume {actor.name} -n {actor.namespace}` goes back to its last snapshot",
        reason="ACTOR_CRASHED",
        metadata={"unsaved_since": str(actor.unsaved_since)},
    )


def _utc(seconds: float | None) -> str:
    if seconds is None:
        return "its last wake-up"
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")


def _template_not_ready(template: Template) -> FailedPrecondition:
    detail = f" ({template.reason}: {template.message})" if template.reason or template.message else ""
    return FailedPrecondition(
        f"template {template.key} is {template.state}{detail}; "
        f"`greenroom describe template {template.name} -n {template.namespace}` tells more",
        reason="TEMPLATE_NOT_READY",
        metadata={"template_state": template.state},
    )


def _held(actor: Actor, operation: Operation, lease: Lease | None) -> LeaseHeld:
    holder = lease.owner if lease else "nobody"
    until = f"{lease.expires_at:.3f}" if lease else ""
    return LeaseHeld(
        f"actor {actor.key} is {actor.state}: operation {operation.id} ({operation.kind}, phase {operation.phase}) is "
        f"under way; wait for it with `greenroom wait operation {operation.id}`",
        metadata={"holder": holder, "operation": operation.id, "until": until},
    )


def _lost(actor: Actor | None, c: OperationCommand) -> LeaseLost:
    now_at = f"generation {actor.generation}, operation {actor.operation or 'none'}" if actor else "gone"
    return LeaseLost(
        f"operation {c.operation_id} (generation {c.generation}) no longer holds actor {c.key}: it is at {now_at}",
        metadata={"operation": c.operation_id, "generation": str(c.generation)},
    )


#: The command that ends a kind of operation well.
_ENDS: dict[type[OperationCommand], OperationKind] = {
    FinishResume: OperationKind.RESUME,
    FinishSuspend: OperationKind.SUSPEND,
    FinishPause: OperationKind.PAUSE,
    FinishDelete: OperationKind.DELETE,
}


def _done_before(view: View, c: OperationCommand) -> Change | None:
    """What to answer when the step that ends an operation is sent again because its reply was lost: the operation as it
    ended, so that its driver sees no failure. None for every other command."""
    op = view.operation
    if op is None or op.state is OperationState.RUNNING or op.id != c.operation_id or op.generation != c.generation:
        return None
    done = op.state is OperationState.DONE and _ENDS.get(type(c)) is op.kind
    if done or (op.state is OperationState.FAILED and isinstance(c, BackOut)):
        return _repeated(view, op, c.key, op.kind)
    return None


def _current(view: View, c: OperationCommand, kind: OperationKind | None = None) -> tuple[Actor, Operation]:
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
        raise _lost(actor, c)
    if kind is not None and operation.kind is not kind:
        raise _wrong_step(c, operation)
    return actor, operation


def _wrong_step(c: OperationCommand, op: Operation) -> FailedPrecondition:
    origin = f" from {op.from_state}" if op.from_state else ""
    return FailedPrecondition(
        f"{type(c).__name__} is no step of operation {op.id}, which is {op.kind} of {op.key}{origin}",
        reason="WRONG_STEP",
    )


def _end(
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


def _finish_resume(view: View, c: FinishResume) -> Change:
    actor, op = _current(view, c, OperationKind.RESUME)
    fresh = op.from_state is not ActorState.PAUSED  # a thaw loses nothing and saves nothing
    return _end(
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


def _finish_suspend(view: View, c: FinishSuspend) -> Change:
    actor, op = _current(view, c, OperationKind.SUSPEND)
    assert c.snapshot.id == op.snapshot, "a suspend publishes the snapshot that it announced"
    made = replace(c.snapshot, parent=actor.snapshot, golden=actor.golden, tags=(), version=1)
    needed = (view.source if actor.snapshot else None, view.previous)
    if missing := blobs.not_there(made, [s for s in needed if s is not None]):
        raise FailedPrecondition(
            f"snapshot {made.id} of actor {actor.key} refers to {missing[0].name} of an upload that is not kept any "
            "more; suspend it again",
            reason="BLOBS_MISSING",
        )
    kept, over = _way_back(actor, view)
    if c.keeps:
        over = ()
    return _end(
        actor,
        op,
        c.now,
        ActorState.SUSPENDED,
        phases=c.phases,
        snapshots=(made, *over),
        snapshot=made.id,
        previous_snapshot=kept.id if kept else "",
        suspended_at=c.now,
        durable_at=made.created_at if made.state is not SnapshotState.LOCAL else actor.durable_at,
        resumed_at=None,
    )


def _way_back(actor: Actor, view: View) -> tuple[Snapshot | None, tuple[Snapshot, ...]]:
    """Which of its snapshots an actor keeps when it goes on from another one, and the others, condemned. It is the
    latest that is durable, because one that is on a worker's disk only is no way back from the loss of that worker;
    without any it is the latest that is good."""
    have = [s for s in (view.source if actor.snapshot else None, view.previous) if s is not None]
    good = [s for state in (SnapshotState.PRESENT, SnapshotState.LOCAL) for s in have if s.state is state]
    kept = good[0] if good else None
    return kept, keeping.condemned(s for s in have if s is not kept)


def _finish_delete(view: View, c: FinishDelete) -> Change:
    actor, op = _current(view, c, OperationKind.DELETE)
    condemned = keeping.condemned(replace(s, tags=()) for s in view.owned)
    change = _end(actor, op, c.now, ActorState.DELETING, phases=c.phases, snapshots=condemned)
    assert change.operation is not None
    op = replace(change.operation, to_state=None)
    return replace(change, operation=op, delete_actor=True, slots=((actor.worker, -1),) if actor.worker else ())


def _back_out(view: View, c: BackOut) -> Change:
    actor, op = _current(view, c)
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
        fields = _after_loss(actor, view, actor.resumed_at if actor.resumed_at is not None else op.created_at)
    elif to is ActorState.SUSPENDED and _is_lost(actor, view):  # while it was to be resumed from it
        to, fields = ActorState.CRASHED, _after_loss(actor, view, None)
    elif op.chosen and actor.snapshot == op.snapshot and actor.previous_snapshot and to is op.from_state:
        fields = {"snapshot": actor.previous_snapshot, "previous_snapshot": actor.snapshot}
    elif to is ActorState.CRASHED and not actor.snapshot and actor.previous_snapshot:
        fields = {"snapshot": actor.previous_snapshot, "previous_snapshot": ""}  # it did not begin anew
    return _end(
        actor,
        op,
        c.now,
        to,
        phases=c.phases,
        error=c.error,
        **{"endpoint": c.endpoint or actor.endpoint, "reason": c.error.reason, "message": c.error.message} | fields,
    )


def _is_lost(actor: Actor, view: View) -> bool:
    """Whether the snapshot that the actor would wake from is no more."""
    return bool(actor.snapshot) and view.source is not None and view.source.state is SnapshotState.CORRUPT


def _after_loss(actor: Actor, view: View, since: float | None) -> dict[str, Any]:
    """Of an actor that crashes: since when what it did is lost. That is ``since``, unless the snapshot that it woke
    from is lost as well; then it goes back to the one before that, and what it did after that one is lost."""
    if not _is_lost(actor, view):
        return {"unsaved_since": since}
    before = view.previous
    if before is None or before.state not in (SnapshotState.PRESENT, SnapshotState.LOCAL):
        return {"unsaved_since": actor.created_at, "snapshot": "", "previous_snapshot": ""}
    return {"unsaved_since": before.created_at, "snapshot": before.id, "previous_snapshot": ""}


def _rebind(view: View, c: Rebind) -> Change:
    actor, op = _current(view, c, OperationKind.RESUME)
    if op.from_state is ActorState.PAUSED:  # its memory is on that worker only
        raise _wrong_step(c, op)
    source = _source(view, actor)
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


def _fall_back(view: View, c: FallBack) -> Change:
    actor, op = _current(view, c, OperationKind.RESUME)
    if op.from_state is ActorState.PAUSED:
        raise _wrong_step(c, op)
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


def _take_over(view: View, c: TakeOver) -> Change:
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
        raise _held(actor, op, lease)
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


def _request_cancel(view: View, c: RequestCancel) -> Change:
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


def _crash(view: View, c: Crash) -> Change:
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
            **_after_loss(actor, view, actor.resumed_at),
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


def _reunite(view: View, c: Reunite) -> Change:
    actor = view.actor
    if (
        actor is None
        or actor.state is not ActorState.RUNNING
        or (actor.uid, actor.worker, actor.generation) != (c.uid, c.worker, c.generation)
    ):
        return Change(outcome=Outcome.ALREADY, actor=actor)
    return Change(actor=replace(actor, generation=actor.generation + 1, version=actor.version + 1))


def _finish_upload(view: View, c: FinishUpload) -> Change:
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


def _lose_snapshot(view: View, c: LoseSnapshot) -> Change:
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
            **_after_loss(actor, replace(view, source=lost), None),
        ),
        operation=_loss(actor, c.operation_id, c.now, "DATA_LOSS", "SnapshotLost", c.message),
        snapshots=(lost,),
    )
