"""Logs of actors that were deleted, on whichever workers they ran.

A deletion reaches the worker where the actor runs, if it runs and its worker is there. The logs of one that slept, or
was elsewhere before, are found by this: every worker is asked once, when it has connected, of whom it has logs; and
from then on it is told, some at a time, of those that are deleted. A deleted actor's uid never comes again, so telling
it late, twice, or by several replicas does no harm. Whatever may have been missed (a call that failed, a gap in the
change feed) makes the worker one that has to be asked again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from greenroom.core import agentapi as api
from greenroom.core.errors import GreenroomError, Unimplemented
from greenroom.core.records import Actor
from greenroom.engine.census import bug_of

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: Uids in one message: 33 KB.
MAX_TOLD = 1_000
#: Deleted in one period of the janitor; were it more, all workers are asked again instead.
MAX_DELETED = 100_000
#: A worker that takes longer is asked again later.
CALL_TIMEOUT_S = 30.0


class Forgotten:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._deleted: set[str] = set()
        #: By worker: its greeting when it was asked, so that one that has connected anew is asked anew.
        self._asked: dict[str, api.Hello] = {}

    def deleted(self, actor: Actor) -> None:
        """As the change feed says it."""
        self._deleted.add(actor.uid)
        if len(self._deleted) > MAX_DELETED:
            self.look_again()

    def look_again(self) -> None:
        """Something may have been missed."""
        self._deleted.clear()
        self._asked.clear()

    async def loop(self) -> None:
        while True:
            await asyncio.sleep(self._engine.config.janitor_s)
            try:
                await self._round()
            except Exception as error:  # whatever it is, the next round must come
                self.look_again()
                log.warning(
                    "logs of deleted actors not looked for, tries again", error=str(error), exc_info=bug_of(error)
                )

    async def _round(self) -> None:
        deleted, self._deleted = sorted(self._deleted), set()
        connected = self._engine.hub.connected()
        self._asked = {name: hello for name, hello in self._asked.items() if connected.get(name) is hello}
        await asyncio.gather(*(self._worker(name, hello, deleted) for name, hello in connected.items()))

    async def _worker(self, worker: str, hello: api.Hello, deleted: list[str]) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                if worker not in self._asked:
                    deleted = await self._gone(worker)
                for first in range(0, len(deleted), MAX_TOLD):
                    told = tuple(deleted[first : first + MAX_TOLD])
                    await self._engine.hub.call(worker, api.ForgetLogs(actor_uids=told))
            self._asked[worker] = hello
        except Unimplemented:  # an agent of an older version
            self._asked[worker] = hello
        except (GreenroomError, TimeoutError) as error:
            self._asked.pop(worker, None)
            log.info("logs of deleted actors may stay for now", worker=worker, error=str(error))

    async def _gone(self, worker: str) -> list[str]:
        """Those of whom the worker has logs, and of whom there is no record."""
        said = await self._engine.hub.call(worker, api.ListLogs())
        assert isinstance(said, api.LogsListed)
        return [uid for uid in said.actor_uids if not await self._engine.store.list(Actor, where={"uid": uid}, limit=1)]
