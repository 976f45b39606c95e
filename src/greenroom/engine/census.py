"""Which workers there are: those that come, go and stay away.

A worker counts as lost when *no* replica hears it any more, and by then it has frozen what runs on it, so an actor that
wakes elsewhere is not alive twice. No clock is compared with another's for that; ``r`` is ``worker_return_s``:

- Whoever hears a worker writes that down in its record (``last_seen``), a new value each time.
- A heartbeat is answered only by a replica that knows that it was written down at most 0.4 r ago.
- A worker whose heartbeats of the last 0.5 r (`replicas.ALONE_SHARE`) are all unanswered freezes what runs on it.
- A worker is lost for a replica that has looked at its record all the while and seen no new value for r: its last
  answered heartbeat was sent at most 0.4 r after that value was written, so it has been frozen for 0.1 r. (Where
  replicas have different r, the longest of them counts here, and the shortest everywhere else.)
- Nobody routes to a worker unless it knows that that was written down in the last 0.9 r: so not to a sandbox whose
  agent is dead, or stands still, and could not freeze it.
- Only who is registered counts as heard: another agent may have the name, and one that can't be registered is lost like
  one that is away. (Who is alone with the store writes nothing down for its answers, and so answers none but these.)
- A replica that did not look for a while (it was away from the store, or did not run) begins to look anew.
- What a worker froze goes on only by a `Thaw` that was decided after the worker was heard again (its ``epoch``), and
  in a new generation: then a crash that was decided before finds that it is too old.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import (
    Conflict,
    GreenroomError,
    NotFound,
    Unavailable,
)
from greenroom.core.gc import control
from greenroom.core.records import Actor, Worker, WorkerState
from greenroom.engine import clock
from greenroom.engine.members import (
    ASKED,
    AWAY,
    LEAVING,
    RETIRING,
    WRITE_ATTEMPTS,
    Door,
    NotOnRoster,
    as_heard,
    state_of,
)
from greenroom.store.port import R

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: All as shares of ``worker_return_s``. How often the workers' records are looked at:
LOOK_SHARE = 1 / 16
#: How old what is written down may be before it is written down again, if the worker was heard since:
NOTE_SHARE = 0.1
#: How old it may be for a heartbeat to be answered:
BACKED_SHARE = 0.4
#: How old it may be for requests to be routed there:
TRUSTED_SHARE = 0.9
#: How long a request waits for the link of a worker that this process has not met: less than a gateway does for a
#: connection. Agents learn of a new replica with a heartbeat.
DOOR_WAIT_S = 4.0


class Stock(NamedTuple):
    """What a worker says of its images with every heartbeat (`api.Heartbeat`)."""

    images: frozenset[str]
    image_bytes: int
    image_over_bytes: int


class Census:
    """Also the hub's listener (`greenroom.engine.workers.WorkerListener`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops
        #: Set, and replaced by a new one, whenever a worker has come.
        self.arrival = asyncio.Event()
        #: Workers that are away and may still come back in time: since when (loop time).
        self._away: dict[str, float] = {}
        #: Workers whose residents have been compared since they connected.
        self._welcomed: set[str] = set()
        #: The connections over which workers are asked from time to time what they have.
        self._kept: dict[str, api.Hello] = {}
        self._differed: dict[str, frozenset[tuple[str, int]]] = {}
        #: By worker: what it said last of its images.
        self._stock: dict[str, Stock] = {}
        #: The agents (boot id) that have said that they are to end; each says it once, maybe before it is registered.
        self._farewells: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._emptying: set[str] = set()
        self._abandoning: dict[str, asyncio.Task[None]] = {}
        #: ``last_seen`` of each worker, and when (loop time) this value was seen first, looking without a gap.
        self._seen: dict[str, tuple[float, float]] = {}
        #: Of each worker's record at the last look: when the worker was first registered, and the number.
        self._numbers: dict[str, tuple[float, int]] = {}
        self._looked_at = 0.0
        #: Set, and replaced by a new one, with every look.
        self._looked = asyncio.Event()
        #: It was written down after this (loop time) that the worker was heard.
        self._backed: dict[str, float] = {}

    # --- workers come and go ------------------------------------------------------------------------------

    def worker_connected(self, hello: api.Hello) -> None:
        self._engine.members.gone(hello.worker)  # whoever had its name before
        self._missing(hello.worker)  # until it is registered
        if not self._ops.closed:
            self._engine.spawn(self._welcome(hello), f"welcome-{hello.worker}")

    def welcome_again(self, worker: str) -> bool:
        """It is connected, and not what was welcomed before. Returns False when nothing is begun."""
        hello = self._engine.hub.connected().get(worker)
        if hello is None or worker not in self._welcomed:
            return False
        self._welcomed.discard(worker)
        self.worker_connected(hello)
        return True

    def worker_heard(self, worker: str, heartbeat: api.Heartbeat) -> bool:
        self._notice(worker, heartbeat)
        if self._engine.config.exclusive:
            # Nobody else can count it as lost, and this process only when it has not been registered for long.
            return self._engine.members.is_enrolled(worker)
        backed = self._backed.get(worker)
        limit_s = BACKED_SHARE * self._engine.replicas.shortest_return_s
        return backed is not None and clock.monotonic() - backed <= limit_s

    def is_trusted(self, worker: str) -> bool:
        """Whether requests may be routed to what runs there."""
        if self._engine.config.exclusive:
            return True  # nobody could have woken it elsewhere
        backed = self._backed.get(worker)
        limit_s = TRUSTED_SHARE * self._engine.replicas.shortest_return_s
        return backed is not None and clock.monotonic() - backed <= limit_s

    def _notice(self, worker: str, heartbeat: api.Heartbeat) -> None:
        """What it says lives there is compared with what this process routes to; the worker itself is asked before
        anything is done about a difference."""
        if self._ops.closed or worker not in self._welcomed:
            return
        stock = Stock(frozenset(heartbeat.images), heartbeat.image_bytes, heartbeat.image_over_bytes)
        if stock != self._stock.get(worker):
            self._stock[worker] = stock
            self._engine.spawn(self._take_stock(worker, stock), f"stock-{worker}")
        if self._engine.reconciler.is_comparing(worker):
            return
        there = {(r.actor_uid, r.generation) for r in heartbeat.residents if r.state is api.ResidentState.RUNNING}
        bound = {(b.uid, b.generation) for b in self._engine.bindings.all() if b.worker == worker}
        # Once may be a message that crossed another; twice the same is worth a question.
        differs = frozenset(there ^ bound)
        if differs and differs == self._differed.get(worker):
            self._engine.spawn(self._engine.reconciler.compare_quietly(worker), f"compare-{worker}")
        self._differed[worker] = differs

    def has_image(self, worker: str, digest: str) -> bool:
        """Whether it has said so; a hint."""
        stock = self._stock.get(worker)
        return stock is not None and digest in stock.images

    async def _take_stock(self, worker: str, stock: Stock) -> None:
        """Writes down which images a worker has: placement prefers it for them."""
        said: dict[str, Any] = {
            "images": tuple(sorted(stock.images)),
            "image_bytes": stock.image_bytes,
            "image_over_bytes": stock.image_over_bytes,
        }
        try:
            await self._engine.members.change(worker, lambda there: replace(there, **said))
        except GreenroomError as error:
            self._stock.pop(worker, None)  # with the next heartbeat
            log.info("a worker's images are not written down yet", worker=worker, error=error.message)

    def worker_leaving(self, worker: str, boot_id: str) -> None:
        """Its agent was asked to end: its actors are suspended first, then it may go."""
        self._farewells[worker] = boot_id
        if not self._ops.closed and worker not in self._leaving:
            self._leaving.add(worker)
            self._engine.spawn(self._see_off(worker, boot_id), f"see-off-{worker}")

    def worker_gone(self, worker: str, boot_id: str) -> None:
        self._welcomed.discard(worker)
        self._kept.pop(worker, None)
        self._stock.pop(worker, None)
        self._farewells.pop(worker, None)
        self._engine.inventories.forget(worker)
        self._engine.members.gone(worker)
        self._missing(worker)

    def sandbox_exited(self, worker: str, event: api.SandboxExited) -> None:
        if not self._ops.closed:
            self._engine.spawn(self._engine.reconciler.exited(worker, event), f"exited-{event.actor_uid}")

    async def _welcome(self, hello: api.Hello) -> None:
        """Until it is done, or the connection has been replaced by another one. (Which may say the very same: it is the
        object that stands for a connection.)"""
        waits = ""
        while self._engine.hub.connected().get(hello.worker) is hello:
            try:
                self._backed[hello.worker] = await self._engine.members.register(hello)
                if self._farewells.get(hello.worker) == hello.boot_id:  # of one that was not registered nothing came
                    self.worker_leaving(hello.worker, hello.boot_id)
                self._engine.hub.acknowledge(hello)
                under_way = await self._engine.reconciler.compare(hello.worker, anew=True)
            except NotOnRoster as error:
                if waits != error.message:  # it may take long, and is said once
                    log.warning("worker not registered, waits for a roster", worker=hello.worker, error=error.message)
                waits = error.message
                await self._engine.rosters.wait(hello.pool)
                continue
            except GreenroomError as error:
                if waits != error.message:  # so may this
                    log.warning("worker not welcomed, tries again", worker=hello.worker, error=error.message)
                waits = error.message
                await asyncio.sleep(self._engine.config.retry_s)
                continue
            self._welcomed.add(hello.worker)
            self._stock[hello.worker] = Stock(frozenset(hello.images), hello.image_bytes, hello.image_over_bytes)
            self.arrival.set()
            self.arrival = asyncio.Event()
            self._engine.slot_freed(probe=True)
            # An operation that had its answer before the worker went away does not notice what went with it.
            again = self._engine.reconciler.compare_after(under_way, hello.worker)
            self._engine.spawn(again, f"compare-{hello.worker}")
            if self._kept.get(hello.worker) is not hello:
                self._kept[hello.worker] = hello
                self._engine.spawn(self._engine.reconciler.keep(hello), f"keep-{hello.worker}")
            await self._engine.pulls.prewarm(hello)
            return

    def empty(self, worker: str) -> None:
        """Suspends what is awake on a worker; one task at a time for each."""
        if worker not in self._emptying:
            self._emptying.add(worker)
            task = self._engine.spawn(self._engine.suspend_all([worker], cause="drain"), f"empty-{worker}")
            task.add_done_callback(lambda _: self._emptying.discard(worker))

    async def expect_all(self) -> None:
        """At the start: workers of an earlier process that are not here (yet)."""
        for worker in await self.all(Worker):
            if not self._engine.members.is_enrolled(worker.name):
                if self._engine.config.exclusive:
                    await self._mark_away(worker.name)
                self._missing(worker.name)

    def _missing(self, worker: str) -> None:
        """A worker is not registered here (any more); however often it comes and goes, one task waits for it."""
        waiting = worker in self._away
        self._away[worker] = clock.monotonic()
        if not waiting and not self._ops.closed:
            self._engine.spawn(self._expect(worker), f"expect-{worker}")

    async def _expect(self, worker: str) -> None:
        """Waits for a worker that is away; when nobody hears it any more, its actors are lost."""
        try:
            marked = 0.0
            while not self._engine.members.is_enrolled(worker):
                since = self._away[worker]
                if since != marked:
                    if self._engine.config.exclusive:
                        await self._ops.insist(lambda: self._mark_away(worker))
                    marked = since
                elif (left_s := since + self._engine.config.worker_return_s - clock.monotonic()) > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(left_s):
                            await self.arrival.wait()
                else:
                    await self._ops.insist(lambda: self._abandon_if_lost(worker))
                    if self._away[worker] == since:  # else it was here, and has gone again
                        return
        finally:
            del self._away[worker]

    async def _mark_away(self, worker: str) -> None:
        def change(record: Worker) -> Worker | None:
            if worker in self._engine.hub.connected() or record.state in AWAY:
                return None
            return replace(record, state=WorkerState.STALLED, last_seen=self._engine.now())

        await self._engine.members.change(worker, change)

    def may_be_heard(self, record: Worker) -> bool:
        """Whether this replica or another one may hear it, or has heard it so lately that what runs there may not be
        frozen yet."""
        return self._hears(record.name) or self._is_fresh(record)

    def _is_fresh(self, record: Worker) -> bool:
        """Whether some replica may have heard it so lately that it does not count as lost."""
        return self.unheard_s(record) < self._engine.replicas.longest_return_s

    def is_alive(self, record: Worker | None) -> bool:
        """Whether the process that is registered under that name may be heard by somebody, or come back before it
        counts as lost. (Who is alone with the store writes at once that one is away, however short its link breaks.)"""
        if record is None or record.state is WorkerState.GONE:
            return False
        return (self._engine.config.exclusive or record.state not in AWAY) and self._is_fresh(record)

    def unheard_s(self, record: Worker) -> float:
        """For how long this process has watched a worker's record without a gap and seen no sign of it."""
        seen = self._seen.get(record.name)
        if seen is None or seen[0] != record.last_seen:
            return 0.0
        return clock.monotonic() - seen[1]

    def _hears(self, worker: str) -> bool:
        """Whether it is registered with this process and not silent: one that stands still keeps its connection open,
        and who can't be registered need not be that worker."""
        heard = self._engine.hub.heard().get(worker) if self._engine.members.is_enrolled(worker) else None
        return heard is not None and clock.monotonic() - heard < self._engine.config.worker_return_s

    async def alive_elsewhere(self, worker: str) -> bool:
        """Whether other replicas hear a worker that is not connected to this one."""
        if self._engine.config.exclusive or worker in self._engine.hub.connected():
            return False
        try:
            record = await self._ops.read(Worker, worker)
        except NotFound:
            return False
        return record.state not in AWAY and self._is_fresh(record)

    async def _abandon_if_lost(self, worker: str) -> None:
        """A worker that did not come back to this process: lost, unless others hear it. What an operation holds there
        is that operation's to settle, and looked at again by the next `_sweep`."""
        task = self._abandoning.get(worker)
        if task is None:
            task = self._engine.spawn(self._abandon(worker), f"abandon-{worker}")
            self._abandoning[worker] = task
            task.add_done_callback(lambda _: self._abandoning.pop(worker))
        await self._ops.attend(task)

    async def _abandon(self, worker: str) -> None:
        # The actors first, then that it is lost, which is written only if nobody has heard it in between. Whoever hears
        # it afterwards, and lets one of them go on, raises its generation first: then what was read here is too old.
        actors = await self.all(Actor, worker=worker)

        async def write() -> bool:
            try:
                record = await self._store.get(Worker, worker)
            except NotFound:
                return bool(actors)
            if record.state is WorkerState.GONE:
                return True
            lost = not self._hears(worker) and (self._engine.config.exclusive or not self._is_fresh(record))
            if lost and (actors or record.state is not WorkerState.STALLED):
                await self._store.put(replace(record, state=WorkerState.STALLED))
            return lost

        for _ in range(WRITE_ATTEMPTS):
            try:
                if not await self._ops.steadily(write):
                    return
                break
            except Conflict:
                continue
        message = f"worker {worker} went away and did not come back"
        for actor in actors:
            await self._engine.reconciler.crash(actor, actor.generation, "WorkerLost", message, lost=True)

    async def heard_loop(self) -> None:
        """Writes down which workers this process hears, and finds those that nobody does."""
        pause_s = self._engine.config.worker_return_s * LOOK_SHARE
        while True:
            began = clock.monotonic()
            await asyncio.sleep(pause_s)
            if clock.monotonic() - began > 2 * pause_s:  # this process did not run
                self._seen.clear()
            try:
                await self._note_heard()
            except Exception as error:  # whatever it is, the next round must come
                self._seen.clear()
                log.warning("workers not noted, tries again", error=str(error), exc_info=bug_of(error))

    async def _note_heard(self) -> None:
        asked, return_s = clock.monotonic(), self._engine.config.worker_return_s
        workers = await self.all(Worker)
        got = clock.monotonic()
        if got - asked > 2 * return_s * LOOK_SHARE:
            self._seen.clear()  # it took too long to count as looking without a gap
        await self._notice_going_back(workers)
        enrolled = {*self._engine.members.enrolled()}
        heard = {name: at for name, at in self._engine.hub.heard().items() if name in enrolled}
        due: list[str] = []
        for worker in workers:
            self._engine.trust.noted(worker)
            self._observe(worker, got)
            if worker.state is WorkerState.GONE:
                if worker.name in heard:
                    self._present_again(worker.name)
            elif got - heard.get(worker.name, -return_s) < return_s * BACKED_SHARE:
                old = got - self._backed.get(worker.name, -return_s) >= return_s * NOTE_SHARE
                if old or worker.state is WorkerState.STALLED:
                    due.append(worker.name)
            elif not (worker.state is WorkerState.STALLED or worker.name in self._away or self._is_fresh(worker)):
                self._engine.spawn(self._abandon_if_lost(worker.name), f"lost-{worker.name}")
        await asyncio.gather(*map(self._note, due))
        self._forget({w.name for w in workers})
        self._looked_at = asked
        self._looked.set()
        self._looked = asyncio.Event()

    async def _notice_going_back(self, workers: Sequence[Worker]) -> None:
        """A record that is older than it was at the last look: the whole database must be. Workers find that by their
        numbers too, if they are asked before new ones have reached the old."""
        for worker in workers:
            since, seq = self._numbers.get(worker.name, (worker.registered_at, 0))
            if since == worker.registered_at and worker.seq < seq:
                why = f"the record of worker {worker.name} is at number {worker.seq}, and was at {seq} before"
                for each in workers:
                    _, seen = self._numbers.get(each.name, (0.0, 0))
                    await self._engine.members.distrust(each.name, why, control.alarm(each.name, why), seen)
                return  # the next look is at what was written now
        self._numbers = {w.name: (w.registered_at, w.seq) for w in workers}

    def _observe(self, worker: Worker, got: float) -> None:
        """``got``: after the record was read, so that what is seen first is never counted as older than it is."""
        seen = self._seen.get(worker.name)
        if seen is None or seen[0] != worker.last_seen:
            self._seen[worker.name] = (worker.last_seen, got)
        if seen is not None and seen[0] != worker.last_seen:  # others wrote it down, after the look before this one
            self._backed[worker.name] = max(self._looked_at, self._backed.get(worker.name, self._looked_at))

    def _forget(self, workers: set[str]) -> None:
        """What is kept of workers that are no more."""
        for name in (self._seen.keys() | self._backed.keys() | self._differed.keys()) - workers:
            self._seen.pop(name, None)
            self._backed.pop(name, None)
            self._differed.pop(name, None)

    async def _note(self, worker: str) -> None:
        asked = 0.0

        def change(record: Worker) -> Worker | None:
            nonlocal asked
            asked = clock.monotonic()  # not before the record was read, which may have taken long
            if record.state is WorkerState.GONE:
                return None
            return as_heard(record, self._engine.now())

        if await self._engine.members.change(worker, change) is not None:
            self._backed[worker] = asked

    def _present_again(self, worker: str) -> None:
        """It is connected, stood still, and was given up meanwhile: it has to register, and is told to wipe itself."""
        hello = self._engine.hub.connected().get(worker)
        self._welcomed.discard(worker)
        self._engine.members.gone(worker)
        if hello is not None:
            self.worker_connected(hello)

    # --- workers that end ---------------------------------------------------------------------------------

    async def _see_off(self, worker: str, boot_id: str) -> None:
        """Suspends what runs on a worker whose agent was asked to end, uploads what is only there, and lets it go."""
        try:
            if not await self._ops.insist(lambda: self._mark_leaving(worker, boot_id)):
                return  # it has ended already, and another agent has its name
            await self._engine.suspend_all([worker], cause="drain")
            await self._engine.uploads.flush(worker)
            hello = self._engine.hub.connected().get(worker)
            if hello is None or hello.boot_id != boot_id:
                return
            if awake := await self.all(Actor, worker=worker):
                log.warning("worker ends with actors awake", worker=worker, actors=[str(a.key) for a in awake])
            else:
                await self._engine.hub.call(worker, api.Shutdown(wipe=True))
        except GreenroomError as error:
            log.warning("worker not seen off", worker=worker, error=error.message)
        finally:
            self._leaving.discard(worker)

    async def _mark_leaving(self, worker: str, boot_id: str) -> bool:
        def change(record: Worker) -> Worker | None:
            if record.boot_id != boot_id or record.state is WorkerState.GONE or record.cordon == RETIRING:
                return None
            # Somebody's drain outlives this agent: the next one does not end it.
            return record if record.cordon == ASKED else replace(record, state=state_of(LEAVING), cordon=LEAVING)

        return await self._engine.members.change(worker, change) is not None

    async def wait_for_worker(self, worker: str, until: float) -> bool:
        """Whether the worker is connected and registered here, waiting for it until ``until`` (monotonic seconds)."""
        while not self._engine.members.is_enrolled(worker):
            try:
                async with asyncio.timeout(until - clock.monotonic()):
                    await self.arrival.wait()
            except TimeoutError:
                break
        return self._engine.members.is_enrolled(worker)

    async def door(self, worker: str) -> Door:
        """Where it is. A replica that has just begun waits for the worker's link, for `DOOR_WAIT_S`.

        Raises:
            Unavailable: it has not registered here (reason ``WORKER_DISCONNECTED``).
        """
        until = clock.monotonic() + DOOR_WAIT_S
        while (door := self._engine.members.door(worker)) is None:
            try:
                async with asyncio.timeout(until - clock.monotonic()):
                    await self.arrival.wait()
            except TimeoutError:
                raise Unavailable(
                    f"worker {worker} has no link to this replica of the control plane, which does not know where it "
                    "is; its agent's log tells why",
                    reason="WORKER_DISCONNECTED",
                ) from None
        return door

    async def until_trusted(self, worker: str) -> bool:
        """Whether requests may be routed to a worker, waiting for it as long as it may still come back."""
        return_s = self._engine.config.worker_return_s
        until = clock.monotonic() + return_s
        while not self.is_trusted(worker):
            looked = self._looked
            try:
                async with asyncio.timeout_at(until):
                    await looked.wait()
            except TimeoutError:
                return False
        return True

    # --- loops --------------------------------------------------------------------------------------------

    async def reconcile_loop(self) -> None:
        """Finds what no message told: a worker that went, one that is not empty yet and should be."""
        while True:
            await asyncio.sleep(self._engine.config.reconcile_s)
            try:
                await self._sweep()
            except Exception as error:
                log.warning("sweep tries again", error=str(error), exc_info=bug_of(error))

    async def _sweep(self) -> None:
        await self._engine.rosters.sweep()
        workers = await self.all(Worker)
        self._engine.members.forget_all_but([worker.name for worker in workers])
        for worker in workers:
            try:
                if worker.state is WorkerState.GONE:
                    await self._engine.decommission.settle(worker)
                elif self._engine.members.is_enrolled(worker.name):
                    # Who began to empty it has died, or did not get it done.
                    if worker.cordon == RETIRING:
                        self._engine.decommission.begin(worker.name)
                    elif worker.cordon == LEAVING or self._farewells.get(worker.name) == worker.boot_id:
                        self.worker_leaving(worker.name, worker.boot_id)
                    elif worker.cordon == ASKED and worker.used:
                        self.empty(worker.name)
                elif worker.name not in self._away:
                    await self._abandon_if_lost(worker.name)
                    await self._engine.decommission.give_up(worker)
            except GreenroomError as error:
                log.warning("worker not looked after, tries again", worker=worker.name, error=error.message)

    # --- parts --------------------------------------------------------------------------------------------

    async def all(self, cls: type[R], **where: str) -> list[R]:
        """All pages of a list."""

        async def pages() -> list[R]:
            found: list[R] = []
            while page := await self._store.list(cls, where=where, after=found[-1].pk if found else ""):
                found += page
            return found

        return await self._ops.steadily(pages)


def bug_of(error: Exception) -> Exception | None:
    """An error that nobody raised on purpose is logged with its traceback."""
    return None if isinstance(error, GreenroomError) else error
