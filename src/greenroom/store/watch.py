"""Publishing what was written to the watchers of this process."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable

from greenroom.core.errors import GreenroomError, ResourceExhausted, Unavailable
from greenroom.store.port import Event, EventType, Stored


class Broadcast:
    """Numbers events and hands them to every watcher. Used on one event loop only."""

    def __init__(self) -> None:
        self._sequence = 0
        # Weak: a watcher that nobody reads any more must not gather events.
        self._watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()

    def publish(self, effects: Iterable[tuple[EventType, Stored]], *, foreign: bool = False) -> None:
        watchers = list(self._watchers)
        for kind, record in effects:
            self._sequence += 1
            if watchers:
                event = Event(type=kind, record=record, sequence=self._sequence, foreign=foreign)
                for watcher in watchers:
                    watcher.push(event)

    def watch(self, capacity: int) -> Watcher:
        watcher = Watcher(capacity)
        self._watchers.add(watcher)
        return watcher

    def end(self, error: GreenroomError) -> None:
        """Every watcher that there is gets ``error`` after what came before."""
        for watcher in list(self._watchers):
            watcher.end(error)

    def close(self) -> None:
        self.end(closed())

    @property
    def watched(self) -> bool:
        return len(self._watchers) > 0


class Watcher(AsyncIterator[Event]):
    """One watcher's queue, at most ``capacity`` events long. For one reader."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._events: deque[Event] = deque()
        self._ready = asyncio.Event()
        self._error: GreenroomError | None = None

    def push(self, event: Event) -> None:
        if self._error is not None:
            return
        if len(self._events) >= self._capacity:
            self._events.clear()  # with a gap in it, it is worth nothing
            message = f"this watcher is more than {self._capacity} events behind; list again, then watch anew"
            self.end(ResourceExhausted(message, reason="WATCH_TOO_SLOW"))
            return
        self._events.append(event)
        self._ready.set()

    def end(self, error: GreenroomError) -> None:
        """What came before is still read, then ``error`` is raised."""
        self._error = self._error or error
        self._ready.set()

    async def __anext__(self) -> Event:
        while not self._events:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        return self._events.popleft()


def closed() -> Unavailable:
    return Unavailable("the store is closed", reason="STORE_CLOSED")
