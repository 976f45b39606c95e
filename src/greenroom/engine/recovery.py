"""What keeps the records true when parts die: operations of dead processes, workers that go and come, leases,
left-overs.

Truth about what runs is what a worker says when it connects (its residents); truth about what *should* run are the
records. Every difference is settled by a fenced call or a conditional write, so an old or repeated message changes
nothing.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    GreenroomError,
    LeaseLost,
    NotFound,
)
from greenroom.core.lifecycle import Change, Crash, Outcome, RenewLease, TakeOver
from greenroom.core.records import (
    Actor,
    ActorState,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    Worker,
    WorkerState,
)
from greenroom.core.states import BOUND
from greenroom.engine.drivers import Phases

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Tries of a conditional write to a worker's record against the wake-ups that change its slots meanwhile.
WRITE_ATTEMPTS = 100


class Recovery:
    """Also the hub's listener (`greenroom.engine.workers.WorkerListener`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        #: Set, and replaced by a new one, whenever a worker has come.
        self.arrival = asyncio.Event()

    # --- at start -----------------------------------------------------------------------------------------

    async def adopt_operations(self) -> None:
        """Nobody else holds this store, so every lease and operation in it is a dead process's: takes them over."""
        for worker in await self._store.list(Worker):
            await self._change_worker(worker.name, state=WorkerState.DISCONNECTED)
            self._engine.spawn(self._expect(worker.name), f"expect-{worker.name}")
        await self._take_up_operations(force=True)

    async def _take_up_operations(self, *, force: bool) -> None:
        for operation in await self._store.list(Operation, where={"state": OperationState.RUNNING}):
            if operation.id not in self._engine.running:
                try:
                    await self._take_up(operation, force=force)
                except GreenroomError as error:
                    log.info("operation not taken up", operation=operation.id, error=error.message)

    async def _take_up(self, operation: Operation, *, force: bool) -> None:
        log.info("takes up an operation", operation=operation.id, kind=operation.kind, name=str(operation.key))
        if operation.kind is OperationKind.PREPARE:
            template = await self._store.get(Template, str(operation.key))
            self._engine.track(operation, self._engine.preparer.run(template, operation))
            return
        change = await self._store.apply(
            TakeOver(
                key=operation.key,
                now=time.time(),
                operation_id=operation.id,
                owner=self._engine.config.owner,
                lease_ttl_s=self._engine.config.lease_ttl_s,
                force=force,
            )
        )
        assert change.operation is not None and change.actor is not None
        # A deadline that passed while nobody worked on it would only turn work that is nearly done into a failure.
        fresh = time.time() + self._engine.config.operation_deadline_s
        operation = replace(change.operation, deadline_at=max(change.operation.deadline_at, fresh))
        change = replace(await self._with_source(change), operation=operation)
        drivers = self._engine.drivers
        work = {
            OperationKind.RESUME: drivers.resume,
            OperationKind.SUSPEND: drivers.suspend,
            OperationKind.PAUSE: drivers.pause,
            OperationKind.DELETE: drivers.delete,
        }[operation.kind]
        self._engine.track(operation, work(change, Phases()))

    async def _with_source(self, change: Change) -> Change:
        """The template and the snapshot that the operation spoke of when it was begun."""
        actor, operation = change.actor, change.operation
        assert actor is not None and operation is not None
        template = source = None
        try:
            template = await self._store.get(Template, f"{actor.namespace}/{actor.template}")
            if operation.kind is OperationKind.RESUME and operation.snapshot:
                source = await self._store.get(Snapshot, operation.snapshot)
        except NotFound:
            pass  # the driver backs out with a clear error
        return replace(change, template=template, source=source)

    # --- workers come and go ------------------------------------------------------------------------------

    def worker_connected(self, hello: api.Hello) -> None:
        self._engine.spawn(self._welcome(hello), f"welcome-{hello.worker}")

    def worker_gone(self, worker: str, boot_id: str) -> None:
        self._engine.spawn(self._miss(worker), f"miss-{worker}")

    def sandbox_exited(self, worker: str, event: api.SandboxExited) -> None:
        self._engine.spawn(self._exited(worker, event), f"exited-{event.actor_uid}")

    async def _welcome(self, hello: api.Hello) -> None:
        await self._register(hello)
        await self._reconcile(hello)
        self.arrival.set()
        self.arrival = asyncio.Event()
        self._engine.slot_freed()
        await self._engine.preparer.prewarm(hello)

    async def _register(self, hello: api.Hello) -> None:
        now = time.time()
        said: dict[str, Any] = {
            "pool": hello.pool,
            "backend": hello.backend,
            "fingerprint": hello.fingerprint,
            "capacity": hello.capacity,
            "boot_id": hello.boot_id,
            "memory_snapshots": hello.memory_snapshots,
            "last_seen": now,
            "message": "",
        }
        try:
            await self._store.put(Worker(name=hello.worker, registered_at=now, **said))
        except AlreadyExists:
            await self._change_worker(hello.worker, state=WorkerState.ACTIVE, **said)

    async def _change_worker(self, name: str, **fields: Any) -> None:
        for _ in range(WRITE_ATTEMPTS):
            try:
                worker = await self._store.get(Worker, name)
                if worker.state is WorkerState.DRAINING and fields.get("state") is WorkerState.ACTIVE:
                    fields["state"] = WorkerState.DRAINING
                await self._store.put(replace(worker, **fields))
                return
            except Conflict:
                continue
            except NotFound:
                return
        raise Conflict(f"worker {name} keeps changing")

    async def _miss(self, worker: str) -> None:
        if worker in self._engine.hub.connected():
            return
        await self._change_worker(worker, state=WorkerState.DISCONNECTED, last_seen=time.time())
        await self._expect(worker)

    async def _expect(self, worker: str) -> None:
        """Waits for a worker that is away; when it does not come, its actors are lost."""
        if await self.wait_for_worker(worker, time.monotonic() + self._engine.config.worker_return_s):
            return
        for actor in await self._bound_to(worker):
            await self._crash(actor, "WorkerLost", f"worker {worker} went away and did not come back")

    async def wait_for_worker(self, worker: str, until: float) -> bool:
        """Whether the worker is connected, waiting for it until ``until`` (monotonic seconds)."""
        while worker not in self._engine.hub.connected():
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self.arrival.wait()
            except TimeoutError:
                break
        return worker in self._engine.hub.connected()

    async def _bound_to(self, worker: str) -> list[Actor]:
        actors: list[Actor] = []
        after = ""
        while page := await self._store.list(Actor, where={"worker": worker}, after=after):
            actors += page
            after = page[-1].pk
        return actors

    async def _reconcile(self, hello: api.Hello) -> None:
        """Compares what runs on a worker with what should."""
        residents = {r.actor_uid: r for r in hello.residents}
        for actor in await self._bound_to(hello.worker):
            resident = residents.pop(actor.uid, None)
            if actor.state not in (ActorState.RUNNING, ActorState.PAUSED):
                continue  # an operation has it, and asks the worker itself
            if resident is None or resident.endpoint is None:
                await self._crash(actor, "SandboxLost", f"its sandbox was gone when worker {hello.worker} came back")
            else:
                await self._reunite(actor, resident)
        for resident in residents.values():
            await self._discard_stray(hello.worker, resident)

    async def _reunite(self, actor: Actor, resident: api.Resident) -> None:
        ids: dict[str, Any] = {
            "operation_id": f"reunite-{actor.generation}",
            "actor_uid": actor.uid,
            "generation": actor.generation,
        }
        frozen = resident.state is api.ResidentState.FROZEN
        try:
            if actor.state is ActorState.PAUSED:
                if not frozen:
                    await self._engine.hub.call(actor.worker, api.Freeze(**ids))
                return
            if frozen:
                await self._engine.hub.call(actor.worker, api.Thaw(**ids))
        except LeaseLost:
            return  # an operation has begun meanwhile
        current = await self._store.get(Actor, str(actor.key))
        bound = self._engine.bindings.peek(actor.key)
        if current.generation != actor.generation or (bound and bound.generation == actor.generation):
            return
        template = await self._store.get(Template, f"{actor.namespace}/{actor.template}")
        self._engine.drivers.bind(replace(actor, endpoint=resident.endpoint), template)
        log.info("actor goes on running", actor=str(actor.key), worker=actor.worker)

    async def _discard_stray(self, worker: str, resident: api.Resident) -> None:
        """A sandbox that no record speaks of. The worker refuses, by generation, if that has changed."""
        try:
            actor = await self._store.get(Actor, f"{resident.namespace}/{resident.name}")
            if actor.uid == resident.actor_uid and actor.worker == worker and actor.state in BOUND:
                return
        except NotFound:
            pass
        log.info("discards a sandbox that no record speaks of", worker=worker, actor=resident.name)
        call = api.Discard(
            operation_id=f"stray-{resident.generation}",
            actor_uid=resident.actor_uid,
            generation=resident.generation,
        )
        await self._engine.hub.call(worker, call)

    async def _exited(self, worker: str, event: api.SandboxExited) -> None:
        for actor in await self._store.list(Actor, where={"uid": event.actor_uid}):
            if actor.worker == worker:
                last = f"; its last lines:\n{event.last_lines}" if event.last_lines else ""
                await self._crash(actor, "Exited", f"its process ended with status {event.code}{last}")

    async def _crash(self, actor: Actor, reason: str, message: str) -> None:
        change = await self._store.apply(
            Crash(
                key=actor.key,
                now=time.time(),
                uid=actor.uid,
                worker=actor.worker,
                generation=actor.generation,
                reason=reason,
                message=message,
            )
        )
        if change.outcome is Outcome.CHANGED:
            log.warning("actor crashed", actor=str(actor.key), reason=reason)
            self._engine.bindings.revoke(actor.key)
            self._engine.slot_freed()

    # --- loops --------------------------------------------------------------------------------------------

    async def lease_loop(self) -> None:
        """Renews the lease of every operation that runs here, every third of its life; stops those that lost it."""
        config = self._engine.config
        while True:
            await asyncio.sleep(config.lease_ttl_s / 3)
            for running in list(self._engine.running.values()):
                operation = running.operation
                if operation.kind is OperationKind.PREPARE:
                    continue  # holds no actor; the hidden actor's own operations do
                try:
                    await self._store.apply(
                        RenewLease(
                            key=operation.key,
                            now=time.time(),
                            operation_id=operation.id,
                            generation=operation.generation,
                            owner=config.owner,
                            lease_ttl_s=config.lease_ttl_s,
                        )
                    )
                except LeaseLost as lost:
                    if not running.task.done():
                        log.warning("lost the lease of an operation", operation=operation.id, error=lost.message)
                        running.task.cancel()
                except GreenroomError as error:
                    log.warning("lease not renewed, tries again", operation=operation.id, error=error.message)

    async def janitor_loop(self) -> None:
        """Goes on with operations that nobody runs, and removes what is condemned."""
        while True:
            await asyncio.sleep(self._engine.config.janitor_s)
            try:
                await self._take_up_operations(force=False)
                await self._remove_condemned()
                await self._store.trim()
            except GreenroomError as error:
                log.warning("janitor tries again", error=error.message)

    async def _remove_condemned(self) -> None:
        for snapshot in await self._store.list(Snapshot, where={"state": SnapshotState.CONDEMNED}):
            await self._engine.snapshots.delete(snapshot.id)
            await self._store.remove(snapshot)
