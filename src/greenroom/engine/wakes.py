"""Waking actors: one wake-up for however many want it, in turn when there is no free slot."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from greenroom.core.agentapi import WAITS_FOR_IMAGE, Progress
from greenroom.core.commands import BeginResume, BeginSuspend, Change, Outcome
from greenroom.core.errors import GreenroomError, LeaseHeld, ResourceExhausted, Unavailable
from greenroom.core.records import Actor, ActorState, Key, Operation, OperationKind, OperationState, Template
from greenroom.engine import clock
from greenroom.engine.bindings import Binding, Wake
from greenroom.engine.capacity import CapacityQueue
from greenroom.engine.operations import failure_of
from greenroom.engine.phases import Phases

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: How often one `Wakes.wake` wakes an actor that is gone again before it could be used. Once is rare.
WAKE_ATTEMPTS = 10
#: How long an actor that could not be suspended to make room is left alone.
SPARED_S = 10.0
#: When a request that was not held for an image should be sent again.
IMAGE_RETRY_S = 5.0


@dataclass(slots=True)
class _Waking:
    """A wake-up under way and how many wait for it. While somebody does, the actor is not suspended to make room: it
    would be gone before its first request. ``scopes``: to let them time out tells those who wait what is ``told``."""

    task: asyncio.Task[Operation | None]
    waiters: int = 0
    scopes: set[asyncio.Timeout] = field(default_factory=set)
    told: Unavailable | None = None


@dataclass(slots=True)
class _Place:
    """Where a wake-up stands in the queue for a slot: in none, waiting, or at its turn."""

    queue: CapacityQueue | None = None
    has_turn: bool = False
    probe: bool = False

    async def wait(self, queue: CapacityQueue, until: float, only: frozenset[str] = frozenset()) -> None:
        """Returns at its turn: at the end of the queue the first time, then at the front. ``only``: see
        `CapacityQueue.wait`."""
        if only:
            self.pass_on()  # there was a slot, but none that serves it
        again, self.queue, self.has_turn = self.queue is not None, queue, False
        self.probe = await queue.wait(again=again, until=until, only=only)
        self.has_turn = True

    def pass_on(self) -> None:
        """It takes no slot now: the turn, if it has one, is the next one's."""
        if self.has_turn and self.queue is not None:
            self.queue.slot_freed(probe=self.probe)
        self.has_turn = False


class Wakes:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ops = engine.ops
        self._bindings = engine.bindings
        self._waking: dict[Key, _Waking] = {}
        self._queues: dict[str, CapacityQueue] = {}
        #: Actors (uid) that could not be suspended to make room: until when (loop time) others are taken instead.
        self._spared: dict[str, float] = {}
        #: Grows with every slot that becomes free: who was refused one just before need not wait for the next.
        self._freed = 0

    async def wake(self, key: Key) -> Wake:
        """See `greenroom.engine.port.Waker`."""
        operation: Operation | None = None
        for _ in range(WAKE_ATTEMPTS):
            if (binding := self._bindings.get(key)) is not None:
                return Wake(binding, operation.id, operation.phases) if operation else Wake(binding)
            operation = await self._share(key)
            if operation is not None and operation.state is OperationState.FAILED:
                raise failure_of(operation)
        raise Unavailable(
            f"actor {key} was suspended as soon as it was awake, {WAKE_ATTEMPTS} times; "
            "raise the idle timeout of its template, or the pool's slots",
            reason="NOT_STAYING_AWAKE",
        )

    async def _wake(self, key: Key) -> Operation | None:
        """What wakes an actor without a binding; None when nothing had to be done, and there is a binding again."""
        await self._bindings.drained(key)  # one that is about to be suspended first is, or is not
        if self._bindings.get(key) is not None:
            return None
        operation = await self.resume(key, "", "request", False)
        awake = operation.state is OperationState.DONE and self._bindings.get(key) is None
        if awake and not (operation.id and self._engine.config.exclusive):
            # It runs, but this process was not told: another replica woke it, or its worker has not been heard yet.
            await self._engine.follower.reach(key)
        return operation

    def being_woken(self, key: Key) -> bool:
        """Whether somebody waits for it or is about to use it."""
        return key in self._waking

    async def _share(self, key: Key) -> Operation | None:
        """One wake-up for however many want it."""
        waking = self._waking.get(key)
        if waking is None:
            waking = _Waking(self._ops.spawn(self._wake(key), f"wake-{key}"))
            self._waking[key] = waking
            waking.task.add_done_callback(lambda _: self._forget(key, waking))
        waking.waiters += 1
        try:
            async with asyncio.timeout(None) as scope:
                waking.scopes.add(scope)
                return await self._ops.attend(waking.task)
        except TimeoutError:
            if not scope.expired() or waking.told is None:
                raise
            raise waking.told from None
        finally:
            waking.scopes.discard(scope)
            waking.waiters -= 1
            self._forget(key, waking)

    def waits_for_image(self, key: Key, progress: Progress) -> None:
        """Its resume has waited for its image for `IMAGE_HOLD_S` or longer, and goes on to: nobody is held for that."""
        waking = self._waking.get(key)
        if waking is None or not waking.waiters:
            return
        done = sum(layer.done_bytes for layer in progress.layers)
        total = sum(layer.total_bytes for layer in progress.layers)
        far = f", {done * 100 // total} % of {total / (1 << 20):.1f} MiB" if total else ""
        waking.told = Unavailable(
            f"actor {key} waits for its image ({progress.phase.removeprefix(WAITS_FOR_IMAGE)}{far}); it goes on to "
            f"wake, ask again. `greenroom resume {key.name} -n {key.namespace}` waits for it and shows how far it is",
            reason="IMAGE_PREPARING",
            retry_after_s=IMAGE_RETRY_S,
        )
        for scope in waking.scopes:
            if not scope.expired():
                scope.reschedule(clock.monotonic())

    def _forget(self, key: Key, waking: _Waking) -> None:
        """A wake-up that has ended and that nobody has yet to take up."""
        if waking.task.done() and not waking.waiters and self._waking.get(key) is waking:
            del self._waking[key]
            # From now on the actor may be suspended to make room, unless the caller uses it at once.
            asyncio.get_running_loop().call_soon(self.actor_idle)

    async def resume(self, key: Key, request_id: str, cause: str, from_crash: bool, snapshot_id: str = "") -> Operation:
        """Begins a resume as soon as it can be begun, and waits for its end. ``from_crash``: somebody wants it to go
        back to what was saved, and knows that the rest is lost. ``snapshot_id``: see `BeginResume`."""
        until = asyncio.get_running_loop().time() + self._engine.config.capacity_wait_s
        phases = Phases()
        place = await self._behind(key, until)
        if place.queue is not None:
            phases.end("capacity")
        while True:
            freed = self._freed
            try:
                change = await self._begin(key, request_id, cause, from_crash, snapshot_id, phases)
                break
            except LeaseHeld as held:
                place.pass_on()
                await self._ops.ended(held.metadata["operation"])
                phases.end("turn")
            except ResourceExhausted as full:
                if full.reason != "NO_CAPACITY":
                    place.pass_on()
                    raise
                queue = place.queue or self._queue((await self._template_of(key)).spec.pool)
                if freed == self._freed:  # nothing has become free since it was refused
                    only = frozenset(full.metadata.get("only", "").split(",")) - {""}
                    await place.wait(queue, until, only)
                    phases.end("capacity")
            except BaseException:
                place.pass_on()
                raise
        if place.probe or change.outcome is not Outcome.CHANGED:
            place.pass_on()
        if change.operation is None:
            return self._engine.without_work(change)
        ended = await self._ops.outcome(change.operation)
        if change.outcome is Outcome.CHANGED and ended.state is OperationState.DONE:
            self._engine.pools_asked.woken(ended.worker)
        return ended

    async def _begin(
        self, key: Key, request_id: str, cause: str, from_crash: bool, snapshot_id: str, phases: Phases
    ) -> Change:
        command = BeginResume(
            key=key,
            now=self._engine.now(),
            operation_id=self._engine.new_id(),
            owner=self._engine.config.owner,
            request_id=request_id,
            cause=cause,
            lease_ttl_s=self._engine.config.lease_ttl_s,
            deadline_s=self._engine.config.deadline_s(OperationKind.RESUME),
            hold_crashed=not from_crash,
            reachable=self._engine.reachable(),
            snapshot_id=snapshot_id,
        )

        async def drive(change: Change) -> Operation:
            phases.end("bind")
            return await self._engine.drivers.resume(change, phases)

        return await self._ops.begin(command, drive)

    # --- in turn ------------------------------------------------------------------------------------------

    async def _behind(self, key: Key, until: float) -> _Place:
        """Lets those who wait for a slot in the same pool go first, if there are any."""
        place = _Place()
        if any(map(len, self._queues.values())):
            queue = self._queue((await self._template_of(key)).spec.pool)
            paused = len(queue) and (await self._ops.read(Actor, str(key))).state is ActorState.PAUSED
            if len(queue) and not paused:  # a paused actor has its slot
                await place.wait(queue, until)
        return place

    async def _template_of(self, key: Key) -> Template:
        actor = await self._ops.read(Actor, str(key))
        return await self._ops.read(Template, f"{key.namespace}/{actor.template}")

    def _queue(self, pool: str) -> CapacityQueue:
        if pool not in self._queues:
            self._queues[pool] = CapacityQueue(
                pool,
                self._engine.config,
                lambda: self._evictable(pool),
                lambda binding: self._evict(binding),
                lambda: self._why_full(pool),
            )
        return self._queues[pool]

    def waiting(self) -> dict[str, int]:
        """By pool: how many wait for a slot there."""
        return {pool: len(queue) for pool, queue in self._queues.items()}

    def _why_full(self, pool: str) -> str:
        if not any(hello.pool == pool for hello in self._engine.hub.connected().values()):
            return "it has no connected worker (`greenroom get workers` and the server's log tell more)"
        return "every running actor has open requests, or a template that does not let it be suspended for another"

    def _evictable(self, pool: str) -> list[Binding]:
        workers = [name for name, hello in self._engine.hub.connected().items() if hello.pool == pool]
        now = clock.monotonic()
        self._spared = {uid: until for uid, until in self._spared.items() if until > now}
        idle = self._bindings.longest_idle(workers)
        return [b for b in idle if b.evictable and b.uid not in self._spared and not self.being_woken(b.key)]

    def _evict(self, binding: Binding) -> asyncio.Task[None]:
        # Before anything is awaited the binding is marked, so nobody else picks it and no request slips in.
        self._bindings.drain(binding.key)

        async def suspend() -> None:
            try:
                operation = await self._engine.transition(BeginSuspend, binding.key, "", "capacity")
                if operation.state is OperationState.FAILED:
                    raise failure_of(operation)
            except GreenroomError as error:
                # Another one first, next time: what keeps this one from being saved may last.
                self._spared[binding.uid] = clock.monotonic() + SPARED_S
                log.warning("could not make room", actor=str(binding.key), error=error.message)
                raise

        return self._ops.spawn(suspend(), f"evict-{binding.key}")

    def slot_freed(self, *, probe: bool = False) -> None:
        """Some slot of some pool is free; with ``probe`` none or many may be: a worker has come."""
        self._freed += 1
        for queue in self._queues.values():
            queue.slot_freed(probe=probe)

    def actor_idle(self) -> None:
        """Some actor may be suspended to make room."""
        if not self._ops.closed:
            for queue in self._queues.values():
                queue.pump()

    def look_again(self) -> None:
        """For what this process was not told of, such as a slot that somebody else has freed."""
        self.actor_idle()
        for queue in self._queues.values():
            queue.slot_freed(probe=True)
