"""Operations that nobody drives: taken up when their owner is gone, wherever it was; and what is left over of those
that have ended.

An operation belongs to whoever holds its lease. A lease that has run out may be taken by any replica; the generation
grows with it, so the old owner, should it live after all, changes nothing any more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from greenroom.core.commands import Change, TakeOver
from greenroom.core.errors import GreenroomError, LeaseHeld, NotFound
from greenroom.core.records import (
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    Template,
)
from greenroom.engine import clock
from greenroom.engine.census import bug_of
from greenroom.engine.phases import Phases

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)


class Recovery:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops

    # --- operations that nobody drives --------------------------------------------------------------------

    async def adopt_operations(self) -> None:
        """Takes over at once what an earlier process of this replica left; when nobody else can hold the store, that
        is everything."""
        await self._engine.census.expect_all()
        await self._take_up_operations(at_start=True)

    async def _take_up_operations(self, *, at_start: bool) -> None:
        config = self._engine.config
        for operation in await self._engine.census.all(Operation, state=OperationState.RUNNING):
            mine_before = operation.owner.partition("/")[0] == config.replica and operation.owner != config.owner
            force = at_start and (config.exclusive or mine_before)
            if not self._ops.claim(operation.id):
                continue
            try:
                if force or await self._may_take(operation):
                    await self.take_up(operation, force=force)
            except LeaseHeld:
                pass
            except GreenroomError as error:
                log.info("operation not taken up", operation=operation.id, error=error.message)
            finally:
                self._ops.release(operation.id)

    async def _may_take(self, operation: Operation) -> bool:
        """Whether its lease has run out, and no other replica is better placed to go on with it."""
        if operation.kind is OperationKind.PREPARE:
            return self._engine.preparations.may_take(operation)
        try:
            lease = await self._ops.read(Lease, operation.uid)
        except NotFound:
            return True
        mine = lease.owner == self._engine.config.owner
        if not mine and lease.expires_at > self._engine.now():
            return False
        return not operation.worker or not await self._engine.census.alive_elsewhere(operation.worker)

    async def take_up(self, operation: Operation, *, force: bool = False) -> None:
        """Drives an operation on from where it is. The caller has claimed it (`Operations.claim`)."""
        log.info("takes up an operation", operation=operation.id, kind=operation.kind, name=str(operation.key))
        if operation.kind is OperationKind.PREPARE:
            await self._engine.preparer.take_up(operation)
            return
        asked = clock.monotonic()
        change = await self._ops.commit(
            TakeOver(
                key=operation.key,
                now=self._engine.now(),
                operation_id=operation.id,
                owner=self._engine.config.owner,
                lease_ttl_s=self._engine.config.lease_ttl_s,
                force=force,
            )
        )
        assert change.operation is not None and change.actor is not None
        # A deadline that passed while nobody worked on it would only turn work that is nearly done into a failure.
        fresh = self._engine.now() + self._engine.config.deadline_s(operation.kind)
        operation = replace(change.operation, deadline_at=max(change.operation.deadline_at, fresh))
        change = replace(await self._with_source(change), operation=operation)
        drivers = self._engine.drivers
        work = {
            OperationKind.RESUME: drivers.resume,
            OperationKind.SUSPEND: drivers.suspend,
            OperationKind.PAUSE: drivers.pause,
            OperationKind.DELETE: drivers.delete,
        }[operation.kind]
        self._ops.track(operation, work(change, Phases()), asked)

    async def _with_source(self, change: Change) -> Change:
        """The template and the snapshot that the operation spoke of when it was begun."""
        actor, operation = change.actor, change.operation
        assert actor is not None and operation is not None
        template = source = None
        try:
            template = await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
            # A suspend names the snapshot that it makes; the one that the actor woke from is the actor's.
            name = operation.snapshot if operation.kind is OperationKind.RESUME else actor.snapshot
            if name:
                source = await self._ops.read(Snapshot, name)
        except NotFound:
            pass  # the driver backs out with a clear error
        return replace(change, template=template, source=source)

    # --- left-overs ---------------------------------------------------------------------------------------

    async def loop(self) -> None:
        """Goes on with what nobody drives. Nothing else holds this up."""
        while True:
            await asyncio.sleep(self._engine.config.janitor_s)
            try:
                await self._take_up_operations(at_start=False)
                await self._engine.preparer.begin_abandoned()
                await self._engine.preparer.finish_deletions()
            except Exception as error:  # whatever it is, the next round must come
                log.warning("operations not looked at, tries again", error=str(error), exc_info=bug_of(error))

    async def janitor_loop(self) -> None:
        """Uploads what is local, forgets operations that ended long ago."""
        while True:
            await asyncio.sleep(self._engine.config.janitor_s)
            try:
                await self._engine.uploads.sweep()
                await self._store.trim()
            except Exception as error:  # whatever it is, the next round must come
                log.warning("janitor tries again", error=str(error), exc_info=bug_of(error))
