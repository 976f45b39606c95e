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
from typing import TYPE_CHECKING, Any

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core import keeping, manifests
from greenroom.core.commands import (
    BackOut,
    Change,
    FallBack,
    FinishDelete,
    FinishPause,
    FinishResume,
    FinishSuspend,
    Rebind,
)
from greenroom.core.errors import (
    DataLoss,
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
    Endpoint,
    Operation,
    OperationKind,
    Snapshot,
    Template,
)
from greenroom.engine.bindings import Binding
from greenroom.engine.calls import Calls, Deadline, ids, limit
from greenroom.engine.operations import as_failure
from greenroom.engine.phases import Phases

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Thawing takes milliseconds; a worker that takes longer hangs, and what lives there can't be reached by anybody.
PUT_BACK_TIMEOUT_S = 30.0
#: Characters of an error that are kept as the reason why a worker was given up.
MAX_WHY = 300


class Drivers:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ops = engine.ops
        self._calls = Calls(engine)

    # --- resume -------------------------------------------------------------------------------------------

    async def resume(self, change: Change, phases: Phases) -> Operation:
        """From RESUMING to RUNNING, or back to where it came from."""
        actor, op = _both(change)
        source, template = change.source, change.template
        refused: list[str] = []
        try:
            return await self._resume(actor, op, template, source, refused, self._calls.deadline(op), phases)
        finally:
            self._calls.over(actor.key)

    async def _resume(
        self,
        actor: Actor,
        op: Operation,
        template: Template | None,
        source: Snapshot | None,
        refused: list[str],
        deadline: Deadline,
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
        self, actor: Actor, op: Operation, template: Template | None, source: Snapshot | None, deadline: Deadline
    ) -> api.Started:
        if op.from_state is ActorState.PAUSED:
            return await self._calls.ask(op, api.Thaw(**ids(actor, op)), api.Started)
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
            **ids(actor, op),
            "identity": identity,
            "spec": template.spec,
            "image_digest": template.image_digest,
            "peers": self._engine.images.peers(op.worker, template.image_digest),
        }
        if source is not None:
            return await self._calls.ask(op, api.Restore(**about, snapshot=source), api.Started, deadline=deadline)
        if op.snapshot:  # to boot it instead would silently reset it
            raise FailedPrecondition(
                f"actor {actor.key}: the record of its snapshot {op.snapshot} is missing; delete the actor",
                reason="SNAPSHOT_NOT_FOUND",
            )
        return await self._calls.ask(op, api.Start(**about), api.Started, deadline=deadline)

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
        await self._calls.discard(actor, op)  # whatever the last one made
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
        about = ids(actor, op)
        self._engine.bindings.revoke(actor.key)
        try:
            async with self._calls.deadline(op).kept(op):
                template = await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
                announced = manifests.announced(actor, op, template)
                made = await self._calls.ask(op, api.Checkpoint(**about, snapshot=announced), api.Checkpointed)
                phases.took(made.phases, "dispatch")
                await self._calls.advance(op, api.Progress(phase="publish"))
                hold = manifests.is_held(actor, template)
                base = () if hold or change.source is None else manifests.stored(change.source, actor)
                publish = api.Publish(**about, snapshot_id=op.snapshot, hold=hold, base=base)
                published = await self._calls.ask(op, publish, api.Published)
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
        self,
        actor: Actor,
        op: Operation,
        template: Template | None,
        snapshot: Snapshot,
        phases: Phases,
        ran_on: GreenroomError | None = None,
    ) -> Operation:
        """``snapshot``: as the worker says it, or what it has put into the snapshot store. ``ran_on``: the actor may
        have, after it; why the suspend failed."""
        snapshot = manifests.made(manifests.announced(actor, op, template), snapshot, op.worker)
        finished = await self._ops.commit(
            FinishSuspend(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                snapshot=snapshot,
                phases=phases.all(),
                keeps=keeping.keeps_more(template),
                ran_on=as_failure(ran_on) if ran_on is not None else None,
            )
        )
        phases.end("commit")
        self._engine.slot_freed()
        self._engine.spawn(self._calls.discard(actor, op), f"discard-{actor.uid}")
        if keeping.keeps_more(template):
            self._engine.spawn(self._engine.collection.expire(actor.key, actor.uid), f"expire-{actor.uid}")
        if snapshot.held:
            self._engine.uploads.begin(snapshot)
        assert finished.operation is not None
        return replace(finished.operation, phases=phases.all())

    async def _put_back(self, actor: Actor, op: Operation, error: GreenroomError, phases: Phases) -> Operation:
        """An operation on a living sandbox failed: it is put back as it was, running or frozen, as if nothing had been
        asked. A sandbox that can't be is lost; then what was published of it is what is left, and all that there was if
        it was frozen since: which nobody knows once it was let run again, here or by who had the operation before."""
        about = ids(actor, op)
        endpoint: Endpoint | None = None
        ran_on = op.takeovers > 0 and op.from_state is not ActorState.PAUSED
        try:
            if error.reason == "WORKER_DISCONNECTED":
                raise error  # it has been waited for already
            async with limit(PUT_BACK_TIMEOUT_S, f"putting actor {actor.key} back"):
                if op.from_state is ActorState.PAUSED:
                    await self._calls.ask(op, api.Freeze(**about), api.Done, undo=True)
                else:
                    before, ran_on, thaw = ran_on, True, api.Thaw(**about)
                    try:
                        endpoint = (await self._calls.ask(op, thaw, api.Started, undo=True, once=True)).endpoint
                    except GreenroomError as refused:
                        if refused.reason == "NOT_RESIDENT":
                            ran_on = before
                        if refused.reason != "WORKER_DISCONNECTED":
                            raise
                        endpoint = (await self._calls.ask(op, thaw, api.Started, undo=True)).endpoint
        except LeaseLost:
            raise
        except GreenroomError as lost:
            log.error("actor lost", actor=str(actor.key), kind=op.kind, error=error.message, then=lost.message)
            if op.kind is OperationKind.SUSPEND and (saved := await self._published(op)) is not None:
                why = error if ran_on else None
                with contextlib.suppress(FailedPrecondition):  # it refers to what is not kept; then it is no use
                    return await self._finish_suspend(actor, op, await self._template(actor), saved, phases, why)
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
        call = api.Freeze(**ids(actor, op))
        try:
            async with self._calls.deadline(op).kept(op):
                frozen = await self._calls.ask(op, call, api.Done)
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
            await self._calls.discard(actor, op, forget=True)
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

    # --- ends that were not wanted ------------------------------------------------------------------------

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
            await self._calls.discard(actor, op)
        # Before the commit: after it nothing is awaited until the actor is bound, so no news can come in between.
        template = await self._template(actor) if to is ActorState.RUNNING else None
        change = await self._ops.commit(
            BackOut(
                key=actor.key,
                now=self._engine.now(),
                operation_id=op.id,
                generation=op.generation,
                to_state=to,
                error=as_failure(error),
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
            self._engine.spawn(self._calls.discard(actor, op), f"discard-{actor.uid}")
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


#: Reasons that are one worker's alone, whatever the class of the error: another one has another disk.
_OF_ONE_WORKER = frozenset({"STALLED", "WORKER_IO"})


def may_succeed_elsewhere(error: GreenroomError) -> bool:
    return isinstance(error, Unavailable | Internal | ResourceExhausted) or error.reason in _OF_ONE_WORKER


def is_workers_fault(error: GreenroomError) -> bool:
    return isinstance(error, Internal) or error.reason in BLAMED


def _both(change: Change) -> tuple[Actor, Operation]:
    assert change.actor is not None and change.operation is not None
    return change.actor, change.operation
