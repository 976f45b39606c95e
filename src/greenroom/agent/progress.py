"""How far a call is: its phases, timed, and what is told of them while it takes long.

A call that ends within a moment tells nothing: each report costs a frame and a write to the control plane's store,
which is more than a fast wake costs altogether. One that takes longer is told from one that hangs by its reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from greenroom.core.agentapi import Progress
from greenroom.core.records import PhaseTime

#: Between two reports of one call.
PROGRESS_INTERVAL_S = 0.1
#: A call is silent for this long. Wakes and suspends take 20 to 200 ms; people begin to wonder after a second.
QUIET_S = 0.5
#: Between two looks at how much has been written: whoever is to hear something every second must be able to.
SAMPLE_S = 0.5


class Listener(Protocol):
    """Who hears how far a call is. Does not wait, and does not fail."""

    def progress(self, progress: Progress) -> None: ...


class Reporter(Listener, Protocol):
    """What a running call may send besides its answer."""

    async def data(self, channel: int, data: bytes) -> None: ...
    def input(self) -> AsyncIterator[bytes]: ...


@dataclass(slots=True)
class Marks:
    """Phases of one call: each mark ends the phase that began at the mark before."""

    at: float = field(default_factory=time.monotonic)
    phases: list[PhaseTime] = field(default_factory=list)

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.phases.append(PhaseTime(name=name, seconds=now - self.at))
        self.at = now

    def took(self, phases: tuple[PhaseTime, ...], rest: str) -> None:
        """Takes over the phases that a part measured itself; what is left since the last mark is ``rest``."""
        now = time.monotonic()
        spent = sum(p.seconds for p in phases)
        self.phases += [*phases, PhaseTime(name=rest, seconds=max(0.0, now - self.at - spent))]
        self.at = now


class Reports:
    """Reports of one call, to be used as a context: none within ``quiet_s``, then at most one every
    `PROGRESS_INTERVAL_S`. What comes in between waits, and only the latest of it is sent."""

    def __init__(self, reporter: Listener, quiet_s: float = QUIET_S) -> None:
        self._reporter = reporter
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.time() + quiet_s
        self._waiting: Progress | None = None
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, progress: Progress) -> None:
        self._waiting = progress
        if self._timer is None:
            if self._loop.time() >= self._next:
                self._send()
            else:
                self._timer = self._loop.call_at(self._next, self._send)

    def phase(self, name: str) -> None:
        self.tell(Progress(phase=name))

    def bytes(self, phase: str, done: int, total: int) -> None:
        self.tell(Progress(phase=phase, done_bytes=done, total_bytes=total))

    def _send(self) -> None:
        self._timer = None
        self._next = self._loop.time() + PROGRESS_INTERVAL_S
        if self._waiting is not None:
            self._reporter.progress(self._waiting)
            self._waiting = None

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @asynccontextmanager
    async def growing(self, directory: Path, phase: str) -> AsyncIterator[None]:
        """Around work that writes files into a directory: tells how many bytes there are, whenever there are more."""
        self.phase(phase)
        watcher = asyncio.create_task(self._watch(directory, phase))
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _watch(self, directory: Path, phase: str) -> None:
        last = 0
        while True:
            await asyncio.sleep(SAMPLE_S)
            size = 0
            with contextlib.suppress(OSError):  # a file that goes away meanwhile
                size = sum(path.stat().st_size for path in directory.iterdir())  # a handful of files
            if size != last:
                last = size
                self.bytes(phase, size, 0)
