"""How a driver asks the worker of its operation: patiently, and never for ever.

A call that breaks is sent again when the worker is back; one that stands still ends by its stall timeout, one that
somebody cancels at once, and one whose worker is another replica's is handed over. Whether the whole operation takes
too long is a clock of its own (`Deadline`), which stands still while an image is prepared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from greenroom.core import agentapi as api
from greenroom.core.commands import (
    Advance,
    ReleaseLease,
)
from greenroom.core.errors import (
    Cancelled,
    DeadlineExceeded,
    GreenroomError,
    Internal,
    LeaseLost,
    Unavailable,
)
from greenroom.core.records import (
    Actor,
    Key,
    Operation,
    Record,
)
from greenroom.engine import clock

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

A = TypeVar("A", bound=Record)

#: A worker that takes longer to end a sandbox is asked again by `Recovery`.
DISCARD_TIMEOUT_S = 30.0
#: A request is held for this long while its actor waits for an image; that can take an hour, which nobody's connection
#: lives. Small images are there by then.
IMAGE_HOLD_S = 10.0
#: Between two writes of an operation's progress.
PROGRESS_INTERVAL_S = 0.25


class Calls:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ops = engine.ops
        #: Of resumes that wait for their image: since when (loop time).
        self._waits_since: dict[Key, float] = {}

    async def ask(
        self,
        op: Operation,
        call: api.AgentCall,
        answer: type[A],
        *,
        undo: bool = False,
        once: bool = False,
        deadline: Deadline | None = None,
    ) -> A:
        """Asks the operation's worker; when the connection breaks, again once it is back (``worker_return_s``).

        Args:
            undo: takes back what was done, so that a request to cancel does not stop it.
            once: not again: what comes of it is the answer to one call, or ``WORKER_DISCONNECTED``.
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
                if error.reason != "WORKER_DISCONNECTED" or once:
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
        self, op: Operation, moved: Callable[[], None], deadline: Deadline | None
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
                    self._engine.spawn(self.advance(op, progress), f"progress-{op.id}")

        return report

    def deadline(self, op: Operation) -> Deadline:
        return Deadline(op, self._engine.now(), self._engine.config.deadline_s(op.kind))

    def _note_wait(self, op: Operation, progress: api.Progress, deadline: Deadline | None) -> None:
        """While an image is prepared a resume waits for that, for as long as something moves."""
        if progress.phase.startswith(api.WAITS_FOR_IMAGE) and deadline is not None:
            deadline.put_off()
            since = self._waits_since.setdefault(op.key, clock.monotonic())
            if clock.monotonic() - since >= IMAGE_HOLD_S:
                self._engine.wakes.waits_for_image(op.key, progress)
        else:
            self._waits_since.pop(op.key, None)

    async def advance(self, op: Operation, progress: api.Progress) -> None:
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

    async def discard(self, actor: Actor, op: Operation, *, forget: bool = False) -> None:
        """Ends what the actor has on the operation's worker. What can't be ended now, `Recovery` finds later: it is a
        sandbox that no record speaks of."""
        call = api.Discard(**ids(actor, op), forget=forget)
        try:
            async with asyncio.timeout(DISCARD_TIMEOUT_S):
                await self._engine.hub.call(op.worker or actor.worker, call)
        except LeaseLost:
            pass  # it runs there again already, under a newer generation, which ended the old sandbox itself
        except (GreenroomError, TimeoutError) as error:
            log.info("discard is left to recovery", actor=str(actor.key), error=str(error))

    def over(self, key: Key) -> None:
        """The resume of this actor does not wait for an image any more."""
        self._waits_since.pop(key, None)


@asynccontextmanager
async def limit(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"{what} took longer than {seconds:g} s", reason="WORKER_HANGS") from None


class Deadline:
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


def _cancelled(op: Operation) -> Cancelled:
    return Cancelled(f"operation {op.id} ({op.kind} of {op.key}) was cancelled; it is backed out")


def ids(actor: Actor, op: Operation) -> dict[str, Any]:
    """What every call about an actor carries."""
    return {"operation_id": op.attempt, "actor_uid": actor.uid, "generation": op.generation}
