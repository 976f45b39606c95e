"""The operator: caches, queue, election and keepers together."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from greenroom.core.errors import LeaseLost
from greenroom.core.ledger.notes import FENCE_S
from greenroom.core.ledger.records import Ledger
from greenroom.core.scaling import COOL_DOWN_S
from greenroom.operator import budgets, sandboxes
from greenroom.operator.budgets import BudgetObject
from greenroom.operator.client import Kube, pods_path, pools_path
from greenroom.operator.companions import Companions
from greenroom.operator.election import Election
from greenroom.operator.events import Events
from greenroom.operator.failures import message_of
from greenroom.operator.installation import Installation
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
from greenroom.operator.plane import Plane
from greenroom.operator.queue import WorkQueue
from greenroom.operator.reflector import Reflector
from greenroom.operator.sandboxes import SandboxConfigObject
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
        plane: Greenroom's control plane; None: pods are kept, and nobody is told.
        installation: settings of all worker pods.

    Attributes:
        term: what it does while it leads; None while another does.
    """

    transport: Transport
    lease_namespace: str
    identity: str
    namespace: str = ""
    chance: random.Random = field(default_factory=random.Random)
    plane: Plane | None = None
    installation: Installation = field(default_factory=Installation)
    cool_down_s: float = COOL_DOWN_S
    wall: Callable[[], float] = time.time
    term: Term | None = None
    #: Looks at pools, by result.
    looks: Counter[str] = field(default_factory=Counter)
    #: When the API server last answered about the lease, by the loop's clock; infinitely long ago at first.
    heard_at: float = -math.inf

    def __post_init__(self) -> None:
        self.kube = Kube(self.transport)

    async def run(self) -> None:
        """Acts whenever it holds the lease, until it is cancelled."""
        while True:
            await self._term()

    async def _term(self) -> None:
        """From taking the lease to losing it. Nothing that was known in one term is used in another."""
        election = Election(
            self.kube, self.lease_namespace, "greenroom-operator", self.identity, self.chance, on_answer=self._heard
        )
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

    def _heard(self) -> None:
        self.heard_at = asyncio.get_running_loop().time()

    async def _lead(self, election: Election, term: Term) -> None:
        await election.wait()
        self.term = term
        try:
            await term.run()
        finally:
            self.term = None


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
        self.budgets: Reflector[BudgetObject] = Reflector(
            self._kube,
            budgets.path(operator.namespace),
            BudgetObject,
            self._budget_changed,
            query={"labelSelector": POOL_UID_LABEL},
            chance=operator.chance,
        )
        self.configs: Reflector[SandboxConfigObject] = Reflector(
            self._kube, sandboxes.PATH, SandboxConfigObject, self._config_changed, chance=operator.chance
        )
        self._looks = operator.looks
        self._events = Events(self._kube, operator.identity, operator.wall)
        self.companions = Companions(self, operator, election.check)
        self._shared = Shared(
            kube=self._kube,
            may_act=election.check,
            clock=lambda: asyncio.get_running_loop().time(),
            pods=self._pods_of,
            stale=self._stale,
            actors=self.companions.actors,
            ask=self.companions.ask,
            told=self._told,
            held=self.companions.held,
            leave=self.companions.leave,
            trouble=self.companions.trouble,
            installation=operator.installation,
            assets=self.companions.assets,
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
                group.create_task(self.budgets.run(), name="budgets")
                group.create_task(self.configs.run(), name="configs")
                group.create_task(self._events.run(), name="events")
                for number in range(WORKERS):
                    group.create_task(self._work(), name=f"worker {number}")
                for number, work in enumerate(self.companions.tasks()):
                    group.create_task(work, name=f"companion {number}")
        except* LeaseLost as lost:
            raise _first(lost) from None
        finally:
            self.queue.close()

    def caches(self) -> dict[str, Reflector[Any]]:
        """By kind."""
        found: dict[str, Reflector[Any]] = {
            "workerpools": self.pools,
            "pods": self.pods,
            "poddisruptionbudgets": self.budgets,
            "sandboxconfigs": self.configs,
        }
        if self.companions.templates is not None:
            found["actortemplates"] = self.companions.templates.shown
        return found

    async def _work(self) -> None:
        for kind, cache in self.caches().items():
            if kind != "actortemplates":
                await cache.synced.wait()
        while True:
            key = await self.queue.get()
            try:
                pause = await self._look(key)
                self._looks["done"] += 1
            except LeaseLost:
                self._looks["lost"] += 1
                raise
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
            self.companions.forget(key)
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
        except Exception as error:
            _log.info("orphans are looked at again", pool=key, error=message_of(error))
            return ORPHANS_AGAIN_S
        return pause

    async def _end_orphan(self, pod: PodObject) -> float:
        """In how many seconds to look again."""
        meta, now = pod.metadata, asyncio.get_running_loop().time()
        wait = self._orphan_since.setdefault(meta.uid, now) + FENCE_S - now
        self._election.check()
        if meta.deletionTimestamp is None:
            if not meta.ownerReferences and not self._is_anothers(pod):
                await self._kube.delete_pod(meta.namespace, meta.name, meta.uid)
            return math.inf  # it changes, and then there is another look
        if wait > 0:
            return wait
        finalizers = [f for f in meta.finalizers or () if f != FINALIZER]
        await self._kube.patch_pod(meta, {"finalizers": finalizers})
        return math.inf

    def _is_anothers(self, pod: PodObject) -> bool:
        """Whether it is of a pool that there is, though what names the pool was edited; whose keeper puts it right."""
        return any(pool.metadata.uid in uids_of(pod) for pool in self.pools.found.values())

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

    def _budget_changed(self, old: BudgetObject | None, new: BudgetObject | None) -> None:
        for budget in (old, new):
            key = budgets.pool_of(budget) if budget is not None else None
            if key is not None:
                self.queue.add_after(key, GATHER_S)

    def _config_changed(self, old: SandboxConfigObject | None, new: SandboxConfigObject | None) -> None:
        self.companions.configs_changed()
        if old is None or new is None or old.spec != new.spec:
            for key in self.pools.found:
                self.queue.add_after(key, GATHER_S)

    def _pods_of(self, key: Key) -> Iterable[PodObject]:
        names = self._of_pool.get(key, ())
        return [self.pods.found[name] for name in sorted(names) if name in self.pods.found]

    def _stale(self) -> bool:
        now = asyncio.get_running_loop().time()
        return now - min(self.pods.heard_at, self.pools.heard_at) > STALE_S

    def _told(self, pool: PoolObject, before: Ledger | None, after: Ledger) -> None:
        self._events.tell(pool, before, after)
        self.companions.told(pool, after)


def _first(group: BaseExceptionGroup[LeaseLost]) -> LeaseLost:
    """One of them, however deep in groups of groups."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
