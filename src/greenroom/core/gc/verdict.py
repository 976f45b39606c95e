"""Whether something stays or goes, and why: for people. Pure; from what the records say and workers have told.

Nothing is destroyed because of what is said here: each collector decides by rules of its own, in its transaction or
under its lock. These functions say what they will decide, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from greenroom.core.records import (
    Actor,
    ActorState,
    CachedImage,
    ImageCache,
    Operation,
    Record,
    Snapshot,
    SnapshotState,
    Template,
    Worker,
    WorkerState,
)
from greenroom.core.states import BUSY

#: Where things are that no worker has.
DATABASE, SNAPSHOT_STORE = "database", "snapshot store"
NEXT_ROUND = "with the next round"


class Kept(Record, frozen=True, kw_only=True):
    why: str


class Goes(Record, frozen=True, kw_only=True):
    """``when``: what it still waits for."""

    why: str
    when: str = NEXT_ROUND


Verdict = Kept | Goes


class Judged(Record, frozen=True, kw_only=True):
    """One thing and its verdict. ``made_at``: when it was made (seconds since the epoch), None when nobody knows;
    ``size_bytes`` 0: not known, or none; ``when``: "" for what is kept."""

    kind: str
    id: str
    where: str
    goes: bool
    why: str
    when: str = ""
    size_bytes: int = 0
    made_at: float | None = None


class There(Record, frozen=True, kw_only=True):
    """What a worker has said it has. ``kind``: ``sandbox``, or ``copy`` of a snapshot on its own disk; ``id``: its
    handle; ``owner``: the actor's uid, or the snapshot's id."""

    worker: str
    kind: str
    id: str
    owner: str
    size_bytes: int = 0
    made_at: float | None = None


def judged(
    kind: str, id: str, where: str, verdict: Verdict, *, size_bytes: int = 0, made_at: float | None = None
) -> Judged:
    goes = isinstance(verdict, Goes)
    when = verdict.when if isinstance(verdict, Goes) else ""
    return Judged(
        kind=kind, id=id, where=where, goes=goes, why=verdict.why, when=when, size_bytes=size_bytes, made_at=made_at
    )


# --- records ----------------------------------------------------------------------------------------------


def actor(actor: Actor, operation: Operation | None) -> Verdict:
    """``operation``: that which holds it."""
    if actor.state is ActorState.DELETING:
        which = f"operation {operation.id} deletes it" if operation else "it is being deleted, and that has failed once"
        again = "when the operation has ended" if operation else "when somebody deletes it again"
        return Goes(why=which, when=again)
    if actor.golden:
        return Kept(why=f"template {actor.namespace}/{actor.template} is prepared with it, and deletes it then")
    return Kept(why=f"it is {actor.state}, and an actor stays until somebody deletes it (`greenroom delete actor`)")


def template(template: Template, users: int) -> Verdict:
    """``users``: how many actors are made from it."""
    used = f"{users} actors are made from it" if users else "no actor is made from it"
    return Kept(why=f"{used}, and a template stays until somebody deletes it (`greenroom delete template`)")


def worker(worker: Worker, now: float, *, gone_s: float) -> Verdict:
    """``gone_s``: after how long of silence a worker counts as gone by itself."""
    name = worker.name
    if worker.state is WorkerState.GONE:
        return Kept(
            why=f"it is gone ({worker.message}); the tombstone tells it to wipe itself should it come back, and stays "
            f"until `greenroom forget worker {name}`, or until an empty disk takes the name"
        )
    if worker.distrust:
        return Kept(why=_distrusted(worker))
    if worker.state is WorkerState.STALLED:
        if worker.cordon == "retiring" and not worker.used:
            return Goes(why="it was being retired, and nobody hears it", when="when it has been silent for long enough")
        return Kept(
            why=f"nobody has heard it since {_utc(worker.last_seen)}; nothing of it is touched until it is back, "
            f"`greenroom forget worker {name}` says that it is gone, or it has been silent for {gone_s:g} s"
        )
    if worker.cordon == "retiring":
        awake = f"when {worker.used} actors are suspended" if worker.used else "when what only it has is uploaded"
        return Goes(why="it is being retired", when=awake)
    if worker.cordon:
        return Kept(why=f"it is being emptied ({worker.cordon}), and keeps its disk")
    return Kept(why=f"it is {worker.state}, and was heard {max(0.0, now - worker.last_seen):.0f} s ago")


# --- snapshots --------------------------------------------------------------------------------------------


def snapshot(
    snapshot: Snapshot,
    owner: Actor | None,
    template: Template | None,
    operations: Sequence[Operation],
    holder: Worker | None,
    *,
    is_over: bool = False,
    tags: Sequence[str] = (),
) -> Verdict:
    """
    Args:
        owner: the actor with the snapshot's uid; None when there is none.
        template: the snapshot's.
        operations: of the owner that are running.
        holder: the worker that made it.
        is_over: its template's retention keeps it no longer.
        tags: names that people gave it.
    """
    name = f"{snapshot.namespace}/{snapshot.actor}"
    if snapshot.state is SnapshotState.CONDEMNED:
        why = "it is condemned: nothing wakes from it any more"
        if snapshot.held and holder is not None and holder.state is WorkerState.STALLED:
            return Goes(why=why, when=f"when worker {holder.name}, which holds a copy and is stalled, is back or gone")
        return Goes(why=why)
    if snapshot.golden:
        whose = f"template {snapshot.namespace}/{snapshot.template}"
        if template is None:
            return Goes(why=f"it was the golden snapshot of {whose}, which does not exist any more")
        if template.golden_snapshot == snapshot.id:
            return Kept(why=f"it is the golden snapshot of {whose}: its actors wake from it the first time")
        if template.operation:
            return Kept(why=f"{whose} is being prepared, by operation {template.operation}")
        return Goes(why=f"{whose} has another golden snapshot", when="when the template is prepared again, or deleted")
    for operation in operations:
        if operation.snapshot == snapshot.id:
            return Kept(why=f"operation {operation.id} ({operation.kind}) works with it")
    if owner is None:
        return Goes(why=f"its actor {name} does not exist any more")
    if owner.snapshot == snapshot.id:
        return Kept(why=f"actor {name} wakes from it" + _only_copy(snapshot))
    if owner.previous_snapshot == snapshot.id:
        return Kept(why=f"it is the way back of actor {name}, should its latest be damaged" + _only_copy(snapshot))
    if snapshot.state is SnapshotState.CORRUPT:
        return Kept(why=f"it is corrupt or lost, and shows what has happened, until actor {name} is deleted")
    if tags:
        return Kept(why=f"it has a tag ({', '.join(tags)})")
    whose = f"template {snapshot.namespace}/{snapshot.template}"
    return (
        Goes(why=f"{whose} keeps it no longer (`retention`)")
        if is_over
        else Kept(why=f"{whose} keeps it (`retention`)")
    )


def _only_copy(snapshot: Snapshot) -> str:
    return f"; it is on worker {snapshot.worker} only" if snapshot.state is SnapshotState.LOCAL else ""


def stored(owners: Sequence[Snapshot], uploading: Operation | None, age_s: float, scrub_age_s: float) -> Verdict:
    """An object of the snapshot store.

    Args:
        owners: the snapshots that refer to it.
        uploading: a running operation whose upload may have put it there.
        age_s: by the store's clock.
        scrub_age_s: what belongs to nobody goes when it is older.
    """
    for owner in owners:
        if owner.state is not SnapshotState.CONDEMNED:
            return Kept(why=f"snapshot {owner.id} of actor {owner.namespace}/{owner.actor} consists of it")
    if owners:
        return Goes(why=f"snapshot {owners[0].id}, which alone consists of it, is condemned")
    if uploading is not None:
        return Kept(why=f"operation {uploading.id} ({uploading.kind}) is uploading")
    why = "no snapshot refers to it, and no operation is uploading it"
    if age_s <= scrub_age_s:
        return Goes(why=why, when=f"when it is older than {scrub_age_s / 3600:g} h and two scrubs have found it")
    return Goes(why=why, when="when two scrubs have found it")


# --- on workers -------------------------------------------------------------------------------------------


def sandbox(there: There, place: Worker | None, owner: Actor | None) -> Verdict:
    """``place``: the record of the worker that has it; ``owner``: the actor with its uid."""
    if place is not None and place.distrust:
        return Kept(why=_distrusted(place))
    if owner is not None and owner.worker == there.worker and (owner.sandbox or owner.uid) == there.id:
        if owner.state in BUSY:
            return Kept(why=f"operation {owner.operation} holds actor {owner.key}, which is {owner.state} there")
        return Kept(why=f"actor {owner.key} is {owner.state} in it")
    if owner is None:
        why = "its actor does not exist any more"
    elif owner.worker == there.worker:
        why = f"actor {owner.key} has another sandbox there, {owner.sandbox}"
    elif owner.worker:
        why = f"actor {owner.key} is {owner.state} on worker {owner.worker}"
    else:
        why = f"actor {owner.key} is {owner.state}, and on no worker"
    return Goes(why=why, when=_when(there, place))


def copy(there: There, place: Worker | None, snapshot: Snapshot | None, operation: Operation | None) -> Verdict:
    """A snapshot on a worker's own disk. ``operation``: a running one that names the snapshot."""
    if place is not None and place.distrust:
        return Kept(why=_distrusted(place))
    if operation is not None:
        return Kept(why=f"operation {operation.id} ({operation.kind}) works with it")
    if snapshot is None:
        return Goes(why="no snapshot of that id exists", when=_when(there, place))
    if snapshot.state in (SnapshotState.CONDEMNED, SnapshotState.CORRUPT):
        return Goes(why=f"snapshot {snapshot.id} is {snapshot.state.lower()}", when=_when(there, place))
    name = f"{snapshot.namespace}/{snapshot.actor}"
    if snapshot.state is SnapshotState.LOCAL:
        return Kept(why=f"it is the only copy of a snapshot of actor {name}: it is not uploaded yet")
    return Kept(why=f"actor {name} wakes from it here without a download; it goes with its snapshot")


def image(cache: ImageCache, image: CachedImage) -> Verdict:
    if image.pinned:
        return Kept(why="it is pinned (`greenroom images unpin`)")
    if image.users:
        return Kept(why=f"{', '.join(image.users)} runs from it")
    why = "nobody uses it" if image.ready else "it is here in part only, and nobody fetches it"
    if cache.high_bytes:
        return Goes(why=why, when="when images take more than they may and none was unused for longer (--images-high)")
    return Goes(why=why, when="when somebody says `greenroom images prune`")


def _when(there: There, place: Worker | None) -> str:
    if place is None or place.state is WorkerState.GONE:
        return f"when worker {there.worker}, which is gone, comes back and wipes itself"
    if place.state is WorkerState.STALLED:
        return f"when worker {there.worker}, which is stalled, is heard again"
    return NEXT_ROUND


def _distrusted(worker: Worker) -> str:
    return (
        f"nothing on worker {worker.name} is destroyed: {worker.distrust}; `greenroom acknowledge worker "
        f"{worker.name}` says that the database is right as it is"
    )


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds")
