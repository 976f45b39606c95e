"""Which calls about an actor are carried out: by the latest owner, one at a time, each once.

For every call, in this order:

1. *Fence.* A generation below the highest seen for the actor is refused with `LeaseLost`. A higher one is written
   down. A `Discard` ends its operation here for ever: a wake of that operation that comes later is refused.
2. *One at a time.* The same call of the same operation joins the one under way, and hears how far that is. Any other
   stops it first and waits until it has stopped: who sends another call has given the first one up. Only a `Discard`
   is left to end by itself.
3. *Once.* A call that is in the journal is answered from it, if what it speaks of still exists.
4. *Do, record, answer.* A caller that goes away stops nothing.

What the agent does about an actor of its own accord takes its turn among the calls (`Fence.aside`).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from greenroom.agent.journal import Journal
from greenroom.agent.progress import Listener
from greenroom.core import agentapi as api
from greenroom.core.errors import DataLoss, GreenroomError, LeaseLost, ResourceExhausted, Unavailable
from greenroom.core.records import Record

#: Tells the listener how far it is.
Work = Callable[[Listener], Coroutine[Any, Any, Record]]


@dataclass(slots=True)
class _Audience:
    """All who wait for one call: who joins takes it for one that hangs when it hears nothing."""

    listeners: list[Listener]

    def progress(self, progress: api.Progress) -> None:
        for listener in self.listeners:
            listener.progress(progress)


@dataclass(slots=True)
class _Running:
    """A call under way for an actor; None: what the agent does of its own accord, which takes milliseconds."""

    call: api.ActorCall | None
    task: asyncio.Task[Any]
    audience: _Audience = field(default_factory=lambda: _Audience([]))
    stopped: bool = False  # once: a second cancellation would cut its cleaning up short

    def stop(self) -> None:
        if not self.stopped and self.call is not None and not isinstance(self.call, api.Discard):
            self.stopped = True
            self.task.cancel()

    def same(self, call: api.ActorCall) -> bool:
        return (
            self.call is not None
            and type(self.call) is type(call)
            and self.call.operation_id == call.operation_id
            and not self.stopped
        )


class Fence:
    """``floor``: the generation of the actor's resident, 0 for none. ``still_holds``: whether what the recorded answer
    of a call speaks of is still so."""

    def __init__(
        self,
        worker: str,
        journal: Journal,
        floor: Callable[[str], int],
        still_holds: Callable[[api.ActorCall], bool],
    ) -> None:
        self._worker = worker
        self._journal = journal
        self._floor = floor
        self._still_holds = still_holds
        self._running: dict[str, _Running] = {}
        self._closing = False

    def generation(self, actor_uid: str) -> int:
        """The highest seen."""
        return max(self._journal.generation(actor_uid), self._floor(actor_uid))

    def is_busy(self, actor_uid: str) -> bool:
        """Whether anything is under way about that actor."""
        return actor_uid in self._running

    async def run(self, call: api.ActorCall, work: Work, listener: Listener) -> Record:
        """Carries out a call by ``work``, or joins it, or answers it. ``listener`` hears how far it is in any case.

        Raises:
            LeaseLost: a later owner was here, or stopped this call.
            Unavailable: the agent ends (reason ``WORKER_DISCONNECTED``); the call may be sent again.
            GreenroomError: what ``work`` raises.
        """
        name, uid = type(call).__name__, call.actor_uid
        self._check(call)
        self._journal.raise_fence(uid, call.generation)
        if isinstance(call, api.Discard):
            self._journal.end_operation(uid, call.operation_id)
        while (running := self._running.get(uid)) is not None:
            if running.same(call):
                return await self._outcome(running, call, listener)
            running.stop()
            await asyncio.wait({running.task})
            self._check(call)  # somebody else may have come meanwhile
        recorded = self._journal.answer(call.operation_id, name)
        if recorded is not None and self._still_holds(call):
            answer: Record = msgspec.json.decode(recorded, type=api.ANSWERS[name])
            return answer
        audience = _Audience([])
        task = asyncio.create_task(self._do(call, name, work, audience), name=f"{name}-{uid}")
        running = self._begun(uid, _Running(call, task, audience))
        return await self._outcome(running, call, listener)

    async def aside(self, actor_uid: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does ``work`` about an actor when no call about it is under way. It stops none and waits for its turn; calls
        that come meanwhile wait for its end. Nothing is done once the agent ends.

        Raises:
            GreenroomError: what ``work`` raises.
        """
        while (running := self._running.get(actor_uid)) is not None:
            await asyncio.wait({running.task})
        if self._closing:
            return
        task = asyncio.create_task(work(), name=f"aside-{actor_uid}")
        self._begun(actor_uid, _Running(None, task))
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def close(self) -> None:
        """Stops what is under way; whoever waits for it is told that the worker is gone."""
        self._closing = True
        running = [r.task for r in self._running.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _check(self, call: api.ActorCall) -> None:
        if self._closing:
            raise self._gone()
        seen = self.generation(call.actor_uid)
        if call.generation < seen:
            raise LeaseLost(
                f"worker {self._worker} has seen generation {seen} of actor {call.actor_uid}; "
                f"{type(call).__name__} with generation {call.generation} comes from an owner that lost its lease",
                metadata={"generation": str(seen)},
            )
        ended = call.generation == seen and self._journal.ended(call.actor_uid) == call.operation_id
        if ended and isinstance(call, api.Start | api.Restore):
            raise LeaseLost(
                f"operation {call.operation_id} of actor {call.actor_uid} was ended on worker {self._worker} already; "
                f"this {type(call).__name__} comes too late"
            )

    def _begun(self, uid: str, running: _Running) -> _Running:
        self._running[uid] = running
        running.task.add_done_callback(lambda done: self._ended(uid, done))
        return running

    async def _outcome(self, running: _Running, call: api.ActorCall, listener: Listener) -> Record:
        task: asyncio.Task[Record] = running.task
        running.audience.listeners.append(listener)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if not task.cancelled() or (caller is not None and caller.cancelling()):
                raise  # it is the caller that was cancelled
        finally:
            running.audience.listeners.remove(listener)
        if self._closing:
            raise self._gone()
        raise LeaseLost(f"{type(call).__name__} of actor {call.actor_uid} was stopped by a later call about that actor")

    def _gone(self) -> Unavailable:
        return Unavailable(f"worker {self._worker} ends", reason="WORKER_DISCONNECTED")

    def _ended(self, uid: str, task: asyncio.Task[Any]) -> None:
        if (running := self._running.get(uid)) and running.task is task:
            del self._running[uid]
        if not task.cancelled():
            task.exception()  # seen, also when the caller has gone

    async def _do(self, call: api.ActorCall, name: str, work: Work, audience: _Audience) -> Record:
        try:
            answer = await work(audience)
            self._journal.record(call.operation_id, name, msgspec.json.encode(answer))
        except OSError as error:
            raise from_os(error) from error
        return answer


def from_os(error: OSError) -> GreenroomError:
    """What a failure of the worker's own disk is to others."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(
            f"the worker's disk is full ({error.filename or error}); delete actors or images, or add space",
            reason="DISK_FULL",
        )
    return DataLoss(f"the worker's disk failed: {error}", reason="WORKER_IO")
