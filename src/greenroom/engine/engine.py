"""The control plane's engine: what the doors call, and the operations that run behind.

An operation is a row first and a task second. The task (`greenroom.engine.drivers`) does the work; callers wait for the
task, and a caller that goes away stops nothing. When this process dies the row is left, and `Recovery` (at start, and
the janitor later) drives it on or back.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core import names
from greenroom.core.agentapi import ActorStats
from greenroom.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    InvalidArgument,
    LeaseHeld,
    NotFound,
    ResourceExhausted,
    rebuild,
)
from greenroom.core.lifecycle import (
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Change,
    CreateActor,
    Outcome,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Failure,
    Key,
    Operation,
    OperationKind,
    OperationState,
    Pool,
    PoolSpec,
    Template,
    TemplateSpec,
)
from greenroom.engine.bindings import Binding, BindingTable, Wake
from greenroom.engine.capacity import CapacityQueue
from greenroom.engine.config import EngineConfig
from greenroom.engine.drivers import Drivers, Phases
from greenroom.engine.port import DEFAULT_WAIT_S, ExecStream
from greenroom.engine.recovery import Recovery
from greenroom.engine.streams import RemoteExec, merged_logs
from greenroom.engine.templates import Preparer
from greenroom.engine.workers import WorkerHub
from greenroom.snapshots.port import SnapshotStore
from greenroom.store.port import Store

log = structlog.get_logger(__name__)


def new_id() -> str:
    """32 hex digits that sort by time of making (UUID version 7, RFC 9562), so lists of operations are in order."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | (0x7 << 76) | (secrets.randbits(12) << 64) | (0b10 << 62) | secrets.randbits(62)
    return f"{value:032x}"


@dataclass(frozen=True, slots=True)
class RunningOperation:
    """An operation whose driver runs in this process."""

    operation: Operation
    task: asyncio.Task[Operation]


@dataclass(slots=True)
class _Waking:
    """A wake-up under way and how many wait for it. While somebody does, the actor is not suspended to make room: it
    would be gone before its first request."""

    task: asyncio.Task[Operation]
    waiters: int = 0


class Engine:
    """See `greenroom.engine.port.ControlPlane`. All methods belong to one event loop."""

    def __init__(self, store: Store, hub: WorkerHub, snapshots: SnapshotStore, config: EngineConfig) -> None:
        self.store = store
        self.snapshots = snapshots
        self.hub = hub
        self.config = config
        self.bindings = BindingTable()
        self._waking: dict[Key, _Waking] = {}
        #: Operations whose task runs in this process, by id.
        self.running: dict[str, RunningOperation] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._queues: dict[str, CapacityQueue] = {}
        self.drivers = Drivers(self)
        self.preparer = Preparer(self)
        self.recovery = Recovery(self)
        hub.listener = self.recovery

    async def start(self) -> None:
        """Takes up what an earlier process left and starts the background loops."""
        await self.recovery.adopt_operations()
        self.spawn(self._idle_loop(), "idle-loop")
        self.spawn(self.recovery.lease_loop(), "lease-loop")
        self.spawn(self.recovery.janitor_loop(), "janitor-loop")

    async def close(self) -> None:
        """Stops at once; what is under way stays behind as rows, for the next start."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A background task that `close` ends; a failure is logged, never lost."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_done)
        return task

    def _spawned_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            if isinstance(error, GreenroomError):  # whoever waits for it gets it; nobody has to
                log.debug("refused", task=task.get_name(), error=error.message)
            else:
                log.error("work failed", task=task.get_name(), exc_info=error)

    def track(self, operation: Operation, work: Coroutine[Any, Any, Operation]) -> asyncio.Task[Operation]:
        """Runs an operation's driver as a task that outlives its callers."""
        task = self.spawn(work, f"operation-{operation.id}")
        self.running[operation.id] = RunningOperation(operation, task)
        task.add_done_callback(lambda _: self.running.pop(operation.id, None))
        return task

    # --- wake ---------------------------------------------------------------------------------------------

    async def wake(self, key: Key) -> Wake:
        binding = self.bindings.get(key)
        if binding is not None:
            return Wake(binding)
        operation = await self._share(key, "request")
        if operation.state is OperationState.FAILED:
            raise failure_of(operation)
        binding = self.bindings.get(key)
        if binding is None:  # suspended or crashed again in the very next moment
            return await self.wake(key)
        return Wake(binding, operation.id, operation.phases)

    async def _share(self, key: Key, cause: str) -> Operation:
        """One wake-up for however many want it."""
        waking = self._waking.get(key)
        if waking is None:
            waking = _Waking(self.spawn(self._resume(key, "", cause), f"wake-{key}"))
            self._waking[key] = waking
            waking.task.add_done_callback(lambda _: self._waking.pop(key, None) if not self._waked(key) else None)
        waking.waiters += 1
        try:
            return await asyncio.shield(waking.task)
        finally:
            waking.waiters -= 1
            if waking.waiters == 0 and waking.task.done() and self._waking.get(key) is waking:
                del self._waking[key]
                # From now on the actor may be suspended to make room, unless the caller uses it at once.
                asyncio.get_running_loop().call_soon(self.actor_idle)

    def _waked(self, key: Key) -> bool:
        """Whether somebody has yet to take up a wake-up that has ended; the last one removes it."""
        return self._waking[key].waiters > 0 if key in self._waking else False

    async def _resume(self, key: Key, request_id: str, cause: str) -> Operation:
        """Begins a resume as soon as it can be begun, and drives it to its end."""
        until = asyncio.get_running_loop().time() + self.config.capacity_wait_s
        phases = Phases()
        waited = await self._wait_behind(key, until)
        while True:
            try:
                change = await self._begin_resume(key, request_id, cause)
                phases.end("bind")
                break
            except LeaseHeld as held:
                await self._wait_for(held.metadata["operation"])
                phases.end("turn")
            except ResourceExhausted as full:
                if full.reason != "NO_CAPACITY":
                    raise
                queue = self._queue((await self._template_of(key)).spec.pool)
                await queue.wait(again=waited, until=until)
                waited = True
                phases.end("capacity")
        if waited:
            self.slot_freed()  # there may be a second free slot; if not, the next one goes back to the front
        if change.outcome is Outcome.JOINED:
            assert change.operation is not None
            return await self._join(change.operation)
        if change.outcome is not Outcome.CHANGED:
            return self._without_work(change)
        assert change.operation is not None
        return await asyncio.shield(self.track(change.operation, self.drivers.resume(change, phases)))

    async def _begin_resume(self, key: Key, request_id: str, cause: str) -> Change:
        return await self.store.apply(
            BeginResume(
                key=key,
                now=time.time(),
                operation_id=new_id(),
                owner=self.config.owner,
                request_id=request_id,
                cause=cause,
                lease_ttl_s=self.config.lease_ttl_s,
                deadline_s=self.config.operation_deadline_s,
                hold_crashed=cause == "request",
            )
        )

    async def _wait_behind(self, key: Key, until: float) -> bool:
        """Lets those who wait for a slot in the same pool go first; True when there were any."""
        if not any(map(len, self._queues.values())):
            return False
        queue = self._queue((await self._template_of(key)).spec.pool)
        if not len(queue) or (await self.store.get(Actor, str(key))).state is ActorState.PAUSED:
            return False  # a paused actor has its slot
        await queue.wait(again=False, until=until)
        return True

    async def _template_of(self, key: Key) -> Template:
        actor = await self.store.get(Actor, str(key))
        return await self.store.get(Template, f"{key.namespace}/{actor.template}")

    def _queue(self, pool: str) -> CapacityQueue:
        if pool not in self._queues:
            self._queues[pool] = CapacityQueue(
                pool, self.config, lambda: self._evictable(pool), lambda b: self._evict(b)
            )
        return self._queues[pool]

    def _evictable(self, pool: str) -> list[Binding]:
        workers = [name for name, hello in self.hub.connected().items() if hello.pool == pool]
        return [b for b in self.bindings.longest_idle(workers) if b.key not in self._waking]

    def _evict(self, binding: Binding) -> Coroutine[Any, Any, None]:
        # Before anything is awaited the binding is marked, so nobody else picks it and no request slips in.
        self.bindings.drain(binding.key)

        async def suspend() -> None:
            operation = await self._transition(BeginSuspend, binding.key, "", "capacity")
            if operation.state is OperationState.FAILED:
                log.warning("could not make room", actor=str(binding.key), error=operation.error)

        return suspend()

    def slot_freed(self) -> None:
        """Some slot of some pool is free, or a worker has come."""
        for queue in self._queues.values():
            queue.slot_freed()

    def actor_idle(self) -> None:
        for queue in self._queues.values():
            queue.pump()

    # --- mutations ----------------------------------------------------------------------------------------

    async def create_actor(
        self,
        key: Key,
        template: str,
        *,
        labels: Mapping[str, str] | None = None,
        request_id: str = "",
        golden: bool = False,
    ) -> tuple[Actor, Operation]:
        if not golden:
            names.check_label("namespace", key.namespace)
            names.check_actor_name(key.name)
        change = await self.store.apply(
            CreateActor(
                key=key,
                now=time.time(),
                operation_id=new_id(),
                uid=uuid.uuid4().hex,
                template=template,
                request_id=request_id,
                labels=dict(labels or {}),
                golden=golden,
            )
        )
        if change.actor is None or change.operation is None:
            raise NotFound(
                f"actor {key} was created by request {request_id} and deleted since", reason="ACTOR_NOT_FOUND"
            )
        return change.actor, change.operation

    async def resume(
        self, key: Key, *, request_id: str = "", wait_s: float = DEFAULT_WAIT_S, cause: str = "api"
    ) -> Operation:
        task = self.spawn(self._resume(key, request_id, cause), f"resume-{key}")
        return await self._wait_task(task, key, wait_s)

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
        return self.spawn(self._transition(kind, key, request_id, cause), f"{kind.__name__}-{key}")

    async def _transition(
        self, kind: type[BeginSuspend | BeginPause | BeginDelete], key: Key, request_id: str, cause: str
    ) -> Operation:
        """Begins a suspend, pause or delete as soon as no other operation holds the actor, and drives it to its end."""
        # Requests in flight get a moment to end when a person asked; makers of room only pick actors without any.
        grace_s = self.config.drain_grace_s if cause in ("api", "shutdown", "template") else 0.0
        binding = self.bindings.drain(key)
        begun = False
        phases = Phases()
        try:
            if binding is not None and grace_s:
                await binding.wait_idle(grace_s)
                phases.end("drain")
            while True:
                fields: dict[str, Any] = {"snapshot_id": new_id()} if kind is BeginSuspend else {}
                try:
                    change = await self.store.apply(
                        kind(
                            key=key,
                            now=time.time(),
                            operation_id=new_id(),
                            owner=self.config.owner,
                            request_id=request_id,
                            cause=cause,
                            lease_ttl_s=self.config.lease_ttl_s,
                            deadline_s=self.config.operation_deadline_s,
                            **fields,
                        )
                    )
                    break
                except LeaseHeld as held:
                    await self._wait_for(held.metadata["operation"])
            if change.outcome is Outcome.JOINED:
                assert change.operation is not None
                return await self._join(change.operation)
            if change.outcome is not Outcome.CHANGED:
                return self._without_work(change)
            assert change.operation is not None
            begun = True
            phases.end("begin")
        finally:
            if not begun:
                self.bindings.undrain(key)
        self.bindings.revoke(key)
        work = {
            BeginSuspend: self.drivers.suspend,
            BeginPause: self.drivers.pause,
            BeginDelete: self.drivers.delete,
        }[kind]
        return await asyncio.shield(self.track(change.operation, work(change, phases)))

    def _without_work(self, change: Change) -> Operation:
        """What to show when nothing had to be done: the earlier operation, or one that says that it is so already."""
        if change.operation is not None:
            return change.operation
        assert change.actor is not None
        actor, now = change.actor, time.time()
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
            return await task
        actor = await self.store.get(Actor, str(key))
        if actor.operation:
            return await self.store.get(Operation, actor.operation)
        raise DeadlineExceeded(
            f"actor {key}: not begun within {wait_s:g} s, still waiting for its turn; it goes on by itself",
            reason="STILL_WAITING",
        )

    async def _join(self, operation: Operation) -> Operation:
        running = self.running.get(operation.id)
        if running is not None:
            return await asyncio.shield(running.task)
        return await self._watch_end(operation.id)

    async def _wait_for(self, operation_id: str) -> None:
        """Until an operation that holds the actor has ended, however it ends."""
        running = self.running.get(operation_id)
        if running is not None:
            await asyncio.wait({running.task})
        else:
            await self._watch_end(operation_id)

    async def _watch_end(self, operation_id: str) -> Operation:
        """For an operation that no task of this process runs (yet)."""
        events = self.store.watch()
        operation = await self.store.get(Operation, operation_id)
        if operation.state is not OperationState.RUNNING:
            return operation
        async for event in events:
            record = event.record
            if (
                isinstance(record, Operation)
                and record.id == operation_id
                and record.state is not OperationState.RUNNING
            ):
                return record
        raise NotFound(f"operation {operation_id} is gone")

    async def wait_operation(self, operation_id: str, wait_s: float = DEFAULT_WAIT_S) -> Operation:
        try:
            async with asyncio.timeout(wait_s):
                return await self._watch_end(operation_id)
        except TimeoutError:
            return await self.store.get(Operation, operation_id)

    # --- templates and pools ------------------------------------------------------------------------------

    async def apply_template(
        self, key: Key, spec: TemplateSpec, *, request_id: str = ""
    ) -> tuple[Template, Operation | None]:
        names.check_label("namespace", key.namespace)
        names.check_label("template", key.name)
        return await self.preparer.apply(key, spec, request_id)

    async def delete_template(self, key: Key) -> None:
        await self.preparer.delete(key)

    async def apply_pool(self, name: str, spec: PoolSpec) -> Pool:
        names.check_label("pool", name)
        if not 0 <= spec.replicas <= MAX_REPLICAS:
            raise InvalidArgument(f"pool {name}: replicas must be 0 to {MAX_REPLICAS}, not {spec.replicas}")
        if not 1 <= spec.slots <= MAX_SLOTS:
            raise InvalidArgument(f"pool {name}: slots must be 1 to {MAX_SLOTS}, not {spec.slots}")
        try:
            pool = await self.store.get(Pool, name)
        except NotFound:
            return await self.store.put(Pool(name=name, uid=uuid.uuid4().hex, spec=spec, created_at=time.time()))
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
            now = time.monotonic()
            for binding in self.bindings.longest_idle():
                due = binding.idle_timeout_s > 0 and now - binding.last_used >= binding.idle_timeout_s
                if due and binding.key not in self._waking:
                    self.bindings.drain(binding.key)
                    self._asked(BeginSuspend, binding.key, "", "idle")
            self.actor_idle()

    async def suspend_all(self, workers: Sequence[str] | None = None) -> list[Operation]:
        """Suspends every running or paused actor (of the given workers); for a clean stop and for draining."""
        keys: list[Key] = []
        for state in (ActorState.RUNNING, ActorState.PAUSED):
            after = ""
            while page := await self.store.list(Actor, where={"state": state}, after=after):
                keys += [a.key for a in page if workers is None or a.worker in workers]
                after = page[-1].pk
        results = await asyncio.gather(*(self.suspend(key, cause="shutdown") for key in keys), return_exceptions=True)
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("could not suspend", actor=str(key), error=str(result))
        return [r for r in results if isinstance(r, Operation)]


#: Most workers of one pool on one machine, and most actors awake on one worker: what its memory could ever hold.
MAX_REPLICAS = 64
MAX_SLOTS = 10_000

_KIND_OF = {
    ActorState.RUNNING: OperationKind.RESUME,
    ActorState.SUSPENDED: OperationKind.SUSPEND,
    ActorState.PAUSED: OperationKind.PAUSE,
}


def failure_of(operation: Operation) -> GreenroomError:
    failure = operation.error or Failure(code="INTERNAL", reason="INTERNAL", message="failed without saying why")
    return rebuild(failure.code, failure.reason, failure.message, {**failure.metadata, "operation": operation.id})
