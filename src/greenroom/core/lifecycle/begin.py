"""How an actor comes to be, and how an operation on it begins: what it leaves, where to, and the worker and snapshot
that a resume gets."""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec.structs import replace

from greenroom.core import keeping, placement, states
from greenroom.core.commands import (
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Change,
    CreateActor,
    FallBack,
    Outcome,
    Rebind,
    View,
)
from greenroom.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
)
from greenroom.core.lifecycle import fence
from greenroom.core.lifecycle.ends import way_back
from greenroom.core.records import (
    Actor,
    ActorState,
    Lease,
    OnCrash,
    Operation,
    OperationKind,
    OperationState,
    Rejection,
    Snapshot,
    SnapshotState,
    Template,
    TemplateState,
)

#: What begins -> (state while it is under way, state that it leads to, first phase).
_COURSE = {
    BeginResume: (ActorState.RESUMING, ActorState.RUNNING, "bind"),
    BeginSuspend: (ActorState.SUSPENDING, ActorState.SUSPENDED, "checkpoint"),
    BeginPause: (ActorState.PAUSING, ActorState.PAUSED, "freeze"),
    BeginDelete: (ActorState.DELETING, None, "discard"),
}


def create(view: View, c: CreateActor) -> Change:
    if view.prior is not None:
        return fence.repeated(view, view.prior, c.key, OperationKind.CREATE, c.request_digest)
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


def begin(view: View, c: BeginResume | BeginSuspend | BeginPause | BeginDelete) -> Change:
    kind, (doing, goal, phase) = c.kind, _COURSE[type(c)]
    if view.prior is not None:
        return fence.repeated(view, view.prior, c.key, kind)
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
        raise fence.held(actor, view.operation, view.lease)
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
        source = source_of(view, actor)
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


def source_of(view: View, actor: Actor) -> Snapshot | None:
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
            kept, over = way_back(actor, view)
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
