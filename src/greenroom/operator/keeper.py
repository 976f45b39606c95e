"""One pool: get what the server itself has, decide, commit, act, and again until nothing is due.

One task at a time does this for one pool (`WorkQueue`). It acts only on a ledger that this process got from the server
itself, or wrote, in its own term; what the cache shows of the pool only says that there is something newer to get.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from msgspec.structs import replace

from greenroom.core.assets import Asset
from greenroom.core.errors import Conflict, InvalidArgument, NotFound
from greenroom.core.ledger import naming, wire
from greenroom.core.ledger.decide import begin_term, decide, rebuild
from greenroom.core.ledger.effects import plan
from greenroom.core.ledger.notes import Notes
from greenroom.core.ledger.records import Finish, Ledger, Pod, Want
from greenroom.operator import forms, status
from greenroom.operator.actuator import Actuator
from greenroom.operator.client import Kube
from greenroom.operator.failures import message_of
from greenroom.operator.installation import Installation
from greenroom.operator.objects import (
    EPOCH_ANNOTATION,
    POOL_FINALIZER,
    POOL_UID_LABEL,
    Key,
    PodObject,
    PoolObject,
    to_pod,
)
from greenroom.operator.scaled import Scaled, read_scaled
from greenroom.operator.specs import MAX_REPLICAS, ScaleDown, WorkerPoolSpec

#: Rounds of one look at a pool: more mean that it changes all the time, and others wait.
MAX_ROUNDS = 20
#: Versions of a pool that are known to be our own.
KNOWN_VERSIONS = 64
#: Pauses after a failure double from the first to the second of these.
PAUSE_S = (0.5, 30.0)
#: Who is idle is asked again this soon when nobody could tell.
ASK_AGAIN_S = 5.0
MANAGER = "greenroom.dev/operator"


async def _nothing(*_: object) -> None:
    """What is done beside the ledger by default."""


async def _nobody_to_ask(_: Key) -> bool:
    return True


_log = structlog.get_logger("greenroom.operator")


@dataclass
class Shared:
    """What all keepers of one operator use.

    Args:
        pods: what the cache shows of one pool.
        actors: how many actors are awake on the worker of this pool and pod name; None when nobody knows.
        ask: called before workers are chosen to go, so that `actors` knows; False: it can't be told now, and none is
            chosen.
        stale: the cache has heard nothing for long.
        told: called with each change of a ledger that was committed (for events).
        held: called with each pool and its ledger as the server has them, when nothing of the ledger is left to be
            done: for what goes along with a pool. May be called again for the same.
        leave: called before a pool, whose workers have all ended, is let go; when it raises, that is done later.
        trouble: what the control plane has against this pool, or why it does not know of it; "" when all is well.
        installation: settings of all worker pods.
        assets: what the workers of a pool run sandboxes with.
    """

    kube: Kube
    may_act: Callable[[], None]
    clock: Callable[[], float]
    pods: Callable[[Key], Iterable[PodObject]]
    stale: Callable[[], bool] = lambda: False
    actors: Callable[[Key, str], int | None] = lambda *_: None
    ask: Callable[[Key], Awaitable[bool]] = _nobody_to_ask
    told: Callable[[PoolObject, Ledger | None, Ledger], None] = lambda *_: None
    held: Callable[[PoolObject, WorkerPoolSpec, Ledger], Awaitable[None]] = _nothing
    leave: Callable[[PoolObject, Ledger], Awaitable[None]] = _nothing
    trouble: Callable[[Key], str] = lambda _: ""
    installation: Installation = field(default_factory=Installation)
    assets: Callable[[WorkerPoolSpec], Sequence[Asset]] = lambda _: ()
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
        except Exception as error:  # also a defect: it is to hold up no other pool
            self.shared.may_act()
            self._held = None
            first, most = PAUSE_S
            pause = min(first * 2.0 ** min(self._failures, 10), most)
            self._failures += 1
            _log.info("pool is looked at again", pool=self.key, error=message_of(error), again_in_s=pause)
            return pause

    async def _rounds(self) -> float:
        for _ in range(MAX_ROUNDS):
            if self._held is None and not await self._get():
                return math.inf
            assert self._held is not None and self._notes is not None and self._actuator is not None
            pool, ledger, notes = self._held, self._ledger, self._notes
            assert ledger is not None
            spec, want = _read(pool)
            blind = _chooses(ledger, want) and not await self.shared.ask(self.key)
            if blind:
                want = replace(want, named_only=True)
            shown = self._shown(pool)
            now, wall = self.shared.clock(), self.shared.wall()
            name = pool.metadata.name
            after = decide(name, ledger, want, shown, notes, now, wall)
            if not await self._commit(pool, ledger, after, want, shown, wall):
                continue
            todo = plan(name, after, want, shown, notes, now)
            assert self._held is not None
            if not todo.effects:
                await self.shared.held(self._held, spec, after)
                return min(max(0.0, todo.again_at - now), ASK_AGAIN_S if blind else math.inf)
            await self._actuator.act(self._held.metadata, spec, after, notes, todo.effects)
            if any(isinstance(effect, Finish) for effect in todo.effects):
                await self._finish(after)
                return math.inf
        return 0.0

    def _shown(self, pool: PoolObject) -> list[Pod]:
        actors, uid = self.shared.actors, pool.metadata.uid
        return [to_pod(pod, uid, actors(self.key, pod.metadata.name)) for pod in self.shared.pods(self.key)]

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
        ledger = wire.from_plain(pool.status.get("ledger"), pool.metadata.uid)
        adopted = POOL_FINALIZER in (pool.metadata.finalizers or ())
        if pool.metadata.deletionTimestamp is not None:
            if not adopted:
                return False  # what it leaves behind is the garbage collector's
        elif spec.managed_by not in ("", MANAGER):
            return False  # the schema lets nobody hand over a pool of ours; one that was is let go when it is deleted
        if ledger is None:
            pool, ledger = await self._rebuild(pool)
        elif not adopted or _epoch(pool) < ledger.epoch:
            pool = await self._adopt(pool, ledger.epoch)
        self._known.append(pool.metadata.resourceVersion)
        if self._notes is None or self._ledger is None or not self._is_ours(pool, ledger):
            begun = begin_term(ledger)
            self._notes = Notes(term=begun.term)
            shared = self.shared
            self._actuator = Actuator(shared.kube, shared.may_act, shared.clock, shared.installation, shared.assets)
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
            trouble=self.shared.trouble(self.key),
            wall=wall,
        )

    async def _finish(self, ledger: Ledger) -> None:
        assert self._held is not None
        meta = self._held.metadata
        await self.shared.leave(self._held, ledger)
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
    least = min(spec.min_replicas, most)
    scaled = read_scaled(pool) if spec.replicas is None else Scaled(replicas=spec.replicas)
    return spec, Want(
        replicas=max(min(scaled.replicas, most), least),
        suspend=spec.suspend,
        deleting=pool.metadata.deletionTimestamp is not None,
        max_surge=spec.max_surge,
        victims=(*spec.victims, *scaled.victims),
        # The autoscaler knows which workers are idle, and names them; who else there is is none too many.
        named_only=spec.scale_down is ScaleDown.NAMED or spec.replicas is None,
        grace_s=spec.grace_s,
    )


def _chooses(ledger: Ledger, want: Want) -> bool:
    """Whether some workers of several go, and it matters which."""
    return ledger.active > want.replicas > 0 and not (want.named_only or want.suspend or want.deleting)


def _epoch(pool: PoolObject) -> int:
    """0: there is none, or somebody has written what can be none."""
    text = (pool.metadata.annotations or {}).get(EPOCH_ANNOTATION, "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= naming.EPOCH_DIGITS else 0
