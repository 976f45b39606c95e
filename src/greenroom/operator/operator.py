"""The operator: caches, queue, election and keepers together."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from greenroom.core.errors import GreenroomError, LeaseLost
from greenroom.core.ledger.notes import FENCE_S
from greenroom.core.ledger.records import Ledger
from greenroom.operator.client import Kube, pods_path, pools_path
from greenroom.operator.election import Election
from greenroom.operator.events import Events
from greenroom.operator.keeper import Keeper, Shared
from greenroom.operator.objects import (
    FINALIZER,
    POOL_UID_LABEL,
    Key,
    Named,
    PodObject,
    PoolObject,
    pool_key,
    uids_of,
)
from greenroom.operator.queue import WorkQueue
from greenroom.operator.reflector import Reflector
from greenroom.operator.transport import Transport

#: Pools that are looked at at once.
WORKERS = 8
#: Changes of one pool within this time are looked at together: each look may cost a write.
GATHER_S = 0.2
#: A cache that has heard nothing for this long, not even a bookmark, is called stale.
STALE_S = 150.0
#: Then each pool is looked at this often, to say when that is over.
STALE_AGAIN_S = 15.0
#: Each pool is looked at this often even if nothing happens, which costs no request.
RESYNC_S = 600.0
ORPHANS_AGAIN_S = 5.0

_log = structlog.get_logger("greenroom.operator")


@dataclass
class Operator:
    """Keeps the pools of one namespace, or of all. Run `run`.

    Args:
        namespace: whose pools; "" for all.
        lease_namespace: where the lease is that says who acts.
        identity: of this process; new with each.
        actors: how many actors are awake on the worker of this pod; None when nobody knows.
    """

    transport: Transport
    lease_namespace: str
    identity: str
    namespace: str = ""
    chance: random.Random = field(default_factory=random.Random)
    actors: Callable[[str], int | None] = lambda _: None
    wall: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.kube = Kube(self.transport)

    async def run(self) -> None:
        """Acts whenever it holds the lease, until it is cancelled."""
        while True:
            await self._term()

    async def _term(self) -> None:
        """From taking the lease to losing it. Nothing that was known in one term is used in another."""
        election = Election(self.kube, self.lease_namespace, "greenroom-operator", self.identity, self.chance)
        term = Term(self, election)
        electing = asyncio.create_task(election.run(), name="election")
        acting = asyncio.create_task(self._lead(election, term), name="term")
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({electing, acting}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled = error
        electing.cancel()
        acting.cancel()
        outcomes = await asyncio.gather(electing, acting, return_exceptions=True)
        await election.resign()
        if cancelled is not None:
            raise cancelled
        for outcome in outcomes:
            if isinstance(outcome, Exception) and not isinstance(outcome, LeaseLost):
                raise outcome

    async def _lead(self, election: Election, term: Term) -> None:
        await election.wait()
        await term.run()


class Term:
    """What one operator does while it leads."""

    def __init__(self, operator: Operator, election: Election) -> None:
        self._kube = operator.kube
        self._election = election
        self.queue: WorkQueue[Key] = WorkQueue()
        self._keepers: dict[Key, Keeper] = {}
        #: Names of pods by pool.
        self._of_pool: dict[Key, set[Key]] = {}
        #: Since when pods (uid) are known to be of no pool.
        self._orphan_since: dict[str, float] = {}
        self.pools: Reflector[Named] = Reflector(
            self._kube, pools_path(operator.namespace), Named, self._pool_changed, chance=operator.chance
        )
        self.pods: Reflector[PodObject] = Reflector(
            self._kube,
            pods_path(operator.namespace),
            PodObject,
            self._pod_changed,
            query={"labelSelector": POOL_UID_LABEL},
            chance=operator.chance,
        )
        self._events = Events(self._kube, operator.identity, operator.wall)
        self._shared = Shared(
            kube=self._kube,
            may_act=election.check,
            clock=lambda: asyncio.get_running_loop().time(),
            pods=self._pods_of,
            stale=self._stale,
            actors=operator.actors,
            told=self._told,
            wall=operator.wall,
        )

    async def run(self) -> None:
        """Raises:
        LeaseLost: we may not act any more.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.pools.run(), name="pools")
                group.create_task(self.pods.run(), name="pods")
                group.create_task(self._events.run(), name="events")
                for number in range(WORKERS):
                    group.create_task(self._work(), name=f"worker {number}")
        except* LeaseLost as lost:
            raise lost.exceptions[0] from None
        finally:
            self.queue.close()

    async def _work(self) -> None:
        await self.pools.synced.wait()
        await self.pods.synced.wait()
        while True:
            key = await self.queue.get()
            try:
                pause = await self._look(key)
            finally:
                self.queue.done(key)
            if not math.isinf(pause):
                self.queue.add_after(key, pause)

    async def _look(self, key: Key) -> float:
        shown = self.pools.found.get(key)
        if shown is None and key not in self._keepers:
            return await self._orphans(key)
        keeper = self._keepers.setdefault(key, Keeper(self._shared, key))
        pause = await keeper.look(shown.metadata.resourceVersion if shown is not None else None)
        if shown is None:
            del self._keepers[key]
            return min(pause, await self._orphans(key))
        if any(shown.metadata.uid not in uids_of(pod) for pod in self._pods_of(key)):  # of a namesake that is no more
            pause = min(pause, await self._orphans(key))
        return min(pause, STALE_AGAIN_S if self._stale() else RESYNC_S)

    async def _orphans(self, key: Key) -> float:
        """Pods of a pool that is no more, though its finalizer should have kept it. The garbage collector deletes those
        that still name their owner, and waits for our finalizer; that stays until no creation can be under way."""
        left = [pod for pod in self._pods_of(key) if FINALIZER in (pod.metadata.finalizers or ())]
        if not left:
            return math.inf
        pause = math.inf
        try:
            pool = await self._kube.get_pool(*key)
            for pod in left:
                if pool is None or pool.metadata.uid not in uids_of(pod):
                    pause = min(pause, await self._end_orphan(pod))
        except LeaseLost:
            raise
        except GreenroomError as error:
            _log.info("orphans are looked at again", pool=key, error=error.message)
            return ORPHANS_AGAIN_S
        return pause

    async def _end_orphan(self, pod: PodObject) -> float:
        """In how many seconds to look again."""
        meta, now = pod.metadata, asyncio.get_running_loop().time()
        wait = self._orphan_since.setdefault(meta.uid, now) + FENCE_S - now
        self._election.check()
        if meta.deletionTimestamp is None:
            if not meta.ownerReferences:
                await self._kube.delete_pod(meta.namespace, meta.name, meta.uid)
            return math.inf  # it changes, and then there is another look
        if wait > 0:
            return wait
        finalizers = [f for f in meta.finalizers or () if f != FINALIZER]
        await self._kube.patch_pod(meta, {"finalizers": finalizers})
        return math.inf

    # --- what the caches say ---

    def _pool_changed(self, old: Named | None, new: Named | None) -> None:
        changed = new or old
        assert changed is not None
        self.queue.add_after(changed.metadata.key, 0.0 if old is None else GATHER_S)

    def _pod_changed(self, old: PodObject | None, new: PodObject | None) -> None:
        if new is None and old is not None:
            self._orphan_since.pop(old.metadata.uid, None)
        for pod, add in ((old, False), (new, True)):
            key = pool_key(pod) if pod is not None else None
            if pod is None or key is None:
                continue
            names = self._of_pool.setdefault(key, set())
            if add:
                names.add(pod.metadata.key)
            else:
                names.discard(pod.metadata.key)
            if not names:
                del self._of_pool[key]
            self.queue.add_after(key, GATHER_S)

    def _pods_of(self, key: Key) -> Iterable[PodObject]:
        names = self._of_pool.get(key, ())
        return [self.pods.found[name] for name in sorted(names) if name in self.pods.found]

    def _stale(self) -> bool:
        now = asyncio.get_running_loop().time()
        return now - min(self.pods.heard_at, self.pools.heard_at) > STALE_S

    def _told(self, pool: PoolObject, before: Ledger | None, after: Ledger) -> None:
        self._events.tell(pool, before, after)
