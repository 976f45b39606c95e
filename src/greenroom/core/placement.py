"""Which worker an actor goes to: hard gates first, then preference. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from greenroom.core.errors import FailedPrecondition, ResourceExhausted
from greenroom.core.records import Snapshot, SnapshotScope, Worker, WorkerState


def choose(
    workers: Iterable[Worker], pool: str, snapshot: Snapshot | None, prefer: Sequence[str], avoid: Collection[str]
) -> Worker:
    """Picks a worker with a free slot.

    Gates: of the pool, active, able to run the snapshot (same backend and fingerprint; a data-scope snapshot only needs
    the same backend). Among these: not in ``avoid``, then earliest in ``prefer``, then most free slots, then name.

    Raises:
        FailedPrecondition: no worker of the pool could ever run it (reason ``NO_COMPATIBLE_WORKER``).
        ResourceExhausted: all that could are full, draining or disconnected (reason ``NO_CAPACITY``).
    """
    of_pool = [w for w in workers if w.pool == pool]
    able = [w for w in of_pool if snapshot is None or can_run(w, snapshot)]
    if of_pool and not able:
        assert snapshot is not None
        raise FailedPrecondition(
            f"no worker of pool {pool!r} can run snapshot {snapshot.id}: it was made by backend {snapshot.backend!r} "
            f"({snapshot.fingerprint}); add a worker like that, or create the actor anew",
            reason="NO_COMPATIBLE_WORKER",
        )
    free = [w for w in able if w.state is WorkerState.ACTIVE and w.used < w.capacity]
    if not free:
        raise ResourceExhausted(
            f"no free slot in pool {pool!r}: {len(able)} workers, "
            f"{sum(w.used for w in able)} of {sum(w.capacity for w in able)} slots taken; "
            "suspend an actor, or raise the pool's replicas",
            reason="NO_CAPACITY",
        )
    rank = {name: i for i, name in enumerate(prefer)}
    return min(free, key=lambda w: (w.name in avoid, rank.get(w.name, len(rank)), w.used - w.capacity, w.name))


def can_run(worker: Worker, snapshot: Snapshot) -> bool:
    if snapshot.backend != worker.backend:
        return False
    return snapshot.scope is SnapshotScope.DATA or snapshot.fingerprint == worker.fingerprint
