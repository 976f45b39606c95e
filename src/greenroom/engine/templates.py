"""Preparing a template: pull the image, boot it once, wait until it is ready, keep the golden snapshot.

The boot is an ordinary actor, hidden (its name begins with an underscore, which no name of a person's can), that is
resumed without a snapshot, suspended, and deleted; its snapshot stays behind as the template's golden one. So
everything that makes an actor's operations safe holds for it too, and a preparation that was cut short is simply
begun again: first it removes what the one before has left.

A template names the operation that prepares it (``Template.operation``); a driver that finds another one there stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import (
    AlreadyExists,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    LeaseLost,
    NotFound,
    Unavailable,
)
from greenroom.core.records import (
    Actor,
    Failure,
    Key,
    LayerProgress,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
)
from greenroom.engine import clock
from greenroom.engine.drivers import Phases
from greenroom.engine.operations import failure_of

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: How long a preparation waits for the first worker of its pool.
WORKER_WAIT_S = 60.0
#: Between two writes of how far a pull is.
PROGRESS_INTERVAL_S = 0.25
#: The same for the template, which people watch rather than programs.
TEMPLATE_PROGRESS_INTERVAL_S = 1.0
#: Tries to make a template's image ready on a worker that has joined, and the pause before the second; it doubles. What
#: does not succeed then is done by the first actor that wakes there.
WARM_ATTEMPTS = 5
WARM_PAUSE_S = 5.0
#: Tries of a conditional write against somebody else's writes to the same record.
WRITE_ATTEMPTS = 10


class Preparer:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops

    async def apply(self, key: Key, spec: TemplateSpec, request_id: str) -> tuple[Template, Operation | None]:
        """See `greenroom.engine.port.ControlPlane.apply_template`."""
        template = await self._found_or_new(key, spec)
        if template.spec != spec and template.state is TemplateState.FAILED:
            await self.delete(key)  # nobody was ever made from it, else this says who
            template = await self._found_or_new(key, spec)
        if template.spec != spec:
            raise FailedPrecondition(
                f"template {key} exists with another spec, and templates can't change: actors were made from it; "
                "give the new one another name, or delete this one first",
                reason="TEMPLATE_IMMUTABLE",
            )
        if template.state is TemplateState.READY:
            return template, None
        if (op := await self._under_way(template)) is not None:
            return template, op
        return await self._begin(template, request_id)

    async def _found_or_new(self, key: Key, spec: TemplateSpec) -> Template:
        now = self._engine.now()
        new = Template(
            namespace=key.namespace,
            name=key.name,
            uid=self._engine.new_id(),
            spec=spec,
            state=TemplateState.PENDING,
            created_at=now,
            state_since=now,
        )
        try:
            return await self._ops.read(Template, str(key))
        except NotFound:
            pass
        try:
            return await self._ops.steadily(lambda: self._store.put(new))
        except AlreadyExists:  # somebody else's, or ours: then the reply was lost
            return await self._ops.read(Template, str(key))

    async def _under_way(self, template: Template) -> Operation | None:
        """The operation that prepares it, driven again if its driver has given up."""
        try:
            op = await self._ops.read(Operation, template.operation) if template.operation else None
        except NotFound:
            return None
        if op is None or op.state is not OperationState.RUNNING:
            return None
        if self.may_take(op) and self._ops.claim(op.id):
            try:
                await self.take_up(op)
            finally:
                self._ops.release(op.id)
        return op

    def may_take(self, op: Operation) -> bool:
        """Whether a preparation is this process's to drive, or nobody's."""
        return op.owner == self._engine.config.owner or op.held_until <= self._engine.now()

    async def begin_abandoned(self) -> None:
        """Prepares templates that wait for nobody: who applied them died before it had begun, or who prepared them
        was overtaken at its end."""
        for state in (TemplateState.PENDING, TemplateState.PREPARING):
            for template in await self._engine.census.all(Template, state=state):
                if template.state_since + self._engine.config.lease_ttl_s > self._engine.now():
                    continue  # whoever did that is about to go on
                try:
                    if await self._under_way(template) is None:
                        log.info("takes up a template", template=str(template.key))
                        await self._begin(template, "")
                except GreenroomError as error:
                    log.info("template not taken up", template=str(template.key), error=error.message)

    async def _begin(self, template: Template, request_id: str) -> tuple[Template, Operation | None]:
        now = self._engine.now()
        op = Operation(
            id=self._engine.new_id(),
            kind=OperationKind.PREPARE,
            namespace=template.namespace,
            name=template.name,
            uid=template.uid,
            created_at=now,
            updated_at=now,
            deadline_at=now + self._engine.config.prepare_deadline_s,
            owner=self._engine.config.owner,
            generation=template.generation + 1,
            held_until=now + self._engine.config.lease_ttl_s,
            phase="image",
            request_id=request_id,
        )
        self._ops.claim(op.id)
        asked = clock.monotonic()
        try:
            op = await self._store.put(op)
            template = await self._change(
                template,
                unchanged=True,
                state=TemplateState.PREPARING,
                operation=op.id,
                generation=op.generation,
            )
            self._ops.track(op, self._run(template, op), asked)
        except Conflict as overtaken:  # by somebody else who applied it in the same moment
            await self._end(op, overtaken)
            template = await self._ops.read(Template, template.pk)
            return template, await self._under_way(template)
        finally:
            self._ops.release(op.id)
        return template, op

    async def take_up(self, op: Operation) -> None:
        """Goes on with a preparation whose driver is gone: from its beginning, or only says how it ended. The caller
        has claimed it (`Operations.claim`). Waits for no other operation: the caller may be about to take that up.

        Raises:
            Conflict: another replica was quicker (reason ``OVERTAKEN``).
        """
        try:
            template = await self._ops.read(Template, str(op.key))
        except NotFound:
            template = None
        asked = clock.monotonic()
        op = await self._take(op)
        if template is None or template.uid != op.uid:
            await self._end(op, _deleted(op))
        elif template.state is TemplateState.READY:
            self._ops.track(op, self._tidy(template, op), asked)
        elif template.operation == op.id or template.state is TemplateState.PENDING:
            template = await self._change(
                template, state=TemplateState.PREPARING, operation=op.id, generation=op.generation
            )
            self._ops.track(op, self._run(template, op), asked)
        else:
            await self._end(op, _overtaken(template))

    async def _take(self, op: Operation) -> Operation:
        """Makes this process the one that drives it; whoever did so before finds that out by the generation."""

        async def write() -> Operation:
            current = await self._store.get(Operation, op.id)
            if (current.owner, current.generation) == (self._engine.config.owner, op.generation + 1):
                return current  # taken already, and the reply was lost
            if (current.owner, current.held_until, current.state) != (op.owner, op.held_until, op.state):
                raise Conflict(f"another process goes on with operation {op.id}", reason="OVERTAKEN")
            now = self._engine.now()
            return await self._store.put(
                replace(
                    current,
                    owner=self._engine.config.owner,
                    generation=current.generation + 1,
                    takeovers=current.takeovers + 1,
                    held_until=now + self._engine.config.lease_ttl_s,
                    deadline_at=max(current.deadline_at, now + self._engine.config.prepare_deadline_s),
                    updated_at=now,
                )
            )

        return await self._against_others(write, op.id)

    async def renew(self, op: Operation) -> Operation | None:
        """Holds a preparation on; None when it has ended. Raises `LeaseLost` when it is another process's."""
        for _ in range(WRITE_ATTEMPTS):
            current = await self._store.get(Operation, op.id)
            if current.state is not OperationState.RUNNING:
                return None
            now = self._engine.now()
            if current.generation != op.generation or current.held_until <= now:
                raise LeaseLost(f"operation {op.id} is held by {current.owner} now, or its hold has run out")
            try:
                return await self._store.put(replace(current, held_until=now + self._engine.config.lease_ttl_s))
            except Conflict:
                continue  # its own driver noted something
        raise Conflict(f"operation {op.id} keeps changing")

    async def cancel(self, op: Operation) -> Operation:
        """Asks for a preparation to be given up: the template is FAILED then."""

        async def write() -> Operation:
            current = await self._store.get(Operation, op.id)
            if current.state is not OperationState.RUNNING or current.cancel_requested:
                return current
            return await self._store.put(replace(current, cancel_requested=True, updated_at=self._engine.now()))

        current = await self._against_others(write, op.id)
        if (running := self._ops.running.get(op.id)) is not None:
            running.request_cancel()
        return current

    async def _run(self, template: Template, op: Operation) -> Operation:
        phases = Phases()
        error: GreenroomError | None = None
        running = self._ops.running.get(op.id)
        try:
            # A deadline is for what follows the image: that may take as long as bytes move (`_pull_on`).
            async with asyncio.timeout(None) as scope:
                if running is not None:
                    running.step = scope
                    if running.cancel_requested:
                        running.request_cancel()
                await self._prepare(template, op, phases, scope)
        except TimeoutError:
            error = DeadlineExceeded(
                f"template {template.key} was not ready within {self._engine.config.prepare_deadline_s:g} s",
                reason="OPERATION_DEADLINE",
            )
            if running is not None and running.cancel_requested:
                error = Cancelled(f"the preparation of template {template.key} was cancelled; apply it again")
        except LeaseLost:
            raise
        except GreenroomError as failed:
            error = failed
        finally:
            if running is not None:
                running.step = None
        if error is not None and error.reason != "OVERTAKEN":
            log.warning("template failed", template=str(template.key), reason=error.reason, error=error.message)
            await self._quietly(self._drop_golden(template))
            await self._fail(template, op, error)
        return await self._end(op, error, phases)

    async def _fail(self, template: Template, op: Operation, error: GreenroomError) -> None:
        failed = TemplateState.FAILED
        try:
            await self._change(
                template,
                op,
                state=failed,
                reason=error.reason,
                message=error.message,
                operation="",
                phase="",
                layers=(),
            )
        except (Conflict, NotFound) as gone:
            log.info("template not marked as failed", template=str(template.key), error=gone.message)

    async def _tidy(self, template: Template, op: Operation) -> Operation:
        """The end of a preparation that has succeeded."""
        await self._quietly(self._drop_golden(template))
        return await self._end(op, None)

    async def _prepare(self, template: Template, op: Operation, phases: Phases, scope: asyncio.Timeout) -> None:
        spec, golden = template.spec, _golden(template.key)
        await self._drop_golden(template)
        digest = await self._pull(template, op, phases)
        phases.end("image")
        running = self._ops.running.get(op.id)
        if not scope.expired() and not (running is not None and running.cancel_requested):
            scope.reschedule(clock.monotonic() + self._engine.config.prepare_deadline_s)
        template = await self._change(template, op, image_digest=digest, phase="boot", layers=())

        await self._note(op, phase="boot", layers=())
        await self._engine.create_actor(golden, template.name, golden=True)
        _succeeded(await self._engine.resume(golden, cause="template", wait_s=spec.readyz.timeout_s + 60))
        phases.end("boot")

        await self._note(op, phase="snapshot")
        template = await self._change(template, op, phase="snapshot")
        _succeeded(await self._engine.suspend(golden, cause="template"))
        snapshot = (await self._ops.read(Actor, str(golden))).snapshot
        ready = TemplateState.READY
        template = await self._change(
            template, op, state=ready, reason="", message="", operation="", golden_snapshot=snapshot, phase=""
        )
        phases.end("snapshot")
        await self._quietly(self._drop_golden(template))
        self._warm_all(template)

    async def _worker_of(self, pool: str) -> str:
        """A connected worker of the pool, waiting for the first one."""
        try:
            async with asyncio.timeout(WORKER_WAIT_S):
                while True:
                    arrival = self._engine.census.arrival
                    for name, hello in self._engine.hub.connected().items():
                        if hello.pool == pool:
                            return name
                    await arrival.wait()
        except TimeoutError:
            raise FailedPrecondition(
                f"pool {pool!r} has no connected worker; apply a WorkerPool of that name, or start the server with one",
                reason="NO_WORKER",
            ) from None

    async def _pull(self, template: Template, op: Operation, phases: Phases) -> str:
        """The image's digest, pulled by some worker; by another one when that goes away."""
        while True:
            worker = await self._worker_of(template.spec.pool)
            phases.end("worker")
            try:
                return await self._pull_on(worker, template, op)
            except Unavailable as error:
                if error.reason != "WORKER_DISCONNECTED":
                    raise
            await asyncio.sleep(self._engine.config.retry_s)

    async def _pull_on(self, worker: str, template: Template, op: Operation) -> str:
        """Whatever it takes, as long as something moves. How far it is stands in the operation and in the template."""
        layers: tuple[LayerProgress, ...] = ()
        image, phase, shown_at = template.spec.image, op.phase, 0.0

        def report(progress: api.Progress) -> None:
            nonlocal layers, phase
            layers, phase = progress.layers, progress.phase

        peers = self._engine.images.peers(worker)
        prepare = api.Prepare(image=image, peers=peers, id=f"{op.id}-{op.generation}")
        call = asyncio.ensure_future(self._engine.hub.call(worker, prepare, report))
        moved = clock.monotonic()
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=PROGRESS_INTERVAL_S)
                if layers != op.layers or phase != op.phase:
                    changed = phase != op.phase
                    op = await self._note(op, phase=phase, layers=layers)
                    moved = clock.monotonic()
                    if changed or moved - shown_at >= TEMPLATE_PROGRESS_INTERVAL_S:
                        template = await self._change(template, op, phase=op.phase, layers=op.layers)
                        shown_at = moved
                elif clock.monotonic() - moved > self._engine.config.stall_s:
                    raise DeadlineExceeded(
                        f"pulling {image} on worker {worker}: nothing has moved for {self._engine.config.stall_s:g} s; "
                        "what was fetched is kept, so apply the template again when the registry answers",
                        reason="STALLED",
                    )
        finally:
            if not call.done() and not self._ops.closed:  # nobody waits for it any more; the worker must not go on
                self._engine.spawn(self._quietly(self._engine.hub.call(worker, api.StopPrepare(id=prepare.id))), "stop")
            call.cancel()
        prepared = await call
        assert isinstance(prepared, api.Prepared)
        return prepared.image_digest

    # --- workers that come --------------------------------------------------------------------------------

    async def prewarm(self, hello: api.Hello) -> None:
        """A worker has joined: images and sandboxes of its pool's templates are made ready there, one after the other:
        the link is the same for all."""
        after = ""
        while page := await self._store.list(Template, where={"state": TemplateState.READY}, after=after):
            for template in page:
                if template.spec.pool == hello.pool:
                    await self._quietly(self._warm(hello.worker, template))
            after = page[-1].pk

    def _warm_all(self, template: Template) -> None:
        for name, hello in self._engine.hub.connected().items():
            if hello.pool == template.spec.pool:
                self._engine.spawn(self._quietly(self._warm(name, template)), f"warm-{name}")

    async def _warm(self, worker: str, template: Template) -> None:
        pause_s = WARM_PAUSE_S
        for attempt in range(1, WARM_ATTEMPTS + 1):
            try:
                peers = self._engine.images.peers(worker, template.image_digest)
                call = api.Warm(spec=template.spec, image_digest=template.image_digest, peers=peers)
                await self._engine.hub.call(worker, call)
                return
            except Unavailable as error:  # the registry; one that is away itself is prepared anew when it is back
                if error.reason == "WORKER_DISCONNECTED" or attempt == WARM_ATTEMPTS:
                    raise
            await asyncio.sleep(pause_s)
            pause_s *= 2

    async def _quietly(self, work: Awaitable[object]) -> None:
        try:
            await work
        except GreenroomError as error:
            log.info("not done", error=error.message)

    # --- delete -------------------------------------------------------------------------------------------

    async def delete(self, key: Key) -> None:
        """See `greenroom.engine.port.ControlPlane.delete_template`. Cut short, it leaves the template FAILED (reason
        ``Deleting``), to be deleted again."""
        template = await self._ops.read(Template, str(key))
        await self._check_unused(template)
        claimed = await self._stop(template)
        try:
            # No actor can be made from a template that is FAILED; one that was made meanwhile is seen by a second look.
            message = "it is being deleted; delete it again if that does not end"
            await self._change(template, state=TemplateState.FAILED, reason="Deleting", message=message, operation="")
            try:
                await self._check_unused(template)
            except FailedPrecondition:
                await self._change(template, state=template.state, reason=template.reason, message=template.message)
                raise
            if claimed:
                op = await self._ops.read(Operation, claimed)
                await self._end(op, _deleted(op))
            await self._drop_golden(template, keep="")
            await self._ops.steadily(lambda: self._remove(template))
        finally:
            self._ops.release(claimed)

    async def _check_unused(self, template: Template) -> None:
        where = {"template": template.name}
        actors = await self._store.list(Actor, namespace=template.namespace, where=where, limit=10)
        if mine := [a for a in actors if not a.golden]:
            raise FailedPrecondition(
                f"template {template.key} is in use by actor {mine[0].key}; delete its actors first",
                reason="TEMPLATE_IN_USE",
            )

    async def _stop(self, template: Template) -> str:
        """Ends the preparation that is under way, and keeps it from being taken up again. Returns its id or ""."""
        operation_id = template.operation
        while operation_id and not self._ops.claim(operation_id):
            if running := self._ops.running.get(operation_id):
                running.task.cancel()
                await asyncio.wait({running.task})
            await asyncio.sleep(self._engine.config.retry_s)  # the janitor is looking at it just now
        return operation_id

    async def _remove(self, template: Template) -> None:
        try:
            current = await self._store.get(Template, template.pk)
        except NotFound:
            return
        if current.uid == template.uid:
            await self._store.remove(current)

    async def _drop_golden(self, template: Template, keep: str | None = None) -> None:
        """Removes the hidden actor, and every golden snapshot but the template's own (or ``keep``)."""
        try:
            _succeeded(await self._engine.delete(_golden(template.key), cause="template"))
        except NotFound:
            pass
        if keep is None:
            keep = (await self._ops.read(Template, template.pk)).golden_snapshot
        where = {"template": template.name}
        for snapshot in await self._store.list(Snapshot, namespace=template.namespace, where=where):
            if snapshot.golden and snapshot.id != keep:
                await self._condemn(snapshot)

    async def _condemn(self, snapshot: Snapshot) -> None:
        """The janitor removes it then."""

        async def write() -> None:
            try:
                current = await self._store.get(Snapshot, snapshot.id)
            except NotFound:
                return
            if current.state is not SnapshotState.CONDEMNED:
                await self._store.put(replace(current, state=SnapshotState.CONDEMNED))

        await self._against_others(write, snapshot.id)

    # --- records ------------------------------------------------------------------------------------------

    async def _change(
        self, template: Template, op: Operation | None = None, *, unchanged: bool = False, **fields: object
    ) -> Template:
        """Writes fields of a template, against whatever else is written to it.

        Raises:
            NotFound: it was deleted, also when there is another one of its name.
            Conflict: it is not ``op`` that prepares it any more, or (``unchanged``) somebody has begun or ended a
                preparation since ``template`` was read (reason ``OVERTAKEN``).
        """

        async def write() -> Template:
            current = await self._store.get(Template, template.pk)
            if current.uid != template.uid:
                raise NotFound(f"template {template.key} was deleted", reason="TEMPLATE_NOT_FOUND")
            if all(getattr(current, name) == value for name, value in fields.items()):
                return current  # written already, and the reply was lost
            moved = (current.state, current.operation) != (template.state, template.operation)
            newer = current.generation > int(str(fields.get("generation", current.generation)))
            if newer:  # a later process has taken the preparation up
                raise _overtaken(template)
            mine = op is None or (current.operation, current.generation) == (op.id, op.generation)
            if not mine or (unchanged and moved):
                raise _overtaken(template)
            since = current.state_since if fields.get("state", current.state) is current.state else self._engine.now()
            return await self._store.put(replace(current, **fields, state_since=since))

        return await self._against_others(write, str(template.key))

    async def _note(self, op: Operation, **fields: object) -> Operation:
        """Writes fields of a preparation's operation."""

        async def write() -> Operation:
            current = await self._store.get(Operation, op.id)
            if current.state is not OperationState.RUNNING:
                return current  # it has ended, and the reply was lost
            if current.generation != op.generation:
                raise LeaseLost(f"operation {op.id} is held by {current.owner} now")
            return await self._store.put(replace(current, **fields, updated_at=self._engine.now()))

        return await self._against_others(write, op.id)

    async def _end(self, op: Operation, error: GreenroomError | None, phases: Phases | None = None) -> Operation:
        current = await self._ops.read(Operation, op.id)
        if current.state is not OperationState.RUNNING:
            return current
        if (running := self._ops.running.get(op.id)) is not None:
            running.ending = True
        failure = None
        if error is not None:
            failure = Failure(code=error.code, reason=error.reason, message=error.message, metadata=error.facts())
        return await self._note(
            op,
            state=OperationState.FAILED if error else OperationState.DONE,
            error=failure,
            phases=phases.all() if phases else (),
            finished_at=self._engine.now(),
        )

    async def _against_others(self, write: Callable[[], Awaitable[T]], what: str) -> T:
        """Does a read and a conditional write until nobody comes in between."""
        for _ in range(WRITE_ATTEMPTS):
            try:
                return await self._ops.steadily(write)
            except Conflict as conflict:  # also a lost lease is one
                if conflict.reason != "VERSION_CONFLICT":
                    raise
        raise Conflict(f"{what} keeps changing")


def _golden(key: Key) -> Key:
    return Key(key.namespace, f"_golden-{key.name}")


def _deleted(op: Operation) -> FailedPrecondition:
    return FailedPrecondition(f"template {op.key} was deleted while it was prepared", reason="TEMPLATE_DELETED")


def _overtaken(template: Template) -> Conflict:
    return Conflict(f"another operation prepares template {template.key}; see the template", reason="OVERTAKEN")


def _succeeded(operation: Operation) -> Operation:
    """Raises what the operation failed with."""
    if operation.state is OperationState.FAILED:
        raise failure_of(operation)
    if operation.state is OperationState.RUNNING:
        raise DeadlineExceeded(
            f"operation {operation.id} ({operation.kind} of {operation.key}) is still in phase {operation.phase}"
        )
    return operation
