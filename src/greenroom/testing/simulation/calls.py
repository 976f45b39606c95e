"""How an agent carries out calls, with sandboxes that are small objects: a model of `greenroom.agent.agent`. What
decides which calls are carried out is the real `greenroom.agent.fence`, and what decides when it is alone the real
`greenroom.agent.alone`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

from msgspec.structs import replace

from greenroom.agent.alone import AloneWatch
from greenroom.agent.enrolment import Enrolment
from greenroom.agent.fence import Fence
from greenroom.agent.inventory import answer, digest_of, of_sandbox, of_snapshot, page_of
from greenroom.agent.journal import Journal
from greenroom.agent.residents import Wake
from greenroom.agent.sweeper import Sweeper
from greenroom.core import agentapi as api
from greenroom.core.agentapi import AgentCall, Resident, ResidentState
from greenroom.core.errors import (
    Conflict,
    DataLoss,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from greenroom.core.gc.records import Entry, Kind, Local, uid_of_log
from greenroom.core.records import PhaseTime, Record, Snapshot, SnapshotScope, SnapshotState
from greenroom.testing.simulation.faults import Fault
from greenroom.testing.simulation.machine import Machine, Sandbox
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.snapshots import Bucket
from greenroom.testing.simulation.trace import Trace

BACKEND, FINGERPRINT = "sim", "one"

#: How long the work of a sandbox backend takes, in seconds: from, to, and (one in `SLOW_ONE_IN`) at most.
LOAD_S = (0.03, 0.3, 8.0)
WRITE_S = (0.01, 0.2, 4.0)
QUICK_S = (0.002, 0.02, 1.0)
SLOW_ONE_IN = 100
#: And how long it takes when it hangs, while there is trouble.
HANG_S, HANGS_ONE_IN = (10.0, 60.0), 500


class _Nobody:
    """Hears how far a call is."""

    def progress(self, progress: api.Progress) -> None: ...


_NOBODY = _Nobody()


class Calls:
    """Attributes:
    end: ends the agent's process; with its argument everything that runs here, too. Set by whoever runs the world.
    """

    def __init__(self, machine: Machine, network: Network, bucket: Bucket, draw: random.Random, trace: Trace) -> None:
        self.machine = machine
        self.worker = machine.name
        self.network = network
        self.bucket = bucket
        self.trace = trace
        self.end: Callable[[bool], None] = lambda wipe: None
        self._random = draw
        self._fence = Fence(self.worker, cast(Journal, machine.journal), self._resident_generation, self._still_holds)
        self._wakes: dict[str, Wake] = {}
        for sandbox in machine.sandboxes.values():
            sandbox.state = ResidentState.FROZEN if sandbox.frozen else ResidentState.RUNNING
            sandbox.identity = replace(sandbox.identity, generation=self._fence.generation(sandbox.uid))
        machine.staged = {uid: s for uid, s in machine.staged.items() if uid in machine.sandboxes}

    def begin(self) -> None:
        """To be called in the agent's process, before anything else."""
        papers = cast(Path, self.machine.papers)
        self.enrolment = Enrolment(papers, self.worker, self._new_id, _write)
        file, loop = cast(Path, self.machine.welcome), self.network.loop
        self.alone = AloneWatch(file, self._stale, self._stop_stale, boot_time=loop.time)
        for sandbox in self.machine.sandboxes.values():
            sandbox.epoch = self.alone.epoch  # as the agent before this one remembered it
        self.alone.start()
        self.sweeper = Sweeper(self._sandboxes, self._destroy)

    def _new_id(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    # --- alone --------------------------------------------------------------------------------------------

    def _may_run(self, epoch: int) -> bool:
        return epoch >= 0 and epoch == self.alone.now

    def _stale(self) -> list[str]:
        """What runs, or is being woken, and was let run before it was alone."""
        waking = [uid for uid, wake in self._wakes.items() if not self._may_run(wake.epoch)]
        return waking + [uid for uid, s in self.machine.sandboxes.items() if uid not in self._wakes and self._runs(s)]

    def _runs(self, sandbox: Sandbox) -> bool:
        return not sandbox.frozen and not self._may_run(sandbox.epoch)

    async def _stop_stale(self, uid: str) -> None:
        wake = self._wakes.get(uid)
        if wake is not None and not self._may_run(wake.epoch):
            wake.end()

        async def stop() -> None:
            sandbox = self.machine.sandboxes.get(uid)
            if sandbox is None or not self._runs(sandbox):
                return
            if sandbox.state is ResidentState.STARTING:
                await self._end(uid)
            else:
                await self._work(QUICK_S)
                sandbox.freeze()
            self.trace(self.worker, "stopped, having been alone,", sandbox.identity.name)

        await self._fence.aside(uid, stop)

    def knows_it_is_alone(self) -> bool:
        """Looked at from outside: `AloneWatch.alone` would make it so."""
        return self.alone._left_s() <= 0

    # --- calls --------------------------------------------------------------------------------------------

    async def handle(self, call: AgentCall) -> Record:
        """Carries out a call. Raises `GreenroomError`."""
        if isinstance(call, api.Thaw):
            self._check_epoch(call)
        stale = isinstance(call, api.ActorCall) and self.machine.watch.call_arrived(self.worker, call)
        return await self._handle(call, stale)

    def _check_epoch(self, call: api.Thaw) -> None:
        if call.epoch >= 0 and call.epoch != self.alone.now:
            raise FailedPrecondition("what you know of it is from before it was frozen", reason="STALE_EPOCH")

    def _acts(self, call: api.ActorCall) -> None:
        """It is about to change a sandbox."""
        self.machine.watch.call_acts(self.worker, call)

    async def _handle(self, call: AgentCall, stale: bool) -> Record:
        match call:
            case api.Present():
                return self.enrolment.present(call.epoch)
            case api.Enrol():
                if call.registered is not None:
                    self.enrolment.registered(call.registered)
                elif call.refused is not None and self.enrolment.must_wipe(call.refused):
                    await self._wipe()
                return api.Done()  # one whose name is taken waits; what it has is an empty disk
            case api.Sync():
                return self._sync(call)
            case api.ListDisk():
                return page_of(self._held(), call.after)
            case api.Start() | api.Restore():
                epoch = self.alone.now
                return await self._fence.run(call, lambda _: self._wake(call, epoch), _NOBODY)
            case api.Checkpoint():
                return await self._fence.run(call, lambda _: self._checkpoint(call), _NOBODY)
            case api.Publish():
                return await self._fence.run(call, lambda _: self._publish(call), _NOBODY)
            case api.Discard():
                return await self._fence.run(call, lambda _: self._discard(call, stale), _NOBODY)
            case api.Freeze():
                return await self._fence.run(call, lambda _: self._freeze(call), _NOBODY)
            case api.Thaw():
                epoch = self.alone.now
                return await self._fence.run(call, lambda _: self._thaw(call, epoch), _NOBODY)
            case api.Upload():
                return await self._upload(call)
            case api.Release():
                self.machine.held.pop(call.snapshot_id, None)
                return api.Done()
            case api.Prepare():
                await self._work(QUICK_S)
                return api.Prepared(image_digest=f"sha256:{call.image}", size_bytes=1)
            case api.ListResident():
                _ = self.alone.alone  # whether it has just become so is in the epoch
                return api.Residents(epoch=self.alone.epoch, residents=self.residents())
            case api.Warm():
                return api.Done()
            case api.Shutdown():
                self.end(call.wipe)
                return api.Done()
            case _:
                raise Unimplemented(f"simulated agents know no {type(call).__name__}")

    async def _wipe(self) -> None:
        """It was given up, and is back."""
        there = {*self.machine.sandboxes, *self._wakes}
        await asyncio.gather(*(self._fence.aside(uid, partial(self._end, uid)) for uid in there))
        self.enrolment.renew()

    async def _work(self, how_long: tuple[float, float, float]) -> tuple[PhaseTime, ...]:
        """What a backend does takes its time."""
        short, long, longest = how_long
        slow = self._random.randrange(SLOW_ONE_IN) == 0
        seconds = self._random.uniform(long, longest) if slow else self._random.uniform(short, long)
        faults = self.network.faults
        if faults.trouble and Fault.HANG not in faults.without and self._random.randrange(HANGS_ONE_IN) == 0:
            faults.hits[Fault.HANG] += 1
            seconds = self._random.uniform(*HANG_S)
        await asyncio.sleep(seconds)
        return (PhaseTime(name="work", seconds=seconds),)

    def _still_holds(self, call: api.ActorCall) -> bool:
        """See `greenroom.agent.agent`."""
        sandbox = self.machine.sandboxes.get(call.actor_uid)
        staged = self.machine.staged.get(call.actor_uid)
        match call:
            case api.Start() | api.Restore() | api.Thaw():
                if sandbox is None or sandbox.state is not ResidentState.RUNNING:
                    return False
                if isinstance(call, api.Thaw) and not self._may_run(sandbox.epoch):
                    return False
                sandbox.identity = replace(sandbox.identity, generation=call.generation)
                return True
            case api.Checkpoint():
                return bool(staged and staged[0].id == call.snapshot.id and sandbox and sandbox.frozen)
            case api.Freeze():
                return sandbox is not None and sandbox.frozen and staged is None
            case api.Publish():
                return call.hold and call.snapshot_id in self.machine.held
            case _:
                return sandbox is None and staged is None

    def generation(self, uid: str) -> int:
        return self._fence.generation(uid)

    def _resident_generation(self, uid: str) -> int:
        sandbox = self.machine.sandboxes.get(uid)
        return sandbox.identity.generation if sandbox else 0

    def _resident(self, uid: str) -> Sandbox:
        sandbox = self.machine.sandboxes.get(uid)
        if sandbox is None:
            raise NotFound(f"actor {uid} does not run on worker {self.worker}", reason="NOT_RESIDENT")
        return sandbox

    def residents(self) -> tuple[Resident, ...]:
        return tuple(
            Resident(
                actor_uid=uid,
                namespace=s.identity.namespace,
                name=s.identity.name,
                generation=self._fence.generation(uid),
                state=s.state,
                endpoint=s.endpoint,
                operation_id=s.operation_id,
                sandbox=s.identity.sandbox,
            )
            for uid, s in self.machine.sandboxes.items()
        )

    # --- what is here -------------------------------------------------------------------------------------

    def _sync(self, call: api.Sync) -> api.Synced:
        """See `greenroom.agent.inventory`."""
        self.enrolment.close(call.epoch, call.closed_seq, call.incarnation)
        here = {e.handle: e for e in self._sandboxes()}
        for wake in self._wakes.values():
            if wake.identity.handle in call.destroy:
                wake.unwanted = True
                wake.end()
        held = {entry.handle: entry for entry in self._held()}
        self.sweeper.order([(here | held)[handle] for handle in call.destroy if handle in here | held])
        entries = [self._with_fate(e) for e in here.values()]
        _ = self.alone.alone  # whether it has just become so is in the epoch
        disk = digest_of(self._held())
        return answer(call, self.enrolment.papers, self.worker, entries, self.residents(), self.alone.epoch, disk)

    def _held(self) -> list[Entry]:
        return [self._with_fate(of_snapshot(snapshot_id, Local.LIVE)) for snapshot_id in self.machine.held]

    def _with_fate(self, entry: Entry) -> Entry:
        return replace(entry, state=Local.DYING) if entry.handle in self.sweeper else entry

    def _sandboxes(self) -> Iterator[Entry]:
        for wake in self._wakes.values():
            yield of_sandbox(wake.identity, Local.INIT)
        made = {wake.identity.handle for wake in self._wakes.values()}
        for sandbox in self.machine.sandboxes.values():
            if sandbox.identity.handle not in made:
                yield of_sandbox(sandbox.identity, Local.LIVE)

    async def _destroy(self, entry: Entry) -> None:
        if entry.kind is Kind.SNAPSHOT:
            if entry.handle in self.machine.held:
                self.machine.watch.drops(self.worker, entry.handle)
                del self.machine.held[entry.handle]
            return
        uid = uid_of_log(entry.parent)

        async def end() -> None:
            sandbox = self.machine.sandboxes.get(uid)
            if sandbox is not None and sandbox.identity.handle == entry.handle:
                self.machine.watch.sweeps(sandbox)
                await self._end(uid)

        await self._fence.aside(uid, end)

    # --- wake and end -------------------------------------------------------------------------------------

    async def _wake(self, call: api.Start | api.Restore, epoch: int) -> api.Started:
        """``epoch``: when the call came. It ends as soon as that is over."""
        uid = call.actor_uid
        self.enrolment.admit(call.identity)
        made = self.machine.sandboxes.get(uid)
        frozen = made is not None and made.frozen and made.operation_id == call.operation_id
        if frozen or not self._may_run(epoch):
            raise self._was_alone()
        try:
            async with asyncio.timeout(None) as scope:
                self._wakes[uid] = wake = Wake(epoch, scope, call.identity)
                started = await self._wake_in(call)
            if self._may_run(epoch) and not wake.unwanted:
                return started
        except TimeoutError:
            if not scope.expired():
                raise
        finally:
            del self._wakes[uid]
            if (sandbox := self.machine.sandboxes.get(uid)) is not None:
                sandbox.epoch = epoch
        await asyncio.shield(self._end(uid))
        raise self._was_alone()

    def _was_alone(self) -> Unavailable:
        return Unavailable(
            f"worker {self.worker} heard no control plane while it woke the actor", reason="WORKER_ALONE"
        )

    async def _wake_in(self, call: api.Start | api.Restore) -> api.Started:
        await self._end(call.actor_uid)
        count = await self._load(call.snapshot) if isinstance(call, api.Restore) else 0
        phases = await self._work(LOAD_S)
        self._acts(call)
        sandbox = self.machine.make(call.identity, count, call.operation_id)
        try:
            phases += await self._work(QUICK_S)  # until it answers its readiness probe
        except BaseException:
            await asyncio.shield(self._end(call.actor_uid))
            raise
        if sandbox.gone:
            raise FailedPrecondition("the actor's process ended while it was waking", reason="ACTOR_EXITED")
        sandbox.state = ResidentState.RUNNING
        return api.Started(endpoint=sandbox.endpoint, phases=phases)

    async def _load(self, snapshot: Snapshot) -> int:
        fits = snapshot.backend == BACKEND and (
            snapshot.scope is SnapshotScope.DATA or snapshot.fingerprint == FINGERPRINT
        )
        if not fits:
            raise FailedPrecondition(f"snapshot {snapshot.id} can't run here", reason="NO_COMPATIBLE_WORKER")
        if (held := self.machine.held.get(snapshot.id)) is not None:
            return held[1]
        return await self.bucket.load(snapshot)

    async def _end(self, uid: str) -> None:
        """Destroys the sandbox, which runs until it is gone, and drops what is staged."""
        sandbox = self.machine.sandboxes.get(uid)
        if sandbox is not None:
            await self._work(QUICK_S)
            sandbox.ended_by_call = not sandbox.gone
            self.machine.remove(sandbox)
        self.machine.staged.pop(uid, None)

    async def _discard(self, call: api.Discard, stale: bool) -> api.Done:
        if stale:  # one that has begun ends before what comes after it begins
            self._acts(call)
        await self._end(call.actor_uid)
        return api.Done()

    async def _freeze(self, call: api.Freeze) -> api.Done:
        sandbox = self._resident(call.actor_uid)
        self.machine.staged.pop(call.actor_uid, None)
        phases = await self._work(QUICK_S)
        if sandbox.gone:
            raise NotFound(f"actor {call.actor_uid} has ended", reason="NOT_RESIDENT")
        self._acts(call)
        sandbox.freeze()
        return api.Done(phases=phases)

    async def _thaw(self, call: api.Thaw, epoch: int) -> api.Started:
        sandbox = self._resident(call.actor_uid)
        self._check_epoch(call)
        self.machine.staged.pop(call.actor_uid, None)
        phases = await self._work(QUICK_S)
        if sandbox.gone:
            raise NotFound(f"actor {call.actor_uid} has ended", reason="NOT_RESIDENT")
        self._acts(call)
        if self._may_run(epoch):  # else it is frozen again at once
            self.machine.watch.goes_on(sandbox)
        self.machine.thaw(sandbox)
        sandbox.epoch = epoch
        return api.Started(endpoint=sandbox.endpoint, phases=phases, warm=True)

    # --- sleep --------------------------------------------------------------------------------------------

    async def _checkpoint(self, call: api.Checkpoint) -> api.Checkpointed:
        sandbox = self._resident(call.actor_uid)
        try:
            self._acts(call)
            sandbox.frozen = True
            phases = await self._work(WRITE_S)
            if self.machine.disk_full_until > self.network.loop.time():
                raise ResourceExhausted("the worker's disk is full", reason="DISK_FULL")
            if sandbox.gone:
                raise NotFound(f"actor {call.actor_uid} has ended", reason="NOT_RESIDENT")
            made = replace(
                call.snapshot,
                scope=SnapshotScope.MEMORY,
                backend=BACKEND,
                fingerprint=FINGERPRINT,
                hostname=sandbox.identity.hostname,
                worker=self.worker,
            )
            self.machine.staged[call.actor_uid] = made, sandbox.count
        except BaseException:
            if not self._may_run(sandbox.epoch):
                sandbox.freeze()
            elif not sandbox.gone:  # after a failure it runs, also when it was frozen before
                self.machine.thaw(sandbox)
            raise
        sandbox.freeze()
        sandbox.operation_id = call.operation_id
        return api.Checkpointed(size_bytes=8, phases=phases)

    async def _publish(self, call: api.Publish) -> api.Published:
        if call.hold and call.snapshot_id in self.machine.held:
            return api.Published(snapshot=self.machine.held[call.snapshot_id][0])
        staged = self.machine.staged.get(call.actor_uid)
        if staged is None or staged[0].id != call.snapshot_id:
            raise NotFound(f"worker {self.worker} has no files of {call.snapshot_id}", reason="NOT_STAGED")
        phases = await self._work(WRITE_S)
        if call.hold:
            held = replace(staged[0], state=SnapshotState.LOCAL, files=(self.bucket.file(*staged),))
            self.machine.held[call.snapshot_id] = held, staged[1]
            return api.Published(snapshot=held, phases=phases)
        return api.Published(snapshot=await self.bucket.publish(*staged, call.base), phases=phases)

    async def _upload(self, call: api.Upload) -> api.Published:
        held = self.machine.held.get(call.snapshot_id)
        if held is None:
            raise NotFound(f"snapshot {call.snapshot_id} is not held here", reason="NOT_HELD")
        phases = await self._work(WRITE_S)
        try:
            return api.Published(snapshot=await self.bucket.publish(*held), phases=phases)
        except Conflict as other:
            raise DataLoss(other.message, reason="SNAPSHOT_CORRUPT") from other


def _write(file: Path, data: bytes, sync: bool) -> None:
    file.write_bytes(data)
