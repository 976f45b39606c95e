"""Preparing a template: pull the image, boot it once, wait until it is ready, keep the golden snapshot.

The boot is an ordinary actor, hidden (its name begins with an underscore, which no name of a person's can), that is
resumed without a snapshot, suspended, and deleted; its snapshot stays behind as the template's golden one. So
everything that makes an actor's operations safe holds for it too, and a preparation that was cut short is simply
begun again.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import (
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    GreenroomError,
    NotFound,
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
from greenroom.engine.drivers import Phases

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: How long a preparation waits for the first worker of its pool.
WORKER_WAIT_S = 60.0
#: Between two writes of how far a pull is.
PROGRESS_INTERVAL_S = 0.25
#: Tries of a conditional write against somebody else's writes to the same record.
WRITE_ATTEMPTS = 10


class Preparer:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store

    async def apply(self, key: Key, spec: TemplateSpec, request_id: str) -> tuple[Template, Operation | None]:
        """See `greenroom.engine.port.ControlPlane.apply_template`."""
        now = time.time()
        try:
            template = await self._store.get(Template, str(key))
        except NotFound:
            template = await self._store.put(
                Template(
                    namespace=key.namespace,
                    name=key.name,
                    uid=uuid.uuid4().hex,
                    spec=spec,
                    state=TemplateState.PENDING,
                    created_at=now,
                    state_since=now,
                )
            )
        if template.spec != spec:
            raise FailedPrecondition(
                f"template {key} exists with another spec, and templates can't change: actors were made from it; "
                "give the new one another name, or delete this one first",
                reason="TEMPLATE_IMMUTABLE",
            )
        if template.state is TemplateState.READY:
            return template, None
        if template.operation in self._engine.running:
            return template, await self._store.get(Operation, template.operation)
        return await self._begin(template, request_id)

    async def _begin(self, template: Template, request_id: str) -> tuple[Template, Operation]:
        from greenroom.engine.engine import new_id

        now = time.time()
        op = await self._store.put(
            Operation(
                id=new_id(),
                kind=OperationKind.PREPARE,
                namespace=template.namespace,
                name=template.name,
                uid=template.uid,
                created_at=now,
                updated_at=now,
                deadline_at=now + self._engine.config.prepare_deadline_s,
                phase="image",
                request_id=request_id,
            )
        )
        template = await self._change(
            template.key, state=TemplateState.PREPARING, reason="", message="", operation=op.id
        )
        self._engine.track(op, self.run(template, op))
        return template, op

    async def run(self, template: Template, op: Operation) -> Operation:
        """The preparation itself; also what goes on with one that an earlier process left."""
        phases = Phases()
        error: GreenroomError | None = None
        try:
            async with asyncio.timeout(max(0.0, op.deadline_at - time.time())):
                op = await self._prepare(template, op, phases)
        except TimeoutError:
            error = DeadlineExceeded(
                f"template {template.key} was not ready within {self._engine.config.prepare_deadline_s:g} s",
                reason="OPERATION_DEADLINE",
            )
        except GreenroomError as failed:
            error = failed
        if error is not None:
            await self._quietly(self._drop_golden(template.key))
            await self._change(
                template.key, state=TemplateState.FAILED, reason=error.reason, message=error.message, operation=""
            )
            log.warning("template failed", template=str(template.key), reason=error.reason, error=error.message)
        op = await self._store.get(Operation, op.id)
        now = time.time()
        return await self._store.put(
            replace(
                op,
                state=OperationState.FAILED if error else OperationState.DONE,
                error=Failure(code=error.code, reason=error.reason, message=error.message, metadata=error.metadata)
                if error
                else None,
                phases=phases.all(),
                updated_at=now,
                finished_at=now,
            )
        )

    async def _prepare(self, template: Template, op: Operation, phases: Phases) -> Operation:
        key, spec = template.key, template.spec
        await self._drop_golden(key)
        worker = await self._worker_of(spec.pool)
        phases.end("worker")
        op, digest = await self._pull(op, worker, spec.image)
        phases.end("image")
        await self._change(key, image_digest=digest)

        op = await self._phase(op, "boot")
        golden = _golden(key)
        await self._engine.create_actor(golden, key.name, golden=True)
        _succeeded(await self._engine.resume(golden, cause="template", wait_s=spec.readyz.timeout_s + 60))
        phases.end("boot")

        op = await self._phase(op, "snapshot")
        _succeeded(await self._engine.suspend(golden, cause="template"))
        snapshot = (await self._store.get(Actor, str(golden))).snapshot
        ready = {"state": TemplateState.READY, "reason": "", "message": "", "operation": ""}
        await self._change(key, **ready, golden_snapshot=snapshot)
        phases.end("snapshot")
        await self._drop_golden(key)
        await self._warm_all(await self._store.get(Template, str(key)))
        return op

    async def _worker_of(self, pool: str) -> str:
        """A connected worker of the pool, waiting for the first one."""
        try:
            async with asyncio.timeout(WORKER_WAIT_S):
                while True:
                    arrival = self._engine.recovery.arrival
                    for name, hello in self._engine.hub.connected().items():
                        if hello.pool == pool:
                            return name
                    await arrival.wait()
        except TimeoutError:
            raise FailedPrecondition(
                f"pool {pool!r} has no connected worker; apply a WorkerPool of that name, or start the server with one",
                reason="NO_WORKER",
            ) from None

    async def _pull(self, op: Operation, worker: str, image: str) -> tuple[Operation, str]:
        layers: tuple[LayerProgress, ...] = ()
        phase = op.phase

        def report(progress: api.Progress) -> None:
            nonlocal layers, phase
            layers, phase = progress.layers, progress.phase

        call = asyncio.ensure_future(self._engine.hub.call(worker, api.Prepare(image=image), report))
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=PROGRESS_INTERVAL_S)
                if layers != op.layers or phase != op.phase:
                    op = await self._store.put(replace(op, phase=phase, layers=layers, updated_at=time.time()))
        finally:
            call.cancel()
        prepared = await call
        assert isinstance(prepared, api.Prepared)
        return op, prepared.image_digest

    async def _phase(self, op: Operation, phase: str) -> Operation:
        return await self._store.put(replace(op, phase=phase, updated_at=time.time()))

    # --- workers that come --------------------------------------------------------------------------------

    async def prewarm(self, hello: api.Hello) -> None:
        """A worker has joined: images and sandboxes of its pool's templates are made ready there."""
        after = ""
        while page := await self._store.list(Template, where={"state": TemplateState.READY}, after=after):
            for template in page:
                if template.spec.pool == hello.pool:
                    await self._quietly(self._warm(hello.worker, template))
            after = page[-1].pk

    async def _warm_all(self, template: Template) -> None:
        for name, hello in self._engine.hub.connected().items():
            if hello.pool == template.spec.pool:
                self._engine.spawn(self._quietly(self._warm(name, template)), f"warm-{name}")

    async def _warm(self, worker: str, template: Template) -> None:
        await self._engine.hub.call(worker, api.Warm(spec=template.spec, image_digest=template.image_digest))

    async def _quietly(self, work: Awaitable[object]) -> None:
        try:
            await work
        except GreenroomError as error:
            log.info("not made ready", error=error.message)

    # --- delete -------------------------------------------------------------------------------------------

    async def delete(self, key: Key) -> None:
        """See `greenroom.engine.port.ControlPlane.delete_template`."""
        template = await self._store.get(Template, str(key))
        actors = await self._store.list(Actor, namespace=key.namespace, where={"template": key.name}, limit=10)
        if mine := [a for a in actors if not a.golden]:
            raise FailedPrecondition(
                f"template {key} is in use by actor {mine[0].key}; delete its actors first", reason="TEMPLATE_IN_USE"
            )
        if running := self._engine.running.get(template.operation):
            running.task.cancel()
            await asyncio.wait({running.task})
        await self._drop_golden(key)
        if template.golden_snapshot:
            await self._condemn(template.golden_snapshot)
        await self._store.remove(await self._store.get(Template, str(key)))

    async def _drop_golden(self, key: Key) -> None:
        try:
            operation = await self._engine.delete(_golden(key), cause="template")
        except NotFound:
            return
        _succeeded(operation)

    async def _condemn(self, snapshot_id: str) -> None:
        try:
            snapshot = await self._store.get(Snapshot, snapshot_id)
        except NotFound:
            return
        await self._store.put(replace(snapshot, state=SnapshotState.CONDEMNED))

    # --- records ------------------------------------------------------------------------------------------

    async def _change(self, key: Key, **fields: object) -> Template:
        """Writes fields of a template, against whatever else is written to it."""
        for _ in range(WRITE_ATTEMPTS):
            template = await self._store.get(Template, str(key))
            if "state" in fields and fields["state"] is not template.state:
                fields["state_since"] = time.time()
            try:
                return await self._store.put(replace(template, **fields))
            except Conflict:
                continue
        raise Conflict(f"template {key} keeps changing")


def _golden(key: Key) -> Key:
    return Key(key.namespace, f"_golden-{key.name}")


def _succeeded(operation: Operation) -> Operation:
    """Raises what the operation failed with."""
    from greenroom.engine.engine import failure_of

    if operation.state is OperationState.FAILED:
        raise failure_of(operation)
    if operation.state is OperationState.RUNNING:
        raise DeadlineExceeded(
            f"operation {operation.id} ({operation.kind} of {operation.key}) is still in phase {operation.phase}"
        )
    return operation
