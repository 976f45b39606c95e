"""Which workers there are and what lives on them: workers that come, go and stay away, and every difference between
what runs and what should.

Truth about what runs is what a worker says when it is asked (its residents); truth about what *should* run are the
records. Every difference is settled by a fenced call or a conditional write, so an old or repeated message changes
nothing, and it does not matter how many replicas look. What a lost message would have told is found by asking again,
every ``reconcile_s``.

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
- A replica that did not look for a while (it was away from the store, or did not run) begins to look anew.
- What a worker froze goes on only by a `Thaw` that was decided after the worker was heard again (its ``epoch``), and
  in a new generation: then a crash that was decided before finds that it is too old.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core import placement
from greenroom.core.commands import Crash, Outcome, Reunite
from greenroom.core.errors import (
    AlreadyExists,
    Conflict,
    GreenroomError,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from greenroom.core.records import Actor, ActorState, Key, Template, Worker, WorkerState
from greenroom.core.states import BUSY
from greenroom.engine import clock
from greenroom.engine.bindings import Binding
from greenroom.engine.operations import closing
from greenroom.store.port import R

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Tries of a conditional write to a worker's record against others who write it.
WRITE_ATTEMPTS = 100
#: A worker that takes longer to say what runs on it is asked again later.
LIST_TIMEOUT_S = 30.0
#: All as shares of ``worker_return_s``. How often the workers' records are looked at:
LOOK_SHARE = 1 / 16
#: How old what is written down may be before it is written down again, if the worker was heard since:
NOTE_SHARE = 0.1
#: How old it may be for a heartbeat to be answered:
BACKED_SHARE = 0.4
#: How old it may be for requests to be routed there:
TRUSTED_SHARE = 0.9


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
        self._comparing: dict[str, asyncio.Task[list[str]]] = {}
        #: Workers whose residents have been compared since they connected.
        self._welcomed: set[str] = set()
        self._differed: dict[str, frozenset[tuple[str, int]]] = {}
        #: By worker: what it said last of its images.
        self._stock: dict[str, Stock] = {}
        self._leaving: set[str] = set()
        self._emptying: set[str] = set()
        self._abandoning: dict[str, asyncio.Task[None]] = {}
        #: ``last_seen`` of each worker, and when (loop time) this value was seen first, looking without a gap.
        self._seen: dict[str, tuple[float, float]] = {}
        self._looked_at = 0.0
        #: Set, and replaced by a new one, with every look.
        self._looked = asyncio.Event()
        #: It was written down after this (loop time) that the worker was heard.
        self._backed: dict[str, float] = {}

    # --- workers come and go ------------------------------------------------------------------------------

    def worker_connected(self, hello: api.Hello) -> None:
        if not self._ops.closed:
            self._engine.spawn(self._welcome(hello), f"welcome-{hello.worker}")

    def worker_heard(self, worker: str, heartbeat: api.Heartbeat) -> bool:
        self._notice(worker, heartbeat)
        if self._engine.config.exclusive:
            return True  # nobody else can count it as lost, and this process only after it has not heard it
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
        if worker in self._comparing:
            return
        there = {(r.actor_uid, r.generation) for r in heartbeat.residents if r.state is api.ResidentState.RUNNING}
        bound = {(b.uid, b.generation) for b in self._engine.bindings.all() if b.worker == worker}
        # Once may be a message that crossed another; twice the same is worth a question.
        differs = frozenset(there ^ bound)
        if differs and differs == self._differed.get(worker):
            self._engine.spawn(self._compare_quietly(worker), f"compare-{worker}")
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
            await self.change_worker(worker, lambda there: replace(there, **said))
        except GreenroomError as error:
            self._stock.pop(worker, None)  # with the next heartbeat
            log.info("a worker's images are not written down yet", worker=worker, error=error.message)

    def worker_leaving(self, worker: str, boot_id: str) -> None:
        """Its agent was asked to end: its actors are suspended first, then it may go."""
        if not self._ops.closed and worker not in self._leaving:
            self._leaving.add(worker)
            self._engine.spawn(self._see_off(worker, boot_id), f"see-off-{worker}")

    def worker_gone(self, worker: str, boot_id: str) -> None:
        self._welcomed.discard(worker)
        self._stock.pop(worker, None)
        if not self._ops.closed:
            self._missing(worker)

    def sandbox_exited(self, worker: str, event: api.SandboxExited) -> None:
        if not self._ops.closed:
            self._engine.spawn(self._exited(worker, event), f"exited-{event.actor_uid}")

    async def _welcome(self, hello: api.Hello) -> None:
        """Until it is done, or the connection has been replaced by another one."""
        while self._engine.hub.connected().get(hello.worker) == hello:
            try:
                await self._register(hello)
                self._engine.hub.acknowledge(hello.worker)
                under_way = await self._compare(hello.worker, anew=True)
            except GreenroomError as error:
                log.warning("worker not welcomed, tries again", worker=hello.worker, error=error.message)
                await asyncio.sleep(self._engine.config.retry_s)
                continue
            self._welcomed.add(hello.worker)
            self._stock[hello.worker] = Stock(frozenset(hello.images), hello.image_bytes, hello.image_over_bytes)
            self.arrival.set()
            self.arrival = asyncio.Event()
            self._engine.slot_freed(probe=True)
            # An operation that had its answer before the worker went away does not notice what went with it.
            self._engine.spawn(self._compare_after(under_way, hello.worker), f"compare-{hello.worker}")
            await self._engine.preparer.prewarm(hello)
            return

    async def _register(self, hello: api.Hello) -> None:
        asked, now = clock.monotonic(), self._engine.now()
        said: dict[str, Any] = {
            "pool": hello.pool,
            "backend": hello.backend,
            "fingerprint": hello.fingerprint,
            "capacity": hello.capacity,
            "boot_id": hello.boot_id,
            "memory_snapshots": hello.memory_snapshots,
            "labels": hello.labels,
            "images": hello.images,
            "image_bytes": hello.image_bytes,
            "image_over_bytes": hello.image_over_bytes,
            "last_seen": now,
        }
        try:
            await self._store.put(Worker(name=hello.worker, registered_at=now, **said))
        except AlreadyExists:

            def change(worker: Worker) -> Worker | None:
                if self._engine.hub.connected().get(hello.worker) != hello:
                    return None
                new = replace(worker, **said | {"last_seen": worker.last_seen})
                if worker.boot_id != hello.boot_id:
                    # Another agent: the one that was to end has ended, and what failed on it may not fail on this one.
                    cordon = "" if worker.cordon == LEAVING else worker.cordon
                    new = replace(placement.after_success(new), cordon=cordon)
                return _heard(replace(new, state=WorkerState.DISCONNECTED), now)

            await self.change_worker(hello.worker, change)
        self._backed[hello.worker] = asked

    async def cordon(self, name: str, why: str) -> Worker | None:
        """No actor is woken there from now on (``why``: `ASKED`, `LEAVING`), or again ("")."""

        def change(worker: Worker) -> Worker | None:
            away = worker.state is WorkerState.DISCONNECTED
            return replace(worker, cordon=why, state=worker.state if away else _state(why))

        return await self.change_worker(name, change)

    def empty(self, worker: str) -> None:
        """Suspends what is awake on a worker; one task at a time for each."""
        if worker not in self._emptying:
            self._emptying.add(worker)
            task = self._engine.spawn(self._engine.suspend_all([worker], cause="drain"), f"empty-{worker}")
            task.add_done_callback(lambda _: self._emptying.discard(worker))

    async def change_worker(self, name: str, change: Callable[[Worker], Worker | None]) -> Worker | None:
        """Changes a worker's record against whoever else writes it; what was written, or None when there is no such
        worker or ``change`` says that there is nothing to write.

        Raises:
            Conflict: it keeps changing.
        """

        async def write() -> Worker | None:
            worker = await self._store.get(Worker, name)
            new = change(worker)
            return None if new is None else worker if new == worker else await self._store.put(new)

        for _ in range(WRITE_ATTEMPTS):
            try:
                return await self._ops.steadily(write)
            except Conflict:
                continue
            except NotFound:
                return None
        raise Conflict(f"worker {name} keeps changing")

    async def expect_all(self) -> None:
        """At the start: workers of an earlier process that are not here (yet)."""
        for worker in await self.all(Worker):
            if worker.name not in self._engine.hub.connected():
                if self._engine.config.exclusive:
                    await self._mark_away(worker.name)
                self._missing(worker.name)

    def _missing(self, worker: str) -> None:
        """A worker is away; however often it goes, one task waits for it."""
        waiting = worker in self._away
        self._away[worker] = clock.monotonic()
        if not waiting:
            self._engine.spawn(self._expect(worker), f"expect-{worker}")

    async def _expect(self, worker: str) -> None:
        """Waits for a worker that is away; when nobody hears it any more, its actors are lost."""
        try:
            marked = 0.0
            while worker not in self._engine.hub.connected():
                since = self._away[worker]
                if since != marked:
                    if self._engine.config.exclusive:
                        await self._insist(lambda: self._mark_away(worker))
                    marked = since
                elif clock.monotonic() < since + self._engine.config.worker_return_s:
                    await self.wait_for_worker(worker, since + self._engine.config.worker_return_s)
                else:
                    await self._insist(lambda: self._abandon_if_lost(worker))
                    return
        finally:
            del self._away[worker]

    async def _mark_away(self, worker: str) -> None:
        def change(record: Worker) -> Worker | None:
            if worker in self._engine.hub.connected() or record.state is WorkerState.DISCONNECTED:
                return None
            return replace(record, state=WorkerState.DISCONNECTED, last_seen=self._engine.now())

        await self.change_worker(worker, change)

    def _is_fresh(self, record: Worker) -> bool:
        """Whether some replica may have heard it so lately that it does not count as lost."""
        return self.unheard_s(record) < self._engine.replicas.longest_return_s

    def unheard_s(self, record: Worker) -> float:
        """For how long this process has watched a worker's record without a gap and seen no sign of it."""
        seen = self._seen.get(record.name)
        if seen is None or seen[0] != record.last_seen:
            return 0.0
        return clock.monotonic() - seen[1]

    def _hears(self, worker: str) -> bool:
        """Whether it is connected to this process and not silent: one that stands still keeps its connection open."""
        heard = self._engine.hub.heard().get(worker)
        return heard is not None and clock.monotonic() - heard < self._engine.config.worker_return_s

    async def alive_elsewhere(self, worker: str) -> bool:
        """Whether other replicas hear a worker that is not connected to this one."""
        if self._engine.config.exclusive or worker in self._engine.hub.connected():
            return False
        try:
            record = await self._ops.read(Worker, worker)
        except NotFound:
            return False
        return record.state is not WorkerState.DISCONNECTED and self._is_fresh(record)

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
            lost = not self._hears(worker) and (self._engine.config.exclusive or not self._is_fresh(record))
            if lost and (actors or record.state is not WorkerState.DISCONNECTED):
                await self._store.put(replace(record, state=WorkerState.DISCONNECTED))
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
            await self._crash(actor, actor.generation, "WorkerLost", message, lost=True)

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
        heard = self._engine.hub.heard()
        due: list[str] = []
        for worker in workers:
            self._engine.trust.noted(worker)
            self._observe(worker, got)
            if got - heard.get(worker.name, -return_s) < return_s * BACKED_SHARE:
                old = got - self._backed.get(worker.name, -return_s) >= return_s * NOTE_SHARE
                if old or worker.state is WorkerState.DISCONNECTED:
                    due.append(worker.name)
            elif not (worker.state is WorkerState.DISCONNECTED or worker.name in self._away or self._is_fresh(worker)):
                self._engine.spawn(self._abandon_if_lost(worker.name), f"lost-{worker.name}")
        await asyncio.gather(*map(self._note, due))
        self._forget({w.name for w in workers})
        self._looked_at = asked
        self._looked.set()
        self._looked = asyncio.Event()

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
        asked = clock.monotonic()
        if await self.change_worker(worker, lambda w: _heard(w, self._engine.now())) is not None:
            self._backed[worker] = asked

    # --- workers that end ---------------------------------------------------------------------------------

    async def _see_off(self, worker: str, boot_id: str) -> None:
        """Suspends what runs on a worker whose agent was asked to end, uploads what is only there, and lets it go."""
        try:
            if not await self._insist(lambda: self._mark_leaving(worker, boot_id)):
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
            return replace(record, state=_state(LEAVING), cordon=LEAVING) if record.boot_id == boot_id else None

        return await self.change_worker(worker, change) is not None

    async def wait_for_worker(self, worker: str, until: float) -> bool:
        """Whether the worker is connected, waiting for it until ``until`` (monotonic seconds)."""
        while worker not in self._engine.hub.connected():
            try:
                async with asyncio.timeout(until - clock.monotonic()):
                    await self.arrival.wait()
            except TimeoutError:
                break
        return worker in self._engine.hub.connected()

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

    async def rejoin(self, key: Key) -> None:
        """An actor that is RUNNING and that nobody can reach yet: waits for its worker and asks it.

        Raises:
            Unavailable: the worker is away (reason ``WORKER_DISCONNECTED``).
        """
        actor = await self._ops.read(Actor, str(key))
        if actor.state is not ActorState.RUNNING:
            return
        if not await self.wait_for_worker(actor.worker, clock.monotonic() + self._engine.config.worker_return_s):
            raise Unavailable(
                f"actor {key} runs on worker {actor.worker}, which is away; it counts as lost if it does not come back",
                reason="WORKER_DISCONNECTED",
            )
        await self._compare(actor.worker)

    # --- what runs and what should ------------------------------------------------------------------------

    async def _compare(self, worker: str, *, anew: bool = False) -> list[str]:
        """Settles every difference between what runs on a worker and what should. One at a time per worker; who comes
        meanwhile joins it, or (``anew``) waits for its end and begins another. Returns the operations that held an
        actor there."""
        task = self._comparing.get(worker)
        while task is not None and anew:
            await asyncio.wait({task})
            task = self._comparing.get(worker)
        if task is None:
            task = self._ops.spawn(self._settle(worker), f"settle-{worker}")
            self._comparing[worker] = task
            task.add_done_callback(lambda _: self._comparing.pop(worker))
        return await self._ops.attend(task)

    async def _compare_quietly(self, worker: str) -> None:
        try:
            await self._compare(worker)
        except GreenroomError as error:
            log.info("worker not compared, the next sweep does", worker=worker, error=error.message)

    async def _compare_after(self, operations: Collection[str], worker: str) -> None:
        for operation_id in operations:
            await self._ops.ended(operation_id)
        if operations and worker in self._engine.hub.connected():
            await self._compare(worker, anew=True)

    async def _settle(self, worker: str) -> list[str]:
        # First what should run and then what does: what begins in between is seen on the worker, and is no stray by the
        # record that is read again; what ends in between has a newer generation than the record that was read.
        actors = await self.all(Actor, worker=worker)
        said = await self._residents(worker)
        residents = {r.actor_uid: r for r in said.residents}
        under_way: list[str] = []
        for actor in actors:
            resident = residents.pop(actor.uid, None)
            if actor.state in BUSY:
                under_way.append(actor.operation)  # it asks the worker itself
            else:
                await self._one(str(actor.key), self._confirm(actor, resident, said.epoch))
        for resident in residents.values():
            await self._one(f"{resident.namespace}/{resident.name}", self._discard_stray(worker, resident))
        running = {(a.uid, a.generation) for a in actors if a.state is ActorState.RUNNING}
        for binding in self._engine.bindings.all():
            if binding.worker == worker and (binding.uid, binding.generation) not in running:
                await self._one(str(binding.key), self._drop_stale(binding))
        return [operation for operation in under_way if operation]

    async def _drop_stale(self, binding: Binding) -> None:
        """A binding of an incarnation that no record speaks of: made from an answer that came late."""
        try:
            actor = await self._ops.read(Actor, str(binding.key))
        except NotFound:
            actor = None
        same = actor is not None and (actor.uid, actor.generation) == (binding.uid, binding.generation)
        if same and actor is not None and (actor.state is ActorState.RUNNING or actor.state in BUSY):
            return
        newer = actor is not None and actor.uid == binding.uid and actor.generation < binding.generation
        if not newer and self._engine.bindings.peek(binding.key) is binding and not self._ops.busy(binding.uid):
            self._engine.bindings.revoke(binding.key)

    async def _residents(self, worker: str) -> api.Residents:
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                said = await self._engine.hub.call(worker, api.ListResident())
        except TimeoutError:
            raise Unavailable(f"worker {worker} did not say within {LIST_TIMEOUT_S:g} s what runs on it") from None
        assert isinstance(said, api.Residents)
        return said

    async def _one(self, actor: str, work: Awaitable[None]) -> None:
        """One actor that can't be settled now does not keep the others from it; the next sweep tries it again."""
        try:
            await work
        except GreenroomError as error:
            log.warning("actor not settled, tries again", actor=actor, error=error.message)

    async def _confirm(self, actor: Actor, resident: api.Resident | None, epoch: int) -> None:
        if resident is None or resident.endpoint is None:
            text = f"its sandbox was no longer there when worker {actor.worker} was asked"
            await self._crash(actor, actor.generation, "SandboxLost", text)
        else:
            await self._reunite(actor, resident, epoch)

    async def _reunite(self, actor: Actor, resident: api.Resident, epoch: int) -> None:
        """An actor that is there: its sandbox is put into the state that the record says, and it is bound."""
        ids: dict[str, Any] = {
            "operation_id": f"reunite-{actor.uid}-{actor.generation}",
            "actor_uid": actor.uid,
            "generation": actor.generation,
        }
        frozen = resident.state is api.ResidentState.FROZEN
        bound = self._engine.bindings.peek(actor.key)
        try:
            if actor.state is ActorState.PAUSED:
                if not frozen:
                    await self._engine.hub.call(actor.worker, api.Freeze(**ids))
                return
            if frozen:
                # In a new generation: who has given the worker up meanwhile, by what was read before, crashes nobody
                # who goes on. After the worker has said its epoch: had it been lost since, it would be in another.
                again = await self._raise_generation(actor)
                if again is None:
                    return
                actor, ids = again, ids | {"generation": again.generation}
                await self._engine.hub.call(actor.worker, api.Thaw(**ids, epoch=epoch))
            elif bound is not None and (bound.uid, bound.generation) == (actor.uid, actor.generation):
                return
        except LeaseLost:
            return  # an operation has begun meanwhile
        template = await self._ops.read(Template, f"{actor.namespace}/{actor.template}")
        # Nothing is awaited between this look and the binding, so an operation that begins revokes it again.
        if await self._is_still(actor) and not self._ops.busy(actor.uid):
            self._engine.drivers.bind(replace(actor, endpoint=resident.endpoint), template)
            log.info("actor goes on running", actor=str(actor.key), worker=actor.worker)

    async def _raise_generation(self, actor: Actor) -> Actor | None:
        """The actor in a new generation; None when it is not RUNNING in the incarnation that was read any more."""
        raise_it = Reunite(
            key=actor.key, now=self._engine.now(), uid=actor.uid, worker=actor.worker, generation=actor.generation
        )
        change = await self._ops.commit(raise_it)
        return change.actor if change.outcome is Outcome.CHANGED else None

    async def _is_still(self, actor: Actor) -> bool:
        """Whether it is RUNNING in the incarnation that was read."""
        current = await self._ops.read(Actor, str(actor.key))
        return (current.uid, current.generation, current.state) == (actor.uid, actor.generation, ActorState.RUNNING)

    async def _discard_stray(self, worker: str, resident: api.Resident) -> None:
        """A sandbox that no record speaks of. The worker refuses, by generation, if that has changed."""
        try:
            actor = await self._ops.read(Actor, f"{resident.namespace}/{resident.name}")
            if actor.uid == resident.actor_uid and actor.worker == worker:
                return
        except NotFound:
            pass
        log.info("discards a sandbox that no record speaks of", worker=worker, actor=resident.name)
        call = api.Discard(
            operation_id=f"stray-{resident.actor_uid}-{resident.generation}",
            actor_uid=resident.actor_uid,
            generation=resident.generation,
        )
        try:
            await self._engine.hub.call(worker, call)
        except LeaseLost:
            pass  # it has been taken over meanwhile, and is none any more

    async def _exited(self, worker: str, event: api.SandboxExited) -> None:
        """A sandbox has ended by itself. An operation that holds the actor just now may have had its answer before
        that; so the actor is looked at again when it has ended."""
        while operation := await self._insist(lambda: self._record_exit(worker, event)):
            await self._ops.ended(operation)
            await asyncio.sleep(self._engine.config.retry_s)  # its driver may have given up; until it has a new one

    async def _record_exit(self, worker: str, event: api.SandboxExited) -> str:
        """Returns the operation that has to end first; "" when the exit is recorded, or does not matter any more."""
        last = f"; its last lines:\n{event.last_lines}" if event.last_lines else ""
        for actor in await self.all(Actor, uid=event.actor_uid):
            if actor.worker == worker and actor.state in BUSY:
                return actor.operation
            if actor.worker == worker and not await self._lives(actor):
                message = f"its process ended with status {event.code}{last}"
                await self._crash(actor, event.generation, "Exited", message)
        return ""

    async def _lives(self, actor: Actor) -> bool:
        """Whether its worker has a sandbox of it now. The one that has ended need not be the one that the record speaks
        of: when the answer to a call was lost, the call is sent again, and may have made another in its place."""
        await self.wait_for_worker(actor.worker, clock.monotonic() + self._engine.config.worker_return_s)
        said = await self._residents(actor.worker)
        return any(r.actor_uid == actor.uid and r.endpoint is not None for r in said.residents)

    async def _crash(self, actor: Actor, generation: int, reason: str, message: str, *, lost: bool = False) -> None:
        """Records that the incarnation of that generation, or an older one, is gone; a newer one is left alone."""
        change = await self._ops.commit(
            Crash(
                operation_id=self._engine.new_id(),
                key=actor.key,
                now=self._engine.now(),
                uid=actor.uid,
                worker=actor.worker,
                generation=generation,
                reason=reason,
                message=message,
                lost=lost,
            )
        )
        current = change.actor
        if change.outcome is Outcome.CHANGED:
            log.warning("actor crashed", actor=str(actor.key), reason=reason)
            self._engine.slot_freed()
        if current is not None and current.state is ActorState.CRASHED:
            self._engine.bindings.revoke(actor.key)

    # --- loops --------------------------------------------------------------------------------------------

    async def reconcile_loop(self) -> None:
        """Finds what no message told: a sandbox that ended unheard, one that could not be ended, a worker that went."""
        while True:
            await asyncio.sleep(self._engine.config.reconcile_s)
            try:
                await self._sweep()
            except Exception as error:
                log.warning("sweep tries again", error=str(error), exc_info=bug_of(error))

    async def _sweep(self) -> None:
        connected = self._engine.hub.connected()
        for worker in await self.all(Worker):
            try:
                if worker.name in connected:
                    await self._compare(worker.name)
                    # Who began to empty it has died, or did not get it done.
                    if worker.cordon == ASKED and worker.used:
                        self.empty(worker.name)
                    elif worker.cordon == LEAVING:
                        self.worker_leaving(worker.name, worker.boot_id)
                elif worker.name not in self._away:
                    await self._abandon_if_lost(worker.name)
            except GreenroomError as error:
                log.warning("worker not compared, tries again", worker=worker.name, error=error.message)

    # --- parts --------------------------------------------------------------------------------------------

    async def all(self, cls: type[R], **where: str) -> list[R]:
        """All pages of a list."""

        async def pages() -> list[R]:
            found: list[R] = []
            while page := await self._store.list(cls, where=where, after=found[-1].pk if found else ""):
                found += page
            return found

        return await self._ops.steadily(pages)

    async def _insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does what nobody else would do, until the store lets it."""
        while True:
            try:
                return await work()
            except (Unavailable, ResourceExhausted) as error:
                if self._ops.closed:
                    raise closing() from error
                log.warning("tries again", error=error.message)
            await asyncio.sleep(self._engine.config.retry_s)


#: By how much ``last_seen`` grows at least with each new value.
MIN_STEP_S = 0.001
#: Why no actor is woken on a worker (`Worker.cordon`): somebody wants it empty; its agent was asked to end.
ASKED, LEAVING = "asked", "leaving"


def _state(cordon: str) -> WorkerState:
    return WorkerState.DRAINING if cordon else WorkerState.ACTIVE


def _heard(worker: Worker, now: float) -> Worker:
    """The worker as one that was just heard: with another ``last_seen`` than before, whatever the clock says."""
    state = _state(worker.cordon) if worker.state is WorkerState.DISCONNECTED else worker.state
    return replace(worker, last_seen=max(now, worker.last_seen + MIN_STEP_S), state=state)


def bug_of(error: Exception) -> Exception | None:
    """An error that nobody raised on purpose is logged with its traceback."""
    return None if isinstance(error, GreenroomError) else error
