"""The simulated network: every message takes a while, and may be lost, late, carried out twice, or overtaken.

Messages belong to nobody: what a process has sent arrives although the process has died, or stands still, since.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from greenroom.core.errors import GreenroomError
from greenroom.testing.simloop import Process, SimLoop
from greenroom.testing.simulation.faults import AT_ASK, Fault, Injector

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


def data_path(worker: str) -> str:
    """What the network calls the sandboxes of a worker, which are reached on another way than its agent."""
    return f"{worker}-box"


#: How long somebody who gets no answer waits, in seconds: between these two.
PATIENCE_S = (0.05, 2.0)
#: By how much a message may be late, in seconds.
LATE_S = (0.5, 8.0)


class Network:
    """Who reaches whom, and how long it takes.

    Attributes:
        crash: kills the replica whose process that is; set by whoever runs the world.
    """

    def __init__(self, loop: SimLoop, seed: int | str, faults: Injector) -> None:
        self.loop = loop
        self.faults = faults
        self.random = random.Random(f"network {seed}")
        self.crash: Callable[[Process], None] = lambda process: None
        self._cut: dict[tuple[str, str], int] = {}
        #: Who reaches nobody.
        self.down: set[str] = set()

    # --- who reaches whom ---------------------------------------------------------------------------------

    def cut(self, one: str, other: str) -> None:
        """From now on no message between them arrives, without anybody being told. Cuts add up."""
        for pair in ((one, other), (other, one)):
            self._cut[pair] = self._cut.get(pair, 0) + 1

    def heal(self, one: str, other: str) -> None:
        """Ends one `cut`."""
        for pair in ((one, other), (other, one)):
            self._cut[pair] -= 1
            if not self._cut[pair]:
                del self._cut[pair]

    def reaches(self, one: str, other: str) -> bool:
        return ((one, other) not in self._cut) and one not in self.down and other not in self.down

    # --- how long it takes --------------------------------------------------------------------------------

    def latency(self) -> float:
        """Mostly about a millisecond, sometimes some tenths of a second."""
        draw = self.random.random()
        return 0.0002 + draw * draw * 0.003 if draw < 0.98 else 0.003 + self.random.random() * 0.3

    def patience(self) -> float:
        return self.random.uniform(*PATIENCE_S)

    def lateness(self) -> float:
        return self.random.uniform(*LATE_S)

    # --- question and answer ------------------------------------------------------------------------------

    async def ask(
        self,
        to: str,
        act: Callable[[], T],
        failure: Callable[[], GreenroomError],
        possible: tuple[Fault, ...] = AT_ASK,
        weight: float = 1.0,
    ) -> T:
        """Has ``act`` done by ``to``, at once when the question arrives there, and returns what it returned or raises
        what it raised; or ``failure()``: then it may have been done, or may be done yet. ``possible``: what may go
        wrong, ``weight``: how likely."""
        loop, process = self.loop, self.loop.current()
        answer: asyncio.Future[T] = loop.create_future()
        ask = _Ask(self, to, process, act, failure, answer)
        fault = self.faults.at(possible, weight)
        there = self.latency()
        match fault:
            case None:
                ask.send(there)
            case Fault.SLOW:
                ask.send(self.lateness())
            case Fault.LOST:
                ask.fail(self.patience())
            case Fault.REPLY_LOST:
                ask.send(there, reply=False)
            case Fault.LATE:
                ask.fail(self.patience())
                ask.send(self.lateness(), reply=False)
            case Fault.TWICE:
                ask.send(there)
                ask.send(there + self.lateness(), reply=False)
            case Fault.CRASH_AFTER:
                ask.send(there, crash=True)
            case _:
                self.crash(process)
        return await answer


class _Ask:
    """One question on its way."""

    __slots__ = ("act", "answer", "failure", "network", "process", "to")

    def __init__(
        self,
        network: Network,
        to: str,
        process: Process,
        act: Callable[[], Any],
        failure: Callable[[], GreenroomError],
        answer: asyncio.Future[Any],
    ) -> None:
        self.network = network
        self.to = to
        self.process = process
        self.act = act
        self.failure = failure
        self.answer = answer

    def send(self, after: float, *, reply: bool = True, crash: bool = False) -> None:
        loop = self.network.loop
        loop.call_later(after, self._arrive, reply, crash, context=loop.main.context)

    def fail(self, after: float) -> None:
        self.network.loop.call_later(after, self._give_up, context=self.process.context)

    def _arrive(self, reply: bool, crash: bool) -> None:
        network = self.network
        if not network.reaches(self.process.name, self.to):
            self.fail(network.patience())
            return
        result: Any = None
        error: GreenroomError | None = None
        try:
            result = self.act()
        except GreenroomError as refused:
            error = refused
        if crash:
            network.crash(self.process)
        elif reply:
            network.loop.call_later(network.latency(), self._settle, result, error, context=self.process.context)
        else:
            self.fail(network.patience())

    def _settle(self, result: Any, error: GreenroomError | None) -> None:
        if not self.network.reaches(self.process.name, self.to):
            self.fail(self.network.patience())
        elif self.answer.done():
            pass
        elif error is not None:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(result)

    def _give_up(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(self.failure())
