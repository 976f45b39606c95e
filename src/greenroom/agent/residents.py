"""Who lives on this worker: the sandboxes that have an actor in them, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from greenroom.agent.logs import LogFiles
from greenroom.agent.staging import Staging
from greenroom.core import agentapi as api
from greenroom.core.agentapi import Identity, ResidentState
from greenroom.core.errors import GreenroomError, NotFound
from greenroom.core.records import Endpoint
from greenroom.sandbox.port import Backend, Found, Running

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Lodger:
    """One of them. ``operation_id``: the last operation that touched it. ``epoch``: in which it was let run
    (`greenroom.agent.alone`); it may not run in another. ``doors``: closes what is open to it from other machines
    (`greenroom.agent.entrance`); while it is ``shut`` nobody is let in."""

    identity: Identity
    sid: str
    state: ResidentState
    endpoint: Endpoint
    operation_id: str
    epoch: int = -1
    watcher: asyncio.Task[None] | None = None
    doors: set[Callable[[], None]] = field(default_factory=set)
    shut: bool = False

    def shut_out(self) -> None:
        """Nobody from another machine has anything open to it any more, or gets in, until it is not ``shut``."""
        self.shut = True
        for close in [*self.doors]:
            close()
        self.doors.clear()


@dataclass(slots=True)
class Wake:
    """One under way. ``epoch`` is that of its beginning; to let ``scope`` time out ends it. ``unwanted``: nobody has a
    record of it."""

    epoch: int
    scope: asyncio.Timeout
    identity: api.Identity
    unwanted: bool = False

    def end(self) -> None:
        if not self.scope.expired():
            self.scope.reschedule(asyncio.get_running_loop().time())


class Residents:
    """``seen``: the highest generation seen of an actor. ``on_exit`` hears of every resident that ends by itself after
    it had been running; ``on_gone`` (uid) of every actor whose sandbox is no more."""

    def __init__(
        self,
        worker: str,
        backend: Backend,
        logs: LogFiles,
        staging: Staging,
        seen: Callable[[str], int],
        on_exit: Callable[[api.SandboxExited], None],
        on_gone: Callable[[str], Awaitable[None]],
    ) -> None:
        self._worker = worker
        self._backend = backend
        self._logs = logs
        self._staging = staging
        self._seen = seen
        self._on_exit = on_exit
        self._on_gone = on_gone
        self._lodgers: dict[str, Lodger] = {}
        #: Sandboxes that have ended and could not be removed; who is told of each that comes.
        self.remains: set[str] = set()
        self.on_remains: Callable[[str], None] = lambda sid: None

    def __iter__(self) -> Iterator[Lodger]:
        return iter([*self._lodgers.values()])

    def uids(self) -> Collection[str]:
        return self._lodgers.keys()

    def find(self, uid: str) -> Lodger | None:
        return self._lodgers.get(uid)

    def get(self, uid: str) -> Lodger:
        """Raises `NotFound` (reason ``NOT_RESIDENT``)."""
        lodger = self._lodgers.get(uid)
        if lodger is None:
            raise NotFound(f"actor {uid} does not run on worker {self._worker}", reason="NOT_RESIDENT")
        return lodger

    def generation(self, uid: str) -> int:
        """That of the resident, 0 for none."""
        lodger = self._lodgers.get(uid)
        return lodger.identity.generation if lodger else 0

    def listed(self) -> tuple[api.Resident, ...]:
        return tuple(
            api.Resident(
                actor_uid=uid,
                namespace=lodger.identity.namespace,
                name=lodger.identity.name,
                generation=max(self._seen(uid), lodger.identity.generation),
                state=lodger.state,
                endpoint=lodger.endpoint,
                operation_id=lodger.operation_id,
                sandbox=lodger.identity.sandbox,
            )
            for uid, lodger in self._lodgers.items()
        )

    # --- coming and going ---------------------------------------------------------------------------------

    def take_over(self, found: Found) -> None:
        """One that an earlier agent process has left running."""
        identity = found.owner
        generation = max(identity.generation, self._seen(identity.uid))
        identity = msgspec.structs.replace(identity, generation=generation)
        self._enter(Lodger(identity, found.sid, found.state, found.endpoint, ""), found.log_fifo)
        log.info("took over a running actor", actor=f"{identity.namespace}/{identity.name}", sid=found.sid)

    def settle_in(self, identity: Identity, running: Running, operation_id: str) -> None:
        """One that was just made; it is STARTING."""
        lodger = Lodger(identity, running.sid, ResidentState.STARTING, running.endpoint, operation_id)
        self._enter(lodger, running.log_fifo)

    def _enter(self, lodger: Lodger, fifo: Path | None) -> None:
        identity = lodger.identity
        self._lodgers[identity.uid] = lodger
        self._logs.attach(identity.uid, identity.generation, fifo)
        self._look_after(lodger)

    def _look_after(self, lodger: Lodger) -> None:
        lodger.watcher = asyncio.create_task(self._watch(lodger), name=f"watch-{lodger.sid}")

    async def _watch(self, lodger: Lodger) -> None:
        """Tells the control plane when a resident ends by itself."""
        code = await self._backend.wait(lodger.sid)
        uid = lodger.identity.uid
        if self._lodgers.get(uid) is not lodger:
            return
        del self._lodgers[uid]
        lodger.shut_out()
        self._logs.detach(uid)
        last = self._logs.last_words(uid)
        log.warning("actor ended by itself", actor=lodger.identity.name, code=code)
        if lodger.state is not ResidentState.STARTING:
            generation = max(lodger.identity.generation, self._seen(uid))
            self._on_exit(api.SandboxExited(actor_uid=uid, generation=generation, code=code, last_lines=last))
        try:
            await self._backend.destroy(lodger.sid)
        except GreenroomError as error:
            log.error("what an ended actor left could not be removed", sid=lodger.sid, error=error.message)
            self.remains.add(lodger.sid)
            self.on_remains(lodger.sid)
            return
        if uid not in self._lodgers:  # it may be waking again
            await self._on_gone(uid)

    async def end(self, uid: str) -> None:
        """Destroys the actor's sandbox and drops what is staged of it; neither has to be there."""
        lodger = self._lodgers.get(uid)
        if lodger is not None:
            if lodger.watcher:
                lodger.watcher.cancel()
            lodger.shut_out()
            try:
                await self._backend.destroy(lodger.sid)
            except BaseException:
                self._look_after(lodger)  # it may live still: whoever asks next must find it
                raise
            if self._lodgers.get(uid) is lodger:
                del self._lodgers[uid]
            self._logs.detach(uid)
            await self._on_gone(uid)
        await self._staging.clear(uid)

    async def clear_remains(self, sid: str) -> None:
        await self._backend.destroy(sid)
        self.remains.discard(sid)

    async def close(self) -> None:
        """Looks after nobody any more; they go on."""
        watchers = [lodger.watcher for lodger in self if lodger.watcher]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
