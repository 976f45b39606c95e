"""The workers' own records: who is registered, and every change of one.

A worker registers before anything is made on it: it is asked whose disk it has, `greenroom.core.gc.control` decides,
the record says so, and the worker is told. All changes are conditional on the version that was read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core import placement
from greenroom.core.errors import AlreadyExists, Conflict, FailedPrecondition, NotFound, Unavailable
from greenroom.core.gc import control
from greenroom.core.gc import records as gc
from greenroom.core.records import Record, Worker, WorkerState
from greenroom.engine import clock

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)


class NotOnRoster(Unavailable):
    """See `greenroom.engine.rosters`."""


class Door(NamedTuple):
    """Where a worker is, and where it lets in who is elsewhere; see `greenroom.core.agentapi.Hello`."""

    place: str
    entrance: api.Entrance | None


#: Tries of a conditional write to a worker's record against others who write it.
WRITE_ATTEMPTS = 100
#: A worker that takes longer to answer what it knows at once is asked again later.
ANSWER_TIMEOUT_S = 30.0
#: By how much ``last_seen`` grows at least with each new value.
MIN_STEP_S = 0.001
#: Why no actor is woken on a worker (`Worker.cordon`): somebody wants it empty; its agent was asked to end; it is to be
#: wiped and forgotten when it is empty.
ASKED, LEAVING, RETIRING = "asked", "leaving", "retiring"
#: States of a worker that nobody hears.
AWAY = frozenset({WorkerState.STALLED, WorkerState.GONE})


class Members:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops
        #: The connections of workers that are registered; what others say does not count as a sign of the worker.
        self._enrolled: dict[str, api.Hello] = {}
        #: Of workers that have registered here, also of those whose link is broken just now: where they are.
        self._doors: dict[str, Door] = {}

    def enrolled(self) -> list[str]:
        """Workers that are connected to this process and registered: those on which anything may be made."""
        return [*self._enrolled]

    def is_enrolled(self, worker: str) -> bool:
        """Whether it is one of these."""
        return worker in self._enrolled

    def gone(self, worker: str) -> None:
        """Its connection is, or has another in its place."""
        self._enrolled.pop(worker, None)

    def door(self, worker: str) -> Door | None:
        """As it said when it registered last; None: it has not, since this process began."""
        return self._doors.get(worker)

    def forget_all_but(self, workers: Collection[str]) -> None:
        for name in self._doors.keys() - {*workers, *self._enrolled}:
            del self._doors[name]

    async def register(self, hello: api.Hello) -> float:
        """Asks the worker whose disk it has, decides, writes that down, and tells the worker (`greenroom.core.gc`).
        Returns a moment (loop time) before it was written down.

        Raises:
            NotOnRoster: its pool has a roster that it is not on.
            Unavailable: it is not admitted (yet).
        """
        for _ in range(WRITE_ATTEMPTS):
            known = await self._ops.steadily(lambda: self.find(hello.worker))
            said = await self.ask(hello.worker, api.Present(epoch=known.epoch if known else 0))
            assert isinstance(said, gc.Register)
            await self._check_roster(hello, known, said)
            decision = control.register(
                member_of(known) if known and known.incarnation else None,
                [],
                said,
                heard=self._engine.census.is_alive(known),
            )
            if isinstance(decision.answer, gc.Refused):
                if known is not None and known.state is WorkerState.GONE:
                    log.warning("a worker that was given up is back: it is told to wipe itself", worker=hello.worker)
                await self.ask(hello.worker, api.Enrol(refused=decision.answer))
                if decision.answer.what is gc.Refusal.NAME_TAKEN:
                    raise Unavailable(f"another worker {hello.worker} is alive, with another disk", reason="NAME_TAKEN")
                continue
            assert isinstance(decision.answer, gc.Registered)
            self._check_connected(hello)
            new = _enrolled(known, hello, decision.member, self._engine.now())
            new = replace(new, message=decision.alarm or new.message)
            asked = clock.monotonic()
            try:
                await self._ops.steadily(lambda: self._store.put(new))  # noqa: B023  # awaited at once
            except (AlreadyExists, Conflict):
                continue
            if decision.alarm:
                log.error("a worker is quarantined", worker=hello.worker, why=decision.alarm)
            # What is under way there belongs to its operation, which asks the worker itself: nothing of it is closed.
            await self.ask(hello.worker, api.Enrol(registered=replace(decision.answer, closed_seq=0)))
            self._check_connected(hello)  # from here on its end is heard of
            self._enrolled[hello.worker] = hello
            self._doors[hello.worker] = Door(hello.place, hello.entrance)
            await self._engine.rosters.hold(hello)  # it was dropped since it was looked up, or before
            return asked
        raise Conflict(f"worker {hello.worker} keeps changing")

    def _check_connected(self, hello: api.Hello) -> None:
        if self._engine.hub.connected().get(hello.worker) is not hello:
            raise Unavailable(f"worker {hello.worker} has gone again", reason="WORKER_DISCONNECTED")

    async def _check_roster(self, hello: api.Hello, known: Worker | None, said: gc.Register) -> None:
        """One that is registered and was dropped from its roster is let in, to be emptied.

        Raises:
            NotOnRoster: it may not register (now).
        """
        if known is not None and known.state is not WorkerState.GONE and known.incarnation == said.incarnation:
            return
        if why := await self._engine.rosters.refusal(hello):
            refused = gc.Refused(claim=said.claim, what=gc.Refusal.NOT_ON_ROSTER, epoch=known.epoch if known else 0)
            await self.ask(hello.worker, api.Enrol(refused=refused))
            raise NotOnRoster(why, reason="NOT_ON_ROSTER")

    def register_again(self, worker: str) -> None:
        """One that is connected turns out not to be what is registered under its name. Of one that is being welcomed
        that is old news: it registers, and whatever it was asked before is in vain."""
        self._engine.census.welcome_again(worker)

    async def distrust(self, worker: str, why: str, alarm: str, seen: int) -> None:
        """Nothing is destroyed or given up there from now on, until somebody has looked. ``seen``: as `raise_seq`."""
        log.error("a worker's records are not trusted", worker=worker, why=alarm)

        def change(record: Worker) -> Worker:
            return replace(_raised(record, seen), distrust=record.distrust or why, message=alarm)

        await self.change(worker, change)

    async def raise_seq(self, worker: str, seen: int) -> None:
        """``seen``: the highest number that was ever given out, as far as is known; what is placed there gets higher
        ones, or it would be refused. (Of one that is not trusted that is no news: somebody may have acknowledged it
        since its record was read.)"""
        await self.change(worker, lambda record: _raised(record, seen))

    async def find(self, worker: str) -> Worker | None:
        try:
            return await self._store.get(Worker, worker)
        except NotFound:
            return None

    async def ask(self, worker: str, call: api.AgentCall) -> Record:
        """Something that a worker answers at once. Raises `Unavailable` also when it does not."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._engine.hub.call(worker, call)
        except TimeoutError:
            name = type(call).__name__
            raise Unavailable(f"worker {worker} did not answer {name} within {ANSWER_TIMEOUT_S:g} s") from None

    async def cordon(self, name: str, why: str) -> Worker | None:
        """No actor is woken there from now on (``why``: `ASKED`, `LEAVING`, `RETIRING`), or again (""). Returns None
        when there is no such worker. `LEAVING` goes with its agent, so it takes the place of no other reason.

        Raises:
            FailedPrecondition: it is gone (reason ``WORKER_GONE``).
        """

        def change(worker: Worker) -> Worker:
            if worker.state is WorkerState.GONE:
                raise FailedPrecondition(
                    f"worker {name} is gone: {worker.message}; nothing is on it any more. `greenroom forget worker "
                    f"{name}` removes its tombstone, and an agent with an empty disk takes its name",
                    reason="WORKER_GONE",
                )
            if why == LEAVING and worker.cordon:
                return worker
            return replace(worker, cordon=why, state=worker.state if worker.state in AWAY else state_of(why))

        return await self.change(name, change)

    async def change(self, name: str, change: Callable[[Worker], Worker | None]) -> Worker | None:
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


def _raised(record: Worker, seen: int) -> Worker:
    return replace(record, seq_base=max(record.seq_base, seen - record.version))


def member_of(worker: Worker) -> gc.Member:
    """A worker as the rules of the collection know it."""
    standing = gc.Standing.GONE if worker.state is WorkerState.GONE else _STANDINGS.get(worker.cordon)
    return gc.Member(
        name=worker.name,
        incarnation=worker.incarnation,
        claim=worker.claim,
        epoch=worker.epoch,
        seq=worker.seq,
        shared=True,
        standing=standing or gc.Standing.DRAINING,
        quarantined=worker.distrust,
    )


_STANDINGS = {"": gc.Standing.ACTIVE, RETIRING: gc.Standing.RETIRING}


def _enrolled(known: Worker | None, hello: api.Hello, member: gc.Member, now: float) -> Worker:
    """The record of a worker that is connected and registered."""
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
        "incarnation": member.incarnation,
        "claim": member.claim,
        "epoch": member.epoch,
        "distrust": member.quarantined,
        "seq_base": max(known.seq_base, member.seq - known.version) if known is not None else member.seq,
    }
    if known is None:
        return Worker(name=hello.worker, registered_at=now, last_seen=now, **said)
    new = replace(known, **said)
    if known.boot_id != hello.boot_id:
        # Another agent: the one that was to end has ended, and what failed on it may not fail on this one.
        cordon = "" if known.cordon == LEAVING else known.cordon
        new = replace(placement.after_success(new), cordon=cordon)
    if member.standing is gc.Standing.ACTIVE:  # also an empty disk where the one before is gone, or was to go
        new = replace(new, cordon="", message="" if known.state is WorkerState.GONE else new.message)
    return as_heard(replace(new, state=WorkerState.STALLED), now)


def state_of(cordon: str) -> WorkerState:
    if cordon == RETIRING:
        return WorkerState.RETIRING
    return WorkerState.DRAINING if cordon else WorkerState.ACTIVE


def as_heard(worker: Worker, now: float) -> Worker:
    """The worker as one that was just heard: with another ``last_seen`` than before, whatever the clock says. (Not for
    one that is GONE.)"""
    state = state_of(worker.cordon) if worker.state is WorkerState.STALLED else worker.state
    return replace(worker, last_seen=max(now, worker.last_seen + MIN_STEP_S), state=state)
