"""Blocking work on files, in threads that a cancelled caller stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from greenroom.snapshots.objects import Meter, Stop, Stopped

_T = TypeVar("_T")


async def all_of(work: Iterable[Coroutine[Any, Any, _T]]) -> Sequence[_T]:
    """Runs them side by side; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def in_thread(work: Callable[[Stop], _T], meter: Meter | None = None) -> _T:
    """Runs ``work`` in a thread; what it moves goes to ``meter``. A cancelled caller stops it and waits for it to end:
    when this returns or raises, nothing of it runs any more."""
    stop = Stop(meter)
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled() and not isinstance(running.exception(), (Stopped, type(None))):
            raise asyncio.CancelledError from running.exception()
        raise
