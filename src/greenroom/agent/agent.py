"""The agent's core: carries out calls, each at most once, each fenced (`greenroom.agent.fence`). No word of any
backend, no word of gRPC.

A caller that goes away stops nothing. A resident is destroyed only by a call that passed the fence, or because it
ended by itself.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, assert_never

import msgspec
import structlog

from greenroom.agent.alone import AloneWatch
from greenroom.agent.classes import Classes
from greenroom.agent.fence import Fence, from_os
from greenroom.agent.held import Held
from greenroom.agent.journal import Journal
from greenroom.agent.logs import LogFiles
from greenroom.agent.progress import Marks, Reporter, Reports
from greenroom.agent.residents import Lodger, Residents
from greenroom.agent.staging import Staging
from greenroom.agent.waking import Waker
from greenroom.agent.warm import WarmPool
from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, ResidentState
from greenroom.core.errors import FailedPrecondition, GreenroomError, NotFound
from greenroom.core.records import Record, SnapshotScope
from greenroom.images.port import ImageStore
from greenroom.sandbox.port import Backend, BackendProbe, ExecSession, ExecSpec, Warmer
from greenroom.snapshots.port import SnapshotStore

log = structlog.get_logger(__name__)

#: Warm sandboxes that one agent keeps unless told otherwise: what the cores can use at once, and as many for a burst.
DEFAULT_WARM = 2 * (os.cpu_count() or 1)


class Link(Protocol):
    """One way to one replica of the control plane, whatever carries it. Neither method waits."""

    def exited(self, event: api.SandboxExited) -> None: ...
    def leaving(self, leaving: api.Leaving) -> None: ...


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """``labels``: what this worker is to those who choose one."""

    worker: str
    pool: str
    capacity: int
    state_dir: Path
    warm: int = DEFAULT_WARM
    labels: dict[str, str] = field(default_factory=dict)


class Agent:
    """One worker's agent. `open`, then any number of `handle`, then `close`."""

    def __init__(self, config: AgentConfig, backend: Backend, images: ImageStore, snapshots: SnapshotStore) -> None:
        self._config = config
        self._backend = backend
        self._snapshots = snapshots
        self._classes = Classes(images, needs_image=backend.capabilities.needs_image)
        self._boot_id = uuid.uuid4().hex
        self._warm: WarmPool | None = None
        #: The links that are up; each adds and removes itself.
        self.links: set[Link] = set()
        #: Whether this agent has been asked to end, and waits for its actors to be suspended.
        self.is_leaving = False
        #: Where events go.
        self.on_exit = self._tell_exit
        #: Resolves when the control plane asked this agent to end.
        self.shutdown: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    # --- life of the agent --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Opens the backend and takes over what an earlier agent process left running.

        Raises:
            FailedPrecondition: the backend can't run here.
        """
        config, root = self._config, self._config.state_dir
        for name in ("cache", "logs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._journal = Journal(root / "journal")
        self._staging = Staging(root / "staging")
        self._held = Held(root / "held", config.worker, self._snapshots)
        await self._held.open()
        self._logs = LogFiles(root / "logs")
        self._residents = Residents(
            config.worker,
            self._backend,
            self._logs,
            self._staging,
            self._journal.generation,
            lambda event: self.on_exit(event),
        )
        self._fence = Fence(config.worker, self._journal, self._residents.generation, self._still_holds)
        self._probe: BackendProbe = await self._backend.open(root / "sandboxes", config.worker)
        for found in await self._backend.reconcile():
            self._residents.take_over(found)
        self._staging.keep_only(self._residents.uids())
        if isinstance(self._backend, Warmer) and config.warm > 0:
            self._warm = WarmPool(self._backend, config.warm)
            self._warm.start()
        self._waker = Waker(
            config.worker,
            self._backend,
            self._probe.fingerprint,
            classes=self._classes,
            snapshots=self._snapshots,
            held=self._held,
            cache=root / "cache",
            residents=self._residents,
            logs=self._logs,
            warm=self._warm,
        )
        self._alone = AloneWatch(root / "welcome.json", self._running, self._freeze_alone)
        self._alone.start()

    async def close(self, *, wipe: bool) -> None:
        """Ends the agent. Residents go on running, for the next agent process to find, unless ``wipe``. What is held
        here is never wiped: it may be all that is left of actors that sleep."""
        await self._alone.close()
        await self._fence.close()
        await self._held.close()
        await self._residents.close()
        if self._warm:
            await self._warm.close()
        self._logs.close()
        await self._backend.close(keep_running=not wipe)
        self._journal.close()

    # --- what is said and heard without a call ------------------------------------------------------------

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
            residents=self._residents.listed(),
            labels=self._config.labels,
            images=self._classes.digests(),
        )

    def heartbeat(self) -> api.Heartbeat:
        return api.Heartbeat(boot_id=self._boot_id, residents=self._residents.listed(), images=self._classes.digests())

    def heard(self, welcome: api.Welcome, at: float) -> None:
        """A replica has answered what was sent to it at ``at`` (the loop's clock, seconds)."""
        self._alone.heard(welcome, at)

    def leave(self) -> None:
        """Tells every replica that is connected, and each that will be, that this agent is to end; it goes on working
        until it is told to (`shutdown`)."""
        self.is_leaving = True
        for link in [*self.links]:
            link.leaving(self.farewell())

    def farewell(self) -> api.Leaving:
        return api.Leaving(boot_id=self._boot_id)

    def _tell_exit(self, event: api.SandboxExited) -> None:
        # Without a link the event is not lost: the next HELLO lists the residents, and this one is missing there.
        for link in [*self.links]:
            link.exited(event)

    # --- calls --------------------------------------------------------------------------------------------

    async def handle(self, call: AgentCall, reporter: Reporter) -> Record:
        """Carries out a call. Raises `GreenroomError`."""
        match call:
            case api.Start() | api.Restore():
                return await self._fence.run(call, lambda: self._wake(call, reporter))
            case api.Checkpoint():
                return await self._fence.run(call, lambda: self._checkpoint(call, reporter))
            case api.Publish():
                return await self._fence.run(call, lambda: self._publish(call, reporter))
            case api.Discard():
                return await self._fence.run(call, lambda: self._discard(call))
            case api.Freeze():
                return await self._fence.run(call, lambda: self._freeze(call))
            case api.Thaw():
                self._check_epoch(call)
                return await self._fence.run(call, lambda: self._thaw(call))
            case api.Upload() | api.Release():
                try:
                    return (
                        await self._upload(call, reporter)
                        if isinstance(call, api.Upload)
                        else await self._release(call)
                    )
                except OSError as error:
                    raise from_os(error) from error
            case api.Prepare():
                with Reports(reporter, quiet_s=0.0) as reports:  # people watch it from the start
                    image = await self._classes.image(call.image, reports)
                return api.Prepared(image_digest=image.digest, size_bytes=image.size_bytes)
            case api.Warm():
                if self._warm:
                    with Reports(reporter) as reports:
                        self._warm.want(await self._classes.of(call.image_digest, call.spec, reports))
                return api.Done()
            case api.ListResident():
                _ = self._alone.alone  # whether it has just become so is in the epoch
                return api.Residents(residents=self._residents.listed(), epoch=self._alone.epoch)
            case api.Stats():
                return await self._backend.stats(self._residents.get(call.actor_uid).sid)
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
        resident = self._residents.find(call.actor_uid)
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
                # Only the snapshot store knows about the others, and asking it again is publishing again.
                return call.hold and call.snapshot_id in self._held
            case _:
                return resident is None and not self._staging.holds(call.actor_uid)

    async def _wake(self, call: api.Start | api.Restore, reporter: Reporter) -> api.Started:
        with Reports(reporter) as reports:
            return await self._waker.wake(call, reports)

    # --- sleep --------------------------------------------------------------------------------------------

    async def _checkpoint(self, call: api.Checkpoint, reporter: Reporter) -> api.Checkpointed:
        resident = self._residents.get(call.actor_uid)
        dest = await asyncio.to_thread(self._staging.begin, call.actor_uid, call.snapshot.id)
        marks = Marks()
        try:
            with Reports(reporter) as reports:
                async with reports.growing(dest, "checkpoint"):
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

    async def _undo_checkpoint(self, resident: Lodger) -> None:
        """After a failure the sandbox runs, also one that was frozen before."""
        await self._staging.clear(resident.identity.uid)
        try:
            resident.endpoint = await self._backend.thaw(resident.sid)
            resident.state = ResidentState.RUNNING
        except GreenroomError as error:  # the next call about it finds that out too; what failed first says more
            log.error("could not thaw after a failed checkpoint", sid=resident.sid, error=error.message)

    async def _publish(self, call: api.Publish, reporter: Reporter) -> api.Published:
        marks = Marks()
        snapshot = self._staging.find(call.actor_uid, call.snapshot_id)
        if snapshot is None:
            if call.hold and call.snapshot_id in self._held:  # an agent that died had kept it already
                return api.Published(snapshot=await self._held.manifest(call.snapshot_id))
            raise NotFound(
                f"worker {self._config.worker} has no files of snapshot {call.snapshot_id}", reason="NOT_STAGED"
            )
        source = self._staging.path(call.actor_uid, call.snapshot_id)
        publish = self._held.keep if call.hold else self._snapshots.publish
        with Reports(reporter) as reports:
            published = await publish(snapshot, source, lambda done, total: reports.bytes("publish", done, total))
        marks.end("publish")
        return api.Published(snapshot=published, phases=tuple(marks.phases))

    async def _upload(self, call: api.Upload, reporter: Reporter) -> api.Published:
        marks = Marks()
        with Reports(reporter) as reports:
            published = await self._held.upload(
                call.snapshot_id, lambda done, total: reports.bytes("upload", done, total)
            )
        marks.end("upload")
        return api.Published(snapshot=published, phases=tuple(marks.phases))

    async def _release(self, call: api.Release) -> api.Done:
        await self._held.release(call.snapshot_id)
        return api.Done()

    async def _discard(self, call: api.Discard) -> api.Done:
        marks = Marks()
        await self._residents.end(call.actor_uid)
        if call.forget:
            await asyncio.to_thread(self._logs.forget, call.actor_uid)
        marks.end("discard")
        return api.Done(phases=tuple(marks.phases))

    async def _freeze(self, call: api.Freeze) -> api.Done:
        resident, marks = self._residents.get(call.actor_uid), Marks()
        await self._staging.clear(call.actor_uid)
        await self._backend.freeze(resident.sid)
        resident.state = ResidentState.FROZEN
        marks.end("freeze")
        return api.Done(phases=tuple(marks.phases))

    async def _thaw(self, call: api.Thaw) -> api.Started:
        resident, marks = self._residents.get(call.actor_uid), Marks()
        await self._staging.clear(call.actor_uid)  # from here on it is older than the actor
        resident.endpoint = await self._backend.thaw(resident.sid)
        resident.state = ResidentState.RUNNING
        marks.end("thaw")
        return api.Started(endpoint=resident.endpoint, phases=tuple(marks.phases), warm=True)

    def _check_epoch(self, call: api.Thaw) -> None:
        if call.epoch >= 0 and (self._alone.alone or call.epoch != self._alone.epoch):
            raise FailedPrecondition(
                f"worker {self._config.worker} has been alone since that was decided (epoch {self._alone.epoch}, not "
                f"{call.epoch}); read the actor's record again",
                reason="STALE_EPOCH",
            )

    # --- alone --------------------------------------------------------------------------------------------

    def _running(self) -> list[str]:
        return [r.identity.uid for r in self._residents if r.state is ResidentState.RUNNING]

    async def _freeze_alone(self, uid: str) -> None:
        async def freeze() -> None:
            resident = self._residents.find(uid)
            if self._alone.alone and resident is not None and resident.state is ResidentState.RUNNING:
                await self._backend.freeze(resident.sid)
                resident.state = ResidentState.FROZEN
                log.warning("froze an actor", actor=f"{resident.identity.namespace}/{resident.identity.name}")

        await self._fence.aside(uid, freeze)

    # --- exec ---------------------------------------------------------------------------------------------

    async def _exec(self, call: api.Exec, reporter: Reporter) -> api.Exited:
        resident = self._residents.get(call.actor_uid)
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


async def _feed(session: ExecSession, reporter: Reporter) -> None:
    async for data in reporter.input():
        await session.write(data)
