"""One piece of work for all who want it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

Listener = TypeVar("Listener")
Result = TypeVar("Result")


class Flights(Generic[Listener, Result]):
    """Callers with the same key share one task. It ends early only when the last of them has given up.

    Each caller brings a listener (or None); the work gets the live list of listeners to report to.
    """

    def __init__(self) -> None:
        self._running: dict[str, tuple[asyncio.Task[Result], list[Listener | None]]] = {}

    async def join(
        self,
        key: str,
        listener: Listener | None,
        work: Callable[[Sequence[Listener | None]], Coroutine[Any, Any, Result]],
    ) -> Result:
        """Starts ``work`` or joins what runs; the result or error is everybody's. A caller who is cancelled and was
        the last waits for the task to end."""
        if key not in self._running:
            listeners: list[Listener | None] = []
            task = asyncio.create_task(work(listeners), name=f"flight-{key[:24]}")
            self._running[key] = (task, listeners)
            task.add_done_callback(lambda done: self._landed(key, done))
        task, listeners = self._running[key]
        listeners.append(listener)
        try:
            return await asyncio.shield(task)
        finally:
            listeners.remove(listener)
            if not listeners and not task.done():
                # From here nobody may join: it would be cancelled under them.
                self._landed(key, task)
                task.cancel()
                await asyncio.wait([task])

    def _landed(self, key: str, task: asyncio.Task[Result]) -> None:
        current = self._running.get(key)
        if current is not None and current[0] is task:
            del self._running[key]
        if task.done() and not task.cancelled():
            task.exception()  # seen, also when every caller left before it came
