"""The agent's core: carries out calls, each at most once, each fenced. No word of any backend, no word of gRPC.

For every actor call, in this order (`Agent._actor_call`):

1. *Fence.* A generation below the highest seen for the actor is refused with `LeaseLost`. A higher one is written
   down, and whatever a lower one still has under way for that actor is stopped first.
2. *Once.* A (operation, call) whose answer is in the journal is answered from it, if what it speaks of still exists;
   one that is under way is joined.
3. *Do, record, answer.*

A caller that goes away stops nothing. A resident is destroyed only by a call that passed the fence, or because it
ended by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, assert_never

import msgspec
import structlog

from greenroom.agent import readiness
from greenroom.agent.journal import Journal
from greenroom.agent.logs import LogFiles
from greenroom.agent.warm import MAX_CLASSES, WarmPool
from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, Identity, Resident, ResidentState
from greenroom.core.errors import (
    DataLoss,
    FailedPrecondition,
    GreenroomError,
    LeaseLost,
    NotFound,
    ResourceExhausted,
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


@dataclass(slots=True)
class _Running:
    """A call under way for an actor."""

    generation: int
    name: str
    operation_id: str
    task: asyncio.Task[Record]


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
        self._running: dict[str, _Running] = {}
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
        for name in ("staging", "cache", "logs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._journal = Journal(root / "journal")
        self._logs = LogFiles(root / "logs")
        self._probe: BackendProbe = await self._backend.open(root / "sandboxes", self._config.worker)
        for found in await self._backend.reconcile():
            identity = found.owner
            generation = max(identity.generation, self._journal.generation(identity.uid))
            identity = msgspec.structs.replace(identity, generation=generation)
            self._settle_in(identity, found.sid, found.endpoint, found.log_fifo, found.state, "")
            log.info("took over a running actor", actor=f"{identity.namespace}/{identity.name}", sid=found.sid)
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
        running = [r.task for r in self._running.values()]
        for task in [*running, *(r.watcher for r in self._residents.values() if r.watcher)]:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
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
                return await self._actor_call(call, lambda: self._wake(call, reporter))
            case api.Checkpoint():
                return await self._actor_call(call, lambda: self._checkpoint(call))
            case api.Publish():
                return await self._actor_call(call, lambda: self._publish(call))
            case api.Discard():
                return await self._actor_call(call, lambda: self._discard(call))
            case api.Freeze():
                return await self._actor_call(call, lambda: self._freeze(call))
            case api.Thaw():
                return await self._actor_call(call, lambda: self._thaw(call))
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

    async def _actor_call(self, call: api.ActorCall, work: Callable[[], Coroutine[Any, Any, Record]]) -> Record:
        name, uid = type(call).__name__, call.actor_uid
        seen = self._journal.generation(uid)
        if call.generation < seen:
            raise LeaseLost(
                f"worker {self._config.worker} has seen generation {seen} of actor {uid}; "
                f"{name} with generation {call.generation} comes from an owner that lost its lease",
                metadata={"generation": str(seen)},
            )
        self._journal.raise_fence(uid, call.generation)
        running = self._running.get(uid)
        if running and running.operation_id == call.operation_id and running.name == name:
            return await asyncio.shield(running.task)
        if (
            running
        ):  # calls about one actor come one at a time; an older owner's is stopped, the same owner's ends first
            if running.generation < call.generation:
                running.task.cancel()
            await asyncio.wait({running.task})
            return await self._actor_call(call, work)
        if (recorded := self._journal.answer(call.operation_id, name)) is not None:
            answer: Record = msgspec.json.decode(recorded, type=api.ANSWERS[name])
            if self._still_holds(call):
                return answer
        task = asyncio.create_task(self._do(call, name, work), name=f"{name}-{uid}")
        self._running[uid] = _Running(call.generation, name, call.operation_id, task)
        task.add_done_callback(lambda done: self._ended(uid, done))
        return await asyncio.shield(task)

    def _ended(self, uid: str, task: asyncio.Task[Record]) -> None:
        if (running := self._running.get(uid)) and running.task is task:
            del self._running[uid]
        if not task.cancelled():
            task.exception()  # seen, also when the caller has gone

    async def _do(self, call: api.ActorCall, name: str, work: Callable[[], Coroutine[Any, Any, Record]]) -> Record:
        try:
            answer = await work()
        except OSError as error:
            raise _from_os(error) from error
        self._journal.record(call.operation_id, name, msgspec.json.encode(answer))
        return answer

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
                staged = self._staging(call.snapshot.id).is_dir()
                return staged and resident is not None and resident.state is ResidentState.FROZEN
            case api.Freeze():
                return resident is not None and resident.state is ResidentState.FROZEN
            case api.Publish():
                return True
            case _:
                return resident is None

    # --- wake ---------------------------------------------------------------------------------------------

    async def _wake(self, call: api.Start | api.Restore, reporter: Reporter) -> api.Started:
        marks = _Marks()
        if isinstance(call, api.Restore):
            self._check_runs_here(call.snapshot)
        if call.actor_uid in self._residents:  # of an earlier operation that was backed out
            await self._end_resident(call.actor_uid)
        cls = await self._class_of(call.image_digest, call.spec, reporter)
        if self._warm is None:
            async with self._admission:
                return await self._wake_in(call, cls, marks)
        self._warm.want(cls)
        async with self._admission:
            with self._warm:
                return await self._wake_in(call, cls, marks)

    async def _wake_in(self, call: api.Start | api.Restore, cls: SandboxClass, marks: _Marks) -> api.Started:
        marks.end("prepare")
        verify: asyncio.Task[None] | None = None
        if isinstance(call, api.Restore):
            source = await self._snapshots.fetch(call.snapshot, self._config.state_dir / "cache")
            marks.end("fetch")
            # Reading the digests takes as long as the sandbox takes to load; nobody can reach the actor before both are
            # done, so they run side by side.
            verify = asyncio.create_task(self._snapshots.verify(call.snapshot, source))
        try:
            if isinstance(call, api.Restore):
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
        resident.watcher = asyncio.create_task(self._watch(resident), name=f"watch-{sid}")

    async def _watch(self, resident: _Resident) -> None:
        """Tells the control plane when a resident ends by itself."""
        code = await self._backend.wait(resident.sid)
        uid = resident.identity.uid
        if self._residents.get(uid) is not resident:
            return
        del self._residents[uid]
        self._logs.detach(uid)
        last = self._logs.tail(uid, QUOTED_LINES).decode(errors="replace")
        await self._backend.destroy(resident.sid)
        log.warning("actor ended by itself", actor=resident.identity.name, code=code)
        if resident.state is not ResidentState.STARTING:
            self.on_exit(
                api.SandboxExited(actor_uid=uid, generation=self._journal.generation(uid), code=code, last_lines=last)
            )

    async def _end_resident(self, uid: str) -> None:
        resident = self._residents.pop(uid, None)
        if resident is None:
            return
        if resident.watcher:
            resident.watcher.cancel()
        await self._backend.destroy(resident.sid)
        self._logs.detach(uid)

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
                generation=max(r.identity.generation, self._journal.generation(uid)),
                state=r.state,
                endpoint=r.endpoint,
                operation_id=r.operation_id,
            )
            for uid, r in self._residents.items()
        )

    # --- sleep --------------------------------------------------------------------------------------------

    def _staging(self, snapshot_id: str) -> Path:
        return self._config.state_dir / "staging" / snapshot_id

    async def _checkpoint(self, call: api.Checkpoint) -> api.Checkpointed:
        resident = self._resident(call.actor_uid)
        dest = self._staging(call.snapshot.id)
        await asyncio.to_thread(_fresh_directory, dest)
        marks = _Marks()
        try:
            phases = await self._backend.checkpoint(resident.sid, dest)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, dest, ignore_errors=True)
            raise
        marks.took(phases, "staging")
        resident.state = ResidentState.FROZEN
        resident.operation_id = call.operation_id
        snapshot = msgspec.structs.replace(
            call.snapshot,
            scope=self._backend.capabilities.scope,
            backend=self._backend.name,
            fingerprint=self._probe.fingerprint,
            hostname=resident.identity.hostname,
            worker=self._config.worker,
        )
        (dest.parent / f"{dest.name}.json").write_bytes(msgspec.json.encode(snapshot))
        size = sum(f.stat().st_size for f in dest.iterdir())
        return api.Checkpointed(size_bytes=size, phases=tuple(marks.phases))

    async def _publish(self, call: api.Publish) -> api.Published:
        staged = self._staging(call.snapshot_id)
        described = staged.parent / f"{staged.name}.json"
        if not described.exists():
            raise NotFound(
                f"worker {self._config.worker} has no files of snapshot {call.snapshot_id}", reason="NOT_STAGED"
            )
        marks = _Marks()
        snapshot = msgspec.json.decode(described.read_bytes(), type=Snapshot)
        published = await self._snapshots.publish(snapshot, staged)
        marks.end("publish")
        return api.Published(snapshot=published, phases=tuple(marks.phases))

    async def _discard(self, call: api.Discard) -> api.Done:
        marks = _Marks()
        await self._end_resident(call.actor_uid)
        if call.snapshot_id:
            await asyncio.to_thread(self._drop_staged, call.snapshot_id)
        if call.forget:
            await asyncio.to_thread(self._logs.forget, call.actor_uid)
        marks.end("discard")
        return api.Done(phases=tuple(marks.phases))

    def _drop_staged(self, snapshot_id: str) -> None:
        staged = self._staging(snapshot_id)
        (staged.parent / f"{staged.name}.json").unlink(missing_ok=True)
        shutil.rmtree(staged, ignore_errors=True)

    async def _freeze(self, call: api.Freeze) -> api.Done:
        resident, marks = self._resident(call.actor_uid), _Marks()
        await self._backend.freeze(resident.sid)
        resident.state = ResidentState.FROZEN
        marks.end("freeze")
        return api.Done(phases=tuple(marks.phases))

    async def _thaw(self, call: api.Thaw) -> api.Started:
        resident, marks = self._resident(call.actor_uid), _Marks()
        resident.endpoint = await self._backend.thaw(resident.sid)
        resident.state = ResidentState.RUNNING
        if call.snapshot_id:  # the suspend is off, and what it wrote with it
            await asyncio.to_thread(self._drop_staged, call.snapshot_id)
            await self._snapshots.delete(call.snapshot_id)
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


def _fresh_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, parents=True)


def _from_os(error: OSError) -> GreenroomError:
    if error.errno == 28:  # ENOSPC
        return ResourceExhausted(
            f"the worker's disk is full ({error.filename or error}); delete actors or images, or add space",
            reason="DISK_FULL",
        )
    return DataLoss(f"the worker's disk failed: {error}", reason="WORKER_IO")
