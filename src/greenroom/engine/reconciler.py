"""What runs and what should: every difference between a worker and the records, settled.

Truth about what runs is what a worker says when it is asked (`inventories`); truth about what *should* run are the
records. What nobody has a record of the worker is told to destroy; every other difference is settled by a fenced call
or a conditional write. So an old or repeated message changes nothing, and it does not matter how many replicas look.
What a lost message would have told is found by asking again, every ``reconcile_s``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Collection
from typing import TYPE_CHECKING, Any

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.commands import Crash, Outcome, Reunite
from greenroom.core.errors import GreenroomError, LeaseLost, NotFound, Unavailable
from greenroom.core.gc import control
from greenroom.core.records import Actor, ActorState, Key, Template
from greenroom.core.states import BUSY
from greenroom.engine import clock
from greenroom.engine.bindings import Binding
from greenroom.engine.inventories import There

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)


#: Questions in a row to a worker that has more and more to destroy; what is left is for the next time.
MAX_ROUNDS = 10


class Reconciler:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ops = engine.ops
        self._comparing: dict[str, asyncio.Task[list[str]]] = {}
        #: Actors (uid) whose sandbox has just said how it ended: nobody says in the meantime only that it is gone.
        self._exiting: Counter[str] = Counter()

    async def keep(self, hello: api.Hello) -> None:
        """Asks a worker from time to time, as long as this connection of it is there."""
        worker, config, failures = hello.worker, self._engine.config, 0
        pause_s = control.first_pause_s(self._draw(), config.reconcile_s)
        while True:
            await asyncio.sleep(pause_s)
            if self._engine.hub.connected().get(worker) is not hello:
                return
            try:
                await self.compare(worker)
                failures = 0
            except GreenroomError as error:
                failures += 1
                log.info("worker not compared, tries again", worker=worker, failures=failures, error=error.message)
            pause_s = control.pause_s(self._draw(), config.reconcile_s, failures=failures)

    def _draw(self) -> float:
        return self._engine.config.randbits(32) / 2**32

    def is_comparing(self, worker: str) -> bool:
        return worker in self._comparing

    async def compare(self, worker: str, *, anew: bool = False) -> list[str]:
        """Settles every difference between what runs on a worker and what should. One at a time per worker; who comes
        meanwhile joins it, or (``anew``) waits for its end and begins another. Returns the operations that held an
        actor there."""
        task = self._comparing.get(worker)
        while task is not None and anew:
            await asyncio.wait({task})
            task = self._comparing.get(worker)
        if task is None:
            task = self._ops.spawn(self._settle(worker), f"settle-{worker}")
            self._comparing[worker] = task
            task.add_done_callback(lambda done: self._compared(worker, done))
        return await self._ops.attend(task)

    def _compared(self, worker: str, done: asyncio.Task[list[str]]) -> None:
        self._comparing.pop(worker)
        if not done.cancelled():
            self._engine.removals.syncs["failed" if done.exception() else "done"] += 1

    async def compare_quietly(self, worker: str) -> None:
        try:
            await self.compare(worker)
        except GreenroomError as error:
            log.info("worker not compared, the next sweep does", worker=worker, error=error.message)

    async def compare_after(self, operations: Collection[str], worker: str) -> None:
        for operation_id in operations:
            await self._ops.ended(operation_id)
        if operations and worker in self._engine.hub.connected():
            await self.compare(worker, anew=True)

    async def _settle(self, worker: str) -> list[str]:
        """Looks again until the worker knows of everything that is to go there."""
        orders: tuple[str, ...] = ()
        for _ in range(MAX_ROUNDS):
            there = await self._engine.inventories.ask(worker, orders)
            await self._act(worker, there)
            orders = there.destroy
            if there.trusted:
                orders += await self._engine.inventories.look(worker, there.disk)
            if not orders:
                break
            log.info("orders what nobody has a record of to be destroyed", worker=worker, handles=orders[:10])
        return [actor.operation for actor in there.actors if actor.state in BUSY and actor.operation]

    async def _act(self, worker: str, there: There) -> None:
        for actor in there.actors:
            if actor.state in BUSY:
                continue  # its operation asks the worker itself
            handle = there.handles.get(actor.uid, actor.uid)
            resident = there.residents.get(handle)
            if resident is not None and resident.endpoint is not None:
                await self._one(str(actor.key), self._reunite(actor, resident, there.alone_epoch))
            elif handle in there.missing and actor.uid not in self._exiting:
                text = f"its sandbox was no longer there when worker {worker} was asked"
                await self._one(str(actor.key), self.crash(actor, actor.generation, "SandboxLost", text))
        running = {(a.uid, a.generation) for a in there.actors if a.state is ActorState.RUNNING}
        for binding in self._engine.bindings.all():
            if binding.worker == worker and (binding.uid, binding.generation) not in running:
                await self._one(str(binding.key), self._drop_stale(binding))

    async def _drop_stale(self, binding: Binding) -> None:
        """A binding of an incarnation that no record speaks of: made from an answer that came late."""
        try:
            actor = await self._ops.read(Actor, str(binding.key))
        except NotFound:
            actor = None
        same = actor is not None and (actor.uid, actor.generation) == (binding.uid, binding.generation)
        if same and actor is not None and (actor.state is ActorState.RUNNING or actor.state in BUSY):
            return
        newer = actor is not None and actor.uid == binding.uid and actor.generation < binding.generation
        if not newer and self._engine.bindings.peek(binding.key) is binding and not self._ops.busy(binding.uid):
            self._engine.bindings.revoke(binding.key)

    async def _residents(self, worker: str) -> api.Residents:
        said = await self._engine.members.ask(worker, api.ListResident())
        assert isinstance(said, api.Residents)
        return said

    async def _one(self, actor: str, work: Awaitable[None]) -> None:
        """One actor that can't be settled now does not keep the others from it; the next sweep tries it again."""
        try:
            await work
        except GreenroomError as error:
            log.warning("actor not settled, tries again", actor=actor, error=error.message)

    async def _reunite(self, actor: Actor, resident: api.Resident, epoch: int) -> None:
        """An actor that is there: its sandbox is put into the state that the record says, and it is bound."""
        ids: dict[str, Any] = {
            "operation_id": f"reunite-{actor.uid}-{actor.generation}",
            "actor_uid": actor.uid,
            "generation": actor.generation,
        }
        frozen = resident.state is api.ResidentState.FROZEN
        bound = self._engine.bindings.peek(actor.key)
        try:
            if actor.state is ActorState.PAUSED:
                if not frozen:
                    await self._engine.hub.call(actor.worker, api.Freeze(**ids))
                return
            if frozen:
                # In a new generation: who has given the worker up meanwhile, by what was read before, crashes nobody
                # who goes on. After the worker has said its epoch: had it been lost since, it would be in another.
                again = await self._raise_generation(actor)
                if again is None:
                    return
                actor, ids = again, ids | {"generation": again.generation}
                await self._engine.hub.call(actor.worker, api.Thaw(**ids, epoch=epoch))
            elif bound is not None and (bound.uid, bound.generation) == (actor.uid, actor.generation):
                return
        except LeaseLost:
            return  # an operation has begun meanwhile
        template = await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
        # Nothing is awaited between this look and the binding, so an operation that begins revokes it again.
        if await self._is_still(actor) and not self._ops.busy(actor.uid):
            self._engine.drivers.bind(replace(actor, endpoint=resident.endpoint), template)
            log.info("actor goes on running", actor=str(actor.key), worker=actor.worker)

    async def _raise_generation(self, actor: Actor) -> Actor | None:
        """The actor in a new generation; None when it is not RUNNING in the incarnation that was read any more."""
        raise_it = Reunite(
            key=actor.key, now=self._engine.now(), uid=actor.uid, worker=actor.worker, generation=actor.generation
        )
        change = await self._ops.commit(raise_it)
        return change.actor if change.outcome is Outcome.CHANGED else None

    async def _is_still(self, actor: Actor) -> bool:
        """Whether it is RUNNING in the incarnation that was read."""
        current = await self._ops.read(Actor, str(actor.key))
        return (current.uid, current.generation, current.state) == (actor.uid, actor.generation, ActorState.RUNNING)

    async def exited(self, worker: str, event: api.SandboxExited) -> None:
        """A sandbox has ended by itself. An operation that holds the actor just now may have had its answer before
        that; so the actor is looked at again when it has ended."""
        self._exiting[event.actor_uid] += 1
        try:
            while operation := await self._ops.insist(lambda: self._record_exit(worker, event)):
                await self._ops.ended(operation)
                await asyncio.sleep(self._engine.config.retry_s)  # its driver may have given up; until it has a new one
        finally:
            self._exiting[event.actor_uid] -= 1
            self._exiting += Counter()  # without those at 0

    async def _record_exit(self, worker: str, event: api.SandboxExited) -> str:
        """Returns the operation that has to end first; "" when the exit is recorded, or does not matter any more."""
        last = f"; its last lines:\n{event.last_lines}" if event.last_lines else ""
        for actor in await self._engine.census.all(Actor, uid=event.actor_uid):
            if actor.worker == worker and actor.state in BUSY:
                return actor.operation
            if actor.worker == worker and not await self._lives(actor):
                message = f"its process ended with status {event.code}{last}"
                await self.crash(actor, event.generation, "Exited", message)
        return ""

    async def _lives(self, actor: Actor) -> bool:
        """Whether its worker has a sandbox of it now. The one that has ended need not be the one that the record speaks
        of: when the answer to a call was lost, the call is sent again, and may have made another in its place."""
        await self._engine.census.wait_for_worker(actor.worker, clock.monotonic() + self._engine.config.worker_return_s)
        said = await self._residents(actor.worker)
        return any(r.actor_uid == actor.uid and r.endpoint is not None for r in said.residents)

    async def crash(self, actor: Actor, generation: int, reason: str, message: str, *, lost: bool = False) -> None:
        """Records that the incarnation of that generation, or an older one, is gone; a newer one is left alone."""
        change = await self._ops.commit(
            Crash(
                operation_id=self._engine.new_id(),
                key=actor.key,
                now=self._engine.now(),
                uid=actor.uid,
                worker=actor.worker,
                generation=generation,
                reason=reason,
                message=message,
                lost=lost,
            )
        )
        current = change.actor
        if change.outcome is Outcome.CHANGED:
            log.warning("actor crashed", actor=str(actor.key), reason=reason)
            self._engine.slot_freed()
        if current is not None and current.state is ActorState.CRASHED:
            self._engine.bindings.revoke(actor.key)

    async def rejoin(self, key: Key) -> None:
        """An actor that is RUNNING and that nobody can reach yet: waits for its worker and asks it.

        Raises:
            Unavailable: the worker is away (reason ``WORKER_DISCONNECTED``).
        """
        actor = await self._ops.read(Actor, str(key))
        if actor.state is not ActorState.RUNNING:
            return
        until = clock.monotonic() + self._engine.config.worker_return_s
        if not await self._engine.census.wait_for_worker(actor.worker, until):
            raise Unavailable(
                f"actor {key} runs on worker {actor.worker}, which is away; it counts as lost if it does not come back",
                reason="WORKER_DISCONNECTED",
            )
        await self.compare(actor.worker)
