"""A template's preparation as it is written down: the template, the operation that prepares it, and who holds that.

Everything here is a read and a conditional write, so that of two who go on with a preparation one finds out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from greenroom.core.errors import (
    Conflict,
    GreenroomError,
    LeaseLost,
    NotFound,
)
from greenroom.core.records import (
    Operation,
    OperationState,
    Template,
)
from greenroom.engine.operations import as_failure
from greenroom.engine.phases import Phases

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine


T = TypeVar("T")

#: Tries of a conditional write against somebody else's writes to the same record.
WRITE_ATTEMPTS = 10


class Preparations:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops

    def may_take(self, op: Operation) -> bool:
        """Whether a preparation is this process's to drive, or nobody's."""
        return op.owner == self._engine.config.owner or op.held_until <= self._engine.now()

    async def take(self, op: Operation) -> Operation:
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

        return await self.against_others(write, op.id)

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

        current = await self.against_others(write, op.id)
        if (running := self._ops.running.get(op.id)) is not None:
            running.request_cancel()
        return current

    async def change(
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
                raise overtaken(template)
            mine = op is None or (current.operation, current.generation) == (op.id, op.generation)
            if not mine or (unchanged and moved):
                raise overtaken(template)
            since = current.state_since if fields.get("state", current.state) is current.state else self._engine.now()
            return await self._store.put(replace(current, **fields, state_since=since))

        return await self.against_others(write, str(template.key))

    async def note(self, op: Operation, **fields: object) -> Operation:
        """Writes fields of a preparation's operation."""

        async def write() -> Operation:
            current = await self._store.get(Operation, op.id)
            if current.state is not OperationState.RUNNING:
                return current  # it has ended, and the reply was lost
            if current.generation != op.generation:
                raise LeaseLost(f"operation {op.id} is held by {current.owner} now")
            return await self._store.put(replace(current, **fields, updated_at=self._engine.now()))

        return await self.against_others(write, op.id)

    async def end(self, op: Operation, error: GreenroomError | None, phases: Phases | None = None) -> Operation:
        current = await self._ops.read(Operation, op.id)
        if current.state is not OperationState.RUNNING:
            return current
        if (running := self._ops.running.get(op.id)) is not None:
            running.ending = True
        failure = as_failure(error) if error is not None else None
        return await self.note(
            op,
            state=OperationState.FAILED if error else OperationState.DONE,
            error=failure,
            phases=phases.all() if phases else (),
            finished_at=self._engine.now(),
        )

    async def against_others(self, write: Callable[[], Awaitable[T]], what: str) -> T:
        """Does a read and a conditional write until nobody comes in between."""
        for _ in range(WRITE_ATTEMPTS):
            try:
                return await self._ops.steadily(write)
            except Conflict as conflict:  # also a lost lease is one
                if conflict.reason != "VERSION_CONFLICT":
                    raise
        raise Conflict(f"{what} keeps changing")


def overtaken(template: Template) -> Conflict:
    return Conflict(f"another operation prepares template {template.key}; see the template", reason="OVERTAKEN")
