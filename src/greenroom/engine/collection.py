"""Collection of the snapshot store: what is condemned goes, what its template keeps no longer is condemned, and what
belongs to nobody is found. The rules are in `greenroom.core.gc.blobs`; here are the loops that carry them out.

Any number of replicas may do all of it at once: deleting what is gone is no failure, and what may be deleted by one of
them may be deleted for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

import structlog

from greenroom.core import agentapi as api
from greenroom.core import keeping
from greenroom.core.commands import Expire, Outcome
from greenroom.core.errors import GreenroomError, NotFound, Unavailable
from greenroom.core.gc import blobs, verdict
from greenroom.core.records import (
    Actor,
    Key,
    Operation,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    Worker,
)
from greenroom.engine import clock
from greenroom.engine.census import bug_of

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Actors whose snapshots are removed, or looked at, at a time: a bucket answers each after a tenth of a second.
AT_ONCE = 16
#: A snapshot that could not be removed is tried again after this long (seconds), twice that, and so on up to the most.
BACKOFF_S, MAX_BACKOFF_S = 5.0, 600.0
CONDEMNED = "nothing wakes from it any more"
NOBODYS = "no snapshot and no operation speaks of it"
#: Actors whose objects the scrub compares with the records at a time.
SCRUB_BATCH = 100
#: Objects without an owner that one pass of the scrub remembers for the next. Others are found another time.
MAX_STRAYS = 100_000


class Collection:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._removals = engine.removals
        self._turns = asyncio.Semaphore(AT_ONCE)
        #: Workers that have not answered in this round: one that hangs costs a round one wait, not one per snapshot.
        self._silent: set[str] = set()
        #: By snapshot id, how often it could not be removed, and when (loop time) it is tried again.
        self._failed: dict[str, tuple[int, float]] = {}
        #: What the last pass of the scrub found without an owner.
        self._strays: frozenset[str] = frozenset()

    def start(self) -> None:
        config = self._engine.config
        first_s = config.scrub_s * config.randbits(16) / (1 << 16)  # replicas that start together scrub apart
        for name, work, first, period_s in (
            ("sweep", self.sweep, config.janitor_s, config.janitor_s),
            ("mark", self.mark, config.mark_s, config.mark_s),
            ("scrub", self.scrub, first_s, config.scrub_s),
        ):
            self._engine.spawn(self._loop(name, work, first, period_s), f"{name}-loop")

    async def _loop(self, name: str, work: Callable[[], Awaitable[object]], first_s: float, period_s: float) -> None:
        wait_s = first_s
        while True:
            await asyncio.sleep(wait_s)
            wait_s = period_s
            try:
                await work()
            except Exception as error:  # whatever it is, the next round must come
                log.warning(f"{name} tries again", error=str(error), exc_info=bug_of(error))

    # --- sweep --------------------------------------------------------------------------------------------

    async def sweep(self, *, again: bool = False) -> None:
        """Removes every condemned snapshot: its objects, then its row. One that can't be removed holds up nobody, and
        is tried again after a pause (``again``: now)."""
        self._silent.clear()
        condemned = await self._engine.census.all(Snapshot, state=SnapshotState.CONDEMNED)
        known = {s.id for s in condemned}
        self._failed = {i: failed for i, failed in self._failed.items() if i in known}
        now = clock.monotonic()
        due = [s for s in condemned if again or self._failed.get(s.id, (0, now))[1] <= now]
        due.sort(key=attrgetter("actor_uid", "id"))
        await asyncio.gather(*(self._sweep_actor([*of]) for _, of in groupby(due, attrgetter("actor_uid"))))

    async def _sweep_actor(self, condemned: Sequence[Snapshot]) -> None:
        async with self._turns:
            try:
                others = await self._engine.census.all(Snapshot, actor_uid=condemned[0].actor_uid)
            except GreenroomError as error:
                log.info("snapshots not removed, tries again", actor_uid=condemned[0].actor_uid, error=error.message)
                return
            for snapshot in condemned:
                try:
                    await self._remove(snapshot, others)
                except GreenroomError as error:
                    times = self._failed.get(snapshot.id, (0, 0.0))[0] + 1
                    wait_s = min(BACKOFF_S * 2 ** (times - 1), MAX_BACKOFF_S)
                    self._failed[snapshot.id] = times, clock.monotonic() + wait_s
                    self._removals.fail("snapshot", snapshot.id, verdict.SNAPSHOT_STORE, CONDEMNED, error.message)

    async def _remove(self, snapshot: Snapshot, others: Sequence[Snapshot]) -> None:
        if snapshot.held:
            await self._release(snapshot)
        keys = blobs.doomed(snapshot, others)
        await self._engine.snapshots.delete(keys)
        await self._store.remove(snapshot)
        size_bytes = sum(file.size_bytes for file in snapshot.files if blobs.file_key(snapshot, file) in keys)
        self._removals.add("snapshot", snapshot.id, verdict.SNAPSHOT_STORE, CONDEMNED, size_bytes=size_bytes)

    async def _release(self, snapshot: Snapshot) -> None:
        """The copy that its worker holds; one that is gone for good holds nothing any more."""
        try:
            worker = await self._engine.ops.read(Worker, snapshot.worker)
        except NotFound:
            return
        if self._engine.uploads.is_gone(worker):
            return
        if worker.name in self._silent:
            raise Unavailable(f"worker {worker.name}, which holds a copy, has not let go of another one just now")
        try:
            await self._engine.members.ask(worker.name, api.Release(snapshot_id=snapshot.id))
        except Unavailable:
            self._silent.add(worker.name)
            raise

    # --- mark ---------------------------------------------------------------------------------------------

    async def mark(self) -> None:
        """Condemns what templates that keep more than is needed keep no longer: its time is over, or the process that
        was to condemn it died. What is condemned is decided in the transaction; here is only looked where."""
        for key, uid in dict.fromkeys((Key(s.namespace, s.actor), s.actor_uid) for s in await self.over()):
            await self.expire(key, uid)

    async def over(self) -> list[Snapshot]:
        """What `mark` condemns if it is still so in the transaction: snapshots that are kept no longer."""
        found: list[Snapshot] = []
        for template in await self._engine.census.all(Template):
            if not keeping.keeps_more(template):
                continue
            owned: dict[str, list[Snapshot]] = {}
            for snapshot in await self._engine.census.all(Snapshot, template=template.name):
                owned.setdefault(snapshot.actor_uid, []).append(snapshot)
            for actor in await self._engine.census.all(Actor, template=template.name):
                needed = {actor.snapshot, actor.previous_snapshot}
                mine = owned.get(actor.uid, ()) if actor.namespace == template.namespace else ()
                found += blobs.expired(mine, needed, template.spec.retention, self._engine.now())
        return found

    async def expire(self, key: Key, uid: str) -> None:
        """What is over of one actor, in one transaction."""
        try:
            change = await self._engine.ops.commit(Expire(key=key, now=self._engine.now(), uid=uid))
        except GreenroomError as error:
            log.info("snapshots not looked through, tries again", actor=str(key), error=error.message)
            return
        if change.outcome is Outcome.CHANGED:
            ids = [s.id for s in change.snapshots]
            log.info("snapshots condemned", actor=str(key), why="its template keeps them no longer", snapshots=ids)

    # --- scrub --------------------------------------------------------------------------------------------

    async def scrub(self) -> list[str]:
        """One pass over the whole snapshot store; returns the keys of what it destroyed: objects that belonged to
        nobody, in this pass and in the one before."""
        if not self._engine.belongings.mark:
            log.warning("the snapshot store is not scrubbed: it is not known whose it is")
            self._strays = frozenset()
            return []
        if await self._is_distrusted():
            log.warning("the snapshot store is not scrubbed: the records may be old")
            self._strays = frozenset()
            return []
        found: set[str] = set()
        destroyed: list[str] = []
        batch: dict[str, set[str]] = {}
        async for uid, objects in self._engine.snapshots.objects():
            if old := {o.key for o in objects if blobs.is_old(o.age_s, self._engine.config.scrub_age_s)}:
                batch.setdefault(uid, set()).update(old)
            if len(batch) >= SCRUB_BATCH:
                destroyed += await self._scrub(batch, found)
                batch = {}
        destroyed += await self._scrub(batch, found)
        self._strays = frozenset(found)
        return destroyed

    async def _is_distrusted(self) -> bool:
        """Whether the records may be those of an earlier time (the database was restored): then nothing is taken for a
        stray, because its record may be missing."""
        return any(worker.distrust for worker in await self._engine.census.all(Worker))

    async def _scrub(self, batch: dict[str, set[str]], found: set[str]) -> list[str]:
        if not batch:
            return []
        # Operations before rows: see `greenroom.core.gc.blobs`.
        running = await self._engine.census.all(Operation, state=OperationState.RUNNING)
        uploading = {operation.snapshot for operation in running if operation.snapshot}

        async def strays(uid: str, keys: set[str]) -> list[str]:
            async with self._turns:
                rows = await self._engine.census.all(Snapshot, actor_uid=uid)
            await self._expire_what_is_left(rows)
            return blobs.strays(sorted(keys), rows, uploading)

        owned_by_nobody = await asyncio.gather(*(strays(uid, keys) for uid, keys in batch.items()))
        destroyed: list[str] = []
        for keys in owned_by_nobody:
            twice = [key for key in keys if key in self._strays]
            found |= {*keys[: max(0, MAX_STRAYS - len(found))]}
            if not twice:
                continue
            if await self._is_distrusted():
                continue
            try:
                await self._engine.snapshots.delete(twice)
            except GreenroomError as error:
                for key in twice:
                    self._removals.fail("object", key, verdict.SNAPSHOT_STORE, NOBODYS, error.message)
                continue
            for key in twice:
                self._removals.add("object", key, verdict.SNAPSHOT_STORE, NOBODYS)
            found -= {*twice}
            destroyed += twice
        return destroyed

    async def _expire_what_is_left(self, rows: Sequence[Snapshot]) -> None:
        """More than an actor needs, and not tagged: of a time when its template kept more, for example."""
        free = [s for s in rows if s.state is SnapshotState.PRESENT and not (s.tags or s.golden)]
        if len(free) > blobs.NEEDED:
            await self.expire(Key(free[0].namespace, free[0].actor), free[0].actor_uid)

    # --- for people ---------------------------------------------------------------------------------------

    async def judge(self, name: str) -> list[verdict.Judged]:
        """What is stored under that key, or with that SHA-256 (hex), and what is to become of it."""
        place = blobs.place_of(name)
        if place is None and not blobs.is_sha256(name):
            return []
        found: list[verdict.Judged] = []
        running = await self._engine.census.all(Operation, state=OperationState.RUNNING)
        async for uid, objects in self._engine.snapshots.objects():
            if place is not None and uid != place.actor_uid:
                continue
            named = [o for o in objects if o.key == name or f"/{name}." in o.key]
            if not named:
                continue
            rows = await self._engine.census.all(Snapshot, actor_uid=uid)
            for one in named:
                at = blobs.place_of(one.key)
                makers = [o for o in running if at is not None and o.snapshot and o.snapshot == at.snapshot_id]
                owners = [row for row in rows if one.key in blobs.keys_of(row)]
                said = verdict.stored(owners, makers[0] if makers else None, one.age_s, self._engine.config.scrub_age_s)
                made_at = self._engine.now() - one.age_s
                found.append(verdict.judged("object", one.key, verdict.SNAPSHOT_STORE, said, made_at=made_at))
        return found

    async def strays(self) -> list[verdict.Judged]:
        """Objects that the last scrub has found to belong to nobody."""
        said = verdict.Goes(why=NOBODYS, when="when another scrub has found it")
        return [verdict.judged("object", key, verdict.SNAPSHOT_STORE, said) for key in sorted(self._strays)]
