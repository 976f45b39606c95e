"""Preparing a template: pull the image, boot it once, wait until it is ready, keep the golden snapshot.

The boot is an ordinary actor, hidden (its name begins with an underscore, which no name of a person's can), that is
resumed without a snapshot, suspended, and deleted; its snapshot stays behind as the template's golden one. So
everything that makes an actor's operations safe holds for it too, and a preparation that was cut short is simply
begun again: first it removes what the one before has left.

A template names the operation that prepares it (``Template.operation``); a driver that finds another one there stops.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from greenroom.core.errors import (
    AlreadyExists,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    LeaseLost,
    NotFound,
)
from greenroom.core.records import (
    Actor,
    Key,
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
from greenroom.engine.operations import failure_of, quietly
from greenroom.engine.phases import Phases
from greenroom.engine.preparations import overtaken

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Why a template is FAILED whose deletion was begun.
DELETING = "Deleting"


class Preparer:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops
        self._rows = engine.preparations

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
        if self._rows.may_take(op) and self._ops.claim(op.id):
            try:
                await self.take_up(op)
            finally:
                self._ops.release(op.id)
        return op

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

    async def finish_deletions(self) -> None:
        """Goes on with deletions whose process died: of a template that is half deleted nothing can be made."""
        long_ago = self._engine.now() - self._engine.config.lease_ttl_s  # else whoever began it is about to go on
        for template in await self._engine.census.all(Template, state=TemplateState.FAILED):
            if template.reason != DELETING or template.state_since > long_ago:
                continue
            log.info("goes on with a deletion", template=str(template.key))
            try:
                await self.delete(template.key)
            except FailedPrecondition as used:
                await quietly(self._give_back(template, used.message))
            except GreenroomError as error:
                log.info("template not deleted, tries again", template=str(template.key), error=error.message)

    async def _give_back(self, template: Template, why: str) -> None:
        """An actor was made from it in the moment in which its deletion began; nothing of it has gone since."""
        ready = TemplateState.READY if template.golden_snapshot else TemplateState.FAILED
        await self._rows.change(
            template, state=ready, reason="" if template.golden_snapshot else "NotDeleted", message=why
        )

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
            template = await self._rows.change(
                template,
                unchanged=True,
                state=TemplateState.PREPARING,
                operation=op.id,
                generation=op.generation,
            )
            self._ops.track(op, self._run(template, op), asked)
        except Conflict as conflict:  # by somebody else who applied it in the same moment
            await self._rows.end(op, conflict)
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
        op = await self._rows.take(op)
        if template is None or template.uid != op.uid:
            await self._rows.end(op, _deleted(op))
        elif template.state is TemplateState.READY:
            self._ops.track(op, self._tidy(template, op), asked)
        elif template.operation == op.id or template.state is TemplateState.PENDING:
            template = await self._rows.change(
                template, state=TemplateState.PREPARING, operation=op.id, generation=op.generation
            )
            self._ops.track(op, self._run(template, op), asked)
        else:
            await self._rows.end(op, overtaken(template))

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
            await quietly(self._drop_golden(template))
            await self._fail(template, op, error)
        return await self._rows.end(op, error, phases)

    async def _fail(self, template: Template, op: Operation, error: GreenroomError) -> None:
        failed = TemplateState.FAILED
        try:
            await self._rows.change(
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
        await quietly(self._drop_golden(template))
        return await self._rows.end(op, None)

    async def _prepare(self, template: Template, op: Operation, phases: Phases, scope: asyncio.Timeout) -> None:
        spec, golden = template.spec, _golden(template.key)
        await self._drop_golden(template)
        digest = await self._engine.pulls.pull(template, op, phases)
        phases.end("image")
        running = self._ops.running.get(op.id)
        if not scope.expired() and not (running is not None and running.cancel_requested):
            scope.reschedule(clock.monotonic() + self._engine.config.prepare_deadline_s)
        template = await self._rows.change(template, op, image_digest=digest, phase="boot", layers=())

        await self._rows.note(op, phase="boot", layers=())
        await self._engine.create_actor(golden, template.name, golden=True)
        _succeeded(await self._engine.resume(golden, cause="template", wait_s=spec.readyz.timeout_s + 60))
        phases.end("boot")

        await self._rows.note(op, phase="snapshot")
        template = await self._rows.change(template, op, phase="snapshot")
        _succeeded(await self._engine.suspend(golden, cause="template"))
        snapshot = (await self._ops.read(Actor, str(golden))).snapshot
        ready = TemplateState.READY
        template = await self._rows.change(
            template, op, state=ready, reason="", message="", operation="", golden_snapshot=snapshot, phase=""
        )
        phases.end("snapshot")
        await quietly(self._drop_golden(template))
        self._engine.pulls.warm_all(template)

    # --- delete -------------------------------------------------------------------------------------------

    async def delete(self, key: Key) -> None:
        """See `greenroom.engine.port.ControlPlane.delete_template`. Cut short, it leaves the template FAILED (reason
        `DELETING`), and `finish_deletions` goes on."""
        template = await self._ops.read(Template, str(key))
        await self._check_unused(template)
        claimed = await self._stop(template)
        try:
            # No actor can be made from a template that is FAILED; one that was made meanwhile is seen by a second look.
            message = "it is being deleted"
            await self._rows.change(
                template, state=TemplateState.FAILED, reason=DELETING, message=message, operation=""
            )
            try:
                await self._check_unused(template)
            except FailedPrecondition:
                await self._rows.change(
                    template, state=template.state, reason=template.reason, message=template.message
                )
                raise
            if claimed:
                op = await self._ops.read(Operation, claimed)
                await self._rows.end(op, _deleted(op))
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

        await self._rows.against_others(write, snapshot.id)


def _golden(key: Key) -> Key:
    return Key(key.namespace, f"_golden-{key.name}")


def _deleted(op: Operation) -> FailedPrecondition:
    return FailedPrecondition(f"template {op.key} was deleted while it was prepared", reason="TEMPLATE_DELETED")


def _succeeded(operation: Operation) -> Operation:
    """Raises what the operation failed with."""
    if operation.state is OperationState.FAILED:
        raise failure_of(operation)
    if operation.state is OperationState.RUNNING:
        raise DeadlineExceeded(
            f"operation {operation.id} ({operation.kind} of {operation.key}) is still in phase {operation.phase}"
        )
    return operation
