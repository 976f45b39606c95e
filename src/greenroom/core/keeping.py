"""Which snapshots of an actor are kept: retention and tags, as pure decisions of `greenroom.core.lifecycle`."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from greenroom.core.commands import Change, Expire, Outcome, TagSnapshot, View
from greenroom.core.errors import FailedPrecondition, NotFound, ResourceExhausted
from greenroom.core.gc import blobs
from greenroom.core.records import Actor, OperationState, Retention, Snapshot, SnapshotState, Template

#: Tags of one snapshot: more are a mistake of a program.
MAX_TAGS = 32


def condemned(snapshots: Iterable[Snapshot]) -> tuple[Snapshot, ...]:
    """Those of them that nobody pins, CONDEMNED. Nothing leaves that state."""
    over = [s for s in snapshots if not (s.golden or s.tags or s.state is SnapshotState.CONDEMNED)]
    return tuple(replace(s, state=SnapshotState.CONDEMNED, version=s.version + 1) for s in over)


def keeps_more(template: Template | None) -> bool:
    """Whether actors keep more than they need; then nothing is condemned but by `expire`."""
    return template is not None and template.spec.retention != Retention()


def no_snapshot(actor: Actor, snapshot_id: str) -> NotFound:
    return NotFound(
        f"actor {actor.key} has no snapshot {snapshot_id}; "
        f"`greenroom describe actor {actor.name} -n {actor.namespace}` lists those it has",
        reason="SNAPSHOT_NOT_FOUND",
    )


def expire(view: View, c: Expire) -> Change:
    actor = view.actor
    if actor is None or actor.uid != c.uid:
        return Change(outcome=Outcome.ALREADY, actor=actor)
    over = _expired(view, actor, view.owned, c.now)
    return Change(snapshots=over) if over else Change(outcome=Outcome.ALREADY, actor=actor)


def _expired(view: View, actor: Actor, owned: Iterable[Snapshot], now: float) -> tuple[Snapshot, ...]:
    retention = view.template.spec.retention if view.template else Retention()
    needed = {actor.snapshot, actor.previous_snapshot}
    if view.operation is not None and view.operation.state is OperationState.RUNNING:
        needed.add(view.operation.snapshot)
    return condemned(blobs.expired(owned, needed, retention, now))


def tag(view: View, c: TagSnapshot) -> Change:
    """``Change.source`` is the snapshot as it is then."""
    actor = view.actor
    if actor is None:
        raise NotFound(f"actor {c.key} does not exist, or not any more", reason="ACTOR_NOT_FOUND")
    snapshot = next((s for s in view.owned if s.id == c.snapshot_id), None)
    if snapshot is None:
        raise no_snapshot(actor, c.snapshot_id)
    if snapshot.state is SnapshotState.CONDEMNED:
        raise FailedPrecondition(f"snapshot {snapshot.id} is being deleted", reason="SNAPSHOT_CONDEMNED")
    if (c.tag in snapshot.tags) is not c.undo:
        return Change(outcome=Outcome.ALREADY, actor=actor, source=snapshot)
    if not c.undo and len(snapshot.tags) >= MAX_TAGS:
        raise ResourceExhausted(
            f"snapshot {snapshot.id} has {MAX_TAGS} tags already; take one away with "
            f"`greenroom untag snapshot {snapshot.id} NAME`",
            reason="TOO_MANY_TAGS",
        )
    tags = tuple(t for t in snapshot.tags if t != c.tag) if c.undo else tuple(sorted({*snapshot.tags, c.tag}))
    after = replace(snapshot, tags=tags, version=snapshot.version + 1)
    if c.undo and any(s.id == after.id for s in _expired(view, actor, _with(view.owned, after), c.now)):
        after = replace(after, state=SnapshotState.CONDEMNED)
    return Change(snapshots=(after,), source=after)


def _with(owned: Iterable[Snapshot], one: Snapshot) -> list[Snapshot]:
    return [one if s.id == one.id else s for s in owned]
