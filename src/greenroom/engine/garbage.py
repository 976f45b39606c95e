"""Garbage as people see it: what would go, a round of collection now, and why a single thing is kept or goes.

Nothing here decides what is destroyed; it asks those who do (`Garbage.rounds`), and says what they will decide
(`greenroom.core.gc.verdict`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog
from msgspec.structs import replace

from greenroom.core.errors import GreenroomError, InvalidArgument, NotFound
from greenroom.core.gc import blobs, verdict
from greenroom.core.gc.verdict import Judged, There, judged
from greenroom.core.names import DEFAULT_NAMESPACE
from greenroom.core.records import (
    Actor,
    CachedImage,
    ImageCache,
    Operation,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    Worker,
    WorkerState,
)
from greenroom.engine import clock
from greenroom.engine.removals import Removal
from greenroom.images.uses import is_warm
from greenroom.store.port import R

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Workers that are asked at a time.
AT_ONCE = 16
#: How long a round waits for a worker to destroy what it was told to: what takes longer goes on without it.
SWEEP_S = 10.0
#: The longest name of anything that may be asked about (an object's key).
MAX_NAME = 1024
#: Figures are worked out again when they are older than this: whoever reads metrics does so every few seconds.
FIGURES_AGE_S = 10.0


class ObjectFinder(Protocol):
    """Who knows the objects of the snapshot store."""

    async def judge(self, name: str) -> list[Judged]:
        """What is stored under that key, or with that SHA-256 (hex); [] for nothing."""

    async def strays(self) -> list[Judged]:
        """Objects that are known to belong to nobody and are not deleted yet."""


class Round(NamedTuple):
    """A part of a round of collection; what it destroys it notes in `Removals`."""

    name: str
    work: Callable[[], Awaitable[object]]


class Report(NamedTuple):
    would_go: tuple[Judged, ...] = ()
    removed: tuple[Removal, ...] = ()
    failures: tuple[str, ...] = ()


class Figures(NamedTuple):
    """What is garbage now, of one kind. ``oldest_s``: age of the oldest, as far as that is known."""

    objects: int = 0
    size_bytes: int = 0
    oldest_s: float = 0.0


class Garbage:
    """``inventory``: what a connected worker says it has. ``objects``: None where nobody looks at them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self.inventory: Callable[[str], Awaitable[Sequence[There]]] = engine.inventories.listed
        self.objects: ObjectFinder | None = engine.collection
        self.rounds = [
            Round("uploads", lambda: engine.uploads.sweep()),
            Round("retention", lambda: engine.collection.mark()),
            Round("snapshots", lambda: engine.collection.sweep(again=True)),
            Round("objects", lambda: engine.collection.scrub()),
            Round("operations", engine.store.trim),
        ]
        self._figures: tuple[float, dict[str, Figures], dict[str, int]] | None = None

    # --- a round ------------------------------------------------------------------------------------------

    async def collect(self, *, dry_run: bool = False, images: bool = False) -> Report:
        """A round of everything, now; with ``dry_run`` only what would go. ``images``: also those that nobody uses.
        What fails holds up nothing else."""
        failures: list[str] = []
        if dry_run:
            return Report(would_go=tuple(await self._would_go(failures, images=images)), failures=tuple(failures))
        removals = self._engine.removals
        position = removals.position
        workers = await self._engine.census.all(Worker)
        await self._each(workers, self._settle, failures)
        for name, work in self.rounds:
            try:
                await work()
            except GreenroomError as error:
                failures.append(f"{name}: {error.message}")
        if images and self._engine.hub.connected():
            await self._prune(failures)
        done = removals.since(position)
        failures += [f"{r.kind} {r.id}: {r.failure}" for r in done if r.failure]
        return Report(removed=tuple(r for r in done if not r.failure), failures=tuple(failures))

    async def _settle(self, worker: Worker) -> None:
        if worker.state is WorkerState.GONE:
            await self._engine.decommission.settle(worker)
        elif worker.name in self._engine.hub.connected():
            self._engine.inventories.look_closely(worker.name)
            await self._engine.reconciler.compare(worker.name, anew=True)
            try:
                async with asyncio.timeout(SWEEP_S):
                    while self._engine.inventories.is_sweeping(worker.name):
                        await asyncio.sleep(self._engine.config.retry_s)
                        await self._engine.reconciler.compare(worker.name, anew=True)
            except TimeoutError:
                log.info("a worker is still destroying", worker=worker.name)

    async def _prune(self, failures: list[str]) -> None:
        try:
            evicted = await self._engine.images.prune()
        except GreenroomError as error:
            failures.append(f"images: {error.message}")
            return
        for cache, done in evicted:
            failures += [f"image {kept}" for kept in done.kept]
            for image in done.removed:
                self._engine.removals.add(
                    "image", image.digest, ",".join(cache.workers), "nobody uses it", size_bytes=image.disk_bytes
                )

    async def _each(
        self, workers: Sequence[Worker], work: Callable[[Worker], Awaitable[None]], failures: list[str]
    ) -> None:
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(worker: Worker) -> None:
            async with turns:
                try:
                    await work(worker)
                except GreenroomError as error:
                    failures.append(f"worker {worker.name}: {error.message}")

        await asyncio.gather(*map(one, workers))

    # --- what would go ------------------------------------------------------------------------------------

    async def _would_go(self, failures: list[str], *, images: bool = False) -> list[Judged]:
        """Everything that goes by itself (and, with ``images``, what `Images.prune` would remove)."""
        over = [await self._judge_snapshot(s) for s in await self._engine.collection.over()]
        found = [await self._judge_snapshot(s) for s in await self._condemned()] + [one for one in over if one.goes]
        workers = await self._engine.census.all(Worker)
        found += [one for one in map(self._judge_worker, workers) if one.goes]

        async def look(worker: Worker) -> None:
            if worker.name in self._engine.hub.connected():
                found.extend(one for one in await self._judge_there(worker) if one.goes)

        await self._each(workers, look, failures)
        if self.objects is not None:
            try:
                found += await self.objects.strays()
            except GreenroomError as error:
                failures.append(f"snapshot store: {error.message}")
        if images and self._engine.hub.connected():
            try:
                for cache, evicted in await self._engine.images.prune(dry_run=True):
                    found += [self._judge_image(cache, image) for image in evicted.removed]
            except GreenroomError as error:
                failures.append(f"images: {error.message}")
        return sorted(found, key=lambda one: (one.kind, one.where, one.id))

    async def _condemned(self) -> list[Snapshot]:
        return await self._engine.census.all(Snapshot, state=SnapshotState.CONDEMNED)

    async def figures(self) -> tuple[dict[str, Figures], dict[str, int]]:
        """By kind what is garbage now, and by state how many workers there are (and how many are ``distrusted``)."""
        if self._figures is None or clock.monotonic() - self._figures[0] > FIGURES_AGE_S:
            now, by_kind = self._engine.now(), dict[str, Figures]()
            unheard: list[str] = []  # who can't be asked has a state of its own among the workers
            for one in await self._would_go(unheard):
                had = by_kind.get(one.kind, Figures())
                age_s = max(0.0, now - one.made_at) if one.made_at is not None else 0.0
                by_kind[one.kind] = Figures(had.objects + 1, had.size_bytes + one.size_bytes, max(had.oldest_s, age_s))
            states = {str(state): 0 for state in WorkerState} | {"distrusted": 0}
            for worker in await self._engine.census.all(Worker):
                states[worker.state] += 1
                states["distrusted"] += bool(worker.distrust)
            self._figures = clock.monotonic(), by_kind, states
        return self._figures[1], self._figures[2]

    # --- one thing ----------------------------------------------------------------------------------------

    async def explain(self, name: str, namespace: str = "") -> list[Judged]:
        """Everything that is called so: an id of a snapshot or of a sandbox, the key or SHA-256 of an object, the
        digest of an image, a worker, an actor (``namespace/name``), or ``kind/name``.

        Raises:
            InvalidArgument: no such kind, or no name.
            NotFound: nothing is called so.
        """
        finders: dict[str, Callable[[str], Awaitable[list[Judged]]]] = {
            "actor": lambda key: self._find_actor(_full(key, namespace)),
            "template": lambda key: self._find_template(_full(key, namespace)),
            "snapshot": self._find_snapshot,
            "worker": self._find_worker,
            "sandbox": self._find_there,
            "copy": self._find_there,
            "image": self._find_image,
            "object": self._find_object,
        }
        if not name or len(name) > MAX_NAME:
            raise InvalidArgument(f"say what is meant, in at most {MAX_NAME} characters", reason="INVALID_NAME")
        kind, slash, rest = name.partition("/")
        if slash and kind in finders:
            found = [one for one in await finders[kind](rest) if one.kind == kind or kind not in ("sandbox", "copy")]
        else:
            answers = await asyncio.gather(*(find(name) for find in (*finders.values(),)))
            found = list(dict.fromkeys(one for answer in answers for one in answer))
        if not found:
            kinds = ", ".join(finders)
            raise NotFound(
                f"nothing is called {name}: no record, and nothing that a connected worker has. If you know what it "
                f"is, say so: KIND/NAME, where KIND is one of {kinds}",
                reason="OBJECT_NOT_FOUND",
            )
        return found

    async def _find_actor(self, key: str) -> list[Judged]:
        actor = await self._get(Actor, key)
        if actor is None:
            return []
        operation = await self._get(Operation, actor.operation) if actor.operation else None
        found = [judged("actor", key, verdict.DATABASE, verdict.actor(actor, operation), made_at=actor.created_at)]
        for snapshot in await self._engine.census.all(Snapshot, actor_uid=actor.uid):
            found.append(await self._judge_snapshot(snapshot))
        return found + await self._find_there(actor.uid)

    async def _find_template(self, key: str) -> list[Judged]:
        template = await self._get(Template, key)
        if template is None:
            return []
        actors = await self._engine.census.all(Actor, template=template.name)
        users = sum(a.namespace == template.namespace and not a.golden for a in actors)
        return [
            judged("template", key, verdict.DATABASE, verdict.template(template, users), made_at=template.created_at)
        ]

    async def _find_snapshot(self, id: str) -> list[Judged]:
        snapshot = await self._get(Snapshot, id)
        return [] if snapshot is None else [await self._judge_snapshot(snapshot), *await self._find_there(id)]

    async def _find_worker(self, name: str) -> list[Judged]:
        worker = await self._get(Worker, name)
        return [] if worker is None else [self._judge_worker(worker)]

    async def _find_there(self, name: str) -> list[Judged]:
        """On every connected worker; one that does not answer has nothing to say."""
        found: list[Judged] = []

        async def look(worker: Worker) -> None:
            if worker.name in self._engine.hub.connected():
                found.extend(await self._judge_there(worker, name))

        await self._each(await self._engine.census.all(Worker), look, [])
        return found

    async def _find_image(self, name: str) -> list[Judged]:
        if not self._engine.hub.connected():
            return []
        try:
            caches = await self._engine.images.caches()
        except GreenroomError as error:
            log.info("images not looked at", error=error.message)
            return []
        digest = name if name.startswith("sha256:") else f"sha256:{name}"
        return [self._judge_image(c, i) for c in caches for i in c.images if i.digest == digest]

    async def _find_object(self, name: str) -> list[Judged]:
        return [] if self.objects is None else await self.objects.judge(name)

    # --- verdicts -----------------------------------------------------------------------------------------

    async def _judge_snapshot(self, snapshot: Snapshot) -> Judged:
        owner = await self._get(Actor, f"{snapshot.namespace}/{snapshot.actor}")
        if owner is not None and owner.uid != snapshot.actor_uid:
            owner = None
        template = await self._get(Template, f"{snapshot.namespace}/{snapshot.template}")
        running = await self._engine.census.all(Operation, uid=snapshot.actor_uid)
        said = verdict.snapshot(
            snapshot,
            owner,
            template,
            [o for o in running if o.state is OperationState.RUNNING],
            await self._get(Worker, snapshot.worker) if snapshot.worker else None,
            is_over=await self._is_over(snapshot, owner, template),
            tags=snapshot.tags,
        )
        local = snapshot.state is SnapshotState.LOCAL
        where = f"worker {snapshot.worker}" if local else verdict.SNAPSHOT_STORE
        size = snapshot.size_bytes
        return judged("snapshot", snapshot.id, where, said, size_bytes=size, made_at=snapshot.created_at)

    async def _is_over(self, snapshot: Snapshot, owner: Actor | None, template: Template | None) -> bool:
        """Whether its template's retention keeps it no longer."""
        if owner is None or template is None:
            return False
        rows = await self._engine.census.all(Snapshot, actor_uid=snapshot.actor_uid)
        needed = {owner.snapshot, owner.previous_snapshot}
        return snapshot in blobs.expired(rows, needed, template.spec.retention, self._engine.now())

    def _judge_worker(self, worker: Worker) -> Judged:
        said = verdict.worker(worker, self._engine.now(), gone_s=self._engine.config.worker_gone_s)
        return judged("worker", worker.name, verdict.DATABASE, said, made_at=worker.registered_at or None)

    def _judge_image(self, cache: ImageCache, image: CachedImage) -> Judged:
        # A sandbox that is only kept warm is no user: it is ended for the image to go.
        users = tuple(user for user in image.users if not is_warm(user))
        said = verdict.image(cache, replace(image, users=users))
        where = ",".join(cache.workers)
        return judged("image", image.digest, where, said, size_bytes=image.disk_bytes, made_at=image.last_used_at)

    async def _judge_there(self, worker: Worker, name: str = "") -> list[Judged]:
        """What a worker has (of that name or owner)."""
        there = [one for one in await self.inventory(worker.name) if not name or name in (one.id, one.owner)]
        bound = {a.uid: a for a in await self._engine.census.all(Actor, worker=worker.name)}
        found = []
        for one in there:
            if one.kind == "sandbox":
                actor = bound.get(one.owner) or next(iter(await self._engine.census.all(Actor, uid=one.owner)), None)
                said = verdict.sandbox(one, worker, actor)
            else:
                snapshot = await self._get(Snapshot, one.owner)
                uid = snapshot.actor_uid if snapshot is not None else ""
                said = verdict.copy(one, worker, snapshot, await self._working_with(one.owner, uid))
            found.append(judged(one.kind, one.id, one.worker, said, size_bytes=one.size_bytes, made_at=one.made_at))
        return found

    async def _working_with(self, snapshot_id: str, uid: str) -> Operation | None:
        where = {"uid": uid} if uid else {"state": str(OperationState.RUNNING)}
        for operation in await self._engine.census.all(Operation, **where):
            if operation.snapshot == snapshot_id and operation.state is OperationState.RUNNING:
                return operation
        return None

    async def _get(self, cls: type[R], pk: str) -> R | None:
        try:
            return await self._engine.ops.read(cls, pk)
        except NotFound:
            return None


def _full(name: str, namespace: str) -> str:
    return name if "/" in name else f"{namespace or DEFAULT_NAMESPACE}/{name}"
