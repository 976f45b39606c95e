"""A control plane for the tests of API, command line and SDK, and a real gRPC server in front of it.

The store is the real one in memory and what is legal is decided by `greenroom.core.lifecycle`; only workers and
sandboxes are missing: a started operation ends as soon as ``gate`` is open, and a command runs as a local process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from greenroom.api.server import ApiServer
from greenroom.api.service import ServerInfo
from greenroom.core import commands as lc
from greenroom.core.agentapi import ActorStats
from greenroom.core.errors import FailedPrecondition, GreenroomError
from greenroom.core.records import (
    Actor,
    ActorState,
    Endpoint,
    Failure,
    FileDigest,
    Key,
    LayerProgress,
    Operation,
    OperationKind,
    OperationState,
    PhaseTime,
    Pool,
    PoolSpec,
    Snapshot,
    SnapshotScope,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
    WorkerState,
)
from greenroom.engine.bindings import Binding, BindingTable, Wake
from greenroom.engine.decommission import Farewell, Losses
from greenroom.engine.garbage import Garbage
from greenroom.engine.images import Images
from greenroom.engine.removals import Removals
from greenroom.store.memory import MemoryStore

DIGEST = "sha256:" + "ab" * 32
INFO = ServerInfo(backends=("sim",), gateway_url="http://127.0.0.1:8880", domain="actors.localhost")


class FakeControl:
    """``gate``: closed, started operations stay under way until they are cancelled. ``fail``: what the next operation
    fails with. ``refuse``: what the next mutation is refused with. ``log_lines``: what every actor has written; more
    can come while it is followed."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.store = MemoryStore(clock)
        self.bindings = BindingTable()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: Failure | None = None
        self.refuse: GreenroomError | None = None
        self.log_lines: list[bytes] = [b"one\n", b"two\n", b"three\n"]
        self.more_logs = asyncio.Event()
        #: Somebody has had the lines that there were, and waits for more.
        self.follows = asyncio.Event()
        self.killed: list[tuple[str, ...]] = []
        self.kills = asyncio.Event()
        self.started = asyncio.Event()
        self.explode = False
        self._sessions: list[FakeExec] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancels: dict[str, asyncio.Event] = {}
        self.stuck: set[str] = set()  # operations that no gate lets go on
        self._ids = itertools.count(1)

    async def wake(self, key: Key) -> Wake:
        raise NotImplementedError("no gateway here")

    async def is_over(self, binding: Binding) -> bool:
        raise NotImplementedError("no gateway here")

    # --- actors ---

    async def create_actor(
        self,
        key: Key,
        template: str,
        *,
        labels: Mapping[str, str] | None = None,
        worker_selector: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> tuple[Actor, Operation]:
        change = await self.store.apply(
            lc.CreateActor(
                key=key,
                now=time.time(),
                operation_id=self._id(),
                uid=f"uid-{self._id()}",
                template=template,
                request_id=request_id,
                labels=dict(labels or {}),
                worker_selector=dict(worker_selector or {}),
            )
        )
        assert change.actor is not None and change.operation is not None
        return change.actor, change.operation

    async def resume(
        self, key: Key, *, request_id: str = "", wait_s: float = 300.0, snapshot_id: str = ""
    ) -> Operation:
        return await self._begin(lc.BeginResume, key, request_id, wait_s, snapshot_id=snapshot_id)

    async def tag_snapshot(self, snapshot_id: str, tag: str, *, undo: bool = False) -> Snapshot:
        snapshot = await self.store.get(Snapshot, snapshot_id)
        key = Key(snapshot.namespace, snapshot.actor)
        command = lc.TagSnapshot(key=key, now=time.time(), snapshot_id=snapshot_id, tag=tag, undo=undo)
        change = await self.store.apply(command)
        assert change.source is not None
        return change.source

    async def suspend(self, key: Key, *, request_id: str = "", wait_s: float = 300.0) -> Operation:
        return await self._begin(lc.BeginSuspend, key, request_id, wait_s, snapshot_id=f"snap-{self._id()}")

    async def pause(self, key: Key, *, request_id: str = "", wait_s: float = 300.0) -> Operation:
        return await self._begin(lc.BeginPause, key, request_id, wait_s)

    async def delete(self, key: Key, *, request_id: str = "", wait_s: float = 300.0) -> Operation:
        return await self._begin(lc.BeginDelete, key, request_id, wait_s)

    async def _begin(
        self, command: Callable[..., Any], key: Key, request_id: str, wait_s: float, **more: Any
    ) -> Operation:
        if self.explode:
            raise ZeroDivisionError("a secret of the server")
        refusal, self.refuse = self.refuse, None
        if refusal is not None:
            raise refusal
        change = await self.store.apply(
            command(
                key=key,
                now=time.time(),
                operation_id=self._id(),
                owner="me",
                request_id=request_id,
                lease_ttl_s=3600.0,
                **more,
            )
        )
        if change.outcome is lc.Outcome.ALREADY:
            assert change.actor is not None
            return self._nothing_to_do(change.actor, command.kind)  # type: ignore[attr-defined]
        assert change.operation is not None
        if change.outcome is lc.Outcome.CHANGED:
            self._spawn(self._drive(change.operation))
        return await self.wait_operation(change.operation.id, wait_s)

    def _nothing_to_do(self, actor: Actor, kind: OperationKind) -> Operation:
        now = time.time()
        return Operation(
            id="",
            kind=kind,
            namespace=actor.namespace,
            name=actor.name,
            uid=actor.uid,
            created_at=now,
            updated_at=now,
            deadline_at=now,
            finished_at=now,
            state=OperationState.DONE,
            cause="already",
        )

    async def _turn(self, op: Operation) -> Failure | None:
        """Waits until the gate is open, or until it is cancelled; what it is to fail with."""
        cancelled = self._cancels.setdefault(op.id, asyncio.Event())
        gate = asyncio.Event() if op.id in self.stuck else self.gate
        waits = [asyncio.ensure_future(event.wait()) for event in (gate, cancelled)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            del self._cancels[op.id]
        if cancelled.is_set():
            return Failure(
                code="CANCELLED", reason="OPERATION_CANCELLED", message=f"{op.kind} of {op.key} was given up"
            )
        failure, self.fail = self.fail, None
        return failure

    async def _drive(self, op: Operation) -> None:
        failure = await self._turn(op)
        base = {"key": op.key, "now": time.time(), "operation_id": op.id, "generation": op.generation}
        if failure is not None:
            assert op.from_state is not None
            to = ActorState.DELETING if op.kind is OperationKind.DELETE else op.from_state
            await self.store.apply(lc.BackOut(**base, to_state=to, error=failure))
            return
        phases = (PhaseTime(name="bind", seconds=0.002), PhaseTime(name="restore", seconds=0.0405))
        command: lc.ActorCommand
        match op.kind:
            case OperationKind.RESUME:
                command = lc.FinishResume(**base, endpoint=Endpoint(host="127.0.0.1", port=8080), phases=phases)
            case OperationKind.SUSPEND:
                command = lc.FinishSuspend(**base, snapshot=await self._snapshot(op), phases=phases)
            case OperationKind.PAUSE:
                command = lc.FinishPause(**base, phases=phases)
            case _:
                command = lc.FinishDelete(**base, phases=phases)
        await self.store.apply(command)

    async def _snapshot(self, op: Operation) -> Snapshot:
        actor = await self.store.get(Actor, str(op.key))
        return _snapshot(op.snapshot, actor.template, actor=actor)

    # --- templates and pools ---

    async def apply_template(
        self, key: Key, spec: TemplateSpec, *, request_id: str = ""
    ) -> tuple[Template, Operation | None]:
        now = time.time()
        there = [t for t in await self.store.list(Template, namespace=key.namespace) if t.name == key.name]
        if there and there[0].spec != spec:
            raise FailedPrecondition(
                f"template {key} exists with another spec; choose another name", reason="TEMPLATE_IMMUTABLE"
            )
        if there and there[0].state is not TemplateState.FAILED:
            return there[0], None
        op = await self.store.put(
            Operation(
                id=self._id(),
                kind=OperationKind.PREPARE,
                namespace=key.namespace,
                name=key.name,
                uid=f"t-{key.name}",
                created_at=now,
                updated_at=now,
                deadline_at=now + 300,
                phase="pull",
                request_id=request_id,
            )
        )
        template = Template(
            namespace=key.namespace,
            name=key.name,
            uid=f"t-{key.name}",
            spec=spec,
            state=TemplateState.PREPARING,
            created_at=now,
            state_since=now,
            operation=op.id,
            version=there[0].version if there else 0,
        )
        template = await self.store.put(template)
        self._spawn(self._prepare(template, op))
        return template, op

    async def _prepare(self, template: Template, op: Operation) -> None:
        for done in (1 << 20, 3 << 20):
            layer = LayerProgress(digest=DIGEST, done_bytes=done, total_bytes=3 << 20)
            op = await self.store.put(replace(op, layers=(layer,)))
        failure = await self._turn(op)
        now = time.time()
        op = await self.store.get(Operation, op.id)
        if failure is not None:
            await self.store.put(
                replace(template, state=TemplateState.FAILED, reason=failure.reason, message=failure.message)
            )
            await self.store.put(replace(op, state=OperationState.FAILED, error=failure, finished_at=now))
            return
        golden = _snapshot(f"golden-{template.name}", template.name, golden=True)
        await self.store.put(golden)
        await self.store.put(
            replace(template, state=TemplateState.READY, golden_snapshot=golden.id, image_digest=DIGEST)
        )
        done = (PhaseTime(name="pull", seconds=1.5), PhaseTime(name="boot", seconds=0.5))
        await self.store.put(replace(op, state=OperationState.DONE, phases=done, finished_at=now))

    async def delete_template(self, key: Key) -> None:
        if await self.store.list(Actor, namespace=key.namespace, where={"template": key.name}):
            raise FailedPrecondition(f"template {key} is used by actors; delete those first", reason="TEMPLATE_IN_USE")
        await self.store.remove(await self.store.get(Template, str(key)))

    async def apply_pool(self, name: str, spec: PoolSpec) -> Pool:
        there = [p for p in await self.store.list(Pool) if p.name == name]
        version = there[0].version if there else 0
        pool = await self.store.put(
            Pool(name=name, uid=f"p-{name}", spec=spec, created_at=time.time(), version=version)
        )
        for index in range(len(await self.store.list(Worker, where={"pool": name})), spec.replicas):
            await self.store.put(
                Worker(
                    name=f"{name}-{index}",
                    pool=name,
                    backend=spec.backend,
                    fingerprint="f",
                    capacity=spec.slots,
                    registered_at=time.time(),
                    last_seen=time.time(),
                )
            )
        return pool

    async def delete_pool(self, name: str) -> None:
        await self.store.remove(await self.store.get(Pool, name))

    async def wait_operation(self, operation_id: str, wait_s: float = 300.0) -> Operation:
        events = self.store.watch()
        op = await self.store.get(Operation, operation_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while op.state is OperationState.RUNNING:
                    record = (await anext(events)).record
                    if isinstance(record, Operation) and record.id == operation_id:
                        op = record
        return op

    async def cancel_operation(self, operation_id: str) -> Operation:
        op = await self.store.get(Operation, operation_id)
        if op.kind is OperationKind.PREPARE:
            if op.state is OperationState.RUNNING and not op.cancel_requested:
                op = await self.store.put(replace(op, cancel_requested=True))
        else:
            change = await self.store.apply(lc.RequestCancel(key=op.key, now=time.time(), operation_id=op.id))
            assert change.operation is not None
            op = change.operation
        if op.id in self._cancels:
            self._cancels[op.id].set()
        return op

    async def drain_worker(self, name: str, *, undo: bool = False) -> Worker:
        worker = await self.store.get(Worker, name)
        state = WorkerState.ACTIVE if undo else WorkerState.DRAINING
        if worker.state is not state:
            worker = await self.store.put(replace(worker, state=state))
        if not undo:
            for actor in await self.store.list(Actor, where={"worker": name}):
                if actor.state in (ActorState.RUNNING, ActorState.PAUSED):
                    await self.suspend(actor.key, wait_s=0)
        return worker

    async def retire_worker(self, name: str) -> Worker:
        worker = await self.drain_worker(name)
        worker = await self.store.put(replace(worker, state=WorkerState.RETIRING, cordon="retiring"))
        self._spawn(self._retire(name))
        return worker

    async def _retire(self, name: str) -> None:
        await self.gate.wait()
        while (worker := await self.store.get(Worker, name)).used:
            await asyncio.sleep(0.01)
        await self.store.remove(worker)

    async def forget_worker(self, name: str, *, accept_loss: bool = False) -> Farewell:
        worker = await self.store.get(Worker, name)
        if worker.state is WorkerState.GONE:
            await self.store.remove(worker)
            return Farewell(worker, True, Losses())
        if worker.state is not WorkerState.STALLED:
            raise FailedPrecondition(f"worker {name} can't be forgotten: it is heard", reason="WORKER_HEARD")
        awake = tuple(str(a.key) for a in await self.store.list(Actor, where={"worker": name}))
        if awake and not accept_loss:
            raise FailedPrecondition(f"worker {name} may come back: say --yes", reason="WORKER_HOLDS_STATE")
        gone = await self.store.put(replace(worker, state=WorkerState.GONE, message="somebody said so"))
        return Farewell(gone, False, Losses(awake, ("snap-1",) if accept_loss else ()))

    async def acknowledge_worker(self, name: str) -> Worker:
        worker = await self.store.get(Worker, name)
        return await self.store.put(replace(worker, distrust=""))

    @property
    def images(self) -> Images:
        raise NotImplementedError("no workers here")

    @property
    def garbage(self) -> Garbage:
        raise NotImplementedError("no workers here")

    @property
    def removals(self) -> Removals:
        raise NotImplementedError("no workers here")

    # --- inside an actor ---

    async def exec(
        self,
        key: Key,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout_s: float = 0,
    ) -> FakeExec:
        operation = await self.resume(key)
        if operation.error is not None:
            raise GreenroomError(operation.error.message)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env={"PATH": "/usr/bin:/bin", "ACTOR": key.name, **(env or {})},
                cwd=cwd or None,
                start_new_session=True,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError:
            raise FailedPrecondition(f"the image has no command {argv[0]!r}", reason="COMMAND_NOT_FOUND") from None
        if "sleep" in argv[-1]:
            self.started.set()
        self._sessions.append(FakeExec(process, tuple(argv), timeout_s, self._kill))
        return self._sessions[-1]

    async def logs(self, key: Key, *, tail_lines: int = -1, follow: bool = False) -> AsyncIterator[bytes]:
        await self.store.get(Actor, str(key))
        sent = len(self.log_lines)
        for line in self.log_lines if tail_lines < 0 else self.log_lines[sent - min(tail_lines, sent) :]:
            yield line
        while follow:
            self.follows.set()
            await self.more_logs.wait()
            self.more_logs.clear()
            for line in self.log_lines[sent:]:
                yield line
            sent = len(self.log_lines)

    async def stats(self, key: Key) -> ActorStats:
        actor = await self.store.get(Actor, str(key))
        if actor.state is not ActorState.RUNNING:
            raise FailedPrecondition(f"actor {key} is {actor.state}, it has no stats", reason="WRONG_STATE")
        return ActorStats(memory_bytes=64 << 20, cpu_seconds=1.25, pids=3)

    # --- for tests ---

    async def furnish(self) -> None:
        """A pool, a ready template ``counter`` and nothing else."""
        await self.apply_pool("default", PoolSpec(backend="sim"))
        _, op = await self.apply_template(Key("default", "counter"), TemplateSpec(image="example.org/counter:1"))
        assert op is not None
        await self.wait_operation(op.id)

    async def crash(self, key: Key) -> None:
        actor = await self.store.get(Actor, str(key))
        await self.store.apply(
            lc.Crash(
                operation_id=uuid.uuid4().hex,
                key=key,
                now=time.time(),
                uid=actor.uid,
                worker=actor.worker,
                generation=actor.generation,
                reason="WorkerLost",
                message=f"worker {actor.worker} went away",
            )
        )

    async def close(self) -> None:
        for session in self._sessions:
            await session.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.close()

    def _kill(self, argv: tuple[str, ...]) -> None:
        self.killed.append(argv)
        self.kills.set()

    def drive(self, op: Operation) -> None:
        """Ends an operation that a test has begun by itself."""
        self._spawn(self._drive(op))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _id(self) -> str:
        return f"op-{next(self._ids):06d}"


def _snapshot(snapshot_id: str, template: str, *, actor: Actor | None = None, golden: bool = False) -> Snapshot:
    return Snapshot(
        id=snapshot_id, namespace="default", actor=actor.name if actor else "_golden",
        actor_uid=actor.uid if actor else "", template=template, generation=actor.generation if actor else 0,
        scope=SnapshotScope.MEMORY, backend="sim", fingerprint="f", image_digest=DIGEST, hostname="h",
        created_at=time.time(), golden=golden,
        files=(FileDigest(name="pages", size_bytes=48 << 20, sha256="0" * 64, upload=f"{snapshot_id}.0"),),
    )  # fmt: skip


class FakeExec:
    """A local process as an exec session."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        argv: tuple[str, ...],
        timeout_s: float,
        on_kill: Callable[[tuple[str, ...]], None],
    ) -> None:
        self._process, self._argv, self._on_kill = process, argv, on_kill
        if timeout_s > 0:
            asyncio.get_running_loop().call_later(timeout_s, self._kill)

    async def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        if not data:
            self._process.stdin.close()
            return
        self._process.stdin.write(data)
        await self._process.stdin.drain()

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        queue: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(maxsize=16)

        async def pump(number: int, reader: asyncio.StreamReader | None) -> None:
            assert reader is not None
            while data := await reader.read(1 << 16):
                await queue.put((number, data))
            await queue.put((number, b""))

        tasks = [
            asyncio.create_task(pump(1, self._process.stdout)),
            asyncio.create_task(pump(2, self._process.stderr)),
        ]
        try:
            is_open = 2
            while is_open:
                number, data = await queue.get()
                if data:
                    yield number, data
                else:
                    is_open -= 1
        finally:
            for task in tasks:
                task.cancel()

    async def wait(self) -> int:
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def kill(self) -> None:
        self._kill()
        # First, since `wait` does not return before the pipes are at their end, and nobody may read them any more.
        self._process._transport.close()  # type: ignore[attr-defined]
        await self._process.wait()

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._on_kill(self._argv)
            with contextlib.suppress(ProcessLookupError):  # it has ended, and asyncio has not been told yet
                os.killpg(self._process.pid, signal.SIGKILL)


# --- a real server in front of it -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(directory: Path, clock: Callable[[], float] | None = None) -> AsyncIterator[tuple[FakeControl, str]]:
    """For tests on asyncio: server and test share the loop."""
    control = FakeControl(clock)
    server = ApiServer(control, info=INFO)
    address = f"unix:{directory}/run/api.sock"
    await server.start([address])
    try:
        yield control, address
    finally:
        await server.close(0.1)
        await control.close()


class ThreadedServer:
    """For tests that block: the server has a thread and a loop of its own; `run` does something there."""

    def __init__(self, control: FakeControl, address: str, loop: asyncio.AbstractEventLoop) -> None:
        self.control, self.address, self._loop = control, address, loop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def call(self, function: Callable[[], Any]) -> Any:
        async def inner() -> Any:
            return function()

        return self.run(inner())

    def pause(self, seconds: float) -> None:
        """From now on it answers nothing for so long. Does not wait."""
        self._loop.call_soon_threadsafe(time.sleep, seconds)


@contextlib.contextmanager
def threaded(
    directory: Path,
    furnish: Callable[[FakeControl], Coroutine[Any, Any, None]] = FakeControl.furnish,
    clock: Callable[[], float] | None = None,
) -> Iterator[ThreadedServer]:
    started: list[ThreadedServer] = []
    ready, done = threading.Event(), []

    async def main() -> None:
        stop = asyncio.Event()
        done.append(stop)
        async with serving(directory, clock) as (control, address):
            await furnish(control)
            started.append(ThreadedServer(control, address, asyncio.get_running_loop()))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(10), "the server did not start"
    server = started[0]
    try:
        yield server
    finally:
        server.call(done[0].set)
        thread.join(10)
        assert not thread.is_alive()
