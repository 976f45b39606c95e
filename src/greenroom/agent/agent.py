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
from greenroom.agent.entrance import EntranceServer
from greenroom.agent.erase import erase, note_backend
from greenroom.agent.execs import carry_out
from greenroom.agent.fence import Fence, from_os
from greenroom.agent.fetched import Fetched
from greenroom.agent.held import Held
from greenroom.agent.images import WorkerImages
from greenroom.agent.inventory import Inventory
from greenroom.agent.journal import Journal
from greenroom.agent.logs import LogFiles
from greenroom.agent.progress import Listener, Reporter, Reports
from greenroom.agent.residents import Lodger, Residents, Wake
from greenroom.agent.sleeping import Sleeper
from greenroom.agent.staging import Staging
from greenroom.agent.waking import Waker
from greenroom.agent.warm import WarmPool
from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, ResidentState
from greenroom.core.errors import FailedPrecondition, GreenroomError, LeaseLost, Unavailable
from greenroom.core.gc.records import Refusal
from greenroom.core.records import Record, SnapshotScope
from greenroom.core.rosters import Berth
from greenroom.images.port import ImageStore
from greenroom.sandbox.port import Backend, BackendProbe, Warmer
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
    layers; "": nowhere. ``berth``: which slot of its pool's ledger it has, where an operator keeps it. ``place``: see
    `greenroom.core.agentapi.Hello`."""

    worker: str
    pool: str
    capacity: int
    state_dir: Path
    warm: int = DEFAULT_WARM
    labels: dict[str, str] = field(default_factory=dict)
    blobs: str = ""
    berth: Berth = field(default_factory=Berth)
    place: str = ""


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
        self._waits_for_roster = False
        self._entrance: EntranceServer | None = None
        self._entered: api.Entrance | None = None
        #: This worker ends for good: all that it has is being destroyed, or has been.
        self._ending: asyncio.Task[None] | None = None
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
        note_backend(root, self._backend.name)
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
        self._sleeper = Sleeper(
            config.worker,
            self._backend,
            self._probe.fingerprint,
            snapshots=self._snapshots,
            held=self._held,
            staging=self._staging,
            residents=self._residents,
            logs=self._logs,
            alone=self._alone,
        )
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

    async def let_in(self, host: str, port: int, told_host: str) -> None:
        """Lets gateways on other machines reach the actors here; before the first link. See `EntranceServer.start`."""
        self._entrance = EntranceServer(self._residents.find, self._journal.generation)
        self._entered = await self._entrance.start(host, port, told_host)

    @property
    def is_registered(self) -> bool:
        return self._enrolment.is_registered

    def holds_state(self) -> bool:
        """Whether anything is here that is nowhere else: an actor that is awake, or a snapshot that is not uploaded."""
        return bool(self._residents.uids() or self._wakes or self._held.ids())

    def unready(self) -> str:
        """Why no actor can wake here; "" when one can, as far as this agent knows."""
        if self.is_leaving or self._ending is not None or self.shutdown.done():
            return "it is ending"
        return "" if self._enrolment.is_registered else "no replica of the control plane has registered it"

    async def close(self, *, wipe: bool) -> None:
        """Ends the agent. Residents go on running, for the next agent process to find, unless ``wipe``. What is held
        here is never wiped: it may be all that is left of actors that sleep. After `erase` nothing is left to do."""
        if self._ending is None:
            await self._close(wipe=wipe)
        else:
            await asyncio.gather(self._ending, return_exceptions=True)

    async def erase(self) -> None:
        """Destroys all that this worker has, and then its state disk; the agent has ended with that. Who calls it again
        joins it. The papers go last: an agent that comes after one that was killed meanwhile is the same worker still,
        and is told so again.

        Raises:
            FailedPrecondition: something is mounted below the state disk (reason ``STILL_MOUNTED``).
            DataLoss: it can't be removed.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._erase(), name="erase")
        await asyncio.shield(self._ending)

    async def _erase(self) -> None:
        try:
            await self._close(wipe=True)
            await asyncio.to_thread(erase, self._config.state_dir, last=PAPERS)
        except GreenroomError:
            raise
        except OSError as error:
            raise from_os(error) from error
        finally:
            if not self.shutdown.done():
                self.shutdown.set_result(True)

    async def _close(self, *, wipe: bool) -> None:
        if self._entrance is not None:
            await self._entrance.close()
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
            berth=self._config.berth,
            place=self._config.place,
            entrance=self._entered,
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
        if welcome.snapshot_mark:
            self._snapshots.expect(welcome.snapshot_mark)
        if self._ending is None:  # or it would be remembered on a disk that is being erased
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
        if self._ending is not None and not isinstance(call, api.Shutdown):
            raise Unavailable(f"worker {self._config.worker} ends for good", reason="WORKER_DISCONNECTED")
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
                return await self._fence.run(call, lambda hears: self._sleeper.checkpoint(call, hears), reporter)
            case api.Publish():
                return await self._fence.run(call, lambda hears: self._sleeper.publish(call, hears), reporter)
            case api.Discard():
                return await self._fence.run(call, lambda _: self._sleeper.discard(call), reporter)
            case api.Freeze():
                return await self._fence.run(call, lambda _: self._sleeper.freeze(call), reporter)
            case api.Thaw():
                self._sleeper.check_epoch(call)
                epoch = self._alone.now
                return await self._fence.run(call, lambda _: self._sleeper.thaw(call, epoch), reporter)
            case api.Upload() | api.Release():
                # Only the worker that is meant may say that it does not have it: then it counts as lost.
                self._enrolment.check()
                try:
                    return (
                        await self._sleeper.upload(call, reporter)
                        if isinstance(call, api.Upload)
                        else await self._sleeper.release(call)
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
                return await carry_out(self._backend, self._residents.get(call.actor_uid).sid, call, reporter)
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
        try:
            return self._enrolment.present(call.epoch)
        except OSError as error:
            raise from_os(error) from error

    async def _enrol(self, call: api.Enrol) -> api.Done:
        try:
            if call.registered is not None:
                self._enrolment.registered(call.registered)
                self._waits_for_roster = False
            elif call.refused is not None and self._enrolment.must_wipe(call.refused):
                log.error("this worker was given up, or another process has its name or disk: what runs here ends")
                await self._wipe()
                if self._enrolment.must_wipe(call.refused):  # else another replica was quicker, and we are another
                    self._enrolment.renew()
            elif call.refused is not None and call.refused.what is Refusal.NOT_ON_ROSTER:
                if not self._waits_for_roster:  # it may take long, and is said once
                    log.warning("not registered: this worker is not on its pool's roster; waits until it is")
                self._waits_for_roster = True
            elif call.refused is not None and self._enrolment.is_taken(call.refused) and not self.shutdown.done():
                log.error(
                    "another worker of this name lives, or may come back, with another disk: give one of them another "
                    "name; if its disk is no more, wait until it counts as lost"
                )
                self.shutdown.set_result(False)
        except OSError as error:
            raise from_os(error) from error
        return api.Done()

    async def _give_up(self, call: api.Shutdown) -> None:
        """This worker ends for good. Nothing is made here from the look at what there is on."""
        if self._ending is None:
            self._enrolment.check_epoch(call.epoch, call.incarnation)
            if newer := self._inventory.made_after(call.closed_seq):
                raise FailedPrecondition(
                    f"worker {self._config.worker} has {newer}, which was made after it was told to erase its disk",
                    reason="WORKER_IN_USE",
                )
        await self.erase()

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
                if isinstance(call, api.Thaw) and not self._alone.may_run(resident.epoch):
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
                # Only the snapshot store knows about the others, and asking it again is publishing again. What is
                # staged may have been written since.
                staged = self._staging.find(call.actor_uid, call.snapshot_id) is not None
                return call.hold and call.snapshot_id in self._held and not staged
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
        if frozen or not self._alone.may_run(epoch):
            raise self._was_alone()
        try:
            async with asyncio.timeout(None) as scope:
                self._wakes[uid] = wake = Wake(epoch, scope, call.identity)
                with Reports(hears) as reports:
                    started = await self._waker.wake(call, reports)
            if self._alone.may_run(epoch) and not wake.unwanted:
                return started
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            del self._wakes[uid]
            resident = self._residents.find(uid)
            if resident is not None and resident.operation_id == call.operation_id:  # not one that it was to replace
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

    # --- alone --------------------------------------------------------------------------------------------

    def _stale(self) -> list[str]:
        """Actors (uid) that run, or are being woken, and were let run before this worker was alone."""
        waking = [uid for uid, wake in self._wakes.items() if not self._alone.may_run(wake.epoch)]
        return waking + [r.identity.uid for r in self._residents if r.identity.uid not in self._wakes and self._runs(r)]

    def _runs(self, resident: Lodger) -> bool:
        return resident.state is not ResidentState.FROZEN and not self._alone.may_run(resident.epoch)

    async def _stop_stale(self, uid: str) -> None:
        wake = self._wakes.get(uid)
        if wake is not None and not self._alone.may_run(wake.epoch):
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
                resident.shut_out()
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
