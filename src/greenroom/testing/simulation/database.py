"""The real store in memory, as replicas of a control plane see it over a network: late, and sometimes not at all.

Each replica has a clock of its own and one change feed. What it wrote itself comes back on the feed soon, what others
wrote comes later; for each record in the order of the commits, and in no order between different records.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from greenroom.core.commands import ActorCommand, Change, Command
from greenroom.core.errors import ResourceExhausted, Unavailable
from greenroom.store.memory import MemoryStore
from greenroom.store.port import KEPT_OPERATIONS, MAX_PAGE, Event, EventType, Free, R, Stored, W, Where
from greenroom.store.watch import Watcher
from greenroom.testing.simloop import Process
from greenroom.testing.simulation.faults import HEAVY
from greenroom.testing.simulation.network import Network
from greenroom.testing.simulation.trace import Trace

T = TypeVar("T")
Effects = list[tuple[EventType, Stored]]
#: A lifecycle command, or a record as it is to be stored.
Write = Command | Free

#: The date on which every simulation begins, in seconds since the epoch.
EPOCH_S = 1_800_000_000.0
#: What the network calls the store.
STORE = "store"
#: How much later than their own writes replicas hear of others', at most, in seconds.
FEED_DELAY_S = 0.05
#: The same while a feed lags.
FEED_LAG_S = 5.0
#: The smallest time between two changes of one record.
TICK_S = 1e-6
#: How many of the states that were overtaken by the time they could be told are not told.
LEFT_OUT = 0.5


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError(f"{work} waits for something")


class Database:
    """The one store.

    Attributes:
        on_write: called after every write, with what was written and by whom, in the same instant.
    """

    def __init__(self, network: Network, trace: Trace) -> None:
        self.network = network
        self.trace = trace
        self.memory = MemoryStore(lambda: EPOCH_S + network.loop.time())
        self.memory._broadcast = _Tap(self._written)  # type: ignore[assignment]
        self.feeds: list[Feed] = []
        self.on_write: Callable[[str, Write | None, Effects], None] = lambda who, write, effects: None
        #: The latest event of each record.
        self.latest: dict[tuple[type[Stored], str], Stored] = {}
        self._who: SimStore | None = None
        self._write: Write | None = None

    def do(self, who: SimStore, what: str, work: Coroutine[Any, Any, T], write: Write | None = None) -> T:
        """Carries out a call of a replica; ``write``: what it wants to have written."""
        self._who, self._write = who, write
        self.trace(who.name, "store", what)
        return at_once(work)

    def _written(self, effects: Effects) -> None:
        if effects:
            self.latest.update({(type(r), r.pk): r for _, r in effects})
            assert self._who is not None
            self.on_write(self._who.name, self._write, effects)
            for feed in self.feeds:
                feed.push(effects, own=feed is self._who.feed)


class _Tap:
    """Stands in for the broadcast of `MemoryStore`."""

    def __init__(self, written: Callable[[Effects], None]) -> None:
        self._written = written

    def publish(self, effects: Effects) -> None:
        self._written(effects)

    def watch(self, capacity: int) -> Watcher:
        return Watcher(capacity)  # of the world's own looks, which watch nothing

    def close(self) -> None:
        pass


class Feed:
    """The change feed of one replica: hands what was written to whoever of its process watches."""

    def __init__(self, database: Database, process: Process) -> None:
        self.process = process
        self._network = database.network
        self._database = database
        self._watchers: list[weakref.ref[Watcher]] = []
        self._sequence = 0
        #: When the latest change of each record comes.
        self._last: dict[tuple[type[Stored], str], float] = {}
        self.lag_until = 0.0
        database.feeds.append(self)

    def close(self) -> None:
        self._database.feeds.remove(self)

    def watch(self, capacity: int) -> Watcher:
        watcher = Watcher(capacity)
        self._watchers.append(weakref.ref(watcher))
        return watcher

    def push(self, effects: Effects, *, own: bool) -> None:
        loop, network = self._network.loop, self._network
        delay = network.latency()
        if not own:
            delay += network.random.random() * (FEED_LAG_S if loop.time() < self.lag_until else FEED_DELAY_S)
        when = loop.time() + delay
        keys = [(type(record), record.pk) for _, record in effects]
        when = max([when, *(self._last[key] + TICK_S for key in keys if key in self._last)])
        self._last.update(dict.fromkeys(keys, when))
        loop.call_at(when, self._arrive, effects, own, context=self.process.context)

    def _arrive(self, effects: Effects, own: bool) -> None:
        if not self._network.reaches(self.process.name, STORE):
            self.cut()  # what comes meanwhile is lost, so it has a gap
            return
        self._watchers = [ref for ref in self._watchers if ref() is not None]
        for kind, record in effects:
            if not own and self._may_be_left_out(kind, record):
                continue
            self._sequence += 1
            event = Event(type=kind, record=record, sequence=self._sequence, foreign=not own)
            for ref in self._watchers:
                if (watcher := ref()) is not None:
                    watcher.push(event)

    def _may_be_left_out(self, kind: EventType, record: Stored) -> bool:
        """A state that was overtaken before anybody was told of it; who is told anyway is drawn."""
        latest = self._database.latest.get((type(record), record.pk))
        overtaken = kind is EventType.PUT and latest is not None and latest is not record
        return overtaken and self._network.random.random() < LEFT_OUT

    def cut(self) -> None:
        """It has a gap: everybody is told to list again."""
        for ref in self._watchers:
            if (watcher := ref()) is not None:
                watcher.end(ResourceExhausted("the feed has a gap; list again", reason="WATCH_TOO_SLOW"))
        self._watchers.clear()


class SimStore:
    """See `greenroom.store.port.Store`; one for each process of a replica.

    Attributes:
        skew_s: by how much its clock is ahead of the true time.
    """

    def __init__(self, database: Database, process: Process, skew_s: float) -> None:
        self._database = database
        self._memory = database.memory
        self._network = database.network
        self.name = process.name
        self.feed = Feed(database, process)
        self.skew_s = skew_s

    async def _ask(
        self, what: str, make: Callable[[], Coroutine[Any, Any, T]], write: Write | None = None, weight: float = 1.0
    ) -> T:
        act = lambda: self._database.do(self, what, make(), write)  # noqa: E731
        return await self._network.ask(STORE, act, _away, weight=weight)

    async def apply(self, command: ActorCommand) -> Change:
        what = f"{type(command).__name__} {command.key}"
        return await self._ask(what, lambda: self._memory.apply(command), command, HEAVY)

    async def put(self, record: W) -> W:
        return await self._ask(f"put {type(record).__name__} {record.pk}", lambda: self._memory.put(record), record)

    async def remove(self, record: Free) -> None:
        await self._ask(f"remove {type(record).__name__} {record.pk}", lambda: self._memory.remove(record))

    async def get(self, cls: type[R], pk: str) -> R:
        return await self._ask(f"get {cls.__name__} {pk}", lambda: self._memory.get(cls, pk))

    async def list(
        self,
        cls: type[R],
        *,
        namespace: str = "",
        where: Where | None = None,
        after: str = "",
        limit: int = MAX_PAGE,
    ) -> list[R]:
        return await self._ask(
            f"list {cls.__name__}",
            lambda: self._memory.list(cls, namespace=namespace, where=where, after=after, limit=limit),
        )

    def watch(self, *, capacity: int = 10_000) -> Watcher:
        return self.feed.watch(capacity)

    def clock(self) -> float:
        return EPOCH_S + self._network.loop.time() + self.skew_s

    async def trim(self, keep: int = KEPT_OPERATIONS) -> int:
        return await self._ask("trim", lambda: self._memory.trim(keep))

    async def close(self) -> None:
        self.feed.close()


def _away() -> Unavailable:
    return Unavailable("the store does not answer")
