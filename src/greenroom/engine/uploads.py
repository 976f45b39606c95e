"""Snapshots that a suspend left on the disk of their worker: brought to the snapshot store afterwards.

A snapshot is ``LOCAL`` until `FinishUpload` is committed. Uploading is idempotent and a snapshot never changes, so any
replica that is linked to the worker may do it, also two at a time. A worker that is gone for good takes what it had not
uploaded with it: then the actor is CRASHED, says since when, and goes back to the snapshot before.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import structlog

from greenroom.core import agentapi as api
from greenroom.core.commands import FinishUpload, LoseSnapshot
from greenroom.core.errors import DataLoss, DeadlineExceeded, GreenroomError, NotFound, Unavailable
from greenroom.core.records import Key, Snapshot, SnapshotState, Worker, WorkerState
from greenroom.engine import clock

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Uploads at a time from one replica: enough to fill a link, few enough to leave it usable.
MAX_UPLOADS = 4
#: Of these from one worker: one that hangs leaves room to the others.
MAX_OF_ONE = 2
#: Uploads of one worker that `Uploads.sweep` begins, most of which wait for their turn.
MAX_BEGUN = 100


class Uploads:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ops = engine.ops
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(MAX_UPLOADS)
        #: By worker, as long as anybody has or wants one.
        self._turns_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        #: Workers from which nothing moved: until when (loop time) they are left out. So one that hangs costs a turn
        #: now and then, not one for each of its snapshots.
        self._silent: dict[str, float] = {}
        #: Why uploads from a worker fail, as it was said.
        self._said: dict[str, str] = {}

    def begin(self, snapshot: Snapshot) -> asyncio.Task[None]:
        """Uploads it; joins an upload that is under way. What fails is tried again by `sweep`."""
        task = self._under_way.get(snapshot.id)
        if task is None:
            task = self._engine.spawn(self._in_turn(snapshot), f"upload-{snapshot.id}")
            self._under_way[snapshot.id] = task
            task.add_done_callback(lambda _: self._under_way.pop(snapshot.id))
        return task

    async def _in_turn(self, snapshot: Snapshot) -> None:
        worker = snapshot.worker
        async with self._turns_of.setdefault(worker, asyncio.Semaphore(MAX_OF_ONE)):
            if (left_s := self._silent.get(worker, 0.0) - clock.monotonic()) > 0:
                raise Unavailable(
                    f"snapshot {snapshot.id} is not uploaded: nothing has moved from worker {worker} for another one; "
                    f"it is tried again in {left_s:.0f} s",
                    retry_after_s=left_s,
                )
            self._silent.pop(worker, None)
            try:
                await self._upload(snapshot)
            except DeadlineExceeded:
                self._silent[worker] = clock.monotonic() + self._engine.config.stall_s
                raise

    async def _upload(self, snapshot: Snapshot) -> None:
        worker = snapshot.worker
        async with self._turns:
            try:
                await self._ask(snapshot)
            except NotFound as error:
                if error.reason != "NOT_HELD":
                    raise
                await self._lose(snapshot, f"worker {worker}, which alone had it, has it no more")
                return
            except GreenroomError as error:
                if isinstance(error, DataLoss) and error.reason == "SNAPSHOT_CORRUPT":  # and not: a disk fails just now
                    await self._lose(snapshot, f"what worker {worker} alone had is damaged: {error.message}")
                    return
                if self._said.get(worker) != error.message:  # it may take long, and is tried every few seconds
                    self._said[worker] = error.message
                    log.warning("not uploaded, tries again", snapshot=snapshot.id, worker=worker, error=error.message)
                raise
        self._said.pop(worker, None)
        await self._finish(snapshot)

    async def _ask(self, snapshot: Snapshot) -> None:
        """Raises `DeadlineExceeded` when nothing moves (reason ``STALLED``)."""
        stall_s, over = self._engine.config.stall_s, False

        def moved(_: api.Progress) -> None:
            if not over and not scope.expired():
                scope.reschedule(clock.monotonic() + stall_s)

        try:
            async with asyncio.timeout(stall_s) as scope:
                await self._engine.hub.call(snapshot.worker, api.Upload(snapshot_id=snapshot.id), moved)
        except TimeoutError:
            raise DeadlineExceeded(
                f"upload of snapshot {snapshot.id} from worker {snapshot.worker}: nothing has moved for {stall_s:g} s",
                reason="STALLED",
            ) from None
        finally:
            over = True

    async def _finish(self, snapshot: Snapshot) -> None:
        await self._ops.commit(FinishUpload(key=_key(snapshot), now=self._engine.now(), snapshot_id=snapshot.id))
        log.info("snapshot uploaded", snapshot=snapshot.id, worker=snapshot.worker)

    async def sweep(self) -> None:
        """Uploads what is still local, and gives up what is lost."""
        local = await self._engine.census.all(Snapshot, state=SnapshotState.LOCAL)
        if not local:
            return
        workers = {w.name: w for w in await self._engine.census.all(Worker)}
        here = frozenset(self._engine.members.enrolled())
        begun = Counter(snapshot.worker for snapshot in local if snapshot.id in self._under_way)
        for snapshot in local:
            if snapshot.worker in here:
                if snapshot.id not in self._under_way and begun[snapshot.worker] < MAX_BEGUN:
                    begun[snapshot.worker] += 1
                    self.begin(snapshot)
            elif self.is_gone(workers.get(snapshot.worker)):
                await self._lose(snapshot, f"it was on worker {snapshot.worker} only, which is gone")

    async def flush(self, worker: str) -> None:
        """Uploads everything that is only on that worker, before it ends for good. Raises what an upload fails with."""
        for snapshot in await self._engine.census.all(Snapshot, state=SnapshotState.LOCAL):
            if snapshot.worker == worker:
                await self._ops.attend(self.begin(snapshot))

    def is_gone(self, worker: Worker | None) -> bool:
        """Whether a worker's disk counts as lost (`greenroom.engine.decommission`)."""
        return worker is None or worker.state is WorkerState.GONE

    async def _lose(self, snapshot: Snapshot, why: str) -> None:
        try:
            await self._engine.snapshots.manifest(snapshot.actor_uid, snapshot.id)
        except (NotFound, DataLoss):
            pass
        else:  # it was uploaded, and nobody could say so any more
            await self._finish(snapshot)
            return
        log.error("snapshot lost", snapshot=snapshot.id, actor=f"{snapshot.namespace}/{snapshot.actor}", why=why)
        lose = LoseSnapshot(
            key=_key(snapshot),
            now=self._engine.now(),
            operation_id=self._engine.new_id(),
            snapshot_id=snapshot.id,
            message=f"snapshot {snapshot.id} is lost: {why}",
        )
        try:
            await self._ops.commit(lose)
        except GreenroomError as error:
            log.warning("lost snapshot not recorded, tries again", snapshot=snapshot.id, error=error.message)


def _key(snapshot: Snapshot) -> Key:
    return Key(snapshot.namespace, snapshot.actor)
