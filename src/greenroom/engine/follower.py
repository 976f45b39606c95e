"""What other replicas write, as far as this process has to know it at once: which actors run where, which operations
are to be cancelled, which workers are suspects, what is in use elsewhere.

It follows the store's change feed. A gap in the feed is closed by looking at everything anew. Nothing that must not go
wrong hangs on it: a binding that comes late is made by the wake-up that wants it (`Follower.reach`), and one that goes
late leads to a sandbox that is frozen or gone, never to another actor.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from greenroom.core.errors import GreenroomError, NotFound, Unavailable
from greenroom.core.records import Actor, ActorState, Key, Operation, OperationState, Replica, Template, Worker
from greenroom.core.rosters import Roster
from greenroom.engine import clock
from greenroom.engine.bindings import Binding
from greenroom.engine.census import bug_of
from greenroom.engine.replicas import REPORT_S
from greenroom.store.port import Event, EventType

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)


class Follower:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        #: What is needed of a template here never changes while it is there.
        self._templates: dict[tuple[str, str], Template] = {}

    async def loop(self) -> None:
        while True:
            events = self._store.watch()  # first, so that nothing falls between the look and the feed
            try:
                if not self._engine.config.exclusive:
                    await self._look()
                async for event in events:
                    await self._follow(event)
            except Exception as error:  # whatever it is, what others write must go on being followed
                if isinstance(error, GreenroomError) and error.reason == "STORE_CLOSED":
                    return
                log.warning("looks at everything again", error=str(error), exc_info=bug_of(error))
                await asyncio.sleep(self._engine.config.retry_s)

    async def _follow(self, event: Event) -> None:
        record = event.record
        self._engine.pools_asked.noted(record)
        match record:
            case Actor():
                await self._follow_actor(record, event)
            case Operation() if record.cancel_requested and record.state is OperationState.RUNNING:
                running = self._engine.ops.running.get(record.id)
                if running is not None and not running.cancel_requested:
                    running.request_cancel()
            case Template():
                self._templates.pop((record.namespace, record.name), None)  # one of its name may be made anew
            case Worker():
                self._engine.trust.noted(record)
            case Roster():
                self._engine.rosters.noted(record.pool)
            case Replica() if event.type is EventType.PUT:
                self._engine.replicas.seen(record)
            case _:
                pass

    async def _follow_actor(self, actor: Actor, event: Event) -> None:
        deleted = event.type is EventType.DELETED
        if deleted:
            self._engine.inventories.deleted(actor)
        if actor.state is ActorState.RUNNING and not deleted:
            if event.foreign:  # what this process wakes, it binds itself
                await self._bind(actor)
            return
        bound = self._engine.bindings.peek(actor.key)
        if bound is not None and _is_over(bound, actor, deleted=deleted):
            self._engine.bindings.revoke(actor.key)
        if event.foreign and not actor.worker:
            self._engine.slot_freed(probe=True)

    async def _bind(self, actor: Actor) -> None:
        bound = self._engine.bindings.peek(actor.key)
        if bound is not None and bound.uid == actor.uid and bound.generation >= actor.generation:
            return
        template = await self._template(actor)
        bound = self._engine.bindings.peek(actor.key)  # while the template was read
        stale = bound is not None and bound.uid == actor.uid and bound.generation >= actor.generation
        if not stale and not self._engine.ops.busy(actor.uid) and actor.endpoint is not None:
            self._engine.drivers.bind(actor, template)
            # Whoever woke it there is about to use it.
            now = clock.monotonic()
            self._engine.bindings.used_elsewhere(actor.uid, now, now + 2 * REPORT_S)

    async def _template(self, actor: Actor) -> Template | None:
        key = (actor.namespace, actor.template)
        if key not in self._templates:
            try:
                self._templates[key] = await self._store.get(Template, f"{actor.namespace}/{actor.template}")
            except NotFound:
                return None
        return self._templates[key]

    async def _look(self) -> None:
        """All actors that run, and none that does not."""
        self._templates.clear()
        running: dict[Key, Actor] = {}
        for actor in await self._engine.census.all(Actor, state=ActorState.RUNNING):
            running[actor.key] = actor
        for binding in self._engine.bindings.all():
            now = running.get(binding.key)
            gone = now is None or now.uid != binding.uid or now.generation > binding.generation
            if gone and not self._engine.ops.busy(binding.uid):
                current = await self._current(binding.key)
                if current is None or current.uid != binding.uid or _is_over(binding, current, deleted=False):
                    self._engine.bindings.revoke(binding.key)
        for actor in running.values():
            await self._bind(actor)
        for replica in await self._store.list(Replica):
            self._engine.replicas.seen(replica)

    async def _current(self, key: Key) -> Actor | None:
        try:
            return await self._store.get(Actor, str(key))
        except NotFound:
            return None

    async def is_over(self, binding: Binding) -> bool:
        """See `greenroom.engine.port.Waker`."""
        if not binding.revoked and not self._engine.config.exclusive:
            actor = await self._current(binding.key)
            incarnation = (binding.uid, binding.generation, ActorState.RUNNING)
            alive = actor is not None and (actor.uid, actor.generation, actor.state) == incarnation
            if not alive and self._engine.bindings.peek(binding.key) is binding:
                self._engine.bindings.revoke(binding.key)
        return binding.revoked

    async def reach(self, key: Key) -> None:
        """An actor that runs, by its record, and that nobody can reach from here yet: bound when its worker lives,
        waited for when that is away.

        Raises:
            Unavailable: the worker is away (reason ``WORKER_DISCONNECTED``).
        """
        if self._engine.config.exclusive:
            await self._engine.reconciler.rejoin(key)
            return
        actor = await self._engine.ops.read(Actor, str(key))
        if actor.state is not ActorState.RUNNING:
            return
        if not await self._engine.census.until_trusted(actor.worker):
            raise Unavailable(
                f"actor {key} runs on worker {actor.worker}, which nobody hears; it counts as lost if it does not come "
                "back",
                reason="WORKER_DISCONNECTED",
                retry_after_s=1.0,
            )
        actor = await self._engine.ops.read(Actor, str(key))  # it may have been lost, or moved, meanwhile
        if actor.state is ActorState.RUNNING:
            await self._bind(actor)


def _is_over(bound: Binding, actor: Actor, *, deleted: bool) -> bool:
    """Whether a binding can't be good any more, by a record of the actor that may be an older one: what is on its way
    to RUNNING has the generation of the incarnation that it leads to."""
    if deleted or bound.uid != actor.uid:
        return bound.uid == actor.uid
    return bound.generation < actor.generation or (bound.generation == actor.generation and actor.state in _ENDED)


_ENDED = frozenset({ActorState.SUSPENDED, ActorState.PAUSED, ActorState.CRASHED})
