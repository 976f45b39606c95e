"""Destroys what the control plane has said may go, and what this worker itself finds to be left over.

An order is good for ever, because handles are (`greenroom.core.gc`), so it is not written down: an agent that dies is
told again after its next report. Each kind has a few places; what hangs gives its place up after a while, children go
before what they live in, and what fails is tried again later and later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog
from msgspec.structs import replace

from greenroom.core.errors import GreenroomError
from greenroom.core.gc import worker as rules
from greenroom.core.gc.records import Entry, Kind, Local

log = structlog.get_logger(__name__)

#: What takes longer is stopped and tried again later, by kind: tens of times what it usually takes.
LIMITS_S: dict[Kind, float] = {Kind.SANDBOX: 60.0, Kind.LOG: 30.0, Kind.SNAPSHOT: 120.0}
#: Before what failed is tried again: doubled with each failure, up to the last.
FIRST_RETRY_S = 5.0
LAST_RETRY_S = 300.0


@dataclass(slots=True)
class _Doomed:
    """``task``: while it is being destroyed; ``again``: while it waits for another try."""

    entry: Entry
    failures: int = 0
    task: asyncio.Task[None] | None = None
    again: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Swept:
    """How many have been destroyed, by kind, and how many tries have failed."""

    destroyed: dict[Kind, int] = field(default_factory=dict)
    failures: int = 0


class Sweeper:
    """``present``: the entries of what may live in something else (`Entry.parent`). ``destroy``: destroys one, unless
    its handle means another thing or nothing by now; may be called again after it failed or was stopped."""

    def __init__(
        self,
        present: Callable[[], Iterable[Entry]],
        destroy: Callable[[Entry], Awaitable[None]],
        limits_s: Mapping[Kind, float] = LIMITS_S,
    ) -> None:
        self._present = present
        self._destroy = destroy
        self._limits_s = limits_s
        self._doomed: dict[str, _Doomed] = {}
        self.swept = Swept()

    def __contains__(self, handle: str) -> bool:
        """Whether it is to go, or going."""
        return handle in self._doomed

    def __len__(self) -> int:
        return len(self._doomed)

    def order(self, entries: Iterable[Entry]) -> None:
        """They are to go. Begins with as many as there are places for."""
        for entry in entries:
            if entry.handle not in self._doomed:
                self._doomed[entry.handle] = _Doomed(replace(entry, state=Local.DYING))
        self._begin()

    async def close(self) -> None:
        """Stops; what was not destroyed stays."""
        tasks = []
        for doomed in self._doomed.values():
            if doomed.again:
                doomed.again.cancel()
            if doomed.task:
                doomed.task.cancel()
                tasks.append(doomed.task)
        self._doomed.clear()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self) -> None:
        if not self._doomed:
            return
        table = {entry.handle: entry for entry in self._present()}
        for handle, doomed in self._doomed.items():
            waits = doomed.again is not None
            table[handle] = replace(doomed.entry, state=Local.LIVE) if waits else doomed.entry
        busy = {handle for handle, doomed in self._doomed.items() if doomed.task}
        for entry in rules.sweep(table, busy):
            doomed = self._doomed[entry.handle]
            doomed.task = asyncio.create_task(self._one(doomed), name=f"sweep-{entry.handle}")
            doomed.task.add_done_callback(lambda _, d=doomed: self._ended(d))  # type: ignore[misc]

    async def _one(self, doomed: _Doomed) -> None:
        entry = doomed.entry
        said = {"kind": entry.kind, "handle": entry.handle, "owner": entry.owner}
        limit_s = self._limits_s[entry.kind]
        try:
            async with asyncio.timeout(limit_s):
                await self._destroy(entry)
        except (GreenroomError, OSError, TimeoutError) as error:
            doomed.failures += 1
            self.swept.failures += 1
            why = f"it took more than {limit_s:g} s" if isinstance(error, TimeoutError) else str(error)
            log.warning("not destroyed, tries again", **said, attempt=doomed.failures, error=why)
            return
        self.swept.destroyed[entry.kind] = self.swept.destroyed.get(entry.kind, 0) + 1
        log.info("destroyed what nobody has a record of", **said)
        doomed.failures = 0

    def _ended(self, doomed: _Doomed) -> None:
        task, doomed.task = doomed.task, None
        handle = doomed.entry.handle
        if self._doomed.get(handle) is not doomed or task is None or task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("not destroyed, for a reason nobody thought of", handle=handle, exc_info=error)
            doomed.failures += 1
        if doomed.failures:
            pause_s = min(FIRST_RETRY_S * 2.0 ** (doomed.failures - 1), LAST_RETRY_S)
            doomed.again = asyncio.get_running_loop().call_later(pause_s, self._again, doomed)
        else:
            del self._doomed[handle]
        self._begin()

    def _again(self, doomed: _Doomed) -> None:
        doomed.again = None
        self._begin()
