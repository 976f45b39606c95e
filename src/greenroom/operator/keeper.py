"""One pool: get what the server itself has, decide, commit, act, and again until nothing is due.

One task at a time does this for one pool (`WorkQueue`). It acts only on a ledger that this process got from the server
itself, or wrote, in its own term; what the cache shows of the pool only says that there is something newer to get.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from greenroom.core.errors import Conflict, GreenroomError, InvalidArgument, NotFound
from greenroom.core.ledger import naming, wire
from greenroom.core.ledger.decide import begin_term, decide, rebuild
from greenroom.core.ledger.effects import plan
from greenroom.core.ledger.notes import Notes
from greenroom.core.ledger.records import Finish, Ledger, Pod, Want
from greenroom.operator import forms, status
from greenroom.operator.actuator import Actuator
from greenroom.operator.client import Kube
from greenroom.operator.objects import (
    EPOCH_ANNOTATION,
    POOL_FINALIZER,
    POOL_UID_LABEL,
    Key,
    PodObject,
    PoolObject,
    to_pod,
)
from greenroom.operator.specs import MAX_REPLICAS, ScaleDown, WorkerPoolSpec

#: Rounds of one look at a pool: more mean that it changes all the time, and others wait.
MAX_ROUNDS = 20
#: Versions of a pool that are known to be our own.
KNOWN_VERSIONS = 64
#: Pauses after a failure double from the first to the second of these.
PAUSE_S = (0.5, 30.0)
MANAGER = "greenroom.dev/operator"

_log = structlog.get_logger("greenroom.operator")


@dataclass
class Shared:
    """What all keepers of one operator use.

    Args:
        pods: what the cache shows of one pool.
        actors: how many actors are awake on the worker of this pod name; None when nobody knows.
        stale: the cache has heard nothing for long.
        told: called with each change of a ledger that was committed (for events).
    """

    kube: Kube
    may_act: Callable[[], None]
    clock: Callable[[], float]
    pods: Callable[[Key], Iterable[PodObject]]
    stale: Callable[[], bool] = lambda: False
    actors: Callable[[str], int | None] = lambda _: None
    told: Callable[[PoolObject, Ledger | None, Ledger], None] = lambda *_: None
    wall: Callable[[], float] = time.time


@dataclass
class Keeper:
    """See the module. ``key``: of the pool."""

    shared: Shared
    key: Key
    _held: PoolObject | None = None
    _ledger: Ledger | None = None
    _notes: Notes | None = None
    _known: deque[str] = field(default_factory=lambda: deque(maxlen=KNOWN_VERSIONS))
    _actuator: Actuator | None = None
    _rebuilt: str = ""
    _failures: int = 0

    async def look(self, shown_version: str | None) -> float:
        """Does what is due. ``shown_version``: of the pool in the cache; None when that does not show it.

        Returns:
            In how many seconds to look again, if nothing happens before; infinity: not at all.

        Raises:
            LeaseLost: this process may not act any more.
        """
        if shown_version is None or shown_version not in self._known:
            self._held = None  # the cache shows something that is not ours: there may be something newer
        try:
            pause = await self._rounds()
            self._failures = 0
            return pause
        except GreenroomError as error:
            self.shared.may_act()
            self._held = None
            first, most = PAUSE_S
            pause = min(first * 2.0 ** min(self._failures, 10), most)
            self._failures += 1
            _log.info("pool is looked at again", pool=self.key, error=error.message, again_in_s=pause)
            return pause

    async def _rounds(self) -> float:
        for _ in range(MAX_ROUNDS):
            if self._held is None and not await self._get():
                return math.inf
            assert self._held is not None and self._notes is not None and self._actuator is not None
            pool, ledger, notes = self._held, self._ledger, self._notes
            assert ledger is not None
            spec, want = _read(pool)
            shown = self._shown(pool)
            now, wall = self.shared.clock(), self.shared.wall()
            name = pool.metadata.name
            after = decide(name, ledger, want, shown, notes, now, wall)
            if not await self._commit(pool, ledger, after, want, shown, wall):
                continue
            todo = plan(name, after, want, shown, notes, now)
            if not todo.effects:
                return max(0.0, todo.again_at - now)
            assert self._held is not None
            await self._actuator.act(self._held.metadata, spec, after, notes, todo.effects)
            if any(isinstance(effect, Finish) for effect in todo.effects):
                await self._finish()
                return math.inf
        return 0.0

    def _shown(self, pool: PoolObject) -> list[Pod]:
        actors, uid = self.shared.actors, pool.metadata.uid
        return [to_pod(pod, uid, actors(pod.metadata.name)) for pod in self.shared.pods(self.key)]

    # --- getting it ---

    async def _get(self) -> bool:
        """Gets pool and ledger from the server itself, and begins a term if this ledger is not of ours. False: there is
        no such pool, or it is not for us."""
        self.shared.may_act()
        pool = await self.shared.kube.get_pool(*self.key)
        if pool is None:
            self._ledger = self._notes = None
            return False
        try:
            spec, want = _read(pool)
        except InvalidArgument as error:
            _log.warning("pool has a spec that can't be read", pool=self.key, error=error.message)
            return False
        if spec.managed_by not in ("", MANAGER):
            return False
        ledger = wire.from_plain(pool.status.get("ledger"), pool.metadata.uid)
        adopted = POOL_FINALIZER in (pool.metadata.finalizers or ())
        if pool.metadata.deletionTimestamp is not None and not adopted:
            return False  # what it leaves behind is the garbage collector's
        if ledger is None:
            pool, ledger = await self._rebuild(pool)
        elif not adopted or _epoch(pool) < ledger.epoch:
            pool = await self._adopt(pool, ledger.epoch)
        self._known.append(pool.metadata.resourceVersion)
        if self._notes is None or self._ledger is None or not self._is_ours(pool, ledger):
            begun = begin_term(ledger)
            self._notes = Notes(term=begun.term)
            self._actuator = Actuator(self.shared.kube, self.shared.may_act, self.shared.clock)
            body = self._status(pool, begun, want, self._shown(pool), self.shared.wall())
            self.shared.may_act()
            pool = await self.shared.kube.put_pool_status(pool.metadata, body)
            self._known.append(pool.metadata.resourceVersion)
            self.shared.told(pool, None, begun)
            ledger = begun
        self._held, self._ledger = pool, ledger
        return True

    def _is_ours(self, pool: PoolObject, ledger: Ledger) -> bool:
        assert self._notes is not None and self._ledger is not None
        return (ledger.pool_uid, ledger.term) == (self._ledger.pool_uid, self._notes.term)

    async def _rebuild(self, pool: PoolObject) -> tuple[PoolObject, Ledger]:
        """The ledger of a pool that has none: a new one, or one that was lost. The epoch is raised first, where a lost
        status does not lose it, so that no name is ever used again."""
        meta = pool.metadata
        remains = await self._remains(pool)
        epoch = max([_epoch(pool), *(at.epoch for _, at in remains)]) + 1
        pool = await self._adopt(pool, epoch)
        if epoch > 1:
            remains = await self._remains(pool)
        if any(at.epoch >= epoch for _, at in remains):
            raise Conflict(f"pool {meta.name} got pods of a later epoch than {epoch} meanwhile; it is looked at again")
        pods = [pod for pod, _ in remains]
        if epoch > 1:
            self._rebuilt = f"made anew as epoch {epoch} from {len(pods)} pods"
        return pool, rebuild(meta.name, meta.uid, pods, epoch)

    async def _remains(self, pool: PoolObject) -> list[tuple[Pod, naming.Place]]:
        """The pods of this pool that there are. Of one that had a ledger among all of the namespace, because somebody
        may have taken the labels from some. What is named like ours and has none of our marks is somebody else's."""
        meta = pool.metadata
        selector = "" if _epoch(pool) else f"{POOL_UID_LABEL}={meta.uid}"
        found = [to_pod(pod, meta.uid) for pod in await self.shared.kube.list_pods(meta.namespace, selector)]
        places = [(pod, naming.place(meta.name, meta.uid, pod.name)) for pod in found if pod.owner_uid]
        return [(pod, at) for pod, at in places if at is not None]

    async def _adopt(self, pool: PoolObject, epoch: int) -> PoolObject:
        """Makes the pool stay until its workers have ended, and notes the epoch beside the ledger."""
        finalizers = [f for f in pool.metadata.finalizers or () if f != POOL_FINALIZER]
        if pool.metadata.deletionTimestamp is None or POOL_FINALIZER in (pool.metadata.finalizers or ()):
            finalizers.append(POOL_FINALIZER)
        self.shared.may_act()
        adopted = await self.shared.kube.patch_pool(
            pool.metadata, {"finalizers": finalizers, "annotations": {EPOCH_ANNOTATION: str(epoch)}}
        )
        self._known.append(adopted.metadata.resourceVersion)
        return adopted

    # --- writing it ---

    async def _commit(
        self, pool: PoolObject, before: Ledger, after: Ledger, want: Want, shown: list[Pod], wall: float
    ) -> bool:
        """Writes ledger and status if they differ from what there is. False: somebody changed the pool meanwhile."""
        body = self._status(pool, after, want, shown, wall)
        if body == pool.status:
            return True
        self._held = None  # until the answer says what there is now
        self.shared.may_act()
        try:
            written = await self.shared.kube.put_pool_status(pool.metadata, body)
        except Conflict:
            return False
        self._known.append(written.metadata.resourceVersion)
        self._held, self._ledger = written, after
        if after != before:
            self.shared.told(written, before, after)
        return True

    def _status(self, pool: PoolObject, ledger: Ledger, want: Want, shown: list[Pod], wall: float) -> dict[str, Any]:
        assert self._actuator is not None
        return status.make(
            ledger,
            want,
            shown,
            pool.status,
            generation=pool.metadata.generation,
            refusal=self._actuator.refusal,
            stale=self.shared.stale(),
            rebuilt=self._rebuilt,
            wall=wall,
        )

    async def _finish(self) -> None:
        assert self._held is not None
        meta = self._held.metadata
        finalizers = [f for f in meta.finalizers or () if f != POOL_FINALIZER]
        self.shared.may_act()
        self._held = None
        try:
            await self.shared.kube.patch_pool(meta, {"finalizers": finalizers})
        except NotFound:
            return


def _read(pool: PoolObject) -> tuple[WorkerPoolSpec, Want]:
    spec = forms.read(WorkerPoolSpec, pool.spec)
    most = min(spec.max_replicas, MAX_REPLICAS)
    return spec, Want(
        replicas=max(min(spec.replicas, most), min(spec.min_replicas, most)),
        suspend=spec.suspend,
        deleting=pool.metadata.deletionTimestamp is not None,
        max_surge=spec.max_surge,
        victims=spec.victims,
        named_only=spec.scale_down is ScaleDown.NAMED,
        grace_s=spec.grace_s,
    )


def _epoch(pool: PoolObject) -> int:
    text = (pool.metadata.annotations or {}).get(EPOCH_ANNOTATION, "0")
    return int(text) if text.isdigit() and len(text) < 10 else 0
