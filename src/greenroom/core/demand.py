"""How much is asked of a pool just now, for whoever decides how many workers it has."""

from __future__ import annotations

from greenroom.core.records import Record


class WorkerDemand(Record, frozen=True, kw_only=True):
    """``ready``: it is heard and takes actors. ``idle_s``: for how long it has had no actor, as far as is known; 0
    while it has any."""

    name: str
    awake: int = 0
    ready: bool = False
    idle_s: float = 0.0


class Demand(Record, frozen=True, kw_only=True):
    """Of one pool, over all replicas of the control plane.

    Attributes:
        slots: of the workers that are ready.
        awake: slots that are taken, on any worker.
        waiting: wake-ups that wait for a slot, and templates that wait for a worker.
        wakes_per_s: wake-ups that ended well, over the last minute.
    """

    pool: str
    slots: int = 0
    awake: int = 0
    waiting: int = 0
    wakes_per_s: float = 0.0
    workers: tuple[WorkerDemand, ...] = ()
