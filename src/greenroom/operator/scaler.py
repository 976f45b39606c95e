"""The autoscaler: asks for the demand of each pool that leaves ``replicas`` out, and writes what it should be.

What is decided is in `greenroom.core.scaling`; it is written by compare-and-swap on the pool that it was decided from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import structlog

from greenroom.core import scaling
from greenroom.core.demand import Demand
from greenroom.core.errors import Conflict, GreenroomError, LeaseLost, NotFound
from greenroom.core.ledger import naming
from greenroom.core.ledger.records import Ledger
from greenroom.operator.client import Kube
from greenroom.operator.failures import message_of
from greenroom.operator.objects import Key, PoolObject
from greenroom.operator.plane import Plane
from greenroom.operator.scaled import Scaled, read_scaled, write_scaled
from greenroom.operator.specs import MAX_REPLICAS, WorkerPoolSpec

#: How often demand is asked for: who waits for a slot waits for this too.
EVERY_S = 2.0
#: Questions that are under way at once.
AT_ONCE = 8

_log = structlog.get_logger("greenroom.operator")


class _Pool(NamedTuple):
    object: PoolObject
    spec: WorkerPoolSpec
    ledger: Ledger


class Scaler:
    """Run `run` as a task.

    Args:
        wall: seconds since the epoch: cool-downs outlive this process.
    """

    def __init__(
        self,
        kube: Kube,
        plane: Plane,
        may_act: Callable[[], None],
        wall: Callable[[], float],
        *,
        cool_down_s: float = scaling.COOL_DOWN_S,
        every_s: float = EVERY_S,
    ) -> None:
        self._kube = kube
        self._plane = plane
        self._may_act = may_act
        self._wall = wall
        self._cool_down_s = cool_down_s
        self._every_s = every_s
        self._pools: dict[Key, _Pool] = {}
        self._awake: dict[Key, dict[str, int]] = {}
        #: Pools whose demand is not known just now: said once, not every time that it is asked for.
        self._deaf: set[Key] = set()

    def note(self, pool: PoolObject, spec: WorkerPoolSpec, ledger: Ledger) -> None:
        """A pool as the server has it, with its committed ledger."""
        meta = pool.metadata
        if spec.replicas is None and not spec.suspend and meta.deletionTimestamp is None:
            self._pools[meta.key] = _Pool(pool, spec, ledger)
        else:
            self.forget(meta.key)

    def forget(self, key: Key) -> None:
        self._pools.pop(key, None)
        self._awake.pop(key, None)
        self._deaf.discard(key)

    def actors(self, pool: Key, pod: str) -> int | None:
        """How many are awake on this worker; None: nobody has asked. On one that the control plane does not know there
        are none."""
        awake = self._awake.get(pool)
        return None if awake is None else awake.get(pod, 0)

    async def ask(self, key: Key) -> bool:
        """Before workers of a pool are chosen to go: from now on `actors` knows. False: nobody can tell now."""
        try:
            await self._demand(key)
        except NotFound:  # it has no such pool: nobody is awake there
            self._awake.pop(key, None)
        except GreenroomError as error:
            _log.info("no worker is chosen to go: nobody says who is idle", pool=key, error=error.message)
            return False
        return True

    async def run(self) -> None:
        """Until it is cancelled. Raises `LeaseLost`."""
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(key: Key) -> None:
            async with limit:
                await self._look(key)

        while True:
            results = await asyncio.gather(*(one(key) for key in list(self._pools)), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            await asyncio.sleep(self._every_s)

    async def _look(self, key: Key) -> None:
        pool = self._pools.get(key)
        if pool is None:
            return
        try:
            demand = await self._demand(key)
            self._deaf.discard(key)
            await self._decide(pool, demand)
        except LeaseLost:
            raise
        except (Conflict, NotFound):
            return  # it has changed: its keeper tells how
        except Exception as error:  # also a defect: it is to hold up no other pool
            if key not in self._deaf:
                self._deaf.add(key)
                _log.info("demand is asked for again", pool=key, error=message_of(error))

    async def _demand(self, key: Key) -> Demand:
        demand = await self._plane.demand(key[1])
        self._awake[key] = {worker.name: worker.awake for worker in demand.workers}
        return demand

    async def _decide(self, pool: _Pool, demand: Demand) -> None:
        meta, spec, ledger = pool.object.metadata, pool.spec, pool.ledger
        active = {
            naming.pod_name(meta.name, ledger.pool_uid, slot.epoch, slot.ordinal)
            for slot in ledger.slots
            if slot.active
        }
        limits = scaling.Limits(
            slots=spec.slots,
            min_replicas=spec.min_replicas,
            max_replicas=min(spec.max_replicas, MAX_REPLICAS),
            min_free=spec.min_free,
        )
        before, now = read_scaled(pool.object), self._wall()
        # Those that are named already go, whether the ledger that we know says so yet or not.
        going = active & set(before.victims)
        found = scaling.size(
            demand, limits, frozenset(active - going), before.replicas, before.at, now, cool_down_s=self._cool_down_s
        )
        if found is None:
            return
        after = Scaled(replicas=found.replicas, victims=tuple(sorted({*going, *found.victims})), at=now)
        self._may_act()
        await self._kube.patch_pool(meta, {"annotations": write_scaled(after)})
        _log.info(
            "a pool changes its size",
            pool=meta.key,
            workers=len(active),
            wanted=found.replicas,
            victims=list(after.victims),
            awake=demand.awake,
            waiting=demand.waiting,
        )
