"""The operations whose drivers run in this process, and everybody who waits for one.

An operation is a row first and a task second: its driver may end without having ended the row (the store is away, the
lease was lost, this process ends), and then another driver takes it up. So whoever waits, waits for the row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core.commands import (
    ActorCommand,
    BackOut,
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Change,
    FinishDelete,
    FinishPause,
    FinishResume,
    FinishSuspend,
    OperationCommand,
    Outcome,
)
from greenroom.core.errors import (
    GreenroomError,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
    rebuild,
)
from greenroom.core.records import Failure, Operation, OperationState
from greenroom.engine import clock
from greenroom.engine.leases import LeaseKeeper, RunningOperation
from greenroom.store.port import R

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")
Begin = BeginResume | BeginSuspend | BeginPause | BeginDelete
Driver = Callable[[Change], Coroutine[Any, Any, Operation]]


def as_failure(error: GreenroomError) -> Failure:
    return Failure(code=error.code, reason=error.reason, message=error.message, metadata=error.facts())


def failure_of(operation: Operation) -> GreenroomError:
    """What a FAILED operation failed with, as an error to raise."""
    failure = operation.error or Failure(code="INTERNAL", reason="INTERNAL", message="failed without saying why")
    return rebuild(failure.code, failure.reason, failure.message, {**failure.metadata, "operation": operation.id})


async def quietly(work: Awaitable[object]) -> None:
    """Does what nobody waits for; a failure is logged, and what comes later does it again or does without."""
    try:
        await work
    except GreenroomError as error:
        log.info("not done", error=error.message)


class Operations:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._leases = LeaseKeeper(engine)
        #: By operation id.
        self.running: dict[str, RunningOperation] = {}
        #: Ids of operations that somebody in this process is about to drive; the janitor leaves them alone.
        self._claimed: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closed = False

    # --- tasks --------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A task that `close` ends; a failure is logged, never lost. Raises `Unavailable` after `close`."""
        if self.closed:
            work.close()
            raise closing()
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            if isinstance(error, GreenroomError):  # whoever waits for it gets it; nobody has to
                log.debug("refused", task=task.get_name(), error=error.message)
            else:
                log.error("work failed", task=task.get_name(), exc_info=error)

    async def attend(self, task: asyncio.Task[T]) -> T:
        """The result of a task of this engine, for a caller that may go away: the task goes on.

        Raises:
            Unavailable: the engine was closed meanwhile (reason ``SHUTTING_DOWN``).
        """
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if not task.cancelled() or (caller is not None and caller.cancelling()):
                raise  # it is the caller that was cancelled
        raise closing()

    async def close(self) -> None:
        """Ends all tasks. Rows of operations stay as they are; who waits gets `Unavailable`."""
        self.closed = True
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await asyncio.sleep(0)  # their callbacks

    # --- writes whose reply may be lost -------------------------------------------------------------------

    async def commit(self, command: ActorCommand) -> Change:
        """`Store.apply`, again while the store does not answer (``store_away_s``). Every command is idempotent by its
        operation id and fenced, so it does not matter whether one whose reply was lost was carried out."""
        patient = isinstance(command, OperationCommand)
        if isinstance(command, FinishResume | FinishSuspend | FinishPause | FinishDelete | BackOut):
            running = self.running.get(command.operation_id)
            if running is not None:
                running.ending = True
        return await self.steadily(lambda: self._store.apply(replace(command, now=self._engine.now())), patient)

    async def read(self, cls: type[R], pk: str) -> R:
        """`Store.get`, again while the store does not answer."""
        return await self.steadily(lambda: self._store.get(cls, pk))

    async def steadily(self, work: Callable[[], Awaitable[T]], patient: bool = False) -> T:
        """Does what may be done twice, until the store answers. ``patient``: also while too many writes wait."""
        until = clock.monotonic() + self._engine.config.store_away_s
        while True:
            try:
                return await work()
            except (Unavailable, ResourceExhausted) as error:
                away = isinstance(error, Unavailable) and error.reason != "STORE_CLOSED"
                crowded = patient and error.reason == "STORE_OVERLOADED"
                if not (away or crowded) or clock.monotonic() >= until:
                    raise
            await asyncio.sleep(self._engine.config.retry_s)

    async def insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does what nobody else would do, until the store lets it."""
        while True:
            try:
                return await work()
            except (Unavailable, ResourceExhausted) as error:
                if self.closed:
                    raise closing() from error
                log.warning("tries again", error=error.message)
            await asyncio.sleep(self._engine.config.retry_s)

    # --- begin and drive ----------------------------------------------------------------------------------

    async def begin(self, command: Begin, drive: Driver) -> Change:
        """Begins an operation and drives it in a task. Between the commit and the task nobody can come in between."""
        self._claimed.add(command.operation_id)
        asked = clock.monotonic()
        try:
            change = await self.commit(command)
            op = change.operation
            if change.outcome is Outcome.CHANGED:
                assert op is not None
                self.track(op, drive(change), asked)
            elif op is not None and op.id == command.operation_id and op.state is OperationState.RUNNING:
                await self._engine.recovery.take_up(op)  # begun by this very command, whose reply was lost
            return change
        finally:
            self._claimed.discard(command.operation_id)

    def track(self, operation: Operation, work: Coroutine[Any, Any, Operation], asked: float) -> None:
        """Runs an operation's driver as a task that outlives its callers, and keeps its lease. ``asked``: loop time
        before the lease was asked for."""
        running = RunningOperation(operation, asked)
        running.cancel_requested = operation.cancel_requested
        running.task = self.spawn(work, f"operation-{operation.id}")
        self.running[operation.id] = running
        running.task.add_done_callback(lambda _: self._untrack(running))
        self._leases.keep(running)

    def _untrack(self, running: RunningOperation) -> None:
        running.release()
        if self.running.get(running.operation.id) is running:
            del self.running[running.operation.id]

    def claim(self, operation_id: str) -> bool:
        """Whether the caller may take the operation up: nobody in this process has it. `release` ends the claim."""
        if operation_id in self.running or operation_id in self._claimed:
            return False
        self._claimed.add(operation_id)
        return True

    def release(self, operation_id: str) -> None:
        self._claimed.discard(operation_id)

    def busy(self, actor_uid: str) -> bool:
        """Whether an operation on the actor is driven in this process."""
        return any(r.operation.uid == actor_uid for r in self.running.values())

    # --- waiting ------------------------------------------------------------------------------------------

    async def outcome(self, operation: Operation) -> Operation:
        """The operation when it has ended, whoever drives it.

        Raises:
            GreenroomError: its driver gave up (the store is away, the disk is full); the operation goes on later.
        """
        running = self.running.get(operation.id)
        if running is not None:
            await asyncio.wait({running.task})
            if not running.task.cancelled() and not isinstance(running.task.exception(), LeaseLost):
                return running.task.result()
        return await self._watch_end(operation.id)

    async def ended(self, operation_id: str) -> None:
        """Returns when an operation that holds an actor may have ended; who wants the actor tries again then."""
        running = self.running.get(operation_id)
        if running is not None:
            await asyncio.wait({running.task})
            return
        try:
            await self._watch_end(operation_id)
        except NotFound:
            pass  # so long ended that its row is gone

    async def _watch_end(self, operation_id: str) -> Operation:
        """For an operation that no task of this process runs (yet)."""
        while True:
            events = self._store.watch()  # first, so that no end is missed after the look
            operation = await self.read(Operation, operation_id)
            if operation.state is not OperationState.RUNNING:
                return operation
            try:
                async for event in events:
                    record = event.record
                    ended = isinstance(record, Operation) and record.state is not OperationState.RUNNING
                    if ended and record.pk == operation_id:
                        assert isinstance(record, Operation)
                        return record
            except ResourceExhausted as slow:
                if slow.reason != "WATCH_TOO_SLOW":
                    raise


def closing() -> Unavailable:
    return Unavailable(
        "the control plane is stopping; what was begun goes on when it is back, so ask again then",
        reason="SHUTTING_DOWN",
    )
