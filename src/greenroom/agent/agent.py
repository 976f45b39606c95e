"""The agent's core: carries out calls, each at most once, each fenced (`greenroom.agent.fence`). No word of any
backend, no word of gRPC.

A caller that goes away stops nothing. A resident is destroyed only by a call that passed the fence, or because it
ended by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, assert_never

import msgspec
import structlog

from greenroom.agent import readiness
from greenroom.agent.fence import Fence
from greenroom.agent.journal import Journal
from greenroom.agent.logs import LogFiles
from greenroom.agent.staging import Staging
from greenroom.agent.warm import MAX_CLASSES, WarmPool
from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, Identity, Resident, ResidentState
from greenroom.core.errors import (
    FailedPrecondition,
    GreenroomError,
    NotFound,
    Unimplemented,
)
from greenroom.core.records import (
    Endpoint,
    LayerProgress,
    PhaseTime,
    Record,
    Snapshot,
    SnapshotScope,
    TemplateSpec,
)
from greenroom.images.config import resolve_user
from greenroom.images.port import Image, ImageConfig, ImageStore
from greenroom.sandbox.port import Backend, BackendProbe, ExecSession, ExecSpec, SandboxClass, Warmer
from greenroom.snapshots.port import SnapshotStore

log = structlog.get_logger(__name__)

#: Lines of output that an error or a crash report quotes.
QUOTED_LINES = 20
#: Wakes at a time per core: more raise every wake's latency and hardly the throughput (measured: 2 on 2 cores reach
#: 85 % of the best throughput at a third of the latency of 8).
WAKES_PER_CORE = 1
#: Progress reports per second and call.
PROGRESS_INTERVAL_S = 0.1
#: Warm sandboxes that one agent keeps unless told otherwise: what the cores can use at once, and as many for a burst.
DEFAULT_WARM = 2 * (os.cpu_count() or 1)


class Reporter(Protocol):
    """What a running call may send besides its answer."""

    def progress(self, progress: api.Progress) -> None: ...
    async def data(self, channel: int, data: bytes) -> None: ...
    def input(self) -> AsyncIterator[bytes]: ...


@dataclass(slots=True)
class _Resident:
    identity: Identity
    sid: str
    state: ResidentState
    endpoint: Endpoint
    operation_id: str
    watcher: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class AgentConfig:
    worker: str
    pool: str
    capacity: int
    state_dir: Path
    warm: int = DEFAULT_WARM


@dataclass(slots=True)
class _Marks:
    """Phases of one call: each mark ends the phase that began at the mark before."""

    at: float = field(default_factory=time.monotonic)
    phases: list[PhaseTime] = field(default_factory=list)

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.phases.append(PhaseTime(name=name, seconds=now - self.at))
        self.at = now

    def took(self, phases: tuple[PhaseTime, ...], rest: str) -> None:
        """Takes over the phases that a part measured itself; what is left since the last mark is ``rest``."""
        now = time.monotonic()
        spent = sum(p.seconds for p in phases)
        self.phases += [*phases, PhaseTime(name=rest, seconds=max(0.0, now - self.at - spent))]
        self.at = now


class Agent:
    """One worker's agent. `open`, then any number of `handle`, then `close`."""

    def __init__(self, config: AgentConfig, backend: Backend, images: ImageStore, snapshots: SnapshotStore) -> None:
        self._config = config
        self._backend = backend
        self._images = images
        self._snapshots = snapshots
        self._residents: dict[str, _Resident] = {}
        self._classes: dict[bytes, SandboxClass] = {}
        self._admission = asyncio.Semaphore(max(1, WAKES_PER_CORE * (os.cpu_count() or 1)))
        self._boot_id = uuid.uuid4().hex
        self._warm: WarmPool | None = None
        #: Set by the link: where events go.
        self.on_exit: Callable[[api.SandboxExited], None] = lambda event: None
        #: Resolves when the control plane asked this agent to end.
        self.shutdown: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    # --- life of the agent --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens the backend and takes over what an earlier agent process left running.

        Raises:
            FailedPrecondition: the backend can't run here.
        """
        root = self._config.state_dir
        for name in ("cache", "logs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._journal = Journal(root / "journal")
        self._fence = Fence(self._config.worker, self._journal, self._resident_generation, self._still_holds)
        self._staging = Staging(root / "staging")
        self._logs = LogFiles(root / "logs")
        self._probe: BackendProbe = await self._backend.open(root / "sandboxes", self._config.worker)
        for found in await self._backend.reconcile():
            identity = found.owner
            generation = max(identity.generation, self._journal.generation(identity.uid))
            identity = msgspec.structs.replace(identity, generation=generation)
            self._settle_in(identity, found.sid, found.endpoint, found.log_fifo, found.state, "")
            log.info("took over a running actor", actor=f"{identity.namespace}/{identity.name}", sid=found.sid)
        self._staging.keep_only(self._residents)
        if isinstance(self._backend, Warmer) and self._config.warm > 0:
            self._warm = WarmPool(self._backend, self._config.warm)
            self._warm.start()

    def hello(self) -> api.Hello:
        return api.Hello(
            worker=self._config.worker,
            pool=self._config.pool,
            backend=self._backend.name,
            fingerprint=self._probe.fingerprint,
            capacity=self._config.capacity,
            boot_id=self._boot_id,
            memory_snapshots=self._backend.capabilities.scope is SnapshotScope.MEMORY,
            freeze=True,
            residents=self._list(),
        )

    async def close(self, *, wipe: bool) -> None:
        """Ends the agent. Residents go on running, for the next agent process to find, unless ``wipe``."""
        await self._fence.close()
        watchers = [r.watcher for r in self._residents.values() if r.watcher]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        if self._warm:
            await self._warm.close()
        self._logs.close()
        await self._backend.close(keep_running=not wipe)
        self._journal.close()

    # --- calls --------------------------------------------------------------------------------------------

    async def handle(self, call: AgentCall, reporter: Reporter) -> Record:
        """Carries out a call. Raises `GreenroomError`."""
        match call:
            case api.Start() | api.Restore():
                return await self._fence.run(call, lambda: self._wake(call, reporter))
            case api.Checkpoint():
                return await self._fence.run(call, lambda: self._checkpoint(call))
            case api.Publish():
                return await self._fence.run(call, lambda: self._publish(call))
            case api.Discard():
                return await self._fence.run(call, lambda: self._discard(call))
            case api.Freeze():
                return await self._fence.run(call, lambda: self._freeze(call))
            case api.Thaw():
                return await self._fence.run(call, lambda: self._thaw(call))
            case api.Upload() | api.Release():
                raise Unimplemented("snapshots are not held on workers yet")
            case api.Prepare():
                image = await self._image(call.image, reporter)
                return api.Prepared(image_digest=image.digest, size_bytes=image.size_bytes)
            case api.Warm():
                if self._warm:
                    self._warm.want(await self._class_of(call.image_digest, call.spec, reporter))
                return api.Done()
            case api.ListResident():
                return api.Residents(residents=self._list())
            case api.Stats():
                return await self._backend.stats(self._resident(call.actor_uid).sid)
            case api.Exec():
                return await self._exec(call, reporter)
            case api.Logs():
                async for generation, data in self._logs.read(call.actor_uid, call.tail_lines, call.follow):
                    await reporter.data(generation, data)
                return api.Done()
            case api.Shutdown():
                if not self.shutdown.done():
                    self.shutdown.set_result(call.wipe)
                return api.Done()
            case _:
                assert_never(call)

    def _still_holds(self, call: api.ActorCall) -> bool:
        """Whether what the recorded answer of this call speaks of is still so."""
        resident = self._residents.get(call.actor_uid)
        match call:
            case api.Start() | api.Restore() | api.Thaw():
                if resident is None or resident.state is not ResidentState.RUNNING:
                    return False
                resident.identity = msgspec.structs.replace(resident.identity, generation=call.generation)
                return True
            case api.Checkpoint():
                staged = self._staging.find(call.actor_uid, call.snapshot.id) is not None
                return staged and resident is not None and resident.state is ResidentState.FROZEN
            case api.Freeze():
                return resident is not None and resident.state is ResidentState.FROZEN
            case api.Publish():
                return False  # only the snapshot store knows, and asking it again is publishing again
            case _:
                return resident is None and not self._staging.holds(call.actor_uid)

    # --- wake ---------------------------------------------------------------------------------------------

    async def _wake(self, call: api.Start | api.Restore, reporter: Reporter) -> api.Started:
        marks = _Marks()
        if isinstance(call, api.Restore):
            self._check_runs_here(call.snapshot)
        await self._end_resident(call.actor_uid)  # of an earlier operation that was backed out
        cls = await self._class_of(call.image_digest, call.spec, reporter)
        if self._warm:
            self._warm.want(cls)
        return await self._wake_in(call, cls, marks)

    async def _wake_in(self, call: api.Start | api.Restore, cls: SandboxClass, marks: _Marks) -> api.Started:
        marks.end("prepare")
        verify: asyncio.Task[None] | None = None
        if isinstance(call, api.Restore):
            source = await self._snapshots.fetch(call.snapshot, self._config.state_dir / "cache")
            marks.end("fetch")
        try:
            async with self._admitted():
                if isinstance(call, api.Restore):
                    # Reading the digests takes as long as the sandbox takes to load; nobody can reach the actor before
                    # both are done, so they run side by side.
                    verify = asyncio.create_task(self._snapshots.verify(call.snapshot, source))
                    running = await self._backend.restore(cls, call.identity, source, call.snapshot.hostname)
                else:
                    running = await self._backend.start(cls, call.identity)
        except BaseException:
            if verify is not None:
                await asyncio.gather(verify)  # a corrupt snapshot explains why it could not be loaded
            raise
        marks.took(running.phases, "sandbox")
        self._settle_in(
            call.identity, running.sid, running.endpoint, running.log_fifo, ResidentState.STARTING, call.operation_id
        )
        try:
            if verify is not None:
                await verify
                marks.end("verify")
            if not isinstance(call, api.Restore) or call.snapshot.scope is SnapshotScope.DATA:
                await self._wait_ready(call, running.sid, running.endpoint)
                marks.end("ready")
        except BaseException:
            await asyncio.shield(self._end_resident(call.actor_uid))
            raise
        resident = self._residents.get(call.actor_uid)
        if resident is None or resident.sid != running.sid:
            raise FailedPrecondition(
                f"the actor's process ended while it was waking{self._quote(call.actor_uid)}", reason="ACTOR_EXITED"
            )
        resident.state = ResidentState.RUNNING
        return api.Started(endpoint=running.endpoint, phases=tuple(marks.phases), warm=running.warm)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """As many sandboxes at a time are loaded as there are cores, and no warm ones are made meanwhile. Booting is
        the actor's own time and holds up nobody."""
        async with self._admission:
            with self._warm or contextlib.nullcontext():
                yield

    def _check_runs_here(self, snapshot: Snapshot) -> None:
        fits = snapshot.backend == self._backend.name and (
            snapshot.scope is SnapshotScope.DATA or snapshot.fingerprint == self._probe.fingerprint
        )
        if not fits:
            raise FailedPrecondition(
                f"snapshot {snapshot.id} was made by {snapshot.backend} ({snapshot.fingerprint}) and can't run on "
                f"worker {self._config.worker}, which is {self._backend.name} ({self._probe.fingerprint})",
                reason="NO_COMPATIBLE_WORKER",
            )

    async def _class_of(self, image_digest: str, spec: TemplateSpec, reporter: Reporter) -> SandboxClass:
        key = image_digest.encode() + msgspec.json.encode(spec)
        cls = self._classes.get(key)
        if cls is None:
            cls = sandbox_class(await self._pinned_image(image_digest, spec, reporter), spec)
            if len(self._classes) >= MAX_CLASSES:
                self._classes.clear()
            self._classes[key] = cls
        return cls

    async def _pinned_image(self, digest: str, spec: TemplateSpec, reporter: Reporter) -> Image:
        """The image that the template was made from, pulled first where it is not on this worker."""
        if not self._backend.capabilities.needs_image:
            return _no_image(spec.image)
        try:
            return await self._images.get(digest)
        except NotFound:
            image = await self._image(spec.image, reporter)
        if image.digest != digest:
            raise FailedPrecondition(
                f"image {spec.image} is {image.digest} now, but the template was made from {digest}, which this worker "
                "does not have; name the digest in the template, or make a new template",
                reason="IMAGE_MOVED",
            )
        return image

    async def _image(self, reference: str, reporter: Reporter) -> Image:
        if not self._backend.capabilities.needs_image:
            return _no_image(reference)
        last = 0.0

        def report(phase: str, layers: tuple[LayerProgress, ...]) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= PROGRESS_INTERVAL_S:
                last = now
                reporter.progress(api.Progress(phase=phase, layers=layers))

        return await self._images.prepare(reference, report)

    async def _wait_ready(self, call: api.Start | api.Restore, sid: str, endpoint: Endpoint) -> None:
        """Until the probe answers, or the process ends."""
        probe = call.spec.readyz
        if probe.port and endpoint.port and not endpoint.path and probe.port != call.spec.ports[0]:
            endpoint = msgspec.structs.replace(endpoint, port=probe.port)
        ready = asyncio.create_task(readiness.wait_ready(endpoint, probe, call.identity))
        exited = asyncio.create_task(self._backend.wait(sid))
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
        lines = self._logs.tail(actor_uid, QUOTED_LINES).decode(errors="replace").strip()
        return f"; its last lines:\n{lines}" if lines else "; it wrote nothing"

    # --- residents ----------------------------------------------------------------------------------------

    def _settle_in(
        self,
        identity: Identity,
        sid: str,
        endpoint: Endpoint,
        fifo: Path | None,
        state: ResidentState,
        operation_id: str,
    ) -> None:
        resident = _Resident(identity, sid, state, endpoint, operation_id)
        self._residents[identity.uid] = resident
        self._logs.attach(identity.uid, identity.generation, fifo)
        self._look_after(resident)

    def _look_after(self, resident: _Resident) -> None:
        resident.watcher = asyncio.create_task(self._watch(resident), name=f"watch-{resident.sid}")

    async def _watch(self, resident: _Resident) -> None:
        """Tells the control plane when a resident ends by itself."""
        code = await self._backend.wait(resident.sid)
        uid = resident.identity.uid
        if self._residents.get(uid) is not resident:
            return
        del self._residents[uid]
        self._logs.detach(uid)
        last = self._logs.tail(uid, QUOTED_LINES).decode(errors="replace")
        log.warning("actor ended by itself", actor=resident.identity.name, code=code)
        if resident.state is not ResidentState.STARTING:
            generation = max(resident.identity.generation, self._journal.generation(uid))
            self.on_exit(api.SandboxExited(actor_uid=uid, generation=generation, code=code, last_lines=last))
        try:
            await self._backend.destroy(resident.sid)
        except GreenroomError as error:
            log.error("what an ended actor left could not be removed", sid=resident.sid, error=error.message)

    async def _end_resident(self, uid: str) -> None:
        """Destroys the actor's sandbox and drops what is staged of it; neither has to be there."""
        resident = self._residents.get(uid)
        if resident is not None:
            if resident.watcher:
                resident.watcher.cancel()
            try:
                await self._backend.destroy(resident.sid)
            except BaseException:
                self._look_after(resident)  # it may live still: whoever asks next must find it
                raise
            if self._residents.get(uid) is resident:
                del self._residents[uid]
            self._logs.detach(uid)
        await self._drop_staged(uid)

    def _resident_generation(self, uid: str) -> int:
        resident = self._residents.get(uid)
        return resident.identity.generation if resident else 0

    def _resident(self, uid: str) -> _Resident:
        resident = self._residents.get(uid)
        if resident is None:
            raise NotFound(f"actor {uid} does not run on worker {self._config.worker}", reason="NOT_RESIDENT")
        return resident

    def _list(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(
                actor_uid=uid,
                namespace=r.identity.namespace,
                name=r.identity.name,
                generation=self._fence.generation(uid),
                state=r.state,
                endpoint=r.endpoint,
                operation_id=r.operation_id,
            )
            for uid, r in self._residents.items()
        )

    # --- sleep --------------------------------------------------------------------------------------------

    async def _checkpoint(self, call: api.Checkpoint) -> api.Checkpointed:
        resident = self._resident(call.actor_uid)
        dest = await asyncio.to_thread(self._staging.begin, call.actor_uid, call.snapshot.id)
        marks = _Marks()
        try:
            phases = await self._backend.checkpoint(resident.sid, dest)
            marks.took(phases, "staging")
            snapshot = msgspec.structs.replace(
                call.snapshot,
                scope=self._backend.capabilities.scope,
                backend=self._backend.name,
                fingerprint=self._probe.fingerprint,
                hostname=resident.identity.hostname,
                worker=self._config.worker,
            )
            size = sum(f.stat().st_size for f in dest.iterdir())
            self._staging.complete(snapshot)
        except BaseException:
            await self._undo_checkpoint(resident)
            raise
        resident.state = ResidentState.FROZEN
        resident.operation_id = call.operation_id
        return api.Checkpointed(size_bytes=size, phases=tuple(marks.phases))

    async def _undo_checkpoint(self, resident: _Resident) -> None:
        """After a failure the sandbox runs, also one that was frozen before."""
        await self._drop_staged(resident.identity.uid)
        try:
            resident.endpoint = await self._backend.thaw(resident.sid)
            resident.state = ResidentState.RUNNING
        except GreenroomError as error:  # the next call about it finds that out too; what failed first says more
            log.error("could not thaw after a failed checkpoint", sid=resident.sid, error=error.message)

    async def _publish(self, call: api.Publish) -> api.Published:
        snapshot = self._staging.find(call.actor_uid, call.snapshot_id)
        if snapshot is None:
            raise NotFound(
                f"worker {self._config.worker} has no files of snapshot {call.snapshot_id}", reason="NOT_STAGED"
            )
        marks = _Marks()
        published = await self._snapshots.publish(snapshot, self._staging.path(call.actor_uid, call.snapshot_id))
        marks.end("publish")
        return api.Published(snapshot=published, phases=tuple(marks.phases))

    async def _discard(self, call: api.Discard) -> api.Done:
        marks = _Marks()
        await self._end_resident(call.actor_uid)
        if call.forget:
            await asyncio.to_thread(self._logs.forget, call.actor_uid)
        marks.end("discard")
        return api.Done(phases=tuple(marks.phases))

    async def _drop_staged(self, actor_uid: str) -> None:
        if self._staging.holds(actor_uid):  # mostly not, and a look is cheaper than a thread
            await asyncio.to_thread(self._staging.drop, actor_uid)

    async def _freeze(self, call: api.Freeze) -> api.Done:
        resident, marks = self._resident(call.actor_uid), _Marks()
        await self._drop_staged(call.actor_uid)
        await self._backend.freeze(resident.sid)
        resident.state = ResidentState.FROZEN
        marks.end("freeze")
        return api.Done(phases=tuple(marks.phases))

    async def _thaw(self, call: api.Thaw) -> api.Started:
        resident, marks = self._resident(call.actor_uid), _Marks()
        await self._drop_staged(call.actor_uid)  # from here on it is older than the actor
        resident.endpoint = await self._backend.thaw(resident.sid)
        resident.state = ResidentState.RUNNING
        marks.end("thaw")
        return api.Started(endpoint=resident.endpoint, phases=tuple(marks.phases), warm=True)

    # --- exec ---------------------------------------------------------------------------------------------

    async def _exec(self, call: api.Exec, reporter: Reporter) -> api.Exited:
        resident = self._resident(call.actor_uid)
        spec = ExecSpec(argv=call.argv, env=tuple(call.env.items()), cwd=call.cwd, timeout_s=call.timeout_s)
        session = await self._backend.exec(resident.sid, spec)
        feeder = asyncio.create_task(_feed(session, reporter))
        try:
            async for channel, data in session.output():
                await reporter.data(channel, data)
            return api.Exited(code=await session.wait())
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            await session.kill()


def sandbox_class(image: Image, spec: TemplateSpec) -> SandboxClass:
    """Image and template merged, as Kubernetes does: a command replaces entrypoint and arguments of the image."""
    config = image.config
    argv = (*spec.command, *spec.args) if spec.command else (*config.entrypoint, *(spec.args or config.cmd))
    if not argv:
        raise FailedPrecondition(
            f"image {spec.image} has no entrypoint and the template no command; set spec.command",
            reason="COMMAND_NOT_FOUND",
        )
    uid, gid = resolve_user(image.rootfs, spec.user or config.user)
    return SandboxClass(
        rootfs=image.rootfs,
        image_digest=image.digest,
        argv=argv,
        env=tuple({**dict(config.env), **spec.env}.items()),
        cwd=spec.workdir or config.workdir or "/",
        uid=uid,
        gid=gid,
        port=spec.ports[0] if spec.ports else 0,
        resources=spec.resources,
    )


def _no_image(reference: str) -> Image:
    """For backends that run no image: whatever the template names."""
    digest = f"sha256:{hashlib.sha256(reference.encode()).hexdigest()}"
    config = ImageConfig(entrypoint=("none",))
    return Image(reference=reference, digest=digest, rootfs=Path("/"), config=config, size_bytes=0)


async def _feed(session: ExecSession, reporter: Reporter) -> None:
    async for data in reporter.input():
        await session.write(data)
