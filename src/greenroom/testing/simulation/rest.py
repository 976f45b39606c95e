"""What keeps a simulated world from being at rest: when nothing goes wrong any more, all of it must be gone in bounded
time."""

from __future__ import annotations

from collections import Counter

from greenroom.core import states
from greenroom.core.agentapi import ResidentState
from greenroom.core.gc import blobs, control
from greenroom.core.records import (
    Actor,
    ActorState,
    Operation,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.engine.config import EngineConfig
from greenroom.engine.inventories import LOOK_EVERY
from greenroom.store.memory import MemoryStore
from greenroom.testing.contracts.store_world import list_all
from greenroom.testing.simulation.calls import HANG_S
from greenroom.testing.simulation.machine import Machine
from greenroom.testing.simulation.replica import Replica
from greenroom.testing.simulation.snapshots import Bucket

# A snapshot that is lost is kept as a record: it says what became of it.
CORRUPT = SnapshotState.CORRUPT


def bound_s(clocks: EngineConfig, ahead_s: float) -> float:
    """How long a world may need to come to rest, in seconds: a lease that was taken by a clock that went ahead runs
    out, a janitor takes the operation over, it runs to its deadline and is put back (30 s,
    `drivers.PUT_BACK_TIMEOUT_S`), a worker counts as away, what is left on workers is found by the second look, on
    their disks by the next thorough one, and what is left in the snapshot store by two of three; and a margin of 10 s
    for messages."""
    return (
        clocks.lease_ttl_s
        + ahead_s
        + clocks.janitor_s
        + clocks.operation_deadline_s
        + 30.0
        + clocks.worker_return_s
        + (2 + LOOK_EVERY) * clocks.reconcile_s * (1.0 + control.SPREAD)
        + clocks.mark_s
        + 3 * clocks.scrub_s
        + HANG_S[1]
        + 10.0
    )


async def problems(
    store: MemoryStore, replicas: list[Replica], machines: dict[str, Machine], bucket: Bucket
) -> list[str]:
    """Empty when nothing is under way, and store, replicas and workers agree about everything."""
    actors = await list_all(store, Actor)
    found = [f"under way: {o}" for o in await list_all(store, Operation, where={"state": OperationState.RUNNING})]
    found += [f"in between: {a}" for a in actors if a.state in states.BUSY]
    found += [f"not started: {r.name}" for r in replicas if not (r.alive and r.started)]
    found += [f"driven by {r.name}: {o}" for r in replicas for o in r.engine.ops.running]
    found += _sandboxes(actors, machines) + _bindings(actors, replicas)
    found += await _snapshots(store, actors, machines, bucket)
    found += [
        f"a worker that is there: {w}" for w in await list_all(store, Worker) if w.state is not WorkerState.ACTIVE
    ]
    settled = (TemplateState.READY, TemplateState.FAILED)
    found += [f"a template in between: {t}" for t in await list_all(store, Template) if t.state not in settled]
    found += [f"{r.name} does not know {name}" for r in replicas for name in machines if name not in r.hub.connected()]
    return found


def _sandboxes(actors: list[Actor], machines: dict[str, Machine]) -> list[str]:
    """Each awake actor has one sandbox, on its worker and in its state; nobody else has any."""
    wanted = Counter((a.uid, a.worker, a.state is ActorState.PAUSED) for a in actors if a.worker)
    found: Counter[tuple[str, str, bool]] = Counter(
        (s.uid, m.name, s.state is ResidentState.FROZEN) for m in machines.values() for s in m.sandboxes.values()
    )
    staged = [f"staged on {m.name}: {uid}" for m in machines.values() for uid in m.staged if uid in m.sandboxes]
    return (
        [f"sandbox missing: {x}" for x in wanted - found] + [f"sandbox too much: {x}" for x in found - wanted] + staged
    )


def _bindings(actors: list[Actor], replicas: list[Replica]) -> list[str]:
    """Nobody routes to what is not there."""
    running = {(a.key, a.uid, a.worker, a.endpoint) for a in actors if a.state is ActorState.RUNNING}
    return [
        f"{r.name} routes to {b}"
        for r in replicas
        for b in r.engine.bindings.all()
        if (b.key, b.uid, b.worker, b.endpoint) not in running
    ]


async def _snapshots(
    store: MemoryStore, actors: list[Actor], machines: dict[str, Machine], bucket: Bucket
) -> list[str]:
    """What has a record is stored, each record is wanted by somebody; nothing is stored or held without a record."""
    stored = {*bucket.listed()}
    records = {s.id: s for s in await list_all(store, Snapshot)}
    present = {i for i, s in records.items() if s.state is SnapshotState.PRESENT}
    wanted = {i for a in actors for i in (a.snapshot, a.previous_snapshot) if i}
    templates = {t.name: t for t in await list_all(store, Template)}
    wanted |= {t.golden_snapshot for t in templates.values()}
    for a in actors:
        owned = [s for s in records.values() if s.actor_uid == a.uid]
        retention = templates[a.template].spec.retention
        over = blobs.expired(owned, {a.snapshot, a.previous_snapshot}, retention, store.clock())
        wanted |= {s.id for s in owned if s.state is not SnapshotState.CONDEMNED} - {s.id for s in over}
    # What a preparation that failed has left is removed when it is begun again, or the template is deleted.
    failed = {name for name, t in templates.items() if t.state is TemplateState.FAILED}
    wanted |= {s.id for s in records.values() if s.golden and s.template in failed}
    return (
        [f"held on {m.name} by mistake: {i}" for m in machines.values() for i in m.held if i not in records]
        + [f"recorded, but not stored: {k}" for i in present for k in set(blobs.keys_of(records[i])) - stored]
        + [f"stored, but not recorded: {k}" for k in stored - {k for s in records.values() for k in blobs.keys_of(s)}]
        + [f"still to be uploaded: {s}" for s in records.values() if s.state is SnapshotState.LOCAL]
        + [
            f"wanted by nobody: {records[i]}"
            for i in set(records) - wanted
            if records[i].state is not SnapshotState.CORRUPT
        ]
    )
