"""How much is asked of each pool, over all replicas (`greenroom.core.demand`).

Slots and what is taken of them are in the workers' records. The queue for a slot and the pace of wake-ups are each
replica's own; each says them in its record (`greenroom.engine.replicas`), at most a second late. Since when a worker
has had no actor is what this replica has seen happen there: it can only be longer than is said.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from greenroom.core.demand import Demand, WorkerDemand
from greenroom.core.records import Actor, Operation, Pool, Worker, WorkerState
from greenroom.engine import clock
from greenroom.store.port import Stored

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

#: Over how long the pace of wake-ups is told.
PACE_S = 60.0


class Demands:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: Wake-ups that this replica has brought to a good end since it started, by pool.
        self.wakes: Counter[str] = Counter()
        #: By pool: the seconds (loop time) in which there were any, and how many.
        self._paces: dict[str, deque[tuple[int, int]]] = {}
        #: When (loop time) something last happened to an actor on a worker.
        self._touched: dict[str, float] = {}
        self._began = clock.monotonic()

    # --- what is noted ------------------------------------------------------------------------------------

    def woken(self, worker: str) -> None:
        """An actor was woken there."""
        hello = self._engine.hub.connected().get(worker)
        if hello is None:
            return
        self.wakes[hello.pool] += 1
        pace = self._paces.setdefault(hello.pool, deque(maxlen=int(PACE_S) + 1))
        second = int(clock.monotonic())
        if pace and pace[-1][0] == second:
            pace[-1] = (second, pace[-1][1] + 1)
        else:
            pace.append((second, 1))

    def noted(self, record: Stored) -> None:
        """Something was written, by any replica."""
        if isinstance(record, Actor | Operation) and record.worker:
            self._touched[record.worker] = clock.monotonic()

    # --- this replica's part ------------------------------------------------------------------------------

    def waiting_here(self) -> dict[str, int]:
        """Wake-ups, and preparations of templates: without them a pool of no workers would get none, and no actor."""
        waiting = Counter(self._engine.wakes.waiting()) + self._engine.pulls.waiting
        return dict(+waiting)

    def paces_here(self) -> dict[str, float]:
        """Wake-ups a second, by pool."""
        since = clock.monotonic() - PACE_S
        paces = {
            pool: sum(number for second, number in pace if second >= since) / PACE_S
            for pool, pace in self._paces.items()
        }
        return {pool: pace for pool, pace in paces.items() if pace}

    # --- of all replicas ----------------------------------------------------------------------------------

    async def of(self, pool: str) -> Demand:
        """Raises `NotFound`: no such pool."""
        await self._engine.store.get(Pool, pool)
        return self._summed(pool, await self._engine.census.all(Worker, pool=pool), *self._asked())

    async def all(self) -> list[Demand]:
        pools = await self._engine.census.all(Pool)
        workers = await self._engine.census.all(Worker)
        self._forget({worker.name for worker in workers})
        by_pool: dict[str, list[Worker]] = defaultdict(list)
        for worker in workers:
            by_pool[worker.pool].append(worker)
        asked = self._asked()
        return [self._summed(pool.name, by_pool[pool.name], *asked) for pool in pools]

    def _asked(self) -> tuple[dict[str, int], dict[str, float]]:
        """Through all replicas, by pool: wake-ups that wait, and their pace."""
        waiting, paces = Counter(self.waiting_here()), defaultdict(float, self.paces_here())
        for peer in self._engine.replicas.others():
            waiting.update(peer.waiting)
            for pool, pace in peer.wakes_per_s.items():
                paces[pool] += pace
        return waiting, paces

    def _summed(
        self, pool: str, workers: Iterable[Worker], waiting: Mapping[str, int], paces: Mapping[str, float]
    ) -> Demand:
        there = [worker for worker in workers if worker.state is not WorkerState.GONE]
        return Demand(
            pool=pool,
            slots=sum(worker.capacity for worker in there if _ready(worker)),
            awake=sum(worker.used for worker in there),
            waiting=waiting.get(pool, 0),
            wakes_per_s=paces.get(pool, 0.0),
            workers=tuple(
                WorkerDemand(name=w.name, awake=w.used, ready=_ready(w), idle_s=self._idle_s(w)) for w in there
            ),
        )

    def _idle_s(self, worker: Worker) -> float:
        if worker.used:
            return 0.0
        registered_s = max(0.0, self._engine.now() - worker.registered_at)
        return min(clock.monotonic() - self._touched.get(worker.name, self._began), registered_s)

    def _forget(self, workers: set[str]) -> None:
        for name in self._touched.keys() - workers:
            del self._touched[name]


def _ready(worker: Worker) -> bool:
    return worker.state is WorkerState.ACTIVE and not worker.cordon
