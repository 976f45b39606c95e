"""What an operation does, step by step. Each step is durable or can be repeated, so a driver can be run again from the
start by whoever takes the operation over: the worker answers a call that it has carried out from its journal.

Worst instants, for every driver:
- this process dies before or after any step: the row says which operation holds the actor; `Recovery` runs the driver
  again;
- a worker's reply is lost: the call is sent again with the same operation id and is answered from the worker's journal;
- the store's reply is lost: the same command is sent again (`Operations.commit`). What became of a commit is never
  guessed: while nobody knows, nothing is undone, and when the store stays away the driver gives up and leaves the row;
- the lease was taken over: the next write or call is refused with `LeaseLost`, and the driver stops without a trace.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core import keeping
from greenroom.core.commands import (
    Advance,
    BackOut,
    Change,
    FallBack,
    FinishDelete,
    FinishPause,
    FinishResume,
    FinishSuspend,
    Rebind,
    ReleaseLease,
)
from greenroom.core.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    Internal,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Durability,
    Endpoint,
    Failure,
    FileDigest,
    Key,
    Operation,
    OperationKind,
    PhaseTime,
    Record,
    Snapshot,
    SnapshotScope,
    SnapshotState,
    Template,
)
from greenroom.engine import clock
from greenroom.engine.bindings import Binding

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

A = TypeVar("A", bound=Record)

#: A worker that takes longer to end a sandbox is asked again by `Recovery`.
DISCARD_TIMEOUT_S = 30.0
#: Thawing takes milliseconds; a worker that takes longer hangs, and what lives there can't be reached by anybody.
PUT_BACK_TIMEOUT_S = 30.0
#: Characters of an error that are kept as the reason why a worker was given up.
MAX_WHY = 300
#: A request is held for this long while its actor waits for an image; that can take an hour, which nobody's connection
#: lives. Small images are there by then.
IMAGE_HOLD_S = 10.0
#: Between two writes of an operation's progress.
PROGRESS_INTERVAL_S = 0.25


class Phases:
    """Times of an operation, one after the other, so that they sum to its total."""

    def __init__(self) -> None:
        self._at = clock.monotonic()
        self._phases: list[PhaseTime] = []

    def end(self, name: str) -> None:
        now = clock.monotonic()
        self._phases.append(PhaseTime(name=name, seconds=now - self._at))
        self._at = now

    def took(self, phases: tuple[PhaseTime, ...], rest: str) -> None:
        """Takes over what a worker measured; the remainder since the last mark (messages, waiting) is ``rest``."""
        now = clock.monotonic()
        spent = sum(p.seconds for p in phases)
        self._phases += [PhaseTime(name=rest, seconds=max(0.0, now - self._at - spent)), *phases]
        self._at = now

    def all(self) -> tuple[PhaseTime, ...]:
        return tuple(self._phases)


class Drivers:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ops = engine.ops
        #: Of resumes that wait for their image: since when (loop time).
        self._waits_since: dict[Key, float] = {}

    # --- resume -------------------------------------------------------------------------------------------

    async def resume(self, change: Change, phases: Phases) -> Operation:
        """From RESUMING to RUNNING, or back to where it came from."""
        actor, op = _both(change)
        source, template = change.source, change.template
        refused: list[str] = []
        try:
            return await self._resume(actor, op, template, source, refused, self._deadline(op), phases)
        finally:
            self._waits_since.pop(actor.key, None)

    async def _resume(
        self,
        actor: Actor,
        op: Operation,
        template: Template | None,
        source: Snapshot | None,
        refused: list[str],
        deadline: _Deadline,
        phases: Phases,
    ) -> Operation:
        while True:
            try:
                async with deadline.kept(op):
                    started = await self._start(actor, op, template, source, deadline)
                break
            except LeaseLost:
                raise
            except GreenroomError as error:
                if op.from_state is ActorState.PAUSED:
                    return await self._put_back(actor, op, error, phases)
                try:
                    actor, op, source, template = await self._other_way(actor, op, template, source, refused, error)
                except LeaseLost:
                    raise
                except GreenroomError as final:
                    return await self._back_out(actor, op, final, phases)
        phases.took(started.phases, "dispatch")
        finished = await self._ops.commit(
            FinishResume(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                endpoint=started.endpoint,
                phases=phases.all(),
            )
        )
        phases.end("commit")
        self._engine.trust.vindicate(op.worker)
        self._bind_again(finished, template)
        assert finished.operation is not None
        return replace(finished.operation, phases=phases.all())

    async def _start(
        self, actor: Actor, op: Operation, template: Template | None, source: Snapshot | None, deadline: _Deadline
    ) -> api.Started:
        ids = _ids(actor, op)
        if op.from_state is ActorState.PAUSED:
            return await self._call(op, api.Thaw(**ids), api.Started)
        if template is None:
            raise FailedPrecondition(
                f"actor {actor.key} was made from template {actor.template!r}, which is gone; apply it again",
                reason="TEMPLATE_NOT_FOUND",
            )
        identity = api.Identity(
            namespace=actor.namespace,
            name=actor.name,
            uid=actor.uid,
            generation=op.generation,
            sandbox=actor.sandbox,
            create_seq=actor.sandbox_seq,
        )
        about: dict[str, Any] = {
            **ids,
            "identity": identity,
            "spec": template.spec,
            "image_digest": template.image_digest,
            "peers": self._engine.images.peers(op.worker, template.image_digest),
        }
        if source is not None:
            return await self._call(op, api.Restore(**about, snapshot=source), api.Started, deadline=deadline)
        if op.snapshot:  # to boot it instead would silently reset it
            raise FailedPrecondition(
                f"actor {actor.key}: the record of its snapshot {op.snapshot} is missing; delete the actor",
                reason="SNAPSHOT_NOT_FOUND",
            )
        return await self._call(op, api.Start(**about), api.Started, deadline=deadline)

    async def _other_way(
        self,
        actor: Actor,
        op: Operation,
        template: Template | None,
        source: Snapshot | None,
        refused: list[str],
        error: GreenroomError,
    ) -> tuple[Actor, Operation, Snapshot | None, Template | None]:
        """What to try after ``error``: an older snapshot, or another worker. Raises what to back out with."""
        if isinstance(error, DataLoss) and error.reason == "SNAPSHOT_CORRUPT" and source is not None:
            actor, op, source = await self._fall_back(actor, op, source, error)
            return actor, op, source, template
        if not may_succeed_elsewhere(error):
            raise error
        if is_workers_fault(error):
            self._engine.trust.blame(op.worker, error)
        refused.append(op.worker)
        if len(refused) >= self._engine.config.attempts:
            raise error
        await self._discard(actor, op)  # whatever the last one made
        pause_s = self._engine.config.rebind_pause_s * 2 ** (len(refused) - 1)
        if error.reason == "WORKER_ALONE":  # after an outage of the store all are, until they are answered again
            pause_s = max(pause_s, self._engine.hub.welcome.heartbeat_s)
        await asyncio.sleep(pause_s)
        rebind = Rebind(
            key=actor.key,
            now=self._engine.now(),
            operation_id=op.id,
            generation=op.generation,
            attempts=op.attempts,
            avoid=tuple(refused),
            reachable=self._engine.reachable(),
            why=f"{error.reason}: {error.message}"[:MAX_WHY],
        )
        try:
            change = await self._ops.commit(rebind)
        except LeaseLost:
            raise
        except GreenroomError:
            raise error from None  # there is no other worker; the first failure says more
        self._engine.slot_freed()  # the one that it had
        actor, bound = _both(change)
        return actor, replace(bound, deadline_at=op.deadline_at), change.source, change.template

    async def _fall_back(
        self, actor: Actor, op: Operation, bad: Snapshot, error: DataLoss
    ) -> tuple[Actor, Operation, Snapshot]:
        log.error("snapshot is corrupt", actor=str(actor.key), snapshot=bad.id, error=error.message)
        change = await self._ops.commit(
            FallBack(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                snapshot_id=bad.id,
                detail=error.message,
                reachable=self._engine.reachable(),
            )
        )
        actor, bound = _both(change)
        return actor, replace(bound, deadline_at=op.deadline_at), await self._ops.read(Snapshot, bound.snapshot)

    def _bind_again(self, change: Change, template: Template | None) -> None:
        """After an operation that ended with the actor running. When its reply was lost and came by a repetition, the
        actor may be something else again by now, or gone."""
        actor, op = change.actor, change.operation
        assert op is not None
        if actor and actor.state is ActorState.RUNNING and actor.generation == op.generation:
            self.bind(actor, template)

    def bind(self, actor: Actor, template: Template | None) -> None:
        """Makes a RUNNING actor reachable."""
        assert actor.endpoint is not None and actor.state is ActorState.RUNNING
        self._engine.bindings.bind(
            Binding(
                key=actor.key,
                uid=actor.uid,
                generation=actor.generation,
                worker=actor.worker,
                endpoint=actor.endpoint,
                idle_timeout_s=template.spec.idle_timeout_s if template and not actor.golden else 0.0,
                evictable=template is None or template.spec.evictable,
                on_idle=self._engine.actor_idle,
            )
        )
        asyncio.get_running_loop().call_soon(self._engine.actor_idle)

    # --- suspend ------------------------------------------------------------------------------------------

    async def suspend(self, change: Change, phases: Phases) -> Operation:
        """From SUSPENDING to SUSPENDED; until the commit the frozen sandbox can always be thawed again.

        checkpoint (freeze and write on the worker), publish (upload and verify), commit (the snapshot is the actor's
        latest, the slot is free), discard (only now is the sandbox destroyed).
        """
        actor, op = _both(change)
        ids = _ids(actor, op)
        self._engine.bindings.revoke(actor.key)
        try:
            async with self._deadline(op).kept(op):
                template = await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
                announced = _announced(actor, op, template)
                made = await self._call(op, api.Checkpoint(**ids, snapshot=announced), api.Checkpointed)
                phases.took(made.phases, "dispatch")
                await self._progress(op, api.Progress(phase="publish"))
                hold = _is_held(actor, template)
                base = () if hold or change.source is None else _stored(change.source, actor)
                publish = api.Publish(**ids, snapshot_id=op.snapshot, hold=hold, base=base)
                published = await self._call(op, publish, api.Published)
                phases.took(published.phases, "dispatch")
        except LeaseLost:
            raise
        except GreenroomError as error:
            return await self._put_back(actor, op, error, phases)
        try:
            return await self._finish_suspend(actor, op, template, published.snapshot, phases)
        except FailedPrecondition as error:
            if error.reason != "BLOBS_MISSING":
                raise
            return await self._put_back(actor, op, error, phases)

    async def _finish_suspend(
        self, actor: Actor, op: Operation, template: Template | None, snapshot: Snapshot, phases: Phases
    ) -> Operation:
        """``snapshot``: as the worker says it, or what it has put into the snapshot store."""
        snapshot = _made(_announced(actor, op, template), snapshot, op.worker)
        finished = await self._ops.commit(
            FinishSuspend(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                snapshot=snapshot,
                phases=phases.all(),
                keeps=keeping.keeps_more(template),
            )
        )
        phases.end("commit")
        self._engine.slot_freed()
        self._engine.spawn(self._discard(actor, op), f"discard-{actor.uid}")
        if keeping.keeps_more(template):
            self._engine.spawn(self._engine.collection.expire(actor.key, actor.uid), f"expire-{actor.uid}")
        if snapshot.held:
            self._engine.uploads.begin(snapshot)
        assert finished.operation is not None
        return replace(finished.operation, phases=phases.all())

    async def _put_back(self, actor: Actor, op: Operation, error: GreenroomError, phases: Phases) -> Operation:
        """An operation on a living sandbox failed: it is put back as it was, running or frozen, as if nothing had been
        asked. A sandbox that can't be is lost; then what was published of it counts: it was frozen since."""
        ids = _ids(actor, op)
        endpoint: Endpoint | None = None
        try:
            if error.reason == "WORKER_DISCONNECTED":
                raise error  # it has been waited for already
            async with _limit(PUT_BACK_TIMEOUT_S, f"putting actor {actor.key} back"):
                if op.from_state is ActorState.PAUSED:
                    await self._call(op, api.Freeze(**ids), api.Done, undo=True)
                else:
                    endpoint = (await self._call(op, api.Thaw(**ids), api.Started, undo=True)).endpoint
        except LeaseLost:
            raise
        except GreenroomError as lost:
            log.error("actor lost", actor=str(actor.key), kind=op.kind, error=error.message, then=lost.message)
            if op.kind is OperationKind.SUSPEND and (saved := await self._published(op)) is not None:
                with contextlib.suppress(FailedPrecondition):  # it refers to what is not kept; then it is no use
                    return await self._finish_suspend(actor, op, await self._template(actor), saved, phases)
            return await self._back_out(actor, op, error, phases, ActorState.CRASHED)
        return await self._back_out(actor, op, error, phases, endpoint=endpoint)

    async def _published(self, op: Operation) -> Snapshot | None:
        """The snapshot of a suspend, if it is complete in the snapshot store."""
        try:
            return await self._engine.snapshots.manifest(op.uid, op.snapshot)
        except (NotFound, DataLoss):
            return None

    # --- pause and delete ---------------------------------------------------------------------------------

    async def pause(self, change: Change, phases: Phases) -> Operation:
        actor, op = _both(change)
        self._engine.bindings.revoke(actor.key)
        call = api.Freeze(**_ids(actor, op))
        try:
            async with self._deadline(op).kept(op):
                frozen = await self._call(op, call, api.Done)
        except LeaseLost:
            raise
        except GreenroomError as error:
            return await self._put_back(actor, op, error, phases)
        phases.took(frozen.phases, "dispatch")
        finished = await self._ops.commit(
            FinishPause(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                phases=phases.all(),
            )
        )
        assert finished.operation is not None
        return finished.operation

    async def delete(self, change: Change, phases: Phases) -> Operation:
        """Ends the sandbox, then forgets the actor; its snapshots are condemned in the same commit, the janitor
        removes their files. A worker that is away does not hold it up: what it still runs, it is told to discard
        when it comes back."""
        actor, op = _both(change)
        self._engine.bindings.revoke(actor.key)
        if actor.worker:
            await self._discard(actor, op, forget=True)
        phases.end("discard")
        finished = await self._ops.commit(
            FinishDelete(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                phases=phases.all(),
            )
        )
        self._engine.slot_freed()
        assert finished.operation is not None
        return finished.operation

    # --- parts --------------------------------------------------------------------------------------------

    async def _call(
        self,
        op: Operation,
        call: api.AgentCall,
        answer: type[A],
        *,
        undo: bool = False,
        deadline: _Deadline | None = None,
    ) -> A:
        """Asks the operation's worker; when the connection breaks, again once it is back (``worker_return_s``).

        Args:
            undo: takes back what was done, so that a request to cancel does not stop it.
            deadline: waits while an image is prepared.

        Raises:
            Cancelled: somebody asked for it.
            DeadlineExceeded: nothing has moved for ``stall_s`` (reason ``STALLED``).
            LeaseLost: the worker is alive, but not for this replica: the operation is another one's now.
        """
        until: float | None = None
        while True:
            asked = clock.monotonic()
            try:
                async with self._step(op, call, undo) as moved:
                    result = await self._engine.hub.call(op.worker, call, self._on_progress(op, moved, deadline))
                assert isinstance(result, answer)
                return result
            except Unavailable as error:
                if error.reason != "WORKER_DISCONNECTED":
                    raise
                # From when it went, not from when it was asked; and anew when it has been back in between: unless it
                # always goes again at once, which may be this call's doing.
                now, return_s = clock.monotonic(), self._engine.config.worker_return_s
                if until is None or now - asked > return_s or op.worker in self._engine.hub.connected():
                    until = now + return_s
                elif now >= until:
                    await self._hand_over_if_alive(op)
                    raise
            except GreenroomError:
                raise
            except Exception as bug:  # an operation must end, also with an answer that nobody thought of
                log.exception("a call failed in a way nobody thought of", call=type(call).__name__)
                raise Internal(f"{type(call).__name__} on worker {op.worker}: {type(bug).__name__}: {bug}") from bug
            async with self._step(op, call, undo):
                await asyncio.sleep(self._engine.config.retry_s)
                await self._engine.census.wait_for_worker(op.worker, until)

    @asynccontextmanager
    async def _step(self, op: Operation, call: api.AgentCall, undo: bool) -> AsyncIterator[Callable[[], None]]:
        """A part of an operation that may take long: it ends when nothing moves for ``stall_s`` (the function that it
        gives says that something has), and, unless it is an ``undo``, when somebody cancels the operation."""
        stall_s = self._engine.config.stall_s
        if isinstance(call, api.Start | api.Restore):
            stall_s += call.spec.readyz.timeout_s  # until its probe answers, only the actor itself knows what moves
        running = None if undo else self._ops.running.get(op.id)
        over = False  # what comes later, of a call that nobody waits for any more, moves nothing

        def moved() -> None:
            if not over and not scope.expired():
                scope.reschedule(clock.monotonic() + stall_s)

        try:
            async with asyncio.timeout(stall_s) as scope:
                if running is not None:
                    running.step = scope
                    if running.cancel_requested:
                        raise _cancelled(op)
                yield moved
        except TimeoutError:
            if running is not None and running.cancel_requested:
                raise _cancelled(op) from None
            raise DeadlineExceeded(
                f"{type(call).__name__} on worker {op.worker}: nothing has moved for {stall_s:g} s", reason="STALLED"
            ) from None
        finally:
            over = True
            if running is not None:
                running.step = None

    async def _hand_over_if_alive(self, op: Operation) -> None:
        """An operation whose worker other replicas reach is theirs. Raises `LeaseLost` then."""
        if not await self._engine.census.alive_elsewhere(op.worker):
            return
        release = ReleaseLease(
            key=op.key,
            now=self._engine.now(),
            operation_id=op.id,
            generation=op.generation,
            owner=self._engine.config.owner,
        )
        await self._ops.commit(release)
        raise LeaseLost(
            f"worker {op.worker} is alive but not connected to this replica; operation {op.id} is handed over",
            reason="HANDED_OVER",
        )

    def _on_progress(
        self, op: Operation, moved: Callable[[], None], deadline: _Deadline | None
    ) -> Callable[[api.Progress], None]:
        last_at = 0.0
        last: api.Progress | None = None

        def report(progress: api.Progress) -> None:
            nonlocal last_at, last
            if progress != last:
                last = progress
                moved()
                self._note_wait(op, progress, deadline)
                if clock.monotonic() - last_at >= PROGRESS_INTERVAL_S:
                    last_at = clock.monotonic()
                    self._engine.spawn(self._progress(op, progress), f"progress-{op.id}")

        return report

    def _deadline(self, op: Operation) -> _Deadline:
        return _Deadline(op, self._engine.now(), self._engine.config.deadline_s(op.kind))

    def _note_wait(self, op: Operation, progress: api.Progress, deadline: _Deadline | None) -> None:
        """While an image is prepared a resume waits for that, for as long as something moves."""
        if progress.phase.startswith(api.WAITS_FOR_IMAGE) and deadline is not None:
            deadline.put_off()
            since = self._waits_since.setdefault(op.key, clock.monotonic())
            if clock.monotonic() - since >= IMAGE_HOLD_S:
                self._engine.wakes.waits_for_image(op.key, progress)
        else:
            self._waits_since.pop(op.key, None)

    async def _progress(self, op: Operation, progress: api.Progress) -> None:
        """For those who watch; nothing depends on it. Raises `LeaseLost` alone."""
        step = Advance(
            key=op.key,
            now=self._engine.now(),
            operation_id=op.id,
            generation=op.generation,
            phase=progress.phase,
            layers=progress.layers,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
        )
        try:
            await self._engine.store.apply(step)
        except LeaseLost:
            raise
        except GreenroomError as error:
            log.info("progress not recorded", operation=op.id, phase=progress.phase, error=error.message)

    async def _discard(self, actor: Actor, op: Operation, *, forget: bool = False) -> None:
        """Ends what the actor has on the operation's worker. What can't be ended now, `Recovery` finds later: it is a
        sandbox that no record speaks of."""
        call = api.Discard(**_ids(actor, op), forget=forget)
        try:
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                await self._engine.hub.call(op.worker or actor.worker, call)
        except LeaseLost:
            pass  # it runs there again already, under a newer generation, which ended the old sandbox itself
        except (GreenroomError, TimeoutError) as error:
            log.info("discard is left to recovery", actor=str(actor.key), error=str(error))

    async def _back_out(
        self,
        actor: Actor,
        op: Operation,
        error: GreenroomError,
        phases: Phases,
        to_state: ActorState | None = None,
        endpoint: Endpoint | None = None,
    ) -> Operation:
        """Ends a failed operation: back to where the actor came from, unless that is lost (``to_state``)."""
        to = to_state or op.from_state
        assert to is not None
        phases.end("back-out")
        said = {"operation": op.id, "kind": op.kind, "actor": str(actor.key), "reason": error.reason}
        log.warning("operation failed", **said, error=error.message)
        if to is ActorState.SUSPENDED:
            await self._discard(actor, op)
        # Before the commit: after it nothing is awaited until the actor is bound, so no news can come in between.
        template = await self._template(actor) if to is ActorState.RUNNING else None
        change = await self._ops.commit(
            BackOut(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                to_state=to,
                error=Failure(code=error.code, reason=error.reason, message=error.message, metadata=error.facts()),
                endpoint=endpoint or actor.endpoint,
                phases=phases.all(),
            )
        )
        if to is ActorState.RUNNING:
            self._bind_again(change, template)
        else:
            self._engine.slot_freed()
        # Only now: until the commit, what was published and the sandbox could have been what is left of the actor.
        if to is ActorState.CRASHED:
            self._engine.spawn(self._discard(actor, op), f"discard-{actor.uid}")
        if op.kind is OperationKind.SUSPEND:
            self._engine.spawn(self._unpublish(op), f"unpublish-{op.snapshot}")
        assert change.operation is not None
        return change.operation

    async def _unpublish(self, op: Operation) -> None:
        """What a suspend that was backed out may have left: on its worker's disk, and in the snapshot store."""
        try:
            await self._engine.members.ask(op.worker, api.Release(snapshot_id=op.snapshot))
        except GreenroomError as error:
            self._engine.inventories.look_closely(op.worker)  # the next comparison finds a copy that is still there
            log.info("a copy may stay on a worker", worker=op.worker, snapshot=op.snapshot, error=error.message)
        await self._engine.snapshots.retract(op.uid, op.snapshot)
        log.info("snapshot retracted", snapshot=op.snapshot, actor=str(op.key), why="its suspend was backed out")

    async def _template(self, actor: Actor) -> Template | None:
        try:
            return await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
        except NotFound:
            return None


#: What speaks against a worker, beside an error that nobody thought of. A snapshot store or a registry that does not
#: answer does not: no worker could do better.
BLAMED = frozenset({"STALLED", "WORKER_HANGS", "WORKER_IO", "WORKER_OVERLOADED", "DISK_FULL"})


def may_succeed_elsewhere(error: GreenroomError) -> bool:
    return isinstance(error, Unavailable | Internal | ResourceExhausted) or error.reason == "STALLED"


def is_workers_fault(error: GreenroomError) -> bool:
    return isinstance(error, Internal) or error.reason in BLAMED


def _cancelled(op: Operation) -> Cancelled:
    return Cancelled(f"operation {op.id} ({op.kind} of {op.key}) was cancelled; it is backed out")


def _ids(actor: Actor, op: Operation) -> dict[str, Any]:
    """What every call about an actor carries."""
    return {"operation_id": op.attempt, "actor_uid": actor.uid, "generation": op.generation}


def _announced(actor: Actor, op: Operation, template: Template | None) -> Snapshot:
    """The manifest as far as the control plane knows it; the worker fills in what it made."""
    return Snapshot(
        id=op.snapshot,
        namespace=actor.namespace,
        actor=actor.name,
        actor_uid=actor.uid,
        template=actor.template,
        generation=op.generation,
        scope=SnapshotScope.MEMORY,
        backend="",
        fingerprint="",
        image_digest=template.image_digest if template else "",
        hostname="",
        created_at=op.created_at,
        golden=actor.golden,
    )


def _made(announced: Snapshot, said: Snapshot, worker: str) -> Snapshot:
    """The row of what was made: a worker says what it made, not whose it is."""
    local = said.state is SnapshotState.LOCAL
    return replace(
        announced,
        files=said.files,
        scope=said.scope,
        backend=said.backend,
        fingerprint=said.fingerprint,
        hostname=said.hostname,
        worker=worker,
        state=SnapshotState.LOCAL if local else SnapshotState.PRESENT,
        held=local,
    )


def _is_held(actor: Actor, template: Template) -> bool:
    """Whether a suspend is done when the worker's own disk has the snapshot. Every worker needs a golden one."""
    return not actor.golden and template.spec.durability is Durability.LOCAL


def _stored(source: Snapshot, actor: Actor) -> tuple[FileDigest, ...]:
    """What the snapshot store has of the actor, and keeps as long as the operation runs."""
    return source.files if source.state is SnapshotState.PRESENT and source.actor_uid == actor.uid else ()


def _both(change: Change) -> tuple[Actor, Operation]:
    assert change.actor is not None and change.operation is not None
    return change.actor, change.operation


@asynccontextmanager
async def _limit(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"{what} took longer than {seconds:g} s", reason="WORKER_HANGS") from None


class _Deadline:
    """An operation's deadline around a step; its end is a `DeadlineExceeded`, which backs the operation out.

    While an image is prepared it does not run: it begins anew with every byte that comes, so that what remains to be
    done then has its usual time. What doesn't move ends by the stall timeout.
    """

    def __init__(self, op: Operation, now: float, allowed_s: float) -> None:
        self._at = clock.monotonic() + max(0.0, op.deadline_at - now)
        self._allowed_s = allowed_s
        self._scope: asyncio.Timeout | None = None

    def put_off(self) -> None:
        self._at = max(self._at, clock.monotonic() + self._allowed_s)
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(self._at)

    @asynccontextmanager
    async def kept(self, op: Operation) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._at) as self._scope:
                yield
        except TimeoutError:
            raise DeadlineExceeded(
                f"operation {op.id} ({op.kind} of actor {op.key}) did not end within its deadline of "
                f"{self._allowed_s:g} s, in phase {op.phase}",
                reason="OPERATION_DEADLINE",
            ) from None
        finally:
            self._scope = None
