"""Failing step N: counts what an engine does to the world outside it, and lets one step go wrong in a chosen way.

As SQLite's anomaly tests do: run an operation with step 1 failing, then with step 2 failing, and so on, until it runs
without that step being reached. A step is one ``apply``, ``put``, ``remove`` or ``get`` of the store or one ``call`` of
the hub, whatever loop or operation it comes from.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from greenroom.core.agentapi import AgentCall, Hello, StreamingCall, Welcome
from greenroom.core.commands import ActorCommand, Change
from greenroom.core.errors import Unavailable
from greenroom.core.records import Record
from greenroom.engine.workers import CallStream, OnProgress, WorkerHub, WorkerListener
from greenroom.store.port import MAX_PAGE, Event, Free, R, Store, W, Where

T = TypeVar("T")


class Fault(enum.StrEnum):
    REFUSED = "refused"  # it raises and has not happened
    REPLY_LOST = "reply-lost"  # it has happened, and raises
    REPLY_LATE = "reply-late"  # it raises at once, and happens all the same
    CONTROL_DIES_BEFORE = "control-dies-before"
    CONTROL_DIES_AFTER = "control-dies-after"
    AGENT_DIES_BEFORE = "agent-dies-before"
    AGENT_DIES_AFTER = "agent-dies-after"


class Steps:
    """Counts the steps from `arm` on and does ``fault`` to the one with that number."""

    def __init__(self) -> None:
        self._number = 0
        self._count = 0
        self._fault = Fault.REFUSED
        #: What the step was that the fault was done to; "" while none was.
        self.hit = ""
        #: Whether the fault is just being done.
        self.acting = False
        #: Set when the control plane is to die: nothing that it does afterwards reaches anything.
        self.control_dies = asyncio.Event()
        #: Ends agents: that of the worker, or all for "".
        self.kill_agents: Callable[[str], Awaitable[None]] | None = None
        self._late: set[asyncio.Future[Any]] = set()
        #: When set, how many turns of the loop each step takes is drawn from it: other orders of things.
        self.random: random.Random | None = None

    def arm(self, number: int, fault: Fault) -> None:
        self._number, self._fault, self._count, self.hit = number, fault, 0, ""
        self.control_dies.clear()

    async def turns(self) -> None:
        """Before and after each step others have their turn, as they have while a real store or worker answers."""
        for _ in range(self.random.randint(1, 3) if self.random else 1):
            await asyncio.sleep(0)

    def disarm(self) -> None:
        self._number = 0

    async def step(self, name: str, worker: str, act: Callable[[], Awaitable[T]]) -> T:
        if not self._number:
            return await act()
        self._count += 1
        if self._count != self._number:
            return await act()
        self.hit = name
        self._number = 0
        self.acting = True
        try:
            return await self._go_wrong(name, worker, act)
        finally:
            self.acting = False

    async def _go_wrong(self, name: str, worker: str, act: Callable[[], Awaitable[T]]) -> T:
        reason = "WORKER_DISCONNECTED" if worker else ""
        error = Unavailable(f"{name}: {self._fault}", reason=reason)
        match self._fault:
            case Fault.REFUSED:
                raise error
            case Fault.REPLY_LOST:
                await act()
                raise error
            case Fault.REPLY_LATE:
                late = asyncio.ensure_future(act())
                self._late.add(late)
                late.add_done_callback(self._came_late)
                raise error
            case Fault.CONTROL_DIES_BEFORE | Fault.CONTROL_DIES_AFTER:
                if self._fault is Fault.CONTROL_DIES_AFTER:
                    await act()
                self.control_dies.set()
                await asyncio.get_running_loop().create_future()  # until it is cancelled
                raise AssertionError("never reached")
            case Fault.AGENT_DIES_BEFORE | Fault.AGENT_DIES_AFTER:
                assert self.kill_agents is not None
                if self._fault is Fault.AGENT_DIES_BEFORE:
                    await self.kill_agents(worker)
                    return await act()
                result = await act()
                await self.kill_agents(worker)
                return result

    def _came_late(self, late: asyncio.Future[Any]) -> None:
        self._late.discard(late)
        if not late.cancelled():
            late.exception()


class Gate:
    """One control plane's way to the world: shut when it dies, so that nothing of a dead one comes through."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._shut = False
        #: Steps that were tried after the control plane had been closed: it left something running.
        self.zombies: list[str] = []
        self._closed = False

    def shut(self) -> None:
        self._shut = True

    def closed(self) -> None:
        self._shut = self._closed = True

    async def step(self, name: str, worker: str, act: Callable[[], Awaitable[T]]) -> T:
        if self._closed:
            self.zombies.append(name)
        await self._steps.turns()
        if self._shut or self._steps.control_dies.is_set():
            await asyncio.get_running_loop().create_future()
        try:
            return await self._steps.step(name, worker, act)
        finally:
            await self._steps.turns()


class SteppedStore:
    """See `greenroom.store.port.Store`."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    async def apply(self, command: ActorCommand) -> Change:
        return await self._gate.step(type(command).__name__, "", lambda: self._store.apply(command))

    async def put(self, record: W) -> W:
        return await self._gate.step(f"put {type(record).__name__}", "", lambda: self._store.put(record))

    async def remove(self, record: Free) -> None:
        await self._gate.step(f"remove {type(record).__name__}", "", lambda: self._store.remove(record))

    async def get(self, cls: type[R], pk: str) -> R:
        return await self._gate.step(f"get {cls.__name__}", "", lambda: self._store.get(cls, pk))

    async def list(
        self,
        cls: type[R],
        *,
        namespace: str = "",
        where: Where | None = None,
        after: str = "",
        limit: int = MAX_PAGE,
    ) -> list[R]:
        return await self._store.list(cls, namespace=namespace, where=where, after=after, limit=limit)

    def watch(self, *, capacity: int = 10_000) -> AsyncIterator[Event]:
        return self._store.watch(capacity=capacity)

    def clock(self) -> float:
        return self._store.clock()

    async def trim(self, keep: int = 10_000) -> int:
        return await self._store.trim(keep)

    async def close(self) -> None:
        await self._store.close()


class SteppedHub:
    """See `greenroom.engine.workers.WorkerHub`."""

    def __init__(self, hub: WorkerHub, gate: Gate) -> None:
        self._hub = hub
        self._gate = gate

    @property
    def listener(self) -> WorkerListener | None:
        return self._hub.listener

    @listener.setter
    def listener(self, listener: WorkerListener | None) -> None:
        self._hub.listener = listener

    @property
    def welcome(self) -> Welcome:
        return self._hub.welcome

    @welcome.setter
    def welcome(self, welcome: Welcome) -> None:
        self._hub.welcome = welcome

    def connected(self) -> dict[str, Hello]:
        return self._hub.connected()

    def heard(self) -> dict[str, float]:
        return self._hub.heard()

    def acknowledge(self, hello: Hello) -> None:
        self._hub.acknowledge(hello)

    async def call(self, worker: str, call: AgentCall, on_progress: OnProgress | None = None) -> Record:
        name = type(call).__name__
        return await self._gate.step(name, worker, lambda: self._hub.call(worker, call, on_progress))

    def open(self, worker: str, call: StreamingCall) -> CallStream:
        return self._hub.open(worker, call)
