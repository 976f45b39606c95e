"""How others count pods: reference algorithms that must fail in the adversary's world.

Each is the common way of its kind, not a caricature: the same client, caches and queue as the operator, and a
list "at any version" at the start, as client-go makes it. They differ in what tells them that their view is old.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from greenroom.core.errors import Conflict, GreenroomError, LeaseLost, NotFound
from greenroom.operator import worker_pod
from greenroom.operator.client import Kube, pods_path, pools_path
from greenroom.operator.election import Election
from greenroom.operator.objects import POOL_UID_LABEL, Key, PodObject, PoolObject, pool_key
from greenroom.operator.queue import WorkQueue
from greenroom.operator.reflector import Reflector
from greenroom.operator.transport import Transport
from greenroom.testing.pool_world.oracle import desired

#: How long KubeRay waits for its cache to show what it did, before it forgets that it did it.
EXPECTATION_S = 30.0
_EVERY_S = 2.0


@dataclass
class Memory:
    """What an algorithm remembers of what it did; lost with its process."""

    clock: Callable[[], float]

    def ready(self, shown: dict[str, PodObject], version: int) -> bool:
        """Whether the cache shows all that was done, as far as this one can tell. ``version``: of the cache."""
        return True

    def created(self, pod: PodObject) -> None:
        pass

    def deleted(self, name: str, version: int) -> None:
        pass


class Naive(Memory):
    """Compares what is wanted with what is seen."""


@dataclass
class Expectations(Memory):
    """Waits until the names that it created are seen and those that it deleted are not; not for ever (KubeRay)."""

    created_at: dict[str, float] = field(default_factory=dict)
    deleted_at: dict[str, float] = field(default_factory=dict)

    def ready(self, shown: dict[str, PodObject], version: int) -> bool:
        now = self.clock()
        self.created_at = {n: at for n, at in self.created_at.items() if n not in shown and at + EXPECTATION_S > now}
        self.deleted_at = {
            n: at
            for n, at in self.deleted_at.items()
            if n in shown and shown[n].metadata.deletionTimestamp is None and at + EXPECTATION_S > now
        }
        return not self.created_at and not self.deleted_at

    def created(self, pod: PodObject) -> None:
        self.created_at[pod.metadata.name] = self.clock()

    def deleted(self, name: str, version: int) -> None:
        self.deleted_at[name] = self.clock()


@dataclass
class Barrier(Memory):
    """Waits until the cache has the versions of what it wrote."""

    least: int = 0

    def ready(self, shown: dict[str, PodObject], version: int) -> bool:
        return version >= self.least

    def created(self, pod: PodObject) -> None:
        self.least = max(self.least, int(pod.metadata.resourceVersion))

    def deleted(self, name: str, version: int) -> None:
        self.least = max(self.least, version)


ALGORITHMS: dict[str, type[Memory]] = {"naive": Naive, "expectations": Expectations, "barrier": Barrier}


@dataclass
class Loser:
    """A controller of that kind, for one pool at a time. Run `run`."""

    transport: Transport
    identity: str
    memory: type[Memory]
    chance: random.Random

    async def run(self) -> None:
        kube = Kube(self.transport)
        while True:
            election = Election(kube, "default", "greenroom-operator", self.identity, self.chance)
            electing = asyncio.create_task(election.run())
            acting = asyncio.create_task(self._lead(kube, election))
            await asyncio.wait({electing, acting}, return_when=asyncio.FIRST_COMPLETED)
            electing.cancel()
            acting.cancel()
            await asyncio.gather(electing, acting, return_exceptions=True)

    async def _lead(self, kube: Kube, election: Election) -> None:
        await election.wait()
        queue: WorkQueue[Key] = WorkQueue()
        any_version = {"resourceVersion": "0"}

        def pool_changed(old: PoolObject | None, new: PoolObject | None) -> None:
            if new is not None:
                queue.add(new.metadata.key)

        def pod_changed(old: PodObject | None, new: PodObject | None) -> None:
            changed = new or old
            key = pool_key(changed) if changed is not None else None
            if key is not None:
                queue.add(key)

        pools: Reflector[PoolObject] = Reflector(
            kube, pools_path(), PoolObject, pool_changed, query=any_version, chance=self.chance
        )
        pods: Reflector[PodObject] = Reflector(
            kube,
            pods_path(),
            PodObject,
            pod_changed,
            query={**any_version, "labelSelector": POOL_UID_LABEL},
            chance=self.chance,
        )
        memory = self.memory(asyncio.get_running_loop().time)
        async with asyncio.TaskGroup() as group:
            group.create_task(pools.run())
            group.create_task(pods.run())
            await pools.synced.wait()
            await pods.synced.wait()
            while True:
                key = await queue.get()
                pool = pools.found.get(key)
                try:
                    if pool is not None:
                        await self._look(kube, election, memory, pool, pods)
                except LeaseLost:
                    raise
                except GreenroomError:
                    pass
                queue.done(key)
                queue.add_after(key, _EVERY_S)

    async def _look(
        self, kube: Kube, election: Election, memory: Memory, pool: PoolObject, pods: Reflector[PodObject]
    ) -> None:
        meta = pool.metadata
        shown = {
            pod.metadata.name: pod
            for pod in pods.found.values()
            if (pod.metadata.labels or {}).get(POOL_UID_LABEL) == meta.uid
        }
        if not memory.ready(shown, pods._highest):
            return
        alive = [p for p in shown.values() if p.metadata.deletionTimestamp is None]
        for pod in alive:
            if pod.status.phase in ("Failed", "Succeeded"):
                await self._delete(kube, election, memory, pod)
        alive = [p for p in alive if p.status.phase not in ("Failed", "Succeeded")]
        wanted = desired({"metadata": {}, "spec": pool.spec})
        for _ in range(wanted - len(alive)):
            election.check()
            memory.created(await kube.create_pod(meta.namespace, self._pod(pool)))
        for pod in sorted(alive, key=lambda p: p.metadata.name)[: max(0, len(alive) - wanted)]:
            await self._delete(kube, election, memory, pod)

    async def _delete(self, kube: Kube, election: Election, memory: Memory, pod: PodObject) -> None:
        election.check()
        try:
            left = await kube.delete_pod(pod.metadata.namespace, pod.metadata.name, pod.metadata.uid)
        except (NotFound, Conflict):  # its cache is behind: that is done already
            return
        memory.deleted(pod.metadata.name, int(left.metadata.resourceVersion) if left is not None else 0)

    def _pod(self, pool: PoolObject) -> dict[str, Any]:
        meta = pool.metadata
        made: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": f"{meta.name}-worker-",
                "labels": {"greenroom.dev/pool": meta.name, POOL_UID_LABEL: meta.uid},
                "ownerReferences": worker_pod.owners(meta),
            },
            "spec": {"containers": [{"name": "agent", "image": "none"}]},
        }
        return made
