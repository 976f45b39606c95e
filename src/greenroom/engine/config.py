"""The engine's clocks and limits. Clocks that are never one knob: lease, operation deadline, stall, and how
long a worker may be away."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from greenroom.core.gc.blobs import SCRUB_AGE_S
from greenroom.core.records import OperationKind

#: A large image on a slow link.
PREPARE_DEADLINE_S = 3600.0
#: Kinds whose deadline is another than that of all. Freezing takes milliseconds.
DEADLINES_S = {OperationKind.PAUSE: 30.0}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All times in seconds.

    Attributes:
        owner: who holds this process's leases; new with every process.
        replica: name of this process among those that share the store; ``owner`` begins with it and a slash.
        link: where agents connect to this process, as they are told ("": nowhere that others need to know).
        exclusive: no other process can hold the store.
        lease_ttl_s: how long a peer waits after this process died; renewed every third of it.
        operation_deadline_s: how long one operation on an actor may run.
        deadlines_s: the same for single kinds, where it is another.
        stall_s: how long an operation may go on without anything moving (bytes, a phase), before it is given up.
        prepare_deadline_s: how long the preparation of a template may run: a large image on a slow link.
        worker_return_s: how long a worker that is gone may take to come back before its actors count as lost.
        worker_gone_s: how long a worker may be away before it counts as GONE by itself, and its disk as lost. Long: a
            person who knows better can say so at once.
        drain_grace_s: how long an asked-for suspend waits for requests in flight before it cuts them.
        capacity_wait_s: how long a wake-up waits for a slot before it answers "no capacity".
        max_waiting: wake-ups that may wait for a slot in one pool.
        attempts: workers that one resume tries.
        evictions: suspensions at a time that make room.
        idle_scan_s: how often idle actors are looked for.
        janitor_s: how often left-over work is looked for.
        reconcile_s: how often what runs on each worker is compared with the records, whatever was lost on the way.
        mark_s: how often snapshots are looked for that their template keeps no longer.
        scrub_s: how often the snapshot store is compared with the records.
        scrub_age_s: what belongs to nobody there is left alone until it is so old.
        rebind_pause_s: before a wake-up that failed is tried on another worker; doubles with each.
        retry_s: between two tries of what has to be done in the end: a write to a store that does not answer, a call
            to a worker whose connection broke.
        store_away_s: how long a write is tried while the store does not answer; then whoever waits is told, and the
            janitor goes on later.
        rosters: workers of pools without a roster may not register (`greenroom.engine.rosters`).
        place: where this process is, as `greenroom.sandbox.dial.place` says it; "": all workers are here too.
        randbits: randomness for ids: as many random bits as asked for.
    """

    owner: str
    replica: str = "server"
    link: str = ""
    exclusive: bool = True
    lease_ttl_s: float = 30.0
    operation_deadline_s: float = 300.0
    deadlines_s: Mapping[OperationKind, float] = field(default_factory=lambda: dict(DEADLINES_S))
    stall_s: float = 60.0
    prepare_deadline_s: float = PREPARE_DEADLINE_S
    worker_return_s: float = 15.0
    worker_gone_s: float = 86400.0
    drain_grace_s: float = 1.0
    capacity_wait_s: float = 60.0
    max_waiting: int = 4096
    attempts: int = 3
    evictions: int = 4
    idle_scan_s: float = 1.0
    janitor_s: float = 5.0
    reconcile_s: float = 30.0
    mark_s: float = 300.0
    scrub_s: float = 6 * 3600.0
    scrub_age_s: float = SCRUB_AGE_S
    rebind_pause_s: float = 0.05
    retry_s: float = 0.1
    store_away_s: float = 10.0
    rosters: bool = False
    place: str = ""
    randbits: Callable[[int], int] = secrets.randbits

    def deadline_s(self, kind: OperationKind) -> float:
        return self.deadlines_s.get(kind, self.operation_deadline_s)
