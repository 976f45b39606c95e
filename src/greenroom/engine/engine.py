"""The control plane's engine: what the doors call, and the operations that run behind.

An operation is a row first and a task second. The task (`greenroom.engine.drivers`) does the work; callers wait for the
row (`greenroom.engine.operations`), and a caller that goes away stops nothing. When this process dies the row is left,
and `Recovery` (at start, and the janitor later) drives it on or back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core import names
from greenroom.core.agentapi import ActorStats, Entrance
from greenroom.core.commands import (
    BeginDelete,
    BeginPause,
    BeginSuspend,
    Change,
    CreateActor,
    Outcome,
    ReleaseLease,
    RequestCancel,
    TagSnapshot,
)
from greenroom.core.demand import Demand
from greenroom.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    InvalidArgument,
    LeaseHeld,
    NotFound,
    Unavailable,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Operation,
    OperationKind,
    OperationState,
    Pool,
    PoolSpec,
    Snapshot,
    Template,
    TemplateSpec,
    Worker,
)
from greenroom.core.rosters import Roster
from greenroom.core.states import BOUND
from greenroom.engine import clock
from greenroom.engine.belongings import Belongings
from greenroom.engine.bindings import Binding, BindingTable, Wake
from greenroom.engine.census import Census
from greenroom.engine.collection import Collection
from greenroom.engine.config import EngineConfig
from greenroom.engine.decommission import Decommission, Farewell
from greenroom.engine.demand import Demands
from greenroom.engine.drivers import Drivers
from greenroom.engine.follower import Follower
from greenroom.engine.garbage import Garbage
from greenroom.engine.images import Images
from greenroom.engine.inventories import Inventories
from greenroom.engine.members import ASKED, Members
from greenroom.engine.operations import Operations
from greenroom.engine.phases import Phases
from greenroom.engine.port import DEFAULT_WAIT_S, ExecStream
from greenroom.engine.preparations import Preparations
from greenroom.engine.pulls import Pulls
from greenroom.engine.reconciler import Reconciler
from greenroom.engine.recovery import Recovery
from greenroom.engine.removals import Removals
from greenroom.engine.replicas import Replicas
from greenroom.engine.rosters import Rosters
from greenroom.engine.streams import RemoteExec, merged_logs
from greenroom.engine.templates import Preparer
from greenroom.engine.trust import Trust
from greenroom.engine.uploads import Uploads
from greenroom.engine.wakes import Wakes
from greenroom.engine.workers import WorkerHub
from greenroom.snapshots.port import SnapshotStore
from greenroom.store.port import Store

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Engine:
    """See `greenroom.engine.port.ControlPlane`. All methods belong to one event loop."""

    def __init__(self, store: Store, hub: WorkerHub, snapshots: SnapshotStore, config: EngineConfig) -> None:
        self.store = store
        self.snapshots = snapshots
        self.hub = hub
        self.config = config
        self.bindings = BindingTable(lambda worker: self.census.is_trusted(worker))
        self.removals = Removals(self)
        self.ops = Operations(self)
        self.drivers = Drivers(self)
        self.wakes = Wakes(self)
        self.preparations = Preparations(self)
        self.pulls = Pulls(self)
        self.preparer = Preparer(self)
        self.images = Images(self)
        self.trust = Trust(self)
        self.uploads = Uploads(self)
        self.members = Members(self)
        self.rosters = Rosters(self)
        self.pools_asked = Demands(self)
        self.census = Census(self)
        self.inventories = Inventories(self)
        self.reconciler = Reconciler(self)
        self.decommission = Decommission(self)
        self.recovery = Recovery(self)
        self.collection = Collection(self)
        self.garbage = Garbage(self)
        self.belongings = Belongings(self)
        self.replicas = Replicas(self)
        self.follower = Follower(self)
        hub.listener = self.census

    async def start(self) -> None:
        """Takes up what an earlier process left and starts the background loops. When the store does not answer, that
        is done as soon as it does."""
        with contextlib.suppress(Unavailable):
            await self.replicas.check_name()
        await self.belongings.check()
        self.spawn(self.follower.loop(), "follower")
        self.spawn(self.replicas.loop(), "replicas-loop")
        try:
            await self.recovery.adopt_operations()
        except Unavailable as error:
            log.warning("starts without the store, goes on when it answers", error=error.message)
            self.spawn(self._adopt_later(), "adopt")
        self.spawn(self._idle_loop(), "idle-loop")
        self.spawn(self.census.heard_loop(), "heard-loop")
        self.spawn(self.recovery.loop(), "recovery-loop")
        self.spawn(self.recovery.janitor_loop(), "janitor-loop")
        self.collection.start()
        self.spawn(self.census.reconcile_loop(), "reconcile-loop")

    async def _adopt_later(self) -> None:
        while True:
            await asyncio.sleep(self.config.retry_s)
            try:
                await self.recovery.adopt_operations()
                return
            except Unavailable:
                continue

    def reachable(self) -> tuple[str, ...] | None:
        """The workers that this process can talk to; None when it is the only one: then it waits for the others."""
        return None if self.config.exclusive else tuple(self.members.enrolled())

    async def close(self) -> None:
        """Stops at once; what is under way stays behind as rows, for the next start. Who waits for it gets
        `Unavailable` (reason ``SHUTTING_DOWN``)."""
        left = [running.operation for running in self.ops.running.values()]
        await self.ops.close()
        if not self.config.exclusive:
            await self._release(left)

    async def _release(self, operations: Sequence[Operation]) -> None:
        """Others need not wait until these leases run out."""
        for operation in operations:
            if operation.kind is OperationKind.PREPARE:
                continue
            release = ReleaseLease(
                key=operation.key,
                now=self.now(),
                operation_id=operation.id,
                generation=operation.generation,
                owner=self.config.owner,
            )
            try:
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    await self.store.apply(release)
            except (GreenroomError, TimeoutError) as error:  # they run out, then
                log.info("leases not released", operation=operation.id, error=str(error))
                return

    def now(self) -> float:
        """Seconds since the epoch, as all who share the store see it."""
        return self.store.clock()

    def new_id(self) -> str:
        """See `clock.make_id`."""
        return clock.make_id(self.now(), self.config.randbits(74))

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A background task that `close` ends; a failure is logged, never lost."""
        return self.ops.spawn(work, name)

    async def wake(self, key: Key) -> Wake:
        return await self.wakes.wake(key)

    async def is_over(self, binding: Binding) -> bool:
        return await self.follower.is_over(binding)

    async def entrance(self, binding: Binding) -> Entrance | None:
        here = self.config.place
        if not here:
            return None
        door = await self.census.door(binding.worker)
        if door.place in ("", here):
            return None
        if door.entrance is None:
            raise Unavailable(
                f"worker {binding.worker} is on another machine, and lets nobody in to its actors: start its agent "
                "with --serve HOST:PORT",
                reason="NO_ENTRANCE",
            )
        return door.entrance

    def slot_freed(self, *, probe: bool = False) -> None:
        """Some slot of some pool is free; with ``probe`` none or many may be: a worker has come."""
        self.wakes.slot_freed(probe=probe)

    def actor_idle(self) -> None:
        """Some actor may be suspended to make room."""
        self.wakes.actor_idle()

    # --- mutations ----------------------------------------------------------------------------------------

    async def create_actor(
        self,
        key: Key,
        template: str,
        *,
        labels: Mapping[str, str] | None = None,
        worker_selector: Mapping[str, str] | None = None,
        request_id: str = "",
        golden: bool = False,
    ) -> tuple[Actor, Operation]:
        if not golden:
            names.check_label("namespace", key.namespace)
            names.check_actor_name(key.name)
        change = await self.ops.commit(
            CreateActor(
                key=key,
                now=self.now(),
                operation_id=self.new_id(),
                uid=self.new_id(),
                template=template,
                request_id=request_id,
                request_digest=_digest(template, labels, worker_selector) if request_id else "",
                labels=dict(labels or {}),
                worker_selector=dict(worker_selector or {}),
                golden=golden,
            )
        )
        if change.actor is None or change.operation is None:
            raise NotFound(
                f"actor {key} was created by request {request_id} and deleted since", reason="ACTOR_NOT_FOUND"
            )
        return change.actor, change.operation

    async def resume(
        self,
        key: Key,
        *,
        request_id: str = "",
        wait_s: float = DEFAULT_WAIT_S,
        cause: str = "api",
        snapshot_id: str = "",
    ) -> Operation:
        resuming = self.spawn(self._resume(key, request_id, cause, snapshot_id), f"resume-{key}")
        return await self._wait_task(resuming, key, wait_s)

    async def _resume(self, key: Key, request_id: str, cause: str, snapshot_id: str) -> Operation:
        # Who asks for an actor that has not crashed has not agreed to lose what it may lose before its turn comes.
        crashed = (await self.ops.read(Actor, str(key))).state is ActorState.CRASHED
        return await self.wakes.resume(key, request_id, cause, crashed, snapshot_id)

    async def suspend(
        self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S, cause: str = "api"
    ) -> Operation:
        return await self._wait_task(self._asked(BeginSuspend, key, request_id, cause), key, wait_s)

    async def pause(self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S) -> Operation:
        return await self._wait_task(self._asked(BeginPause, key, request_id, "api"), key, wait_s)

    async def delete(
        self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S, cause: str = "api"
    ) -> Operation:
        return await self._wait_task(self._asked(BeginDelete, key, request_id, cause), key, wait_s)

    def _asked(
        self, kind: type[BeginSuspend | BeginPause | BeginDelete], key: Key, request_id: str, cause: str
    ) -> asyncio.Task[Operation]:
        return self.spawn(self.transition(kind, key, request_id, cause), f"{kind.__name__}-{key}")

    async def transition(
        self, kind: type[BeginSuspend | BeginPause | BeginDelete], key: Key, request_id: str, cause: str
    ) -> Operation:
        """Begins a suspend, pause or delete as soon as no other operation holds the actor, and waits for its end."""
        # Requests in flight get a moment to end when a person asked; makers of room only pick actors without any.
        grace_s = self.config.drain_grace_s if cause in ("api", "shutdown", "drain", "template") else 0.0
        binding = self.bindings.drain(key)
        phases = Phases()
        try:
            if binding is not None and grace_s:
                await binding.wait_idle(grace_s)
                phases.end("drain")
            while True:
                try:
                    change = await self._begin(kind, key, request_id, cause, phases)
                    break
                except LeaseHeld as held:
                    if kind is BeginDelete:  # whatever is being done to it is not wanted any more
                        with contextlib.suppress(NotFound):  # it has ended meanwhile, so long ago that it is forgotten
                            await self.cancel_operation(held.metadata["operation"])
                    await self.ops.ended(held.metadata["operation"])
                    phases.end("turn")
            if change.outcome is Outcome.CHANGED:
                self.bindings.revoke(key)
        finally:
            self.bindings.undrain(key)
        if change.operation is None:
            return self.without_work(change)
        return await self.ops.outcome(change.operation)

    async def _begin(
        self,
        kind: type[BeginSuspend | BeginPause | BeginDelete],
        key: Key,
        request_id: str,
        cause: str,
        phases: Phases,
    ) -> Change:
        fields: dict[str, Any] = {"snapshot_id": self.new_id()} if kind is BeginSuspend else {}
        command = kind(
            key=key,
            now=self.now(),
            operation_id=self.new_id(),
            owner=self.config.owner,
            request_id=request_id,
            cause=cause,
            lease_ttl_s=self.config.lease_ttl_s,
            deadline_s=self.config.deadline_s(kind.kind),
            **fields,
        )
        driver = {
            BeginSuspend: self.drivers.suspend,
            BeginPause: self.drivers.pause,
            BeginDelete: self.drivers.delete,
        }[kind]

        async def drive(change: Change) -> Operation:
            phases.end("begin")
            return await driver(change, phases)

        return await self.ops.begin(command, drive)

    def without_work(self, change: Change) -> Operation:
        """What to show when nothing had to be done: the earlier operation, or one that says that it is so already."""
        if change.operation is not None:
            return change.operation
        assert change.actor is not None
        actor, now = change.actor, self.now()
        return Operation(
            id="",
            kind=_KIND_OF[actor.state],
            namespace=actor.namespace,
            name=actor.name,
            uid=actor.uid,
            created_at=now,
            updated_at=now,
            deadline_at=now,
            finished_at=now,
            state=OperationState.DONE,
            cause="already",
            worker=actor.worker,
        )

    # --- waiting ------------------------------------------------------------------------------------------

    async def _wait_task(self, task: asyncio.Task[Operation], key: Key, wait_s: float) -> Operation:
        done, _ = await asyncio.wait({task}, timeout=wait_s)
        if done:
            return await self.ops.attend(task)
        actor = await self.store.get(Actor, str(key))
        if actor.operation:
            return await self.store.get(Operation, actor.operation)
        raise DeadlineExceeded(
            f"actor {key}: not begun within {wait_s:g} s, still waiting for its turn; it goes on by itself",
            reason="STILL_WAITING",
        )

    async def wait_operation(self, operation_id: str, wait_s: float = DEFAULT_WAIT_S) -> Operation:
        operation = await self.store.get(Operation, operation_id)
        if operation.state is not OperationState.RUNNING:
            return operation
        waiting = self.spawn(self.ops.ended(operation_id), f"wait-{operation_id}")
        try:
            async with asyncio.timeout(wait_s):
                await self.ops.attend(waiting)
        except TimeoutError:
            pass
        finally:
            waiting.cancel()
        return await self.store.get(Operation, operation_id)

    async def cancel_operation(self, operation_id: str) -> Operation:
        operation = await self.store.get(Operation, operation_id)
        if operation.kind is OperationKind.PREPARE:
            return await self.preparations.cancel(operation)
        command = RequestCancel(key=operation.key, now=self.now(), operation_id=operation_id)
        change = await self.ops.commit(command)
        assert change.operation is not None
        if (running := self.ops.running.get(operation_id)) is not None:
            running.request_cancel()
        return change.operation

    # --- workers ------------------------------------------------------------------------------------------

    async def drain_worker(self, name: str, *, undo: bool = False) -> Worker:
        await self.store.get(Worker, name)
        written = await self.members.cordon(name, "" if undo else ASKED)
        if written is None:
            raise NotFound(f"worker {name} does not exist any more", reason="WORKER_NOT_FOUND")
        if not undo:
            self.census.empty(name)
        return written

    async def retire_worker(self, name: str) -> Worker:
        return await self.decommission.retire(name)

    async def forget_worker(self, name: str, *, accept_loss: bool = False) -> Farewell:
        return await self.ops.attend(
            self.spawn(self.decommission.forget(name, accept_loss=accept_loss), f"forget-{name}")
        )

    async def acknowledge_worker(self, name: str) -> Worker:
        return await self.decommission.acknowledge(name)

    # --- snapshots ----------------------------------------------------------------------------------------

    async def tag_snapshot(self, snapshot_id: str, tag: str, *, undo: bool = False) -> Snapshot:
        snapshot = await self.store.get(Snapshot, snapshot_id)
        key = Key(snapshot.namespace, snapshot.actor)
        change = await self.ops.commit(
            TagSnapshot(key=key, now=self.now(), snapshot_id=snapshot_id, tag=tag, undo=undo)
        )
        assert change.source is not None
        return change.source

    # --- templates and pools ------------------------------------------------------------------------------

    async def apply_template(
        self, key: Key, spec: TemplateSpec, *, request_id: str = ""
    ) -> tuple[Template, Operation | None]:
        names.check_label("namespace", key.namespace)
        names.check_label("template", key.name)
        return await self.preparer.apply(key, spec, request_id)

    async def delete_template(self, key: Key) -> None:
        await self.ops.attend(self.spawn(self.preparer.delete(key), f"delete-template-{key}"))

    async def apply_pool(self, name: str, spec: PoolSpec) -> Pool:
        names.check_label("pool", name)
        if not 0 <= spec.replicas <= MAX_REPLICAS:
            raise InvalidArgument(f"pool {name}: replicas must be 0 to {MAX_REPLICAS}, not {spec.replicas}")
        if not 1 <= spec.slots <= MAX_SLOTS:
            raise InvalidArgument(f"pool {name}: slots must be 1 to {MAX_SLOTS}, not {spec.slots}")
        try:
            pool = await self.store.get(Pool, name)
        except NotFound:
            return await self.store.put(Pool(name=name, uid=self.new_id(), spec=spec, created_at=self.now()))
        if pool.spec == spec:
            return pool
        if pool.spec.backend != spec.backend:
            raise FailedPrecondition(
                f"pool {name} has backend {pool.spec.backend!r}, which can't change to {spec.backend!r}; "
                "make another pool, or use another data directory",
                reason="POOL_IMMUTABLE",
            )
        return await self.store.put(replace(pool, spec=spec))

    async def delete_pool(self, name: str) -> None:
        pool = await self.store.get(Pool, name)
        after = ""
        while page := await self.store.list(Template, after=after):
            for template in page:
                if template.spec.pool == name:
                    raise FailedPrecondition(
                        f"pool {name} is used by template {template.key}; delete that first", reason="POOL_IN_USE"
                    )
            after = page[-1].pk
        await self.store.remove(pool)

    async def admit_workers(self, roster: Roster) -> tuple[Roster, list[str]]:
        return await self.ops.attend(self.spawn(self.rosters.admit(roster), f"admit-{roster.pool}"))

    async def demand(self, pool: str) -> Demand:
        return await self.pools_asked.of(pool)

    async def demands(self) -> list[Demand]:
        return await self.pools_asked.all()

    def wakes_here(self) -> Mapping[str, int]:
        return self.pools_asked.wakes

    # --- streams ------------------------------------------------------------------------------------------

    async def exec(
        self,
        key: Key,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout_s: float = 0,
    ) -> ExecStream:
        if not argv:
            raise InvalidArgument("exec needs a command")
        wake = await self.wake(key)
        call = api.Exec(actor_uid=wake.binding.uid, argv=tuple(argv), env=dict(env or {}), cwd=cwd, timeout_s=timeout_s)
        wake.binding.acquire()  # an actor that runs somebody's command is not idle
        try:
            return RemoteExec(self.hub.open(wake.binding.worker, call), wake.binding)
        except BaseException:
            wake.binding.release()
            raise

    async def logs(self, key: Key, *, tail_lines: int = -1, follow: bool = False) -> AsyncIterator[bytes]:
        actor = await self.store.get(Actor, str(key))
        async for chunk in merged_logs(self.hub, actor, tail_lines, follow):
            yield chunk

    async def stats(self, key: Key) -> ActorStats:
        actor = await self.store.get(Actor, str(key))
        if actor.state not in (ActorState.RUNNING, ActorState.PAUSED):
            raise FailedPrecondition(
                f"actor {key} is {actor.state}; only a running one uses anything", reason="WRONG_STATE"
            )
        answer = await self.hub.call(actor.worker, api.Stats(actor_uid=actor.uid))
        assert isinstance(answer, ActorStats)
        return answer

    # --- idleness -----------------------------------------------------------------------------------------

    async def _idle_loop(self) -> None:
        while True:
            await asyncio.sleep(self.config.idle_scan_s)
            now = clock.monotonic()
            for binding in self.bindings.longest_idle():
                due = binding.idle_timeout_s > 0 and now - binding.last_used >= binding.idle_timeout_s
                if due and not self.wakes.being_woken(binding.key):
                    self.bindings.drain(binding.key)
                    self._asked(BeginSuspend, binding.key, "", "idle")
            self.wakes.look_again()

    async def suspend_all(self, workers: Sequence[str] | None = None, *, cause: str = "shutdown") -> list[Operation]:
        """Suspends every actor that has a slot (on the given workers), after the operation that holds it, if one does;
        for a clean stop and for draining."""
        keys: list[Key] = []
        for state in sorted(BOUND):
            after = ""
            while page := await self.store.list(Actor, where={"state": state}, after=after):
                keys += [a.key for a in page if workers is None or a.worker in workers]
                after = page[-1].pk
        turns = asyncio.Semaphore(self.config.evictions * max(1, len(self.hub.connected())))

        async def one(key: Key) -> Operation:
            async with turns:
                return await self.suspend(key, cause=cause)

        results = await asyncio.gather(*map(one, keys), return_exceptions=True)
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("could not suspend", actor=str(key), error=str(result))
        return [r for r in results if isinstance(r, Operation)]


#: How long the end of a process waits for the store, to release what it holds.
RELEASE_TIMEOUT_S = 2.0
#: Most workers of one pool on one machine, and most actors awake on one worker: what its memory could ever hold.
MAX_REPLICAS = 64
MAX_SLOTS = 10_000

_KIND_OF = {
    ActorState.RUNNING: OperationKind.RESUME,
    ActorState.SUSPENDED: OperationKind.SUSPEND,
    ActorState.PAUSED: OperationKind.PAUSE,
}


def _digest(*arguments: object) -> str:
    """Of what was asked for, to tell a repeated request from another one with the same id."""
    return hashlib.sha256(msgspec.json.encode(arguments, order="deterministic")).hexdigest()[:32]
