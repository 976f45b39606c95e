"""What keeps the records true when parts die: operations of dead processes, workers that go and come, leases,
left-overs.

Truth about what runs is what a worker says when it is asked (its residents); truth about what *should* run are the
records. Every difference is settled by a fenced call or a conditional write, so an old or repeated message changes
nothing; and what a lost message would have told is found by asking again, every ``reconcile_s``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.commands import Change, Crash, Outcome, RenewLease, TakeOver
from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    GreenroomError,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    Worker,
    WorkerState,
)
from greenroom.core.states import BUSY
from greenroom.engine import clock
from greenroom.engine.drivers import Phases
from greenroom.engine.operations import closing
from greenroom.store.port import R

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Tries of a conditional write to a worker's record against others who write it.
WRITE_ATTEMPTS = 100
#: A worker that takes longer to say what runs on it is asked again later.
LIST_TIMEOUT_S = 30.0
#: Failed suspends whose snapshot is looked for again when their worker is back: what was published after they had
#: failed was published within moments.
UNPUBLISH_WITHIN_S = 24 * 3600.0


class Recovery:
    """Also the hub's listener (`greenroom.engine.workers.WorkerListener`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops
        #: Set, and replaced by a new one, whenever a worker has come.
        self.arrival = asyncio.Event()
        #: Workers that are away and may still come back in time: since when (monotonic seconds).
        self._away: dict[str, float] = {}
        self._comparing: dict[str, asyncio.Task[list[str]]] = {}

    # --- operations that nobody drives --------------------------------------------------------------------

    async def adopt_operations(self) -> None:
        """Nobody else holds this store, so every lease and operation in it is a dead process's: takes them over."""
        for worker in await self._all(Worker):
            if worker.name not in self._engine.hub.connected():
                await self._mark_away(worker.name)
                self._missing(worker.name)
        await self._take_up_operations(force=True)

    async def _take_up_operations(self, *, force: bool) -> None:
        for operation in await self._all(Operation, state=OperationState.RUNNING):
            if not self._ops.claim(operation.id):
                continue
            try:
                await self.take_up(operation, force=force)
            except GreenroomError as error:
                log.info("operation not taken up", operation=operation.id, error=error.message)
            finally:
                self._ops.release(operation.id)

    async def take_up(self, operation: Operation, *, force: bool = False) -> None:
        """Drives an operation on from where it is. The caller has claimed it (`Operations.claim`)."""
        log.info("takes up an operation", operation=operation.id, kind=operation.kind, name=str(operation.key))
        if operation.kind is OperationKind.PREPARE:
            await self._engine.preparer.take_up(operation)
            return
        change = await self._ops.commit(
            TakeOver(
                key=operation.key,
                now=self._engine.now(),
                operation_id=operation.id,
                owner=self._engine.config.owner,
                lease_ttl_s=self._engine.config.lease_ttl_s,
                force=force,
            )
        )
        assert change.operation is not None and change.actor is not None
        # A deadline that passed while nobody worked on it would only turn work that is nearly done into a failure.
        fresh = self._engine.now() + self._engine.config.operation_deadline_s
        operation = replace(change.operation, deadline_at=max(change.operation.deadline_at, fresh))
        change = replace(await self._with_source(change), operation=operation)
        drivers = self._engine.drivers
        work = {
            OperationKind.RESUME: drivers.resume,
            OperationKind.SUSPEND: drivers.suspend,
            OperationKind.PAUSE: drivers.pause,
            OperationKind.DELETE: drivers.delete,
        }[operation.kind]
        self._ops.track(operation, work(change, Phases()))

    async def _with_source(self, change: Change) -> Change:
        """The template and the snapshot that the operation spoke of when it was begun."""
        actor, operation = change.actor, change.operation
        assert actor is not None and operation is not None
        template = source = None
        try:
            template = await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
            if operation.kind is OperationKind.RESUME and operation.snapshot:
                source = await self._ops.read(Snapshot, operation.snapshot)
        except NotFound:
            pass  # the driver backs out with a clear error
        return replace(change, template=template, source=source)

    # --- workers come and go ------------------------------------------------------------------------------

    def worker_connected(self, hello: api.Hello) -> None:
        if not self._ops.closed:
            self._engine.spawn(self._welcome(hello), f"welcome-{hello.worker}")

    def worker_heard(self, worker: str, heartbeat: api.Heartbeat) -> None:
        pass

    def worker_leaving(self, worker: str, boot_id: str) -> None:
        pass

    def worker_gone(self, worker: str, boot_id: str) -> None:
        if not self._ops.closed:
            self._missing(worker)

    def sandbox_exited(self, worker: str, event: api.SandboxExited) -> None:
        if not self._ops.closed:
            self._engine.spawn(self._exited(worker, event), f"exited-{event.actor_uid}")

    async def _welcome(self, hello: api.Hello) -> None:
        """Until it is done, or the connection has been replaced by another one."""
        while self._engine.hub.connected().get(hello.worker) == hello:
            try:
                await self._register(hello)
                under_way = await self._compare(hello.worker, anew=True)
            except GreenroomError as error:
                log.warning("worker not welcomed, tries again", worker=hello.worker, error=error.message)
                await asyncio.sleep(self._engine.config.retry_s)
                continue
            self.arrival.set()
            self.arrival = asyncio.Event()
            self._engine.slot_freed(probe=True)
            # An operation that had its answer before the worker went away does not notice what went with it.
            self._engine.spawn(self._compare_after(under_way, hello.worker), f"compare-{hello.worker}")
            self._engine.spawn(self._unpublish(hello.worker), f"unpublish-{hello.worker}")
            await self._engine.preparer.prewarm(hello)
            return

    async def _register(self, hello: api.Hello) -> None:
        now = self._engine.now()
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
            still = lambda: self._engine.hub.connected().get(hello.worker) == hello  # noqa: E731
            await self._change_worker(hello.worker, still, state=WorkerState.ACTIVE, **said)

    async def _change_worker(self, name: str, still: Callable[[], bool], **fields: Any) -> None:
        """Writes fields of a worker's record, as long as they are true (``still``)."""

        async def write() -> None:
            worker = await self._store.get(Worker, name)
            draining = worker.state is WorkerState.DRAINING and fields.get("state") is WorkerState.ACTIVE
            new = replace(worker, **fields | ({"state": worker.state} if draining else {}))
            if still():
                await self._store.put(new)

        for _ in range(WRITE_ATTEMPTS):
            try:
                return await self._ops.steadily(write)
            except Conflict:
                continue
            except NotFound:
                return
        raise Conflict(f"worker {name} keeps changing")

    def _missing(self, worker: str) -> None:
        """A worker is away; however often it goes, one task waits for it."""
        waiting = worker in self._away
        self._away[worker] = clock.monotonic()
        if not waiting:
            self._engine.spawn(self._expect(worker), f"expect-{worker}")

    async def _expect(self, worker: str) -> None:
        """Waits for a worker that is away; when it does not come, its actors are lost."""
        try:
            marked = 0.0
            while worker not in self._engine.hub.connected():
                since = self._away[worker]
                if since != marked:
                    await self._insist(lambda: self._mark_away(worker))
                    marked = since
                elif clock.monotonic() < since + self._engine.config.worker_return_s:
                    await self.wait_for_worker(worker, since + self._engine.config.worker_return_s)
                else:
                    await self._insist(lambda: self._abandon(worker))
                    return
        finally:
            del self._away[worker]

    async def _mark_away(self, worker: str) -> None:
        await self._change_worker(
            worker,
            lambda: worker not in self._engine.hub.connected(),
            state=WorkerState.DISCONNECTED,
            last_seen=self._engine.now(),
        )

    async def _abandon(self, worker: str) -> None:
        """A worker that did not come back. What an operation holds there is that operation's to settle, and looked at
        again by the next `_sweep`."""
        for actor in await self._all(Actor, worker=worker):
            if worker in self._engine.hub.connected():
                return
            await self._crash(actor, actor.generation, "WorkerLost", f"worker {worker} went away and did not come back")

    async def wait_for_worker(self, worker: str, until: float) -> bool:
        """Whether the worker is connected, waiting for it until ``until`` (monotonic seconds)."""
        while worker not in self._engine.hub.connected():
            try:
                async with asyncio.timeout(until - clock.monotonic()):
                    await self.arrival.wait()
            except TimeoutError:
                break
        return worker in self._engine.hub.connected()

    async def rejoin(self, key: Key) -> None:
        """An actor that is RUNNING and that nobody can reach yet: waits for its worker and asks it.

        Raises:
            Unavailable: the worker is away (reason ``WORKER_DISCONNECTED``).
        """
        actor = await self._ops.read(Actor, str(key))
        if actor.state is not ActorState.RUNNING:
            return
        if not await self.wait_for_worker(actor.worker, clock.monotonic() + self._engine.config.worker_return_s):
            raise Unavailable(
                f"actor {key} runs on worker {actor.worker}, which is away; it counts as lost if it does not come back",
                reason="WORKER_DISCONNECTED",
            )
        await self._compare(actor.worker)

    # --- what runs and what should ------------------------------------------------------------------------

    async def _compare(self, worker: str, *, anew: bool = False) -> list[str]:
        """Settles every difference between what runs on a worker and what should. One at a time per worker; who comes
        meanwhile joins it, or (``anew``) waits for its end and begins another. Returns the operations that held an
        actor there."""
        task = self._comparing.get(worker)
        while task is not None and anew:
            await asyncio.wait({task})
            task = self._comparing.get(worker)
        if task is None:
            task = self._ops.spawn(self._settle(worker), f"settle-{worker}")
            self._comparing[worker] = task
            task.add_done_callback(lambda _: self._comparing.pop(worker))
        return await self._ops.attend(task)

    async def _compare_after(self, operations: Collection[str], worker: str) -> None:
        for operation_id in operations:
            await self._ops.ended(operation_id)
        if operations and worker in self._engine.hub.connected():
            await self._compare(worker, anew=True)

    async def _settle(self, worker: str) -> list[str]:
        # First what should run and then what does: what begins in between is seen on the worker, and is no stray by the
        # record that is read again; what ends in between has a newer generation than the record that was read.
        actors = await self._all(Actor, worker=worker)
        residents = await self._residents(worker)
        under_way: list[str] = []
        for actor in actors:
            resident = residents.pop(actor.uid, None)
            if actor.state in BUSY:
                under_way.append(actor.operation)  # it asks the worker itself
            else:
                await self._one(str(actor.key), self._confirm(actor, resident))
        for resident in residents.values():
            await self._one(f"{resident.namespace}/{resident.name}", self._discard_stray(worker, resident))
        return [operation for operation in under_way if operation]

    async def _residents(self, worker: str) -> dict[str, api.Resident]:
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                said = await self._engine.hub.call(worker, api.ListResident())
        except TimeoutError:
            raise Unavailable(f"worker {worker} did not say within {LIST_TIMEOUT_S:g} s what runs on it") from None
        assert isinstance(said, api.Residents)
        return {r.actor_uid: r for r in said.residents}

    async def _one(self, actor: str, work: Awaitable[None]) -> None:
        """One actor that can't be settled now does not keep the others from it; the next sweep tries it again."""
        try:
            await work
        except GreenroomError as error:
            log.warning("actor not settled, tries again", actor=actor, error=error.message)

    async def _confirm(self, actor: Actor, resident: api.Resident | None) -> None:
        if resident is None or resident.endpoint is None:
            text = f"its sandbox was no longer there when worker {actor.worker} was asked"
            await self._crash(actor, actor.generation, "SandboxLost", text)
        else:
            await self._reunite(actor, resident)

    async def _reunite(self, actor: Actor, resident: api.Resident) -> None:
        """An actor that is there: its sandbox is put into the state that the record says, and it is bound."""
        ids: dict[str, Any] = {
            "operation_id": f"reunite-{actor.uid}-{actor.generation}",
            "actor_uid": actor.uid,
            "generation": actor.generation,
        }
        frozen = resident.state is api.ResidentState.FROZEN
        bound = self._engine.bindings.peek(actor.key)
        try:
            if actor.state is ActorState.PAUSED:
                if not frozen:
                    await self._engine.hub.call(actor.worker, api.Freeze(**ids))
                return
            if frozen:
                await self._engine.hub.call(actor.worker, api.Thaw(**ids))
            elif bound is not None and (bound.uid, bound.generation) == (actor.uid, actor.generation):
                return
        except LeaseLost:
            return  # an operation has begun meanwhile
        template = await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
        current = await self._ops.read(Actor, str(actor.key))
        same = (current.uid, current.generation, current.state) == (actor.uid, actor.generation, ActorState.RUNNING)
        # Nothing is awaited between this look and the binding, so an operation that begins revokes it again.
        if same and not self._ops.busy(actor.uid):
            self._engine.drivers.bind(replace(current, endpoint=resident.endpoint), template)
            log.info("actor goes on running", actor=str(actor.key), worker=actor.worker)

    async def _discard_stray(self, worker: str, resident: api.Resident) -> None:
        """A sandbox that no record speaks of. The worker refuses, by generation, if that has changed."""
        try:
            actor = await self._ops.read(Actor, f"{resident.namespace}/{resident.name}")
            if actor.uid == resident.actor_uid and actor.worker == worker:
                return
        except NotFound:
            pass
        log.info("discards a sandbox that no record speaks of", worker=worker, actor=resident.name)
        call = api.Discard(
            operation_id=f"stray-{resident.actor_uid}-{resident.generation}",
            actor_uid=resident.actor_uid,
            generation=resident.generation,
        )
        try:
            await self._engine.hub.call(worker, call)
        except LeaseLost:
            pass  # it has been taken over meanwhile, and is none any more

    async def _exited(self, worker: str, event: api.SandboxExited) -> None:
        """A sandbox has ended by itself. An operation that holds the actor just now may have had its answer before
        that; so the actor is looked at again when it has ended."""
        while operation := await self._insist(lambda: self._record_exit(worker, event)):
            await self._ops.ended(operation)
            await asyncio.sleep(self._engine.config.retry_s)  # its driver may have given up; until it has a new one

    async def _record_exit(self, worker: str, event: api.SandboxExited) -> str:
        """Returns the operation that has to end first; "" when the exit is recorded, or does not matter any more."""
        last = f"; its last lines:\n{event.last_lines}" if event.last_lines else ""
        for actor in await self._all(Actor, uid=event.actor_uid):
            if actor.worker == worker and actor.state in BUSY:
                return actor.operation
            if actor.worker == worker:
                message = f"its process ended with status {event.code}{last}"
                await self._crash(actor, event.generation, "Exited", message)
        return ""

    async def _crash(self, actor: Actor, generation: int, reason: str, message: str) -> None:
        """Records that the incarnation of that generation, or an older one, is gone; a newer one is left alone."""
        change = await self._ops.commit(
            Crash(
                operation_id=self._engine.new_id(),
                key=actor.key,
                now=self._engine.now(),
                uid=actor.uid,
                worker=actor.worker,
                generation=generation,
                reason=reason,
                message=message,
            )
        )
        current = change.actor
        if change.outcome is Outcome.CHANGED:
            log.warning("actor crashed", actor=str(actor.key), reason=reason)
            self._engine.slot_freed()
        if current is not None and current.state is ActorState.CRASHED:
            self._engine.bindings.revoke(actor.key)

    # --- loops --------------------------------------------------------------------------------------------

    async def lease_loop(self) -> None:
        """Renews the lease of every operation that runs here, every third of its life; stops those that lost it."""
        config = self._engine.config
        while True:
            await asyncio.sleep(config.lease_ttl_s / 3)
            for running in list(self._ops.running.values()):
                operation = running.operation
                if operation.kind is OperationKind.PREPARE:
                    continue  # holds no actor; the hidden actor's own operations do
                try:
                    await self._store.apply(
                        RenewLease(
                            key=operation.key,
                            now=self._engine.now(),
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
                except Exception as error:
                    log.warning("lease not renewed, tries again", operation=operation.id, exc_info=_bug(error))

    async def janitor_loop(self) -> None:
        """Goes on with operations that nobody runs, and removes what is condemned."""
        while True:
            await asyncio.sleep(self._engine.config.janitor_s)
            try:
                await self._take_up_operations(force=False)
                await self._remove_condemned()
                await self._store.trim()
            except Exception as error:  # whatever it is, the next round must come
                log.warning("janitor tries again", error=str(error), exc_info=_bug(error))

    async def reconcile_loop(self) -> None:
        """Finds what no message told: a sandbox that ended unheard, one that could not be ended, a worker that went."""
        while True:
            await asyncio.sleep(self._engine.config.reconcile_s)
            try:
                await self._sweep()
            except Exception as error:
                log.warning("sweep tries again", error=str(error), exc_info=_bug(error))

    async def _sweep(self) -> None:
        connected = self._engine.hub.connected()
        for worker in await self._all(Worker):
            try:
                if worker.name in connected:
                    await self._compare(worker.name)
                elif worker.name not in self._away:
                    await self._abandon(worker.name)
            except GreenroomError as error:
                log.warning("worker not compared, tries again", worker=worker.name, error=error.message)

    async def _remove_condemned(self) -> None:
        for snapshot in await self._all(Snapshot, state=SnapshotState.CONDEMNED):
            try:
                await self._engine.snapshots.delete(snapshot.id)
                await self._store.remove(snapshot)
            except GreenroomError as error:
                log.warning("snapshot not removed, tries again", snapshot=snapshot.id, error=error.message)

    async def _unpublish(self, worker: str) -> None:
        """A worker may have published the snapshot of a suspend after that had failed for its absence."""
        since = self._engine.now() - UNPUBLISH_WITHIN_S
        for operation in await self._all(Operation, kind=OperationKind.SUSPEND, state=OperationState.FAILED):
            if operation.worker == worker and operation.updated_at >= since:
                await self._engine.snapshots.delete(operation.snapshot)

    # --- parts --------------------------------------------------------------------------------------------

    async def _all(self, cls: type[R], **where: str) -> list[R]:
        """All pages of a list."""

        async def pages() -> list[R]:
            found: list[R] = []
            while page := await self._store.list(cls, where=where, after=found[-1].pk if found else ""):
                found += page
            return found

        return await self._ops.steadily(pages)

    async def _insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does what nobody else would do, until the store lets it."""
        while True:
            try:
                return await work()
            except (Unavailable, ResourceExhausted) as error:
                if self._ops.closed:
                    raise closing() from error
                log.warning("tries again", error=error.message)
            await asyncio.sleep(self._engine.config.retry_s)


def _bug(error: Exception) -> Exception | None:
    """An error that nobody raised on purpose is logged with its traceback."""
    return None if isinstance(error, GreenroomError) else error
