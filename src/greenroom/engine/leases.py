"""Keeping the lease of an operation for as long as its driver runs here.

Most operations end long before their lease does and never come here; a longer one is renewed every third of the
lease's life. Three answers:

- *renewed*: it goes on. What somebody asked meanwhile (to cancel it) comes with the answer.
- *lost*: somebody took it over, or it ran out. The driver is stopped at once, with `LeaseLost` as the cause.
- *no answer* (an error, a call that hangs): tried again. Only when this process's own clock says that the lease may
  have run out, the driver is stopped: last success, counted from *before* it was asked for, plus the lease's life, less
  a margin. So a store that is away for less than that stops nothing, and an owner is silent before anybody can take
  over.

Releasing needs no step of its own: the commit that ends an operation drops its lease in the same transaction, and a
renewal that comes after it finds no operation to renew. So a heartbeat can't bring a lease back.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from greenroom.core.commands import Outcome, RenewLease
from greenroom.core.errors import GreenroomError, LeaseLost
from greenroom.core.records import Operation, OperationKind
from greenroom.engine import clock

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Renewals in a lease's life.
RENEWALS = 3
#: Share of a lease's life by which its owner stops before it runs out, for the calls that it has sent already.
MARGIN_SHARE = 0.1


@dataclass(eq=False, slots=True)
class RunningOperation:
    """An operation whose driver runs in this process.

    Attributes:
        asked: loop time before its lease was last asked for with success.
        lost: set when the driver was stopped because the lease is gone.
        ending: the command that ends it has been sent; the lease may be gone because it was carried out.
        cancel_requested: somebody wants it backed out.
        step: the step that its driver waits in, if that may be cut short.
    """

    operation: Operation
    asked: float
    task: asyncio.Task[Operation] = field(init=False)
    lost: LeaseLost | None = None
    ending: bool = False
    cancel_requested: bool = False
    step: asyncio.Timeout | None = None
    _timer: asyncio.TimerHandle | None = None
    _heartbeat: asyncio.Task[None] | None = None

    def stop(self, lost: LeaseLost) -> None:
        """Its lease is gone: the driver is cancelled and says why."""
        if not self.task.done() and self.lost is None:
            log.warning("lost the lease of an operation", operation=self.operation.id, error=lost.message)
            self.lost = lost
            self.task.cancel()

    def request_cancel(self) -> None:
        """The step that its driver waits in ends, if it is one that may be cut short; so does every later one."""
        self.cancel_requested = True
        if self.step is not None and not self.step.expired():
            self.step.reschedule(clock.monotonic())

    def release(self) -> None:
        """No more heartbeats."""
        if self._timer is not None:
            self._timer.cancel()
        if self._heartbeat is not None:
            self._heartbeat.cancel()


class LeaseKeeper:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def keep(self, running: RunningOperation) -> None:
        """Renews its lease from now on, until `RunningOperation.release`."""
        loop, ttl_s = asyncio.get_running_loop(), self._engine.config.lease_ttl_s
        running._timer = loop.call_at(running.asked + ttl_s / RENEWALS, self._begin, running)

    def _begin(self, running: RunningOperation) -> None:
        if not running.task.done() and not self._engine.ops.closed:
            name = f"heartbeat-{running.operation.id}"
            running._heartbeat = self._engine.spawn(self._beat(running), name)

    async def _beat(self, running: RunningOperation) -> None:
        ttl_s = self._engine.config.lease_ttl_s
        margin_s = ttl_s * MARGIN_SHARE
        while not running.task.done():
            asked = clock.monotonic()
            held_until = running.asked + ttl_s - margin_s
            try:
                async with asyncio.timeout_at(held_until):
                    goes_on = await self._renew(running)
            except LeaseLost as lost:
                if not running.ending:
                    running.stop(lost)
                return
            except (GreenroomError, TimeoutError) as error:
                if clock.monotonic() >= held_until:
                    running.stop(_not_renewed(running.operation, ttl_s, error))
                    return
                await asyncio.sleep(self._engine.config.retry_s)
                continue
            if not goes_on:
                return
            running.asked = asked
            await asyncio.sleep(max(0.0, asked + ttl_s / RENEWALS - clock.monotonic()))

    async def _renew(self, running: RunningOperation) -> bool:
        """Whether there is something to renew still. Raises `LeaseLost`."""
        operation, config = running.operation, self._engine.config
        if operation.kind is OperationKind.PREPARE:
            current = await self._engine.preparations.renew(operation)
        else:
            change = await self._engine.store.apply(
                RenewLease(
                    key=operation.key,
                    now=self._engine.now(),
                    operation_id=operation.id,
                    generation=operation.generation,
                    owner=config.owner,
                    lease_ttl_s=config.lease_ttl_s,
                )
            )
            if change.outcome is not Outcome.CHANGED:
                return False
            current = change.current
        if current is not None and current.cancel_requested and not running.cancel_requested:
            running.request_cancel()
        return current is not None


def _not_renewed(operation: Operation, ttl_s: float, error: Exception) -> LeaseLost:
    return LeaseLost(
        f"the lease of operation {operation.id} could not be renewed within its {ttl_s:g} s ({error or 'no answer'}); "
        "another process may have taken it over",
        metadata={"operation": operation.id, "generation": str(operation.generation)},
    )
