"""Tells the control plane which workers there are: the roster of each pool, after each committed change of its ledger.

A worker registers only when it is on the roster, so a pod of a slot that is retired, or of a ledger that was lost,
never takes an actor. The newest roster of a pool is posted until it arrives; those between are left out. All are posted
again when the control plane was away, and now and then: it may have lost what it was told.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable

import structlog
from msgspec.structs import replace

from greenroom.core.errors import Conflict, FailedPrecondition, LeaseLost
from greenroom.core.ledger import naming
from greenroom.core.ledger.records import Ledger
from greenroom.core.records import PoolSpec
from greenroom.core.rosters import Roster, RosterEntry
from greenroom.operator.failures import message_of
from greenroom.operator.objects import Key, PoolObject
from greenroom.operator.plane import Plane
from greenroom.operator.queue import WorkQueue
from greenroom.operator.specs import WorkerPoolSpec

#: Posts that are under way at once.
POSTERS = 4
#: Pauses after a failure double from the first to the second of these.
PAUSE_S = (0.25, 15.0)
#: What arrived this long ago is posted again when somebody looks at its pool; that changes nothing where it is known.
POST_AGAIN_S = 300.0
#: A pool that is gone, and that a template still names, is deleted from the control plane this long after each refusal.
DELETE_AGAIN_S = 30.0

POOL_IN_USE = "POOL_IN_USE"
#: We lead, and what we say is older than what the control plane knows: the cluster has lost writes. By reason.
RESTORED = {
    "STALE_ROSTER": "; when the cluster was restored from a backup, have a new ledger made: "
    'kubectl patch workerpool {} -n {} --subresource=status --type=merge -p \'{{"status":{{"ledger":null}}}}\'',
    "FORMER_POOL": "; when the cluster was restored from a backup to before this pool was made again, make it once "
    "more: kubectl delete workerpool {} -n {}, and then create it",
}

_log = structlog.get_logger("greenroom.operator")


def roster_of(pool: PoolObject, ledger: Ledger) -> Roster:
    """Of a committed ledger: ``pool`` is what the server answered to the commit."""
    meta = pool.metadata
    workers = [
        RosterEntry(
            name=naming.pod_name(meta.name, ledger.pool_uid, slot.epoch, slot.ordinal),
            ordinal=slot.ordinal,
            epoch=slot.epoch,
            pod_uid=slot.pod_uid,
        )
        for slot in ledger.slots
        if slot.active
    ]
    version = int(meta.resourceVersion) if meta.resourceVersion.isdecimal() else 0
    return Roster(
        pool=meta.name,
        pool_uid=ledger.pool_uid,
        pool_namespace=meta.namespace,
        epoch=ledger.epoch,
        ledger_version=version,
        workers=tuple(workers),
    )


class Rosters:
    """Run `run` as a task.

    Args:
        may_act: raises `LeaseLost` when this process may not act any more.
        on_trouble: called with a pool whose `trouble` has changed.
    """

    def __init__(
        self, plane: Plane, may_act: Callable[[], None], on_trouble: Callable[[Key], None], chance: random.Random
    ) -> None:
        self._plane = plane
        self._may_act = may_act
        self._on_trouble = on_trouble
        self._chance = chance
        self._queue: WorkQueue[Key] = WorkQueue()
        self._latest: dict[Key, tuple[PoolSpec, Roster]] = {}
        self._posted: dict[Key, tuple[PoolSpec, Roster]] = {}
        self._posted_at: dict[Key, float] = {}
        #: Of pools that something is being said of: a post that is under way is over before its pool leaves.
        self._locks: dict[Key, asyncio.Lock] = {}
        #: Pools that have gone, while the control plane keeps their records because of a template.
        self._leftover: set[Key] = set()
        self._failures: dict[Key, int] = {}
        #: Why the control plane does not have the newest roster of a pool.
        self.trouble: dict[Key, str] = {}

    def tell(self, pool: PoolObject, spec: WorkerPoolSpec, ledger: Ledger) -> None:
        """What is to be posted for this pool from now on."""
        key = pool.metadata.key
        # Its workers are none that the control plane is to start itself.
        wanted = PoolSpec(replicas=0, slots=spec.slots, backend=spec.backend)
        roster = roster_of(pool, ledger)
        known = self._latest.get(key)
        if known is not None and known[0] == wanted and _same(known[1], roster):
            if asyncio.get_running_loop().time() < self._posted_at.get(key, math.inf) + POST_AGAIN_S:
                return
            self._posted.pop(key, None)
        else:
            self._latest[key] = wanted, roster
        self._leftover.discard(key)
        self._queue.add(key)

    def again(self) -> None:
        """The control plane was away: it may have lost what it was told."""
        self._posted.clear()
        for key in self._latest:
            self._queue.add(key)

    def forget(self, key: Key) -> None:
        """There is no such pool, or it is not ours any more."""
        for kept in (self._latest, self._posted, self._posted_at, self._failures, self.trouble):
            kept.pop(key, None)
        if key in self._locks and not self._locks[key].locked():
            del self._locks[key]

    async def leave(self, pool: PoolObject, ledger: Ledger) -> None:
        """The pool goes: so do its roster and its record; the record later when a template still names it. Raises what
        the control plane refuses it with."""
        key = pool.metadata.key
        self._latest.pop(key, None)
        self._posted.pop(key, None)
        empty = replace(roster_of(pool, ledger), workers=())
        async with self._lock(key):
            self._may_act()
            try:
                await self._plane.admit(empty)
            except Conflict as error:
                if error.reason not in RESTORED:
                    raise
                _log.warning("a pool leaves its name to another", pool=key, error=error.message)
            else:
                await self._delete(key)
        self.forget(key)

    async def _delete(self, key: Key) -> None:
        try:
            await self._plane.delete_pool(key[1])
        except FailedPrecondition as error:
            if error.reason != POOL_IN_USE:
                raise
            _log.info("the control plane keeps a pool that has gone", pool=key, error=error.message)
            self._leftover.add(key)
            self._queue.add_after(key, DELETE_AGAIN_S)
        else:
            self._leftover.discard(key)

    async def work(self) -> None:
        """Posts what is to be posted, until it is cancelled. Several may do so."""
        while True:
            key = await self._queue.get()
            try:
                await self._post(key)
            except LeaseLost:
                raise
            except Exception as error:  # also a defect: it is to hold up no other pool
                self._may_act()
                self._failed(key, error)
            finally:
                self._queue.done(key)

    async def _post(self, key: Key) -> None:
        if key not in self._latest and key not in self._leftover:
            return
        async with self._lock(key):
            await self._post_alone(key)

    async def _post_alone(self, key: Key) -> None:
        latest = self._latest.get(key)
        if latest is None and key in self._leftover:
            self._may_act()
            await self._delete(key)
        if latest is None or self._posted.get(key) == latest:
            return
        wanted, roster = latest
        before = self._posted.get(key)
        self._may_act()
        if before is None or before[0] != wanted:
            await self._plane.apply_pool(roster.pool, wanted)
        await self._plane.admit(roster)
        if key not in self._latest:
            return  # it was forgotten meanwhile
        self._posted[key] = latest
        self._posted_at[key] = asyncio.get_running_loop().time()
        self._failures.pop(key, None)
        if self.trouble.pop(key, None):
            self._on_trouble(key)

    def _lock(self, key: Key) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _failed(self, key: Key, error: Exception) -> None:
        why = message_of(error)
        first, most = PAUSE_S
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(first * 2.0 ** min(failures - 1, 16), most) * (1 - self._chance.random() / 2)
        _log.info("a roster is posted again", pool=key, error=why, again_in_s=round(pause, 2))
        self._queue.add_after(key, pause)
        if key not in self._latest:
            return  # it is gone, and nobody reads of it
        way_out = RESTORED.get(error.reason, "") if isinstance(error, Conflict) else ""
        message = why + way_out.format(key[1], key[0])
        if (way_out or isinstance(error, FailedPrecondition) or failures > 3) and self.trouble.get(key) != message:
            self.trouble[key] = message
            self._on_trouble(key)


def _same(one: Roster, other: Roster) -> bool:
    """But for the version, which grows with every write to the pool."""
    return replace(one, ledger_version=0) == replace(other, ledger_version=0)
