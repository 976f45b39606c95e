"""What an operation does, step by step. Each step is durable or can be repeated, so a driver can be run again from the
start by whoever takes the operation over: the worker answers a call that it has carried out from its journal.

Worst instants, for every driver:
- this process dies before or after any step: the row says which operation holds the actor; `Recovery` runs the driver
  again;
- a reply is lost: the call is sent again with the same operation id and is answered from the worker's journal;
- the lease was taken over: the next write or call is refused with `LeaseLost`, and the driver stops without a trace.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import (
    DataLoss,
    DeadlineExceeded,
    GreenroomError,
    Internal,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.lifecycle import (
    Advance,
    BackOut,
    Change,
    FallBack,
    FinishDelete,
    FinishPause,
    FinishResume,
    FinishSuspend,
    Rebind,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Endpoint,
    Failure,
    LayerProgress,
    Operation,
    OperationKind,
    PhaseTime,
    Record,
    Snapshot,
    SnapshotScope,
    Template,
)
from greenroom.engine.bindings import Binding

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

A = TypeVar("A", bound=Record)

#: A worker that takes longer to end a sandbox is asked again when it next says hello.
DISCARD_TIMEOUT_S = 30.0
#: Between two writes of an operation's progress.
PROGRESS_INTERVAL_S = 0.25


class Phases:
    """Times of an operation, one after the other, so that they sum to its total."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._phases: list[PhaseTime] = []

    def end(self, name: str) -> None:
        now = time.monotonic()
        self._phases.append(PhaseTime(name=name, seconds=now - self._at))
        self._at = now

    def took(self, phases: tuple[PhaseTime, ...], rest: str) -> None:
        """Takes over what a worker measured; the remainder since the last mark (messages, waiting) is ``rest``."""
        now = time.monotonic()
        spent = sum(p.seconds for p in phases)
        self._phases += [PhaseTime(name=rest, seconds=max(0.0, now - self._at - spent)), *phases]
        self._at = now

    def all(self) -> tuple[PhaseTime, ...]:
        return tuple(self._phases)


class Drivers:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store

    # --- resume -------------------------------------------------------------------------------------------

    async def resume(self, change: Change, phases: Phases) -> Operation:
        """From RESUMING to RUNNING, or back to where it came from."""
        actor, op = _both(change)
        source, template = change.source, change.template
        refused: list[str] = []
        while True:
            try:
                async with _deadline(op):
                    started = await self._start(actor, op, template, source)
                break
            except LeaseLost:
                raise
            except DataLoss as error:
                if error.reason != "SNAPSHOT_CORRUPT" or source is None:
                    return await self._back_out(actor, op, error, phases)
                try:
                    actor, op, source = await self._fall_back(actor, op, source, error)
                except LeaseLost:
                    raise
                except GreenroomError as failure:
                    return await self._back_out(actor, op, failure, phases)
            except (Unavailable, Internal, ResourceExhausted) as error:
                refused.append(op.worker)
                if op.from_state is ActorState.PAUSED:
                    return await self._back_out(actor, op, error, phases, ActorState.CRASHED)
                if len(refused) >= self._engine.config.attempts:
                    return await self._back_out(actor, op, error, phases)
                try:
                    actor, op, source, template = await self._rebind(actor, op, tuple(refused))
                except LeaseLost:
                    raise
                except GreenroomError:
                    return await self._back_out(actor, op, error, phases)
            except GreenroomError as error:
                return await self._back_out(actor, op, error, phases)
        phases.took(started.phases, "dispatch")
        finished = await self._store.apply(
            FinishResume(
                key=actor.key,
                now=time.time(),
                operation_id=op.id,
                generation=op.generation,
                endpoint=started.endpoint,
                phases=phases.all(),
            )
        )
        actor, op = _both(finished)
        phases.end("commit")
        self.bind(actor, template)
        return replace(op, phases=phases.all())

    async def _start(
        self, actor: Actor, op: Operation, template: Template | None, source: Snapshot | None
    ) -> api.Started:
        ids = _ids(actor, op)
        if op.from_state is ActorState.PAUSED:
            return await self._call(op, api.Thaw(**ids), api.Started)
        assert template is not None
        identity = api.Identity(namespace=actor.namespace, name=actor.name, uid=actor.uid, generation=op.generation)
        about: dict[str, Any] = {
            **ids,
            "identity": identity,
            "spec": template.spec,
            "image_digest": template.image_digest,
        }
        if source is None:
            return await self._call(op, api.Start(**about), api.Started)
        return await self._call(op, api.Restore(**about, snapshot=source), api.Started)

    async def _fall_back(
        self, actor: Actor, op: Operation, bad: Snapshot, error: DataLoss
    ) -> tuple[Actor, Operation, Snapshot]:
        log.error("snapshot is corrupt", actor=str(actor.key), snapshot=bad.id, error=error.message)
        change = await self._store.apply(
            FallBack(
                key=actor.key,
                now=time.time(),
                operation_id=op.id,
                generation=op.generation,
                snapshot_id=bad.id,
                detail=error.message,
            )
        )
        actor, op = _both(change)
        return actor, op, await self._store.get(Snapshot, op.snapshot)

    async def _rebind(
        self, actor: Actor, op: Operation, refused: tuple[str, ...]
    ) -> tuple[Actor, Operation, Snapshot | None, Template | None]:
        """The next worker, after whatever the last one made is ended."""
        await self._discard(actor, op)
        change = await self._store.apply(
            Rebind(key=actor.key, now=time.time(), operation_id=op.id, generation=op.generation, avoid=refused)
        )
        actor, op = _both(change)
        return actor, op, change.source, change.template

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
        try:
            async with _deadline(op):
                made = await self._call(
                    op, api.Checkpoint(**ids, snapshot=await self._announced(actor, op)), api.Checkpointed
                )
                phases.took(made.phases, "dispatch")
                await self._advance(actor, op, "publish")
                published = await self._call(op, api.Publish(**ids, snapshot_id=op.snapshot), api.Published)
                phases.took(published.phases, "dispatch")
            finished = await self._store.apply(
                FinishSuspend(
                    key=actor.key,
                    now=time.time(),
                    operation_id=op.id,
                    generation=op.generation,
                    snapshot=published.snapshot,
                    phases=phases.all(),
                )
            )
        except LeaseLost:
            raise
        except GreenroomError as error:
            return await self._stay_awake(actor, op, error, phases)
        phases.end("commit")
        self._engine.slot_freed()
        self._engine.spawn(self._discard(actor, op, snapshot_id=op.snapshot), f"discard-{actor.uid}")
        _, op = _both(finished)
        return replace(op, phases=phases.all())

    async def _announced(self, actor: Actor, op: Operation) -> Snapshot:
        """The manifest as far as the control plane knows it; the worker fills in what it made."""
        template = await self._store.get(Template, f"{actor.namespace}/{actor.template}")
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
            image_digest=template.image_digest,
            hostname="",
            created_at=op.created_at,
            golden=actor.golden,
        )

    async def _stay_awake(self, actor: Actor, op: Operation, error: GreenroomError, phases: Phases) -> Operation:
        """A suspend that failed: the actor goes on as if nothing had been asked."""
        if op.from_state is ActorState.PAUSED:
            return await self._back_out(actor, op, error, phases)
        thaw = api.Thaw(**_ids(actor, op), snapshot_id=op.snapshot)
        try:
            thawed = await self._call(op, thaw, api.Started)
        except LeaseLost:
            raise
        except GreenroomError as lost:
            log.error("actor lost in a suspend", actor=str(actor.key), error=error.message, then=lost.message)
            return await self._back_out(actor, op, error, phases, ActorState.CRASHED)
        return await self._back_out(actor, op, error, phases, endpoint=thawed.endpoint)

    # --- pause and delete ---------------------------------------------------------------------------------

    async def pause(self, change: Change, phases: Phases) -> Operation:
        actor, op = _both(change)
        call = api.Freeze(**_ids(actor, op))
        try:
            async with _deadline(op):
                frozen = await self._call(op, call, api.Done)
        except LeaseLost:
            raise
        except GreenroomError as error:
            return await self._stay_awake(actor, op, error, phases)
        phases.took(frozen.phases, "dispatch")
        finished = await self._store.apply(
            FinishPause(
                key=actor.key,
                now=time.time(),
                operation_id=op.id,
                generation=op.generation,
                phases=phases.all(),
            )
        )
        return _both(finished)[1]

    async def delete(self, change: Change, phases: Phases) -> Operation:
        """Ends the sandbox, then forgets the actor; its snapshots are condemned in the same commit, the janitor
        removes their files. A worker that is away does not hold it up: what it still runs, it is told to discard
        when it comes back."""
        actor, op = _both(change)
        if actor.worker:
            await self._discard(actor, op, forget=True)
        phases.end("discard")
        finished = await self._store.apply(
            FinishDelete(
                key=actor.key,
                now=time.time(),
                operation_id=op.id,
                generation=op.generation,
                phases=phases.all(),
            )
        )
        self._engine.slot_freed()
        assert finished.operation is not None
        return finished.operation

    # --- parts --------------------------------------------------------------------------------------------

    async def _call(self, op: Operation, call: api.AgentCall, answer: type[A]) -> A:
        """Asks the operation's worker; when the connection breaks, again once it is back (``worker_return_s``)."""
        until = time.monotonic() + self._engine.config.worker_return_s
        while True:
            try:
                result = await self._engine.hub.call(op.worker, call, self._on_progress(op))
                assert isinstance(result, answer)
                return result
            except Unavailable as error:
                if error.reason != "WORKER_DISCONNECTED" or time.monotonic() >= until:
                    raise
            await self._engine.recovery.wait_for_worker(op.worker, until)

    def _on_progress(self, op: Operation) -> Callable[[api.Progress], None]:
        last = 0.0

        def report(progress: api.Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= PROGRESS_INTERVAL_S:
                last = time.monotonic()
                self._engine.spawn(self._progress(op, progress.phase, progress.layers), f"progress-{op.id}")

        return report

    async def _progress(self, op: Operation, phase: str, layers: tuple[LayerProgress, ...]) -> None:
        try:
            await self._store.apply(
                Advance(
                    key=op.key,
                    now=time.time(),
                    operation_id=op.id,
                    generation=op.generation,
                    phase=phase,
                    layers=layers,
                )
            )
        except LeaseLost:
            pass  # the operation has ended meanwhile, or another process has it

    async def _advance(self, actor: Actor, op: Operation, phase: str) -> None:
        await self._store.apply(
            Advance(key=actor.key, now=time.time(), operation_id=op.id, generation=op.generation, phase=phase)
        )

    async def _discard(self, actor: Actor, op: Operation, *, snapshot_id: str = "", forget: bool = False) -> None:
        """Ends what the actor has on the operation's worker. A worker that is away is told when it says hello."""
        call = api.Discard(**_ids(actor, op), snapshot_id=snapshot_id, forget=forget)
        try:
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                await self._engine.hub.call(op.worker or actor.worker, call)
        except LeaseLost:
            pass  # it runs there again already, under a newer generation, which ended the old sandbox itself
        except (Unavailable, TimeoutError) as error:
            log.info("discard is left to the worker's return", actor=str(actor.key), error=str(error))

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
        if to in (ActorState.SUSPENDED, ActorState.CRASHED):
            await self._discard(actor, op, snapshot_id=op.snapshot if op.kind is OperationKind.SUSPEND else "")
        change = await self._store.apply(
            BackOut(
                key=actor.key,
                now=time.time(),
                operation_id=op.id,
                generation=op.generation,
                to_state=to,
                error=Failure(code=error.code, reason=error.reason, message=error.message, metadata=error.metadata),
                endpoint=endpoint or actor.endpoint,
                phases=phases.all(),
            )
        )
        actor, op = _both(change)
        if actor.state is ActorState.RUNNING:
            self.bind(actor, await self._template(actor))
        else:
            self._engine.slot_freed()
        return op

    async def _template(self, actor: Actor) -> Template | None:
        try:
            return await self._store.get(Template, f"{actor.namespace}/{actor.template}")
        except NotFound:
            return None


def _ids(actor: Actor, op: Operation) -> dict[str, Any]:
    """What every call about an actor carries."""
    return {"operation_id": op.id, "actor_uid": actor.uid, "generation": op.generation}


def _both(change: Change) -> tuple[Actor, Operation]:
    assert change.actor is not None and change.operation is not None
    return change.actor, change.operation


@asynccontextmanager
async def _deadline(op: Operation) -> AsyncIterator[None]:
    """The operation's deadline around a step; its end is a `DeadlineExceeded`, which backs the operation out."""
    try:
        async with asyncio.timeout(max(0.0, op.deadline_at - time.time())):
            yield
    except TimeoutError:
        raise DeadlineExceeded(
            f"operation {op.id} ({op.kind} of actor {op.key}) did not end within its deadline of "
            f"{op.deadline_at - op.created_at:g} s, in phase {op.phase}",
            reason="OPERATION_DEADLINE",
        ) from None
