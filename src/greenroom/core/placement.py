"""Which worker an actor goes to: hard gates first, then preference; and when a worker is not trusted any more. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from greenroom.core.errors import FailedPrecondition, ResourceExhausted
from greenroom.core.records import Record, Rejection, Snapshot, SnapshotScope, SnapshotState, Worker, WorkerState

#: Wake-ups that fail in a row before a worker gets no more for a while: one or two can be bad luck.
FAILURES_TO_QUARANTINE = 3
#: How long the first quarantine takes; each further failure doubles it up to the last.
FIRST_QUARANTINE_S = 30.0
LAST_QUARANTINE_S = 600.0
MAX_DOUBLINGS = 10
#: Rejections that an operation keeps; more say nothing new.
MAX_REJECTIONS = 16


class Demand(Record, frozen=True, kw_only=True):
    """What is looked for.

    Attributes:
        pool: the template's.
        snapshot: what is to be restored; None boots.
        selector: labels that the worker must have (template's and actor's together).
        image_digest: of the image below the actor, "" when not known.
        prefer: names, the best first.
        avoid: names that come last.
        reachable: when given, the only workers that whoever asks can talk to.
    """

    pool: str
    snapshot: Snapshot | None = None
    selector: dict[str, str] = {}
    image_digest: str = ""
    prefer: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    reachable: tuple[str, ...] | None = None


class Ranking(Record, frozen=True, kw_only=True):
    """``order``: workers that could take it now, the best first; ``rejected``: why not the others of the pool."""

    order: tuple[Worker, ...]
    rejected: tuple[Rejection, ...]


def choose(workers: Iterable[Worker], demand: Demand, now: float) -> tuple[Worker, tuple[Rejection, ...]]:
    """The best worker with a free slot, and what spoke against others (see `rank`).

    Raises:
        FailedPrecondition: no worker of the pool could ever run it (reason ``NO_COMPATIBLE_WORKER``).
        ResourceExhausted: all that could are full, being emptied or stalled (reason ``NO_CAPACITY``). ``metadata``:
            ``only``, the names of these, when others of the pool have a free slot.
    """
    of_pool = [w for w in workers if w.pool == demand.pool and w.state is not WorkerState.GONE]
    ranking = rank(of_pool, demand, now)
    if ranking.order:
        return ranking.order[0], ranking.rejected
    able = [w for w in of_pool if never(w, demand) is None and _has_it(w, demand.snapshot)]
    reasons = "; ".join(f"{r.worker}: {r.why}" for r in ranking.rejected)
    if of_pool and all(never(w, demand) for w in of_pool):
        snapshot = demand.snapshot
        what = (
            f"snapshot {snapshot.id}, made by backend {snapshot.backend!r} ({snapshot.fingerprint})"
            if snapshot is not None
            else "it"
        )
        raise FailedPrecondition(
            f"no worker of pool {demand.pool!r} can run {what}: {reasons}; add a worker that fits, or create the actor "
            "anew",
            reason="NO_COMPATIBLE_WORKER",
        )
    held = [w.name for w in able if w.state is WorkerState.STALLED and _is_only_on(w, demand.snapshot)]
    way_out = (
        f"its snapshot is on worker {held[0]} only, which nobody hears: start its agent again, or give up what it has "
        f"with `greenroom forget worker {held[0]}`"
        if held
        else "suspend an actor, or raise the pool's replicas"
    )
    raise ResourceExhausted(
        f"no free slot in pool {demand.pool!r}: {len(able)} workers, "
        f"{sum(w.used for w in able)} of {sum(w.capacity for w in able)} slots taken"
        + (f" ({reasons})" if reasons else "")
        + f"; {way_out}",
        reason="NO_CAPACITY",
        metadata={"only": ",".join(w.name for w in able)} if _free_but_unfit(of_pool, able) else {},
    )


def _free_but_unfit(of_pool: list[Worker], able: list[Worker]) -> bool:
    """Whether somebody else could have a slot that this one can't use."""
    active = (w for w in of_pool if w.state is WorkerState.ACTIVE and not w.cordon and w.used < w.capacity)
    return any(w not in able for w in active)


def rank(workers: Iterable[Worker], demand: Demand, now: float) -> Ranking:
    """Gates: of the pool, has the labels, able to run the snapshot (same backend and fingerprint; a data-scope snapshot
    only needs the same backend; one that is on one worker's disk only needs that worker), active, reachable, a free
    slot; and not in quarantine, unless only such ones are left.

    Among these: not in ``avoid``, then none that has just failed, then earliest in ``prefer``, then with the image,
    then most free slots, then name.
    """
    fit: list[Worker] = []
    rejected: list[Rejection] = []
    for worker in workers:
        if worker.pool != demand.pool or worker.state is WorkerState.GONE:
            continue
        why = never(worker, demand) or not_now(worker, demand, now)
        if why is None:
            fit.append(worker)
        elif len(rejected) < MAX_REJECTIONS:
            rejected.append(Rejection(worker=worker.name, why=why))
    trusted = [w for w in fit if w.quarantined_until <= now]
    if trusted:
        shunned = [Rejection(worker=w.name, why=_quarantine(w)) for w in fit if w.quarantined_until > now]
        fit, rejected = trusted, [*rejected, *shunned][:MAX_REJECTIONS]
    place = {name: i for i, name in enumerate(demand.prefer)}
    fit.sort(
        key=lambda w: (
            w.name in demand.avoid,
            w.failures > 0,
            place.get(w.name, len(place)),
            bool(demand.image_digest) and demand.image_digest not in w.images,
            w.used - w.capacity,
            w.name,
        )
    )
    return Ranking(order=tuple(fit), rejected=tuple(rejected))


def _quarantine(worker: Worker) -> str:
    return f"in quarantine after {worker.failures} failures"


def never(worker: Worker, demand: Demand) -> str | None:
    """Why this worker can't run it whatever happens; None when it could."""
    missing = {k: v for k, v in demand.selector.items() if worker.labels.get(k) != v}
    if missing:
        return f"has no label {', '.join(f'{k}={v}' for k, v in sorted(missing.items()))}"
    if demand.snapshot is not None and not can_run(worker, demand.snapshot):
        return f"can't run the snapshot: it is {worker.backend} ({worker.fingerprint})"
    return None


def not_now(worker: Worker, demand: Demand, now: float) -> str | None:
    """Why this worker can't take it now; None when it can."""
    if not _has_it(worker, demand.snapshot):
        assert demand.snapshot is not None
        return f"the snapshot is not uploaded yet, it is on worker {demand.snapshot.worker} only"
    if worker.state is not WorkerState.ACTIVE:
        return f"is {worker.state}"
    if worker.cordon:
        return f"is being emptied ({worker.cordon})"
    if demand.reachable is not None and worker.name not in demand.reachable:
        return "is not connected to the replica that decided"
    if worker.used >= worker.capacity:
        return f"is full ({worker.used} of {worker.capacity} slots)"
    return None


def _has_it(worker: Worker, snapshot: Snapshot | None) -> bool:
    return snapshot is None or snapshot.state is not SnapshotState.LOCAL or snapshot.worker == worker.name


def _is_only_on(worker: Worker, snapshot: Snapshot | None) -> bool:
    return snapshot is not None and snapshot.state is SnapshotState.LOCAL and snapshot.worker == worker.name


def can_run(worker: Worker, snapshot: Snapshot) -> bool:
    if snapshot.backend != worker.backend:
        return False
    return snapshot.scope is SnapshotScope.DATA or snapshot.fingerprint == worker.fingerprint


def selector(*parts: Mapping[str, str]) -> dict[str, str]:
    """All of the parts together; where two name the same label with different values nothing fits."""
    merged: dict[str, str] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = value if merged.get(name, value) == value else f"{merged[name]} and {value}"
    return merged


# --- trust ------------------------------------------------------------------------------------------------


def after_failure(worker: Worker, now: float) -> Worker:
    """The worker after one more wake-up that failed there for a reason that is the worker's. What fails while it is in
    quarantine began before, or found no other: that says nothing new."""
    if worker.quarantined_until > now:
        return worker
    failures = worker.failures + 1
    until = worker.quarantined_until
    if failures >= FAILURES_TO_QUARANTINE:
        doublings = min(failures - FAILURES_TO_QUARANTINE, MAX_DOUBLINGS)
        until = now + min(FIRST_QUARANTINE_S * 2.0**doublings, LAST_QUARANTINE_S)
    return replace(worker, failures=failures, quarantined_until=until)


def after_success(worker: Worker) -> Worker:
    return replace(worker, failures=0, quarantined_until=0.0)
