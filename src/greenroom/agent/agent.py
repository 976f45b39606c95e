"""The agent's core: carries out calls, each at most once, each fenced (`greenroom.agent.fence`). No word of any
backend, no word of gRPC.

A caller that goes away stops nothing. A resident is destroyed only by a call that passed the fence, or because it
ended by itself.
"""

from __future__ import annotations

import asyncio
import functools
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, assert_never

import msgspec
import structlog

from greenroom.agent.alone import AloneWatch
from greenroom.agent.classes import Classes
from greenroom.agent.enrolment import PAPERS, Enrolment
from greenroom.agent.erase import erase
from greenroom.agent.fence import Fence, from_os
from greenroom.agent.fetched import Fetched
from greenroom.agent.held import Held
from greenroom.agent.images import WorkerImages
from greenroom.agent.inventory import Inventory
from greenroom.agent.journal import Journal
from greenroom.agent.logs import LogFiles
from greenroom.agent.progress import Listener, Marks, Reporter, Reports
from greenroom.agent.residents import Lodger, Residents, Wake
from greenroom.agent.staging import Staging
from greenroom.agent.waking import Waker
from greenroom.agent.warm import WarmPool
from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, ResidentState
from greenroom.core.errors import FailedPrecondition, GreenroomError, LeaseLost, NotFound, Unavailable
from greenroom.core.records import Record, SnapshotScope
from greenroom.images.port import ImageStore
from greenroom.sandbox.port import Backend, BackendProbe, ExecSession, ExecSpec, Warmer
from greenroom.snapshots.port import SnapshotStore

log = structlog.get_logger(__name__)

#: Warm sandboxes that one agent keeps unless told otherwise: what the cores can use at once, and as many for a burst.
DEFAULT_WARM = 2 * (os.cpu_count() or 1)
#: What is staged of an actor without a sandbox is dropped when no call has had to do with it for this long: twice an
#: operation's usual deadline (`greenroom.engine.config`), so whoever drives the suspend will not ask for it any more.
FORSAKEN_S = 600.0
#: How often is looked for that. It is rare, and only costs disk.
SWEEP_S = 60.0


class Link(Protocol):
    """One way to one replica of the control plane, whatever carries it. Neither method waits."""

    def exited(self, event: api.SandboxExited) -> None: ...
    def leaving(self, leaving: api.Leaving) -> None: ...


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """``labels``: what this worker is to those who choose one. ``blobs``: base URL where other workers get its image
    layers; "": nowhere."""

    worker: str
    pool: str
    capacity: int
    state_dir: Path
    warm: int = DEFAULT_WARM
    labels: dict[str, str] = field(default_factory=dict)
    blobs: str = ""


class Agent:
    """One worker's agent. `open`, then any number of `handle`, then `close`."""

    def __init__(self, config: AgentConfig, backend: Backend, images: ImageStore, snapshots: SnapshotStore) -> None:
        self._config = config
        self._backend = backend
        self._snapshots = snapshots
        self._images = WorkerImages(images, config.worker, config.state_dir)
        self._classes = Classes(self._images, needs_image=backend.capabilities.needs_image)
        self._boot_id = uuid.uuid4().hex
        self._warm: WarmPool | None = None
        self._wakes: dict[str, Wake] = {}
        #: The links that are up; each adds and removes itself.
        self.links: set[Link] = set()
        #: Whether this agent has been asked to end, and waits for its actors to be suspended.
        self.is_leaving = False
        #: Whether the state disk goes when it ends.
        self._erases = False
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
        (root / "logs").mkdir(parents=True, exist_ok=True)
        self._enrolment = Enrolment(root / PAPERS, config.worker)
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
            self._images.release,
        )
        self._fence = Fence(config.worker, self._journal, self._residents.generation, self._still_holds)
        self._probe: BackendProbe = await self._backend.open(root / "sandboxes", config.worker)
        for found in await self._backend.reconcile():
            self._residents.take_over(found)
        self._staging.keep_only(self._residents.uids())
        fetched = Fetched(root / "cache")
        await fetched.clear()
        await self._images.open(self._residents.uids() if self._backend.capabilities.needs_image else ())
        if isinstance(self._backend, Warmer) and config.warm > 0:
            keep = self._images.keep_warm if self._backend.capabilities.needs_image else None
            self._warm = WarmPool(self._backend, config.warm, keep)
            self._images.unwant = self._warm.unwant
            self._warm.start()
        self._waker = Waker(
            config.worker,
            self._backend,
            self._probe.fingerprint,
            classes=self._classes,
            images=self._images,
            snapshots=self._snapshots,
            held=self._held,
            fetched=fetched,
            residents=self._residents,
            logs=self._logs,
            warm=self._warm,
        )
        self._alone = AloneWatch(root / "welcome.json", self._stale, self._stop_stale)
        for resident in self._residents:
            resident.epoch = self._alone.epoch  # as the agent before this one remembered it
        self._alone.start()
        self._inventory = Inventory(
            config.worker,
            self._enrolment,
            self._residents,
            self._wakes,
            fence=self._fence,
            held=self._held,
            fetched=fetched,
            logs=self._logs,
            alone=self._alone,
            warm=self._warm,
        )
        self._staging_sweep = asyncio.create_task(self._sweep(), name="staging-sweep")

    async def close(self, *, wipe: bool) -> None:
        """Ends the agent. Residents go on running, for the next agent process to find, unless ``wipe``. What is held
        here is never wiped: it may be all that is left of actors that sleep."""
        self._staging_sweep.cancel()
        await asyncio.gather(self._staging_sweep, return_exceptions=True)
        await self._inventory.close()
        await self._alone.close()
        await self._fence.close()
        await self._held.close()
        await self._residents.close()
        if self._warm:
            await self._warm.close()
        self._logs.close()
        await self._backend.close(keep_running=not wipe)
        await self._images.close(wipe=wipe)
        self._journal.close()
        if self._erases:
            try:
                await asyncio.to_thread(erase, self._config.state_dir)
            except (GreenroomError, OSError) as error:
                log.error("the state disk is not erased", path=str(self._config.state_dir), error=str(error))

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
            blobs=self._config.blobs,
            images=self._classes.digests(),
            image_bytes=self._images.used_bytes,
            image_over_bytes=self._images.over_bytes,
        )

    def heartbeat(self) -> api.Heartbeat:
        return api.Heartbeat(
            boot_id=self._boot_id,
            residents=self._residents.listed(),
            images=self._classes.digests(),
            image_bytes=self._images.used_bytes,
            image_over_bytes=self._images.over_bytes,
        )

    def heard(self, welcome: api.Welcome, at: float) -> None:
        """A replica has answered what was sent to it at ``at`` (`greenroom.agent.clock.boot_time`)."""
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
            case api.Present():
                return self._present(call)
            case api.Enrol():
                return await self._enrol(call)
            case api.Sync():
                return await self._inventory.sync(call)
            case api.ListDisk():
                return await self._inventory.list_disk(call)
            case api.Start() | api.Restore():
                epoch = self._alone.now
                return await self._fence.run(call, lambda hears: self._wake(call, epoch, hears), reporter)
            case api.Checkpoint():
                return await self._fence.run(call, lambda hears: self._checkpoint(call, hears), reporter)
            case api.Publish():
                return await self._fence.run(call, lambda hears: self._publish(call, hears), reporter)
            case api.Discard():
                return await self._fence.run(call, lambda _: self._discard(call), reporter)
            case api.Freeze():
                return await self._fence.run(call, lambda _: self._freeze(call), reporter)
            case api.Thaw():
                self._check_epoch(call)
                epoch = self._alone.now
                return await self._fence.run(call, lambda _: self._thaw(call, epoch), reporter)
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
                    return await self._classes.pull(call, reports)
            case api.Warm():
                if self._warm:
                    with Reports(reporter) as reports:
                        self._warm.want(await self._classes.to_warm(call, reports))
                return api.Done()
            case api.ListImages() | api.InspectImage() | api.RemoveImage() | api.PinImage() | api.PruneImages():
                return await self._about_images(call)
            case api.StopPrepare():
                self._images.stop(call.id)
                return api.Done()
            case api.CoolImage():
                if self._warm:
                    await self._warm.cool(call.digest)
                return api.Done()
            case api.ImportImage():
                return await self._images.take_in(call, reporter.input())
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
                if call.erase:
                    await self._give_up(call)
                if not self.shutdown.done():
                    self.shutdown.set_result(call.wipe)
                return api.Done()
            case _:
                assert_never(call)

    # --- whose disk this is -------------------------------------------------------------------------------

    def _present(self, call: api.Present) -> Record:
        if self._erases:
            raise Unavailable(f"worker {self._config.worker} ends for good", reason="WORKER_DISCONNECTED")
        try:
            return self._enrolment.present(call.epoch)
        except OSError as error:
            raise from_os(error) from error

    async def _enrol(self, call: api.Enrol) -> api.Done:
        try:
            if call.registered is not None:
                self._enrolment.registered(call.registered)
            elif call.refused is not None and self._enrolment.must_wipe(call.refused):
                log.error("this worker was given up, or another process has its name or disk: what runs here ends")
                await self._wipe()
                self._enrolment.renew()
            elif call.refused is not None and self._enrolment.is_taken(call.refused) and not self.shutdown.done():
                log.error("another worker of this name lives, with another disk: give one of them another name")
                self.shutdown.set_result(False)
        except OSError as error:
            raise from_os(error) from error
        return api.Done()

    async def _give_up(self, call: api.Shutdown) -> None:
        """This worker ends for good: its papers go first, so that nothing is made here any more."""
        if self._erases:
            return
        try:
            self._enrolment.check_epoch(call.epoch)
            if newer := self._inventory.made_after(call.closed_seq):
                raise FailedPrecondition(
                    f"worker {self._config.worker} has {newer}, which was made after it was told to erase its disk",
                    reason="WORKER_IN_USE",
                )
            self._erases = True
            self._enrolment.forget()
        except OSError as error:
            raise from_os(error) from error
        await self._wipe()

    async def _wipe(self) -> None:
        """Ends all residents. What is held stays: it may be all that is left of actors that sleep."""

        async def end(uid: str) -> None:
            await self._fence.aside(uid, functools.partial(self._residents.end, uid))

        await asyncio.gather(*map(end, {*self._residents.uids(), *self._wakes}))

    def _still_holds(self, call: api.ActorCall) -> bool:
        """Whether what the recorded answer of this call speaks of is still so."""
        resident = self._residents.find(call.actor_uid)
        match call:
            case api.Start() | api.Restore() | api.Thaw():
                if resident is None or resident.state is not ResidentState.RUNNING:
                    return False
                if isinstance(call, api.Thaw) and not self._may_run(resident.epoch):
                    return False  # it is about to be frozen, and this call may be what lets it run on
                resident.identity = msgspec.structs.replace(resident.identity, generation=call.generation)
                return True
            case api.Checkpoint():
                staged = self._staging.find(call.actor_uid, call.snapshot.id) is not None
                return staged and resident is not None and resident.state is ResidentState.FROZEN
            case api.Freeze():  # a suspend that was taken over may have written anew what the first one removed
                frozen = resident is not None and resident.state is ResidentState.FROZEN
                return frozen and not self._staging.holds(call.actor_uid)
            case api.Publish():
                # Only the snapshot store knows about the others, and asking it again is publishing again.
                return call.hold and call.snapshot_id in self._held
            case _:
                return resident is None and not self._staging.holds(call.actor_uid)

    async def _wake(self, call: api.Start | api.Restore, epoch: int, hears: Listener) -> api.Started:
        """``epoch``: when the call came. It ends as soon as that is over: from then on the actor may wake elsewhere,
        and its program runs here already before it is ready.

        Raises:
            Unavailable: that is over (reason ``WORKER_ALONE``), or this worker is not registered yet
                (``WORKER_NOT_REGISTERED``); nothing is left here, it may be tried again.
        """
        uid = call.actor_uid
        self._enrolment.admit(call.identity)
        made = self._residents.find(uid)
        frozen = made is not None and made.state is ResidentState.FROZEN and made.operation_id == call.operation_id
        # This very call has made it, and it was frozen since: whoever has had the answer counts on what is in it.
        if frozen or not self._may_run(epoch):
            raise self._was_alone()
        try:
            async with asyncio.timeout(None) as scope:
                self._wakes[uid] = wake = Wake(epoch, scope, call.identity)
                with Reports(hears) as reports:
                    started = await self._waker.wake(call, reports)
            if self._may_run(epoch) and not wake.unwanted:
                return started
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            del self._wakes[uid]
            if (resident := self._residents.find(uid)) is not None:
                resident.epoch = epoch
        await asyncio.shield(self._residents.end(uid))
        if wake.unwanted:
            raise LeaseLost(f"nobody waits for sandbox {call.identity.sandbox} any more")
        raise self._was_alone()

    def _was_alone(self) -> Unavailable:
        return Unavailable(
            f"worker {self._config.worker} heard no control plane while it woke the actor; try again",
            reason="WORKER_ALONE",
        )

    async def _about_images(
        self, call: api.ListImages | api.InspectImage | api.RemoveImage | api.PinImage | api.PruneImages
    ) -> Record:
        try:
            return await self._images.handle(call)
        except OSError as error:
            raise from_os(error) from error

    # --- sleep --------------------------------------------------------------------------------------------

    async def _checkpoint(self, call: api.Checkpoint, hears: Listener) -> api.Checkpointed:
        resident = self._residents.get(call.actor_uid)
        dest = await asyncio.to_thread(self._staging.begin, call.actor_uid, call.snapshot.id)
        marks = Marks()
        try:
            with Reports(hears) as reports:
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
        """After a failure the sandbox runs, also one that was frozen before; but not one that may not run."""
        await self._staging.clear(resident.identity.uid)
        try:
            if not self._may_run(resident.epoch):
                await self._backend.freeze(resident.sid)
                resident.state = ResidentState.FROZEN
                return
            resident.endpoint = await self._backend.thaw(resident.sid)
            resident.state = ResidentState.RUNNING
        except GreenroomError as error:  # the next call about it finds that out too; what failed first says more
            log.error("could not be put back after a failed checkpoint", sid=resident.sid, error=error.message)

    async def _publish(self, call: api.Publish, hears: Listener) -> api.Published:
        marks = Marks()
        snapshot = self._staging.find(call.actor_uid, call.snapshot_id)
        if snapshot is None:
            if call.hold and call.snapshot_id in self._held:  # an agent that died had kept it already
                return api.Published(snapshot=await self._held.manifest(call.snapshot_id))
            raise NotFound(
                f"worker {self._config.worker} has no files of snapshot {call.snapshot_id}", reason="NOT_STAGED"
            )
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
            await self._logs.forget(call.actor_uid)
        marks.end("discard")
        return api.Done(phases=tuple(marks.phases))

    async def _freeze(self, call: api.Freeze) -> api.Done:
        resident, marks = self._residents.get(call.actor_uid), Marks()
        await self._staging.clear(call.actor_uid)
        await self._backend.freeze(resident.sid)
        resident.state = ResidentState.FROZEN
        marks.end("freeze")
        return api.Done(phases=tuple(marks.phases))

    async def _thaw(self, call: api.Thaw, epoch: int) -> api.Started:
        """``epoch``: when the call came. Should it be over by the end, the sandbox is soon frozen again."""
        resident, marks = self._residents.get(call.actor_uid), Marks()
        self._check_epoch(call)  # what was under way may have taken long
        await self._staging.clear(call.actor_uid)  # from here on it is older than the actor
        self._check_epoch(call)  # so may that
        resident.endpoint = await self._backend.thaw(resident.sid)
        resident.state, resident.epoch = ResidentState.RUNNING, epoch
        marks.end("thaw")
        return api.Started(endpoint=resident.endpoint, phases=tuple(marks.phases), warm=True)

    def _check_epoch(self, call: api.Thaw) -> None:
        if call.epoch >= 0 and call.epoch != self._alone.now:
            raise FailedPrecondition(
                f"worker {self._config.worker} has been alone since that was decided (epoch {self._alone.epoch}, not "
                f"{call.epoch}); read the actor's record again",
                reason="STALE_EPOCH",
            )

    # --- alone --------------------------------------------------------------------------------------------

    def _may_run(self, epoch: int) -> bool:
        """What was let run in that epoch."""
        return epoch >= 0 and epoch == self._alone.now

    def _stale(self) -> list[str]:
        """Actors (uid) that run, or are being woken, and were let run before this worker was alone."""
        waking = [uid for uid, wake in self._wakes.items() if not self._may_run(wake.epoch)]
        return waking + [r.identity.uid for r in self._residents if r.identity.uid not in self._wakes and self._runs(r)]

    def _runs(self, resident: Lodger) -> bool:
        return resident.state is not ResidentState.FROZEN and not self._may_run(resident.epoch)

    async def _stop_stale(self, uid: str) -> None:
        wake = self._wakes.get(uid)
        if wake is not None and not self._may_run(wake.epoch):
            wake.end()

        async def stop() -> None:
            resident = self._residents.find(uid)
            if resident is None or not self._runs(resident):
                return
            actor = f"{resident.identity.namespace}/{resident.identity.name}"
            if resident.state is ResidentState.STARTING:  # its wake has failed, and could not end it
                await self._residents.end(uid)
                log.warning("ended an actor that was waking", actor=actor)
            else:
                await self._backend.freeze(resident.sid)
                resident.state = ResidentState.FROZEN
                log.warning("froze an actor", actor=actor)

        await self._fence.aside(uid, stop)

    # --- what is left behind ------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Drops what is staged of actors whose sandbox ended by itself, when the `Discard` of it was lost: nobody sees
        from outside that it is there."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                for uid in await asyncio.to_thread(self._staging.uids):
                    if self._is_forsaken(uid) and not self._fence.is_busy(uid):
                        await self._fence.aside(uid, functools.partial(self._drop_forsaken, uid))
            except Exception as error:  # a disk that fails; there is another time
                log.error("could not look for what is staged and forsaken", error=str(error))

    def _is_forsaken(self, uid: str) -> bool:
        return self._residents.find(uid) is None and self._staging.untouched_s(uid) >= FORSAKEN_S

    async def _drop_forsaken(self, uid: str) -> None:
        if self._is_forsaken(uid):  # a call may have come in between
            log.warning("drops staged files that nobody asks for", actor_uid=uid)
            await self._staging.clear(uid)

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
