"""Whether the snapshot store is the one that goes with the database (`greenroom.core.marks`).

Both keep the same mark. A store without it is not mounted, or has another address than before: then nothing in it is
missing, and nothing is put there. One with another mark is another installation's, to whose objects no row of this
database belongs; each of the two would take what the other has for what nobody owns, and remove it. Agents hear the
mark with every answer to what they say, and hold to it, too.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from greenroom.core.errors import AlreadyExists, Conflict, FailedPrecondition, GreenroomError, NotFound, Unavailable
from greenroom.core.marks import SNAPSHOTS, Mark

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

#: How long a start waits for a snapshot store that does not answer.
START_WAIT_S = 5.0
#: A mark that no store has.
NOBODYS = "nobody's"


class Belongings:
    """``mark``: what the snapshot store is known by; "" until that is known."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._begun = False
        self.mark = ""

    async def check(self) -> None:
        """At the start, once; goes on by itself as long as database or store do not answer.

        Raises:
            FailedPrecondition: the snapshot store is another installation's (reason ``SNAPSHOT_STORE_FOREIGN``).
        """
        if self._begun:
            return
        self._begun = True
        first = self._engine.spawn(self._check(), "belongings")
        await asyncio.wait({first}, timeout=START_WAIT_S)
        if first.done():
            try:
                return await self._engine.ops.attend(first)
            except Unavailable as error:
                log.warning("starts without the snapshot store, goes on when it is there", error=error.message)
        self._engine.spawn(self._later(first), "belongings-later")

    async def _later(self, first: asyncio.Task[None]) -> None:
        attempt = first
        while True:
            try:
                return await attempt
            except FailedPrecondition as error:
                log.error("nothing in the snapshot store is used", error=error.message)
                return self._hold_to(self.mark or NOBODYS)
            except GreenroomError as error:
                log.debug("the snapshot store is not there yet", error=error.message)
            await asyncio.sleep(self._engine.config.retry_s)
            attempt = self._engine.spawn(self._check(), "belongings")

    async def _check(self) -> None:
        snapshots = self._engine.snapshots
        there = await snapshots.mark()  # before the record: whoever puts it there has written that before
        mark = await self._record(there)
        if not mark.placed:
            there = await snapshots.mark(mark.value)
        self._hold_to(mark.value)
        if not there:
            raise Unavailable(
                "the snapshot store is not the one that this database goes with: it has no object greenroom-store. See "
                f"that it is mounted, and that its address is right (or put that object there, with {mark.value!r})",
                reason="SNAPSHOT_STORE_AWAY",
            )
        if there != mark.value:
            raise _foreign(there, mark.value)
        if not mark.placed:
            with contextlib.suppress(Conflict):  # another replica was quicker
                await self._store.put(replace(mark, placed=True))

    def _hold_to(self, mark: str) -> None:
        self._engine.snapshots.expect(mark)
        self.mark = mark
        self._engine.replicas.announce()

    async def _record(self, there: str) -> Mark:
        """The database's; a new one if it has none and the store has none either."""
        with contextlib.suppress(NotFound):
            return await self._store.get(Mark, SNAPSHOTS)
        if there:
            raise _foreign(there, "")
        new = Mark(name=SNAPSHOTS, value=self._engine.new_id())
        with contextlib.suppress(AlreadyExists, Conflict):
            return await self._store.put(new)
        return await self._store.get(Mark, SNAPSHOTS)


def _foreign(there: str, mine: str) -> FailedPrecondition:
    of_mine = f"this database goes with {mine!r}" if mine else "this database has not used any yet"
    return FailedPrecondition(
        f"the snapshot store is another installation's: its object greenroom-store says {there!r}, and {of_mine}. Give "
        "each installation a place of its own with --snapshots, or the database that goes with this one with --store. "
        "(If the database that it went with is lost for good, remove that object, and what has no row is collected.)",
        reason="SNAPSHOT_STORE_FOREIGN",
    )
