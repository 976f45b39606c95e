"""What there is against what should be: every difference, each in a line. Pure.

The roots are what people made: actors, templates, pools. Whatever none of them needs is a leak, in the database and on
the machine; whatever one of them needs and is not there was destroyed. Lines have the form ``kind: what and why``.

It holds at rest only, so what is under way is a line too (``under way: ...``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from greenroom.agent.logs import KEPT_FILES
from greenroom.core import states
from greenroom.core.gc.blobs import keys_of, place_of
from greenroom.core.keeping import keeps_more
from greenroom.core.records import (
    Actor,
    Key,
    OperationState,
    Snapshot,
    SnapshotState,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.images.uses import WARM
from greenroom.snapshots.store import MARK
from greenroom.store.port import KEPT_OPERATIONS
from greenroom.testing.leaks.places import Machine, Place
from greenroom.testing.leaks.rows import Rows

#: Operations beyond those that are kept, which end between two rounds of the janitor.
MORE_OPERATIONS = 1_000
#: Backends that keep no sandbox where it could be seen from outside.
_UNSEEN = frozenset({"sim"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """``workers``: names of those that should be; None: those of the pools in the database. ``warm``: sandboxes that a
    worker may keep ready."""

    workers: Collection[str] | None = None
    warm: int = 1_000
    #: Replicas of the control plane that run, by name; None: not looked at.
    replicas: Collection[str] | None = field(default=None)


def differences(rows: Rows, machine: Machine, wanted: Wanted = Wanted()) -> list[str]:
    """All of them, sorted; [] when all is as it should be."""
    return sorted({*under_way(rows), *_rows(rows, wanted), *_objects(rows, machine), *_machine(rows, machine, wanted)})


def objects_of(snapshot: Snapshot) -> set[str]:
    """The keys that a snapshot has in the store, with that of its manifest."""
    return {*keys_of(snapshot)}


def under_way(rows: Rows) -> Iterator[str]:
    """What ends by itself."""
    for operation in rows.operations:
        if operation.state is OperationState.RUNNING:
            yield f"under way: {operation.kind} of {operation.key} ({operation.id}, {operation.phase or 'begun'})"
    for actor in rows.actors:
        if actor.state in states.BUSY:
            yield f"under way: actor {actor.key} is {actor.state}"
    for template in rows.templates:
        if template.state in (TemplateState.PENDING, TemplateState.PREPARING):
            yield f"under way: template {template.key} is {template.state}"
    for snapshot in rows.snapshots:
        if snapshot.state in (SnapshotState.LOCAL, SnapshotState.CONDEMNED):
            yield f"under way: snapshot {snapshot.id} of {snapshot.namespace}/{snapshot.actor} is {snapshot.state}"
    for worker in rows.workers:
        if worker.state is not WorkerState.ACTIVE:
            yield f"under way: worker {worker.name} is {worker.state} {worker.cordon}".rstrip()


# --- the database -----------------------------------------------------------------------------------------


def _rows(rows: Rows, wanted: Wanted) -> Iterator[str]:
    templates = {str(t.key): t for t in rows.templates}
    for actor in rows.actors:
        if str(actor.key.__class__(actor.namespace, actor.template)) not in templates:
            yield f"actor row: {actor.key} is of template {actor.template}, which is not there"
        elif actor.golden and not templates[f"{actor.namespace}/{actor.template}"].operation:
            yield f"actor row: {actor.key} made a golden snapshot, and nobody prepares its template any more"
    yield from _snapshots(rows)
    running = {o.id for o in rows.operations if o.state is OperationState.RUNNING}
    for lease in rows.leases:
        if lease.operation not in running:
            yield f"lease row: of actor {lease.uid} for operation {lease.operation}, which does not run"
    if (count := len(rows.operations)) > KEPT_OPERATIONS + MORE_OPERATIONS:
        yield f"operation rows: {count}, where {KEPT_OPERATIONS} are kept"
    bound = Counter(a.worker for a in rows.actors if a.worker)
    there = {w.name for w in rows.workers}
    for worker in rows.workers:
        if worker.used != bound[worker.name]:
            yield f"slots: {worker.used} of worker {worker.name} are taken, by {bound[worker.name]} actors"
    for name in bound.keys() - there:
        yield f"slots: {bound[name]} actors are bound to worker {name}, which has no row"
    should = _workers(rows, wanted)
    yield from (f"worker row: {name}, which is wanted, is missing" for name in should - there)
    yield from (f"worker row: {name} is in no pool any more" for name in there - should)
    if wanted.replicas is not None:
        gone = {r.name for r in rows.replicas} - {*wanted.replicas}
        yield from (f"replica row: {name} runs no more" for name in gone)


def _snapshots(rows: Rows) -> Iterator[str]:
    there = {s.id for s in rows.snapshots}
    needed: dict[str, str] = {}
    for actor in rows.actors:
        needed |= {s: f"actor {actor.key}" for s in (actor.snapshot, actor.previous_snapshot) if s}
    needed |= {t.golden_snapshot: f"template {t.key}" for t in rows.templates if t.golden_snapshot}
    for snapshot_id, who in needed.items():
        if snapshot_id not in there:
            yield f"lost: snapshot {snapshot_id}, which {who} needs, has no row"
    more = {t.key for t in rows.templates if keeps_more(t)}
    for snapshot in rows.snapshots:
        kept = snapshot.tags or Key(snapshot.namespace, snapshot.template) in more
        if snapshot.id not in needed and snapshot.state is not SnapshotState.CONDEMNED and not kept:
            yield f"snapshot row: {snapshot.id} of {snapshot.namespace}/{snapshot.actor}, which nothing needs"


def _workers(rows: Rows, wanted: Wanted) -> set[str]:
    if wanted.workers is not None:
        return {*wanted.workers}
    return {f"{pool.name}-{n}" for pool in rows.pools for n in range(pool.spec.replicas)}


# --- the snapshot store -----------------------------------------------------------------------------------


def _objects(rows: Rows, machine: Machine) -> Iterator[str]:
    owed = {key: s for s in rows.snapshots if s.state is not SnapshotState.LOCAL for key in objects_of(s)}
    for key in machine.objects - owed.keys() - {MARK}:
        yield f"object: {key} belongs to no snapshot"
    for key in owed.keys() - machine.objects:
        snapshot = owed[key]
        if snapshot.state is SnapshotState.PRESENT:
            yield f"lost: object {key} of snapshot {snapshot.id} of {snapshot.namespace}/{snapshot.actor}"


# --- the machine ------------------------------------------------------------------------------------------


def _machine(rows: Rows, machine: Machine, wanted: Wanted) -> Iterator[str]:
    workers = {w.name: w for w in rows.workers}
    should = _workers(rows, wanted)
    for name, place in machine.places.items():
        if name in should:
            yield from _place(rows, workers.get(name), name, place, wanted.warm)
        else:
            yield from _gone(name, place)
    for name, count in machine.agents.items():
        if count > (name in should):
            yield f"process: {count} agents of worker {name}, where there should be {int(name in should)}"
    yield from (f"process: {pid}, {text.splitlines()[0] or 'an actor'}" for pid, text in machine.processes.items())
    yield from (f"mount: {path}" for path in machine.mounts)
    yield from (f"image use: holder {name} is no worker" for name in machine.holders)


def _place(rows: Rows, worker: Worker | None, name: str, place: Place, warm: int) -> Iterator[str]:
    if not place.exists:
        yield f"lost: the state directory of worker {name}"
        return
    actors = {a.uid: a for a in rows.actors}
    if worker is None or worker.backend not in _UNSEEN:
        yield from _sandboxes(name, place, [a for a in rows.actors if a.worker == name], warm)
    yield from _held(rows, name, place)
    yield from (f"staged: of actor {_who(uid, actors)} on worker {name}" for uid in place.staged)
    golden = {s.id for s in rows.snapshots if s.golden}  # many wake from them, so they are kept, up to a bound
    yield from (f"cached: {entry} on worker {name}" for entry in place.cached - golden)
    for uid, files in place.logs.items():
        if uid not in actors:
            yield f"log: of actor {uid} on worker {name}, which is deleted"
        elif files > KEPT_FILES:
            yield f"log: {files} files of actor {_who(uid, actors)} on worker {name}, where {KEPT_FILES} are kept"
    alive = {box.uid for box in place.sandboxes if box.uid}
    for uid in place.uses - alive - {WARM}:
        yield f"image use: by actor {_who(uid, actors)}, which has no sandbox on worker {name}"
    if WARM in place.uses and all(box.uid for box in place.sandboxes):
        yield f"image use: by warm sandboxes of worker {name}, which has none"
    yield from (f"unfinished: {entry} of worker {name}" for entry in place.unfinished)


def _held(rows: Rows, name: str, place: Place) -> Iterator[str]:
    """Copies of snapshots against what their rows say. A line for each snapshot, whatever there is of it."""
    owed = {s.id: s for s in rows.snapshots if s.worker == name and (s.held or s.state is SnapshotState.LOCAL)}
    there: Counter[str] = Counter()
    for key in place.held:
        at = place_of(key)
        there[at.snapshot_id if at is not None else key] += 1
    for snapshot_id in there.keys() - owed.keys():
        yield f"held copy: {snapshot_id} on worker {name}, of which no row says so"
    for snapshot_id, snapshot in owed.items():
        files = 1 + len({file.sha256 for file in snapshot.files})  # its manifest, and each content once
        if there[snapshot_id] > files:
            yield f"held copy: {snapshot_id} on worker {name}, has more files than its row says"
        elif (
            there[snapshot_id] < files and snapshot.state is SnapshotState.LOCAL
        ):  # others are caches: they may be lost
            yield f"lost: {snapshot_id} of {snapshot.namespace}/{snapshot.actor}, which only worker {name} had"


def _sandboxes(name: str, place: Place, bound: list[Actor], warm: int) -> Iterator[str]:
    """Sandboxes against actors, and what the kernel has against sandboxes."""
    should = {a.uid: a for a in bound}
    alive = Counter(box.uid for box in place.sandboxes if box.uid)
    for uid, count in alive.items():
        if count > (uid in should):
            yield f"sandbox: {count} of actor {uid} on worker {name}, where there should be {int(uid in should)}"
    for uid in should.keys() - alive.keys():
        yield f"lost: the sandbox of actor {should[uid].key}, which is {should[uid].state} on worker {name}"
    if (count := sum(not box.uid for box in place.sandboxes)) > warm:
        yield f"sandbox: {count} warm ones on worker {name}, where there should be at most {warm}"
    yield from (f"sandbox: directory {entry} of worker {name}, which says nothing" for entry in place.broken)
    sids = {box.sid for box in place.sandboxes}
    for box in place.sandboxes:
        if not box.pid:
            yield f"sandbox: {box.sid} of worker {name} has no process"
    for sid, pids in place.processes.items():
        if sid not in sids:
            yield f"process: {', '.join(map(str, pids))} of sandbox {sid} of worker {name}, which is not there"
    yield from (f"interface: {device} of worker {name}" for device in _more(place.devices, _devices(place)))
    yield from (f"cgroup: {sid} of worker {name}" for sid in _more(place.cgroups, sids))
    for device in _more(_devices(place), place.devices):
        yield f"lost: interface {device} of a sandbox on worker {name}"


def _gone(name: str, place: Place) -> Iterator[str]:
    """A worker that is no more leaves nothing."""
    if place.exists:
        yield f"directory: {place.state_dir} of worker {name}, which is no more"
    if place.netns:
        yield f"network namespace: of worker {name}, which is no more"
    yield from (f"cgroup: {sid} of worker {name}, which is no more" for sid in place.cgroups)
    for sid, pids in place.processes.items():
        yield f"process: {', '.join(map(str, pids))} of sandbox {sid} of worker {name}, which is no more"
    if place.uses or place.is_holder:
        yield f"image use: by worker {name}, which is no more"


def _devices(place: Place) -> set[str]:
    return {box.device for box in place.sandboxes if box.device}


def _more(there: Iterable[str], should: Collection[str]) -> set[str]:
    return {*there} - {*should}


def _who(uid: str, actors: dict[str, Actor]) -> str:
    return f"{actors[uid].key} ({uid})" if uid in actors else uid
