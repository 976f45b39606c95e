"""`Checkpoint` and `Publish`, `Freeze` and `Thaw`, `Discard`: how an actor that lives here goes to sleep, is put back,
or ends."""

from __future__ import annotations

import msgspec
import structlog

from greenroom.agent.alone import AloneWatch
from greenroom.agent.held import Held
from greenroom.agent.logs import LogFiles
from greenroom.agent.progress import Listener, Marks, Reporter, Reports
from greenroom.agent.residents import Lodger, Residents
from greenroom.agent.staging import Staging
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import FailedPrecondition, GreenroomError, NotFound
from greenroom.sandbox.port import Backend
from greenroom.snapshots.port import SnapshotStore

log = structlog.get_logger(__name__)


class Sleeper:
    def __init__(
        self,
        worker: str,
        backend: Backend,
        fingerprint: str,
        *,
        snapshots: SnapshotStore,
        held: Held,
        staging: Staging,
        residents: Residents,
        logs: LogFiles,
        alone: AloneWatch,
    ) -> None:
        self._worker = worker
        self._backend = backend
        self._fingerprint = fingerprint
        self._snapshots = snapshots
        self._held = held
        self._staging = staging
        self._residents = residents
        self._logs = logs
        self._alone = alone

    async def checkpoint(self, call: api.Checkpoint, hears: Listener) -> api.Checkpointed:
        resident = self._residents.get(call.actor_uid)
        resident.shut_out()
        marks = Marks()
        try:
            dest = await self._staging.begin(call.actor_uid, call.snapshot.id)
            with Reports(hears) as reports:
                async with reports.growing(dest, "checkpoint"):
                    phases = await self._backend.checkpoint(resident.sid, dest)
            marks.took(phases, "staging")
            snapshot = msgspec.structs.replace(
                call.snapshot,
                scope=self._backend.capabilities.scope,
                backend=self._backend.name,
                fingerprint=self._fingerprint,
                hostname=resident.identity.hostname,
                worker=self._worker,
            )
            size = sum(f.stat().st_size for f in dest.iterdir())
            self._staging.complete(snapshot)
        except BaseException:
            await self._undo_checkpoint(resident)
            raise
        resident.state = ResidentState.FROZEN
        resident.operation_id = call.operation_id
        return api.Checkpointed(size_bytes=size, phases=tuple(marks.phases))

    async def _undo_checkpoint(self, resident: Lodger) -> None:
        """After a failure the sandbox runs, also one that was frozen before; but not one that may not run."""
        await self._staging.clear(resident.identity.uid)
        try:
            if not self._alone.may_run(resident.epoch):
                await self._backend.freeze(resident.sid)
                resident.state = ResidentState.FROZEN
                return
            resident.endpoint = await self._backend.thaw(resident.sid)
            resident.state, resident.shut = ResidentState.RUNNING, False
        except GreenroomError as error:  # the next call about it finds that out too; what failed first says more
            log.error("could not be put back after a failed checkpoint", sid=resident.sid, error=error.message)

    async def publish(self, call: api.Publish, hears: Listener) -> api.Published:
        marks = Marks()
        snapshot = self._staging.find(call.actor_uid, call.snapshot_id)
        if snapshot is None:
            if call.hold and call.snapshot_id in self._held:  # an agent that died had kept it already
                return api.Published(snapshot=await self._held.manifest(call.snapshot_id))
            raise NotFound(f"worker {self._worker} has no files of snapshot {call.snapshot_id}", reason="NOT_STAGED")
        source = self._staging.path(call.actor_uid, call.snapshot_id)
        try:
            with Reports(hears) as reports:

                def moved(done: int, total: int) -> None:
                    reports.bytes("publish", done, total)

                if call.hold:
                    published = await self._held.keep(snapshot, source, moved)
                else:
                    published = await self._snapshots.publish(snapshot, source, moved, call.base)
        finally:
            self._staging.touch(call.actor_uid)  # it may have taken long
        marks.end("publish")
        return api.Published(snapshot=published, phases=tuple(marks.phases))

    async def upload(self, call: api.Upload, reporter: Reporter) -> api.Published:
        marks = Marks()
        with Reports(reporter) as reports:
            published = await self._held.upload(
                call.snapshot_id, lambda done, total: reports.bytes("upload", done, total)
            )
        marks.end("upload")
        return api.Published(snapshot=published, phases=tuple(marks.phases))

    async def release(self, call: api.Release) -> api.Done:
        await self._held.release(call.snapshot_id)
        return api.Done()

    async def discard(self, call: api.Discard) -> api.Done:
        marks = Marks()
        await self._residents.end(call.actor_uid)
        if call.forget:
            await self._logs.forget(call.actor_uid)
        marks.end("discard")
        return api.Done(phases=tuple(marks.phases))

    async def freeze(self, call: api.Freeze) -> api.Done:
        resident, marks = self._residents.get(call.actor_uid), Marks()
        resident.shut_out()
        try:
            await self._staging.clear(call.actor_uid)
            await self._backend.freeze(resident.sid)
        except BaseException:
            resident.shut = False  # it runs on
            raise
        resident.state = ResidentState.FROZEN
        marks.end("freeze")
        return api.Done(phases=tuple(marks.phases))

    async def thaw(self, call: api.Thaw, epoch: int) -> api.Started:
        """``epoch``: when the call came. Should it be over by the end, the sandbox is soon frozen again."""
        resident, marks = self._residents.get(call.actor_uid), Marks()
        self.check_epoch(call)  # what was under way may have taken long
        await self._staging.clear(call.actor_uid)  # from here on it is older than the actor
        self.check_epoch(call)  # so may that
        # From here on it may run, also when this is stopped; who counts on a frozen one has to freeze it again.
        resident.state, resident.epoch = ResidentState.RUNNING, epoch
        resident.endpoint = await self._backend.thaw(resident.sid)
        resident.shut = False
        marks.end("thaw")
        return api.Started(endpoint=resident.endpoint, phases=tuple(marks.phases), warm=True)

    def check_epoch(self, call: api.Thaw) -> None:
        if call.epoch >= 0 and call.epoch != self._alone.now:
            raise FailedPrecondition(
                f"worker {self._worker} has been alone since that was decided (epoch {self._alone.epoch}, not "
                f"{call.epoch}); read the actor's record again",
                reason="STALE_EPOCH",
            )
