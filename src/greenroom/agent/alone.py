"""When no replica of the control plane is heard for long, this worker may count as lost and its actors may wake
elsewhere; so what runs here is stopped before that. It goes on when a replica says so (`Thaw`), never by itself: it may
be that it does run elsewhere by now, and then it is to be discarded.

All times are the machine's (`greenroom.agent.clock`): what it slept counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import msgspec
import structlog

from greenroom.agent import clock
from greenroom.core.agentapi import Welcome
from greenroom.core.records import Record

log = structlog.get_logger(__name__)

#: How often is looked whether this worker is alone, and for what runs and must not (a freeze may have failed). Timers
#: stand still while the machine sleeps, so this is also how long what runs goes on at most after a sleep.
SCAN_S = 0.2


class _Remembered(Record, frozen=True, kw_only=True):
    """``heard_at``: on the machine's clock (seconds), which the next process has too."""

    alone_s: float = 0.0
    epoch: int = 0
    heard_at: float = 0.0


class AloneWatch:
    """``stale``: actors (uid) that run and were not let run in the epoch that is `now`; ``stop`` stops one, unless it
    is not stale any more. ``boot_time``: the machine's clock.

    How long is long is remembered in ``path``, for an agent process that begins while nobody can be heard; so is the
    `epoch`, which grows each time that this worker becomes alone: what somebody decided about what runs here before
    that may not be true any more.
    """

    def __init__(
        self,
        path: Path,
        stale: Callable[[], Iterable[str]],
        stop: Callable[[str], Awaitable[None]],
        boot_time: Callable[[], float] = lambda: clock.boot_time(),
    ) -> None:
        self._path = path
        self._boot_time = boot_time
        self._stale = stale
        self._stop = stop
        remembered = self._recall()
        self._alone_s, self.epoch = remembered.alone_s, remembered.epoch
        # An agent that comes back is as alone as the one before was. After a boot of the machine nothing runs anyway,
        # nor does anything where nobody was ever heard.
        now = boot_time()
        self._heard_at = min(now, remembered.heard_at or now)
        self._was_alone = False
        self._news = asyncio.Event()
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="alone-watch")

    def heard(self, welcome: Welcome, at: float) -> None:
        """A replica lived at ``at`` (`clock.boot_time`): it has answered what was sent to it then."""
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

    @property
    def now(self) -> int:
        """The epoch in which what is decided now may run; -1 while `alone`: nothing may. Once it is another it never is
        the same again, so whether it is the same says that this worker was not alone in between."""
        return -1 if self.alone else self.epoch

    def may_run(self, epoch: int) -> bool:
        """Whether what was let run in that epoch may go on."""
        return epoch >= 0 and epoch == self.now

    def _left_s(self) -> float:
        return self._heard_at + self._alone_s - self._boot_time() if self._alone_s > 0 else float("inf")

    async def _watch(self) -> None:
        was = False
        while True:
            if self.alone is not was:
                was = not was
                if was:
                    log.error("no control plane is heard: what runs is frozen", alone_s=self._alone_s)
                else:
                    log.warning("a control plane is heard again")
            # Also when somebody has been heard since: what it knows of what runs here may be from before.
            stale = [*self._stale()]
            for uid in stale:
                if uid not in self._stopping:
                    self._begin(uid)
            left_s = self._left_s()
            await self._wait(min(SCAN_S, left_s) if left_s > 0 and not stale else SCAN_S)

    async def _wait(self, seconds: float) -> None:
        """Until something was heard, and at most this long."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    def _begin(self, uid: str) -> None:
        self._stopping[uid] = asyncio.create_task(self._try_to_stop(uid), name=f"alone-{uid}")
        self._stopping[uid].add_done_callback(lambda _: self._stopping.pop(uid))

    async def _try_to_stop(self, uid: str) -> None:
        try:
            await self._stop(uid)
        except Exception as error:  # whatever it is, it must be tried again
            log.error("can't stop an actor, tries again", actor_uid=uid, error=str(error))
            await asyncio.sleep(SCAN_S)

    def _recall(self) -> _Remembered:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Remembered)
        except (OSError, msgspec.MsgspecError):
            return _Remembered()

    def _remember(self) -> None:
        try:
            now = _Remembered(alone_s=self._alone_s, epoch=self.epoch, heard_at=self._heard_at)
            new = self._path.with_suffix(".new")  # a process that is killed here must not forget its epoch
            new.write_bytes(msgspec.json.encode(now))
            new.replace(self._path)
        except OSError as error:
            log.warning("what the control plane said is not remembered", path=str(self._path), error=str(error))

    async def close(self) -> None:
        tasks = [*self._stopping.values()] + ([self._task] if self._task else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
