"""Effects of a committed ledger -> calls, and what their answers say.

An answer that does not come says nothing: the slot stays as it is, and the same is done again later. Nothing is deleted
by name alone, and never more than one pod by one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from greenroom.core.assets import Asset
from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    GreenroomError,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.ledger.notes import Notes
from greenroom.core.ledger.records import Delete, Effect, Finish, Ledger, Look, Post, Release, Repair
from greenroom.operator import worker_pod
from greenroom.operator.client import Kube
from greenroom.operator.installation import Installation
from greenroom.operator.objects import FINALIZER, Meta, PodObject, to_pod
from greenroom.operator.specs import WorkerPoolSpec

#: Calls of one pool that are under way at once.
MAX_IN_FLIGHT = 16

_log = structlog.get_logger("greenroom.operator")


@dataclass
class Actuator:
    """Acts for one pool in one term.

    Args:
        may_act: raises `LeaseLost` when this process may not act any more; asked right before each request.
        clock: seconds that only go forward; that of ``notes``.
        installation: settings of all worker pods.
        assets: what the workers of a pool run sandboxes with. Raises `GreenroomError` when it can't be told.

    Attributes:
        refusal: what the server last refused to create a pod with; "" when it did create one since.
    """

    kube: Kube
    may_act: Callable[[], None]
    clock: Callable[[], float]
    installation: Installation = field(default_factory=Installation)
    assets: Callable[[WorkerPoolSpec], Sequence[Asset]] = lambda _: ()
    refusal: str = ""

    async def act(
        self, pool: Meta, spec: WorkerPoolSpec, ledger: Ledger, notes: Notes, effects: Sequence[Effect]
    ) -> None:
        """Carries them out: creations by a slow start (1, 2, 4, ...), so that a server that refuses them is not asked
        for a hundred; all others at once. `Finish` is the caller's.

        Raises:
            LeaseLost: this process may not act any more. What it has sent may still take effect.
        """
        others = [e for e in effects if not isinstance(e, Post | Finish)]
        posts = [e for e in effects if isinstance(e, Post)]
        for start in range(0, len(others), MAX_IN_FLIGHT):
            await _all([self._one(pool, ledger, notes, effect) for effect in others[start : start + MAX_IN_FLIGHT]])
        size = 1
        while posts and notes.posts_from <= self.clock():
            batch, posts = posts[:size], posts[size:]
            await _all([self._post(pool, spec, ledger, notes, post) for post in batch])
            size = min(2 * size, MAX_IN_FLIGHT)

    async def _one(self, pool: Meta, ledger: Ledger, notes: Notes, effect: Effect) -> None:
        self.may_act()
        notes.tried(effect, self.clock())
        try:
            match effect:
                case Look():
                    await self._look(pool, notes, effect.slot_id, effect.name)
                case Delete():
                    await self._delete(pool, notes, effect)
                case Release():
                    await self._change(pool, notes, effect, {})
                case Repair():
                    slot = ledger.find(effect.slot_id)
                    assert slot is not None
                    right = {"labels": worker_pod.labels(pool, slot), "ownerReferences": worker_pod.owners(pool)}
                    await self._change(pool, notes, effect, right)
                case Post() | Finish():
                    raise AssertionError(effect)
        except LeaseLost:
            raise
        except GreenroomError as error:
            _log.info("is tried again", pool=pool.name, effect=type(effect).__name__, error=error.message)

    async def _post(self, pool: Meta, spec: WorkerPoolSpec, ledger: Ledger, notes: Notes, post: Post) -> None:
        slot = ledger.find(post.slot_id)
        assert slot is not None
        self.may_act()
        notes.tried(post, self.clock())
        asked_at = self.clock()
        try:
            pod = worker_pod.make(pool, spec, slot, post.name, self.installation, self.assets(spec))
            made = await self.kube.create_pod(pool.namespace, pod)
        except AlreadyExists:
            await self._met(pool, notes, post)
        except Unavailable as error:
            notes.unanswered(post.slot_id, self.clock())
            _log.info("nobody knows whether a pod was created", pod=post.name, error=error.message)
        except GreenroomError as error:
            self.refusal = error.message
            retry_after_s = error.retry_after_s if isinstance(error, ResourceExhausted) else 0.0
            notes.refused(self.clock(), retry_after_s)
        except asyncio.CancelledError:
            notes.unanswered(post.slot_id, self.clock())
            raise
        else:
            self.refusal = ""
            notes.created(post.slot_id, to_pod(made, pool.uid), asked_at)

    async def _met(self, pool: Meta, notes: Notes, post: Post) -> None:
        """The name is taken: by the pod of an earlier try, or by somebody else's."""
        try:
            await self._look(pool, notes, post.slot_id, post.name)
        except GreenroomError as error:
            _log.info("is tried again", pool=pool.name, effect="Look", error=error.message)

    async def _look(self, pool: Meta, notes: Notes, slot_id: str, name: str) -> None:
        asked_at = self.clock()
        found = await self.kube.get_pod(pool.namespace, name)
        notes.saw(slot_id, to_pod(found, pool.uid) if found is not None else None, asked_at)

    async def _delete(self, pool: Meta, notes: Notes, effect: Delete) -> None:
        try:
            left = await self.kube.delete_pod(pool.namespace, effect.name, effect.uid)
        except (NotFound, Conflict):  # it is gone; another one may have its name
            if effect.slot_id:
                await self._look(pool, notes, effect.slot_id, effect.name)
            else:
                notes.gone.add(effect.uid)
            return
        if effect.slot_id and left is not None and left.metadata.finalizers:
            notes.saw(effect.slot_id, to_pod(left, pool.uid), self.clock())

    async def _change(self, pool: Meta, notes: Notes, effect: Release | Repair, metadata: Mapping[str, object]) -> None:
        """Puts metadata of this very pod right, its finalizer among them, as it is now."""
        asked_at = self.clock()
        found = await self.kube.get_pod(pool.namespace, effect.name)
        if found is None or found.metadata.uid != effect.uid:
            seen = to_pod(found, pool.uid) if found is not None else None
        else:
            self.may_act()
            seen = to_pod(await self._patch(found, effect, metadata), pool.uid)
        if effect.slot_id and not (seen is not None and seen.deleting and not seen.held):
            notes.saw(effect.slot_id, seen, asked_at)
        elif effect.slot_id:
            # Without our finalizer it may be gone by the answer already, or stay until its node has ended it.
            notes.looked.pop(effect.slot_id, None)

    async def _patch(self, found: PodObject, effect: Release | Repair, metadata: Mapping[str, object]) -> PodObject:
        finalizers = list(found.metadata.finalizers or ())
        if isinstance(effect, Release):
            finalizers = [f for f in finalizers if f != FINALIZER]
        elif FINALIZER not in finalizers and found.metadata.deletionTimestamp is None:
            finalizers.append(FINALIZER)  # the server takes none for what is being deleted
        return await self.kube.patch_pod(found.metadata, {**metadata, "finalizers": finalizers})


async def _all(work: list) -> None:  # type: ignore[type-arg]
    """Waits for all of them, also when one may not act any more."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
