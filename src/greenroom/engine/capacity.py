"""Waiting for a slot, in order of arrival, and making one by suspending the longest idle actor."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from greenroom.core.errors import ResourceExhausted
from greenroom.engine.bindings import Binding
from greenroom.engine.config import EngineConfig

#: Turns from which the pace of a queue is told.
TURNS_REMEMBERED = 32
#: What a wake-up that was refused is told at least and at most, in seconds.
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


class CapacityQueue:
    """The wake-ups that wait for a slot in one pool.

    Each `slot_freed` gives the first one its turn to try; it goes back to the front if somebody else was quicker
    (`wait` with ``again``). Who has its turn and does not take a slot after all passes it on by another `slot_freed`.
    So there are as many turns as slots, and nobody is overtaken again and again. A turn that is a ``probe`` may be one
    too many or stand for many (a worker has come): who finds a slot with it lets the next one probe.

    While anybody waits, idle actors are suspended, at most ``config.evictions`` at a time and never more than there are
    waiting.
    """

    def __init__(
        self,
        pool: str,
        config: EngineConfig,
        candidates: Callable[[], list[Binding]],
        evict: Callable[[Binding], asyncio.Task[None]],
        why: Callable[[], str] = lambda: "every running actor has open requests",
    ) -> None:
        """``candidates``: actors that may be suspended now, the best first. ``evict`` begins to suspend one, which is
        no candidate from then on; the task ends without an error when the slot is free."""
        self._pool = pool
        self._config = config
        self._candidates = candidates
        self._evict = evict
        self._why = why  # nothing became free
        self._waiting: deque[asyncio.Future[bool]] = deque()
        #: Of those who wait, the workers that serve them, where that is not every one.
        self._only: dict[asyncio.Future[bool], frozenset[str]] = {}
        #: When the latest turns were given (loop time): how fast the queue moves.
        self._turns: deque[float] = deque(maxlen=TURNS_REMEMBERED)
        self._evicting: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, *, again: bool, until: float, only: frozenset[str] = frozenset()) -> bool:
        """Returns when it is this caller's turn to try: whether the turn is a probe. ``again``: it has been its turn
        before. ``until``: loop time. ``only``: workers of which it needs one, where not every one serves it; it then
        waits behind the others, who could use what it can't.

        Raises:
            ResourceExhausted: the queue is full, or nothing became free in time.
        """
        if len(self._waiting) >= self._config.max_waiting and not again:
            position = len(self._waiting)
            raise self._exhausted(f"{position} wake-ups are waiting already", position)
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if again and not only:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        if only:
            self._only[turn] = only
        self.pump()
        try:
            async with asyncio.timeout_at(until):
                return await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.slot_freed(probe=turn.result())  # it came in the very moment of giving up: the next one's, then
            if isinstance(error, TimeoutError):
                position = self._waiting.index(turn) if turn in self._waiting else 0
                raise self._exhausted(self._why(), position) from None
            raise
        finally:
            self._only.pop(turn, None)
            if turn in self._waiting:
                self._waiting.remove(turn)

    def slot_freed(self, *, probe: bool = False) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(probe)
                self._turns.append(asyncio.get_running_loop().time())
                return

    def pump(self) -> None:
        """Starts as many suspensions as are missing; called when somebody comes to wait and when an actor idles."""
        missing = min(len(self._waiting), self._config.evictions) - len(self._evicting)
        if missing <= 0:
            return
        candidates = self._candidates()
        if len(self._only) == len(self._waiting):  # room elsewhere would serve nobody
            wanted = frozenset().union(*self._only.values())
            candidates = [b for b in candidates if b.worker in wanted]
        for binding in candidates[:missing]:
            task = self._evict(binding)
            self._evicting.add(task)
            task.add_done_callback(self._evicted)

    def _evicted(self, task: asyncio.Task[None]) -> None:
        self._evicting.discard(task)
        # After a failure not at once again: whoever comes, and every actor that idles, tries anew.
        if not task.cancelled() and task.exception() is None:
            self.pump()

    def _exhausted(self, why: str, position: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"no free slot in pool {self._pool!r}: {why}; try again, suspend an actor, or raise the pool's replicas or "
            "slots",
            reason="NO_CAPACITY",
            metadata={"waiting": str(len(self._waiting)), "position": str(position)},
            retry_after_s=self._retry_after_s(position),
        )

    def _retry_after_s(self, position: int) -> float:
        """When it may be that many wake-ups' turn, going by how fast turns came lately."""
        if len(self._turns) < 2:
            return MIN_RETRY_AFTER_S
        pace_s = (asyncio.get_running_loop().time() - self._turns[0]) / len(self._turns)
        return min(max(MIN_RETRY_AFTER_S, position * pace_s), MAX_RETRY_AFTER_S)
