"""`Start` and `Restore`: how an actor comes to live here."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from greenroom.agent import readiness
from greenroom.agent.classes import Classes
from greenroom.agent.fetched import Fetched
from greenroom.agent.held import Held
from greenroom.agent.images import WorkerImages
from greenroom.agent.logs import LogFiles
from greenroom.agent.progress import Marks, Reports
from greenroom.agent.residents import Residents
from greenroom.agent.warm import WarmPool
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import DataLoss, FailedPrecondition, GreenroomError, NotFound
from greenroom.core.records import Snapshot, SnapshotScope
from greenroom.sandbox.port import Backend, Running, SandboxClass
from greenroom.snapshots.port import SnapshotStore

log = structlog.get_logger(__name__)

#: Wakes at a time per core: more raise every wake's latency and hardly the throughput (measured: 2 on 2 cores reach
#: 85 % of the best throughput at a third of the latency of 8).
WAKES_PER_CORE = 1


class Waker:
    """``fetched``: where the files of snapshots are while they are read."""

    def __init__(
        self,
        worker: str,
        backend: Backend,
        fingerprint: str,
        *,
        classes: Classes,
        images: WorkerImages,
        snapshots: SnapshotStore,
        held: Held,
        fetched: Fetched,
        residents: Residents,
        logs: LogFiles,
        warm: WarmPool | None,
    ) -> None:
        self._worker = worker
        self._backend = backend
        self._fingerprint = fingerprint
        self._classes = classes
        self._images = images
        self._snapshots = snapshots
        self._held = held
        self._fetched = fetched
        self._residents = residents
        self._logs = logs
        self._warm = warm
        self._admission = asyncio.Semaphore(max(1, WAKES_PER_CORE * (os.cpu_count() or 1)))

    async def wake(self, call: api.Start | api.Restore, reports: Reports) -> api.Started:
        marks = Marks()
        if isinstance(call, api.Restore):
            self._check_runs_here(call.snapshot)
        await self._residents.end(call.actor_uid)  # of an earlier operation that was backed out
        try:
            return await self._wake(call, marks, reports)
        finally:
            if self._residents.find(call.actor_uid) is None:
                await self._images.release(call.actor_uid)

    async def _wake(self, call: api.Start | api.Restore, marks: Marks, reports: Reports) -> api.Started:
        cls = await self._classes.held(call, reports)
        if self._warm:
            self._warm.want(cls)
        marks.end("prepare")
        if isinstance(call, api.Restore):
            running = await self._restore(call, cls, marks, reports)
        else:
            running = await self._boot(call, cls, marks, reports)
        if not isinstance(call, api.Restore) or call.snapshot.scope is SnapshotScope.DATA:
            reports.phase("ready")
            try:
                await self._wait_ready(call, cls.port, running)
            except BaseException:
                await asyncio.shield(self._residents.end(call.actor_uid))
                raise
            marks.end("ready")
        resident = self._residents.find(call.actor_uid)
        if resident is None or resident.sid != running.sid:
            raise FailedPrecondition(
                f"the actor's process ended while it was waking{self._quote(call.actor_uid)}", reason="ACTOR_EXITED"
            )
        resident.state = ResidentState.RUNNING
        return api.Started(endpoint=running.endpoint, phases=tuple(marks.phases), warm=running.warm)

    async def _boot(self, call: api.Start, cls: SandboxClass, marks: Marks, reports: Reports) -> Running:
        async with self._admitted():
            reports.phase("boot")
            running = await self._backend.start(cls, call.identity)
        marks.took(running.phases, "sandbox")
        self._residents.settle_in(call.identity, running, call.operation_id)
        return running

    async def _restore(self, call: api.Restore, cls: SandboxClass, marks: Marks, reports: Reports) -> Running:
        snapshot = call.snapshot
        if snapshot.id in self._held:
            try:
                async with self._fetched.reading(snapshot.id, functools.partial(self._held.fetch, snapshot)) as source:
                    marks.end("fetch")
                    return await self._load(call, cls, source, marks, reports)
            except DataLoss as error:
                if not await self._is_stored(snapshot):
                    raise
                log.error("what is held is damaged, takes what is stored", snapshot=snapshot.id, error=error.message)
                await self._held.release(snapshot.id)
                marks.end("held")

        def fetch(cache: Path) -> Awaitable[Path]:
            return self._snapshots.fetch(snapshot, cache, lambda done, total: reports.bytes("fetch", done, total))

        # Links take no room; to make and remove them for each first wake takes a tenth of a millisecond.
        often = (1 if self._snapshots.is_near else snapshot.size_bytes) if snapshot.golden else 0
        async with self._fetched.reading(snapshot.id, fetch, often) as source:
            marks.end("fetch")
            return await self._load(call, cls, source, marks, reports)

    async def _is_stored(self, snapshot: Snapshot) -> bool:
        try:
            await self._snapshots.manifest(snapshot.actor_uid, snapshot.id)
        except NotFound:
            return False
        return True

    async def _load(
        self, call: api.Restore, cls: SandboxClass, source: Path, marks: Marks, reports: Reports
    ) -> Running:
        async with self._admitted():
            # Reading the digests takes as long as the sandbox takes to load; nobody can reach the actor before both are
            # done, so they run side by side.
            reports.phase("load")
            verify = asyncio.create_task(
                self._snapshots.verify(call.snapshot, source, lambda done, total: reports.bytes("load", done, total))
            )
            try:
                running = await self._backend.restore(cls, call.identity, source, call.snapshot.hostname)
            except Exception:
                await verify  # a corrupt snapshot explains why it could not be loaded
                raise
            except BaseException:
                verify.cancel()
                await asyncio.gather(verify, return_exceptions=True)
                raise
        marks.took(running.phases, "sandbox")
        self._residents.settle_in(call.identity, running, call.operation_id)
        try:
            await verify
        except BaseException:
            await asyncio.shield(self._residents.end(call.actor_uid))
            raise
        marks.end("verify")
        return running

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """As many sandboxes at a time are loaded as there are cores, and no warm ones are made meanwhile. Booting is
        the actor's own time and holds up nobody."""
        async with self._admission:
            with self._warm or contextlib.nullcontext():
                yield

    def _check_runs_here(self, snapshot: Snapshot) -> None:
        fits = snapshot.backend == self._backend.name and (
            snapshot.scope is SnapshotScope.DATA or snapshot.fingerprint == self._fingerprint
        )
        if not fits:
            raise FailedPrecondition(
                f"snapshot {snapshot.id} was made by {snapshot.backend} ({snapshot.fingerprint}) and can't run on "
                f"worker {self._worker}, which is {self._backend.name} ({self._fingerprint})",
                reason="NO_COMPATIBLE_WORKER",
            )

    async def _wait_ready(self, call: api.Start | api.Restore, port: int, running: Running) -> None:
        """Until the probe answers, or the process ends."""
        probe, endpoint = call.spec.readyz, running.endpoint
        if probe.port and endpoint.port and not endpoint.path and probe.port != port:
            endpoint = msgspec.structs.replace(endpoint, port=probe.port)
        ready = asyncio.create_task(readiness.wait_ready(endpoint, probe, call.identity))
        exited = asyncio.create_task(self._backend.wait(running.sid))
        try:
            await asyncio.wait({ready, exited}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                await ready
                return
            raise FailedPrecondition(
                f"the actor's process ended with status {exited.result()} before it was ready"
                f"{self._quote(call.actor_uid)}",
                reason="ACTOR_EXITED",
            )
        except GreenroomError as error:
            if error.reason == "NOT_READY":
                error.message += self._quote(call.actor_uid)
            raise
        finally:
            ready.cancel()
            exited.cancel()
            await asyncio.gather(ready, exited, return_exceptions=True)

    def _quote(self, actor_uid: str) -> str:
        lines = self._logs.last_words(actor_uid).strip()
        return f"; its last lines:\n{lines}" if lines else "; it wrote nothing"
