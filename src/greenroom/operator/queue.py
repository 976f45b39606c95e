"""What is to be looked at, each thing by one task at a time.

As client-go's work queue: a thing that is added while it waits is there once; one that is added while somebody looks at
it is looked at again afterwards, and never by two at once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class WorkQueue(Generic[T]):
    """`get` hands out a thing until `done` is called for it."""

    def __init__(self) -> None:
        self._ready: OrderedDict[T, None] = OrderedDict()
        self._busy: set[T] = set()
        self._again: set[T] = set()
        self._timers: dict[T, asyncio.TimerHandle] = {}
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready) + len(self._again)

    @property
    def idle(self) -> bool:
        """Nothing waits and nobody looks at anything; what is due later does not count."""
        return not self._ready and not self._busy

    def add(self, item: T) -> None:
        timer = self._timers.pop(item, None)
        if timer is not None:
            timer.cancel()
        if item in self._busy:
            self._again.add(item)
        else:
            self._ready[item] = None
            self._news.set()

    def add_after(self, item: T, delay_s: float) -> None:
        """As `add`, later. Of several the earliest counts."""
        if item in self._ready or item in self._again:
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, delay_s)
        timer = self._timers.get(item)
        if timer is not None:
            if timer.when() <= when:
                return
            timer.cancel()
        self._timers[item] = loop.call_at(when, self._due, item)

    def _due(self, item: T) -> None:
        self._timers.pop(item, None)
        self.add(item)

    async def get(self) -> T:
        while not self._ready:
            self._news.clear()
            await self._news.wait()
        item, _ = self._ready.popitem(last=False)
        self._busy.add(item)
        return item

    def done(self, item: T) -> None:
        self._busy.discard(item)
        if item in self._again:
            self._again.discard(item)
            self._ready[item] = None
            self._news.set()

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
