"""When no replica of the control plane is heard for long, this worker may count as lost and its actors may wake
elsewhere; so what runs here is stopped before that. It goes on when a replica says so (`Thaw`), never by itself: it may
be that it does run elsewhere by now, and then it is to be discarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import msgspec
import structlog

from greenroom.core.agentapi import Welcome
from greenroom.core.records import Record

log = structlog.get_logger(__name__)

#: While alone, how often is looked for what runs: a wake that was under way has ended, a freeze has failed.
SCAN_S = 0.2


class _Remembered(Record, frozen=True, kw_only=True):
    """``heard_at``: seconds since the machine was booted, which a next process can compare with its own."""

    alone_s: float = 0.0
    epoch: int = 0
    heard_at: float = 0.0


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class AloneWatch:
    """``running``: actors (uid) that run; ``freeze`` stops one, unless it is not `alone` any more.

    How long is long is remembered in ``path``, for an agent process that begins while nobody can be heard; so is the
    `epoch`, which grows each time that this worker becomes alone: what somebody decided about what runs here before
    that may not be true any more.
    """

    def __init__(
        self,
        path: Path,
        running: Callable[[], Iterable[str]],
        freeze: Callable[[str], Awaitable[None]],
        boot_time: Callable[[], float] = _boot_time,
    ) -> None:
        self._path = path
        self._boot_time = boot_time
        self._running = running
        self._freeze = freeze
        self._loop = asyncio.get_running_loop()
        remembered = self._recall()
        self._alone_s, self.epoch = remembered.alone_s, remembered.epoch
        # An agent that comes back is as alone as the one before was. After a boot of the machine nothing runs anyway,
        # nor does anything where nobody was ever heard.
        away_s = max(0.0, boot_time() - remembered.heard_at) if remembered.heard_at else 0.0
        self._heard_at = self._loop.time() - away_s
        self._was_alone = False
        self._news = asyncio.Event()
        self._freezing: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="alone-watch")

    def heard(self, welcome: Welcome, at: float) -> None:
        """A replica lived at ``at`` (the loop's clock, seconds): it has answered what was sent to it then."""
        _ = self.alone  # until now, perhaps, and nobody has looked
        self._heard_at, self._alone_s = max(self._heard_at, at), welcome.alone_s
        self._remember()
        self._news.set()

    @property
    def alone(self) -> bool:
        """Looked at whenever it matters, so that the epoch has grown before anybody is told that it is over."""
        alone = self._left_s() <= 0
        if alone and not self._was_alone:
            self.epoch += 1
            self._remember()
        self._was_alone = alone
        return alone

    def _left_s(self) -> float:
        return self._heard_at + self._alone_s - self._loop.time() if self._alone_s > 0 else float("inf")

    async def _watch(self) -> None:
        was = False
        while True:
            if self.alone is not was:
                was = not was
                if was:
                    log.error("no control plane is heard: what runs is frozen", alone_s=self._alone_s)
                else:
                    log.warning("a control plane is heard again")
            for uid in self._running() if was else ():
                if uid not in self._freezing:
                    self._begin(uid)
            await self._wait(SCAN_S if was else self._left_s())

    async def _wait(self, seconds: float) -> None:
        """Until something was heard, and at most this long."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if seconds == float("inf") else seconds):
                await self._news.wait()

    def _begin(self, uid: str) -> None:
        self._freezing[uid] = asyncio.create_task(self._stop(uid), name=f"alone-{uid}")
        self._freezing[uid].add_done_callback(lambda _: self._freezing.pop(uid))

    async def _stop(self, uid: str) -> None:
        try:
            await self._freeze(uid)
        except Exception as error:  # whatever it is, it must be tried again
            log.error("can't freeze an actor, tries again", actor_uid=uid, error=str(error))
            await asyncio.sleep(SCAN_S)

    def _recall(self) -> _Remembered:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Remembered)
        except (OSError, msgspec.MsgspecError):
            return _Remembered()

    def _remember(self) -> None:
        try:
            heard_at = self._boot_time() - (self._loop.time() - self._heard_at)
            now = _Remembered(alone_s=self._alone_s, epoch=self.epoch, heard_at=heard_at)
            new = self._path.with_suffix(".new")  # a process that is killed here must not forget its epoch
            new.write_bytes(msgspec.json.encode(now))
            new.replace(self._path)
        except OSError as error:
            log.warning("what the control plane said is not remembered", path=str(self._path), error=str(error))

    async def close(self) -> None:
        tasks = [*self._freezing.values()] + ([self._task] if self._task else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
