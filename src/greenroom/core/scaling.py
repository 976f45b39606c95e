"""How many workers a pool needs, by demand, and which go when it has too many. Pure.

Demand is in actors, not in CPU: those awake, those that wait for a slot, and how many are woken. Growing is at once,
because somebody waits; shrinking is slow, and only ever by workers that are named, known and idle: what is awake is
never moved to save a worker.
"""

from __future__ import annotations

import math

from greenroom.core.demand import Demand
from greenroom.core.records import Record

#: Slots are kept free for those who are woken within this time, beside ``min_free``: for as long as it takes until a
#: decision has become a worker, roughly.
LOOK_AHEAD_S = 10.0
#: A pool does not shrink within this time after it has changed, and then only by workers on which nobody was awake
#: for as long, so that what comes in waves does not make it swing.
COOL_DOWN_S = 120.0


class Limits(Record, frozen=True, kw_only=True):
    """What the pool's spec allows. ``slots``: of one worker; ``min_free``: slots of the pool that are kept free."""

    slots: int
    min_replicas: int = 0
    max_replicas: int = 1000
    min_free: int = 0


class Size(Record, frozen=True, kw_only=True):
    """``victims``: workers that go, by name; all of them idle when they were chosen."""

    replicas: int
    victims: tuple[str, ...] = ()


def needed(demand: Demand, limits: Limits) -> int:
    """Workers that hold all who are awake or wait, and those who come soon."""
    free = max(limits.min_free, math.ceil(demand.wakes_per_s * LOOK_AHEAD_S))
    workers = math.ceil((demand.awake + demand.waiting + free) / limits.slots)
    return max(min(workers, limits.max_replicas), min(limits.min_replicas, limits.max_replicas))


def size(
    demand: Demand,
    limits: Limits,
    active: frozenset[str],
    decided: int,
    changed_at: float,
    now: float,
    *,
    cool_down_s: float = COOL_DOWN_S,
) -> Size | None:
    """What the pool should be; None: as was decided before.

    Args:
        active: names of the pool's workers, those among them that have not come up yet too, without those that were
            named before. No other is ever a victim.
        decided: how many it was to have.
        changed_at: when that was decided; ``now``: by the same clock. One that is said to be in the future is of a
            clock that was wrong, and holds up nothing.
    """
    wanted = needed(demand, limits)
    if wanted >= len(active):
        return None if decided == wanted else Size(replicas=wanted)
    if not 0 <= now - changed_at < cool_down_s:
        idle = [w for w in demand.workers if w.name in active and w.ready and w.awake == 0 and w.idle_s >= cool_down_s]
        # The longest idle first; of equals always the same.
        idle.sort(key=lambda worker: (-worker.idle_s, worker.name))
        names = list(dict.fromkeys(worker.name for worker in idle))[: len(active) - wanted]
        if names:
            return Size(replicas=len(active) - len(names), victims=tuple(sorted(names)))
    # Nobody can go: it is as large as it is, also when what was decided is lost.
    return None if decided >= len(active) else Size(replicas=len(active))
