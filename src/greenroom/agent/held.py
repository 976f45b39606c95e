"""Snapshots that are held on this worker's own disk until the control plane has had them uploaded and lets go of them.

They lie below ``held/`` as in a snapshot store of one's own (`greenroom.snapshots.store`): linked from where they were
staged, with their digests, synced before anybody is told, and with a manifest that says ``LOCAL``. Unlike what is
staged they outlive the sandbox, and the agent.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from msgspec.structs import replace

from greenroom.agent.fetched import Fetched
from greenroom.core.errors import Conflict, DataLoss, NotFound, Unavailable
from greenroom.core.gc import blobs
from greenroom.core.records import Snapshot, SnapshotState
from greenroom.snapshots.objects import OnBytes
from greenroom.snapshots.port import SnapshotStore
from greenroom.snapshots.store import ObjectSnapshotStore

log = structlog.get_logger(__name__)


def holds_any(root: Path) -> bool:
    """Whether files of snapshots lie in a `Held` of that root, whole or not."""
    return any(not path.is_dir() for path in (root / blobs.PREFIX).rglob("*"))


@dataclass(slots=True)
class _Upload:
    """One under way, for all who want it."""

    listeners: list[OnBytes] = field(default_factory=list)
    task: asyncio.Task[Snapshot] | None = None

    def moved(self, done: int, total: int) -> None:
        for listener in self.listeners:
            listener(done, total)


class Held:
    """``snapshots``: where `upload` brings them. `open` first."""

    def __init__(self, root: Path, worker: str, snapshots: SnapshotStore) -> None:
        self._worker = worker
        self._snapshots = snapshots
        self._local = ObjectSnapshotStore(root)
        self._fetched = Fetched(root / "uploads")
        #: Id -> uid of its actor.
        self._ids: dict[str, str] = {}
        self._uploads: dict[str, _Upload] = {}
        self._closing = False

    async def open(self) -> None:
        """Finds what earlier agent processes hold; what one of them was killed over is removed."""
        await self._fetched.clear()
        await self._local.remove_unfinished()
        self._ids = {snapshot_id: uid for uid, snapshot_id in await self._local.list()}
        await self._remove_unfinished()

    async def _remove_unfinished(self) -> None:
        """What no manifest speaks of is of no use to anybody; nobody else writes here."""
        by_actor: dict[str, list[str]] = {}
        for snapshot_id, uid in self._ids.items():
            by_actor.setdefault(uid, []).append(snapshot_id)
        async for uid, objects in self._local.objects():
            try:
                held = [await self._local.manifest(uid, snapshot_id) for snapshot_id in by_actor.get(uid, ())]
            except DataLoss as error:  # what it speaks of is not known: all of it stays, until it is released
                log.error("a held snapshot is damaged", actor_uid=uid, error=error.message)
                continue
            if stray := blobs.strays([o.key for o in objects], held, ()):
                log.warning("removes what was held in part", actor_uid=uid, keys=stray)
                await self._local.delete(stray)

    def ids(self) -> frozenset[str]:
        return frozenset(self._ids)

    def __contains__(self, snapshot_id: str) -> bool:
        """Costs nothing: asked before every restore."""
        return snapshot_id in self._ids

    async def keep(self, snapshot: Snapshot, source: Path, progress: OnBytes | None = None) -> Snapshot:
        """Takes the files of ``source`` over (linked, so ``source`` may go) and returns the manifest. Idempotent;
        durable when it returns. Cancelled, it goes on to its end before it says so: a thread that writes a manifest is
        not stopped, and nobody would know of what it has written.

        Raises:
            ResourceExhausted: the disk is full (reason ``DISK_FULL``); nothing of it remains.
            Conflict: another content is held under this id.
        """
        keeping = asyncio.ensure_future(self._keep(snapshot, source, progress))
        try:
            return await asyncio.shield(keeping)
        except asyncio.CancelledError:
            await asyncio.wait({keeping})
            if not keeping.cancelled():
                keeping.exception()  # nobody asks for it any more
            raise

    async def _keep(self, snapshot: Snapshot, source: Path, progress: OnBytes | None) -> Snapshot:
        local = replace(snapshot, state=SnapshotState.LOCAL, worker=self._worker)
        kept = await self._local.publish(local, source, progress)
        self._ids[snapshot.id] = snapshot.actor_uid
        return kept

    async def manifest(self, snapshot_id: str) -> Snapshot:
        """Raises `NotFound` (reason ``NOT_HELD``), `DataLoss` when it can't be read."""
        if (uid := self._ids.get(snapshot_id)) is None:
            raise self._not_held(snapshot_id)
        return await self._local.manifest(uid, snapshot_id)

    async def fetch(self, snapshot: Snapshot, cache: Path) -> Path:
        """As `SnapshotStore.fetch`: links to the files of one that is held."""
        return await self._local.fetch(snapshot, cache)

    async def upload(self, snapshot_id: str, progress: OnBytes) -> Snapshot:
        """Brings it to the snapshot store and returns its manifest there. Idempotent; who asks while it is under way
        joins. Who goes away stops nothing.

        Raises:
            NotFound: it is not held here (any more; reason ``NOT_HELD``).
            DataLoss: what is held is not what was once kept; nothing was published.
            GreenroomError: as `SnapshotStore.publish` does.
        """
        upload = self._uploads.get(snapshot_id)
        if upload is None or upload.task is None:
            upload = self._uploads[snapshot_id] = _Upload()
            upload.task = asyncio.create_task(self._upload(snapshot_id, upload), name=f"upload-{snapshot_id}")
            upload.task.add_done_callback(lambda done: self._uploaded(snapshot_id, done))
        task = upload.task
        upload.listeners.append(progress)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if not task.cancelled() or (caller is not None and caller.cancelling()):
                raise  # it is the caller that was cancelled
            if self._closing:
                raise Unavailable(f"worker {self._worker} ends", reason="WORKER_DISCONNECTED") from None
            raise self._not_held(snapshot_id) from None
        finally:
            upload.listeners.remove(progress)

    async def _upload(self, snapshot_id: str, upload: _Upload) -> Snapshot:
        held = await self.manifest(snapshot_id)
        try:
            there = await self._snapshots.manifest(held.actor_uid, snapshot_id)
        except DataLoss as error:  # not of what is held
            raise Conflict(
                f"snapshot {snapshot_id} is published, and its manifest is damaged: {error.message}"
            ) from error
        except NotFound:
            present = replace(held, state=SnapshotState.PRESENT)
            fetch = functools.partial(self._local.fetch, held)
            async with self._fetched.reading(snapshot_id, fetch) as source:
                return await self._snapshots.publish(present, source, upload.moved)
        if there.files != held.files:
            raise Conflict(f"snapshot {snapshot_id} is published with another content than worker {self._worker} holds")
        return there

    def _uploaded(self, snapshot_id: str, task: asyncio.Task[Snapshot]) -> None:
        del self._uploads[snapshot_id]
        if not task.cancelled():
            task.exception()  # seen, also when every caller has gone

    async def release(self, snapshot_id: str) -> None:
        """Removes it; an upload of it is stopped first. Idempotent."""
        await self._stop(snapshot_id)
        if (uid := self._ids.get(snapshot_id)) is not None:
            await self._local.retract(uid, snapshot_id)
            self._ids.pop(snapshot_id, None)  # only now: a removal that failed is not done at the next try

    async def _stop(self, snapshot_id: str) -> None:
        upload = self._uploads.get(snapshot_id)
        if upload is not None and upload.task is not None:
            upload.task.cancel()
            await asyncio.wait({upload.task})

    async def close(self) -> None:
        self._closing = True
        for snapshot_id in [*self._uploads]:
            await self._stop(snapshot_id)

    def _not_held(self, snapshot_id: str) -> NotFound:
        return NotFound(f"worker {self._worker} does not hold snapshot {snapshot_id}", reason="NOT_HELD")
