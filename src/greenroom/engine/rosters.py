"""Who may register, where an operator keeps the workers of a pool (`greenroom.core.rosters` has the rules).

The roster lies in the store, so every replica holds to the same one, and each looks there whenever a worker registers.
A worker that is on none waits, connected, until the roster that names it comes: its pod may be quicker than its
operator. One that was dropped is retired, as by `greenroom retire worker`: it is emptied first, and its actors wake
elsewhere. When its disk is gone with its pod nothing stays of it either, not even a tombstone: it is on no roster, and
its name is never used again, so it can't come back.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog

from greenroom.core import agentapi as api
from greenroom.core import names
from greenroom.core.errors import AlreadyExists, Conflict, GreenroomError, InvalidArgument, NotFound
from greenroom.core.records import Worker, WorkerState
from greenroom.core.rosters import Roster, admits, replaced
from greenroom.engine.members import RETIRING, WRITE_ATTEMPTS

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Entries of one roster; a pool's ledger holds no more (`greenroom.core.ledger.decide.MAX_SLOTS`).
MAX_ENTRIES = 2000
#: How long a worker that is on no roster waits at most before it is looked up again, should nobody have told that the
#: roster has changed.
LOOK_AGAIN_S = 5.0


class Rosters:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        #: By pool that workers wait for: set when its roster has changed. (Each looks again then, and asks its worker
        #: anew; with one for all pools that would be all workers for every change of any.)
        self._changes: dict[str, asyncio.Event] = {}

    # --- the operator's side ------------------------------------------------------------------------------

    async def admit(self, roster: Roster) -> tuple[Roster, list[str]]:
        """Replaces a pool's roster. Returns it, and the pool's workers that are not on it and are retired.

        Raises:
            InvalidArgument, Conflict, FailedPrecondition: see `greenroom.core.rosters.replaced`.
        """
        names.check_label("pool", roster.pool)
        _check(roster)
        written = await self._write(roster)
        self.noted(written.pool)
        return written, await self._enforce(written)

    async def _write(self, roster: Roster) -> Roster:
        for _ in range(WRITE_ATTEMPTS):
            known = await self._engine.ops.steadily(lambda: self.find(roster.pool))
            new = replaced(known, roster)
            if new is known:
                return new
            with contextlib.suppress(AlreadyExists, Conflict):
                return await self._store.put(new)
        raise Conflict(f"the roster of pool {roster.pool} keeps changing; try again")

    async def find(self, pool: str) -> Roster | None:
        try:
            return await self._store.get(Roster, pool)
        except NotFound:
            return None

    # --- the workers' side --------------------------------------------------------------------------------

    async def refusal(self, hello: api.Hello) -> str:
        """Why this worker may not register now; "" when it may."""
        roster = await self._roster(hello)
        if roster is not None:
            return _misfit(roster, hello)
        if not self._engine.config.rosters:
            return ""
        return f"pool {hello.pool} has no roster: its operator has not sent one yet"

    async def _roster(self, hello: api.Hello) -> Roster | None:
        return await self._engine.ops.steadily(lambda: self.find(hello.pool))

    async def wait(self, pool: str) -> None:
        """Until its roster has changed, or for `LOOK_AGAIN_S`."""
        changed = self._changes.setdefault(pool, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_AGAIN_S):
                await changed.wait()

    def noted(self, pool: str) -> None:
        """Its roster has changed."""
        if (changed := self._changes.pop(pool, None)) is not None:
            changed.set()

    async def hold(self, hello: api.Hello) -> None:
        """A worker has registered that may not be on its roster any more.

        Only a roster throws out. A pool that has none yet lets nobody new in, and keeps whom it has.
        """
        roster = await self._roster(hello)
        if roster is None or not _misfit(roster, hello):
            return
        if (worker := await self._engine.members.find(hello.worker)) is not None:
            await self._drop(worker)

    # --- who is dropped -----------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Goes on with whatever an `admit` did not get done."""
        after = ""
        while page := await self._store.list(Roster, after=after):
            for roster in page:
                await self._enforce(roster)
            after = page[-1].pk

    async def _enforce(self, roster: Roster) -> list[str]:
        listed = {entry.name for entry in roster.workers}
        dropped = [w for w in await self._engine.census.all(Worker, pool=roster.pool) if w.name not in listed]
        for worker in dropped:
            await self._drop(worker)
        return [worker.name for worker in dropped]

    async def _drop(self, worker: Worker) -> None:
        try:
            if worker.state is WorkerState.GONE:
                await self._engine.decommission.forget(worker.name)
            elif worker.cordon != RETIRING:
                log.info("a worker is on its pool's roster no more: it retires", worker=worker.name, pool=worker.pool)
                await self._engine.decommission.retire(worker.name)
        except NotFound:
            pass  # another replica was quicker
        except GreenroomError as error:
            log.warning("a worker that was dropped stays for now", worker=worker.name, error=error.message)


def _misfit(roster: Roster, hello: api.Hello) -> str:
    """Why its pool's roster does not admit this worker; "" when it does."""
    if admits(roster, hello.worker, hello.berth):
        return ""
    who = f"pod {hello.berth.pod_uid or '(none)'} of slot {hello.berth.epoch}-{hello.berth.ordinal}"
    if roster.find(hello.worker) is not None:
        return f"on the roster of pool {hello.pool} worker {hello.worker} is another one than {who}"
    return f"worker {hello.worker} ({who}) is not on the roster of pool {hello.pool}, of epoch {roster.epoch}"


def _check(roster: Roster) -> None:
    """Raises `InvalidArgument`."""
    if not roster.pool_uid:
        raise InvalidArgument(f"pool {roster.pool}: pool_uid is missing: it tells namesakes apart")
    if roster.epoch < 1 or roster.ledger_version < 0:
        raise InvalidArgument(
            f"pool {roster.pool}: epoch {roster.epoch} has to be 1 or more, and ledger_version "
            f"{roster.ledger_version} 0 or more"
        )
    if len(roster.workers) > MAX_ENTRIES:
        raise InvalidArgument(f"pool {roster.pool}: {len(roster.workers)} workers are more than {MAX_ENTRIES}")
    seen: set[str] = set()
    for entry in roster.workers:
        names.check_label("worker", entry.name)
        if entry.name in seen:
            raise InvalidArgument(f"pool {roster.pool}: worker {entry.name} is on the roster twice")
        seen.add(entry.name)
