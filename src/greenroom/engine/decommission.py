"""Workers that end for good: retired in order, or given up because they will not come back.

*Retired*: emptied first, as a drain does; then whatever only it has is uploaded; then its agent erases its state disk,
says so and ends; then its record goes. Each step can be repeated, by any replica that is linked to the worker, so what
is cut short goes on with the next sweep.

*Given up* (GONE): by a person, or because this process has watched for its sign for ``worker_gone_s`` and seen none.
What was awake there is CRASHED and wakes elsewhere, what only its disk had is lost. Its record stays, as a tombstone:
should it come back, it is told to wipe itself. Nobody may give up a worker that may still be heard, because what runs
there may go on running then; by the rules of `greenroom.engine.census` one that is not heard has frozen itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import structlog
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import Conflict, FailedPrecondition, GreenroomError, NotFound
from greenroom.core.gc import control
from greenroom.core.gc.verdict import DATABASE
from greenroom.core.records import Actor, Snapshot, SnapshotState, Worker, WorkerState
from greenroom.core.states import BUSY
from greenroom.engine.members import RETIRING, WRITE_ATTEMPTS, member_of

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

log = structlog.get_logger(__name__)


class Losses(NamedTuple):
    """What the loss of a worker costs: actors (``namespace/name``) that are awake there, and snapshots (id) that are
    nowhere else."""

    actors: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()


class Farewell(NamedTuple):
    """``worker``: as it was last; ``removed``: nothing is recorded of it any more."""

    worker: Worker
    removed: bool
    losses: Losses


class Decommission:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops
        self._retiring: dict[str, asyncio.Task[None]] = {}

    # --- retired ------------------------------------------------------------------------------------------

    async def retire(self, name: str) -> Worker:
        """Begins it, or goes on with it.

        Raises:
            NotFound: no such worker.
            FailedPrecondition: it is gone (reason ``WORKER_GONE``), or what is recorded of it can't be relied on
                (``WORKER_DISTRUSTED``).
        """
        if why := (await self._store.get(Worker, name)).distrust:
            raise FailedPrecondition(
                f"worker {name} can't be retired: {why}, so it may have what the database knows nothing of; look, and "
                f"say `greenroom acknowledge worker {name}` first",
                reason="WORKER_DISTRUSTED",
            )
        written = await self._engine.members.cordon(name, RETIRING)
        if written is None:
            raise NotFound(f"worker {name} does not exist any more", reason="WORKER_NOT_FOUND")
        self.begin(name)
        return written

    def begin(self, name: str) -> asyncio.Task[None]:
        """One at a time per worker; what fails is tried again by the next sweep."""
        task = self._retiring.get(name)
        if task is None:
            task = self._engine.spawn(self._retire(name), f"retire-{name}")
            self._retiring[name] = task
            task.add_done_callback(lambda _: self._retiring.pop(name))
        return task

    async def _retire(self, name: str) -> None:
        try:
            await self._engine.suspend_all([name], cause="drain")
            if awake := (await self.losses(name)).actors:
                log.warning("worker can't retire yet: actors are awake", worker=name, actors=awake)
                return
            await self._engine.uploads.flush(name)
            record = await self._store.get(Worker, name)
            if record.cordon != RETIRING or record.distrust:
                return  # somebody has undone it, or has to look first
            if await self.losses(name) != Losses():
                return  # it was undone and asked for again: what was placed meanwhile goes with the next sweep
            call = api.Shutdown(
                wipe=True,
                erase=True,
                epoch=record.epoch,
                incarnation=record.incarnation,
                closed_seq=record.seq - 1,
            )
            await self._engine.members.ask(name, call)
            await self._has_retired(record)
        except NotFound:
            pass  # another replica was quicker
        except GreenroomError as error:
            log.warning("worker can't retire yet, tries again", worker=name, error=error.message)

    async def erased(self, name: str, incarnation: str) -> None:
        """For whoever keeps the disks of this machine: that one is no more. A worker that was to retire has retired
        then, also when nobody heard it say so. Any other, and one with which something is lost, is left alone."""
        record = await self._engine.members.find(name)
        if record is None or record.incarnation != incarnation or record.cordon != RETIRING or record.distrust:
            return
        if await self.losses(name) == Losses():
            await self._has_retired(record)

    async def _has_retired(self, worker: Worker) -> None:
        if await self._remove(worker):
            self._engine.removals.add("worker", worker.name, DATABASE, "it has retired, and erased its disk")

    async def _remove(self, known: Worker) -> bool:
        """Whether it is recorded no more. One with another disk that has taken the name meanwhile stays."""
        for _ in range(WRITE_ATTEMPTS):
            record = await self._ops.steadily(lambda: self._engine.members.find(known.name))
            if record is None:
                return True
            if record.incarnation != known.incarnation:
                return False
            if record.used:
                raise FailedPrecondition(
                    f"worker {known.name}: {record.used} actors are bound to it still; `greenroom describe worker "
                    f"{known.name}` lists them, and their operations end by themselves",
                    reason="WORKER_IN_USE",
                )
            try:
                await self._ops.steadily(lambda: self._store.remove(record))  # noqa: B023  # awaited at once
            except Conflict:
                continue
            return True
        raise Conflict(f"worker {known.name} keeps changing")

    # --- given up -----------------------------------------------------------------------------------------

    async def forget(self, name: str, *, accept_loss: bool = False) -> Farewell:
        """A person says that a worker will not come back. On one that is GONE already, its tombstone is removed.

        Raises:
            NotFound: no such worker.
            FailedPrecondition: it may be heard (reason ``WORKER_HEARD``); something would be lost and ``accept_loss``
                does not say that it may (``WORKER_HOLDS_STATE``); operations are bound to it still (``WORKER_IN_USE``).
        """
        record = await self._store.get(Worker, name)
        if record.state is WorkerState.GONE:
            await self.settle(record)
            await self._engine.uploads.sweep()
            removed = await self._remove(record)
            if removed:
                self._engine.removals.add("worker", name, DATABASE, "somebody has said that it is to be forgotten")
            return Farewell(record, removed, Losses())
        if self._engine.census.may_be_heard(record):
            raise self._heard(record)
        losses = await self.losses(name)
        if (losses.actors or losses.snapshots) and not accept_loss:
            raise FailedPrecondition(
                f"worker {name} may come back: {_counted(losses)} would be lost with it. Start its agent again, or say "
                f"`greenroom forget worker {name} --yes`",
                reason="WORKER_HOLDS_STATE",
                metadata={"actors": ",".join(losses.actors), "snapshots": ",".join(losses.snapshots)},
            )
        gone = await self._declare(record, "somebody has said that it will not come back")
        if gone is None:
            raise self._heard(record)
        return Farewell(gone, False, losses)

    def _heard(self, record: Worker) -> FailedPrecondition:
        left_s = self._engine.replicas.longest_return_s - self._engine.census.unheard_s(record)
        when = (
            f"nobody hears it, but what runs there may not be frozen yet. Try again in {left_s:.0f} s"
            if record.state is WorkerState.STALLED
            else f"it is heard. `greenroom retire worker {record.name}` empties it first, and loses nothing; one whose "
            "agent has just ended counts as away after a while"
        )
        return FailedPrecondition(
            f"worker {record.name} can't be forgotten: {when}",
            reason="WORKER_HEARD",
            metadata={"retry_after_s": f"{max(0.0, left_s):.0f}"},
        )

    async def losses(self, name: str) -> Losses:
        """What giving it up would cost now."""
        actors = await self._engine.census.all(Actor, worker=name)
        local = await self._engine.census.all(Snapshot, state=SnapshotState.LOCAL)
        return Losses(tuple(str(a.key) for a in actors), tuple(s.id for s in local if s.worker == name))

    async def give_up(self, worker: Worker) -> None:
        """For a sweep, with the record of a worker that is not connected: when this process has watched for its sign
        for ``worker_gone_s``, or it was being retired and nothing is lost with it, then it is GONE."""
        if worker.state is not WorkerState.STALLED or self._engine.census.may_be_heard(worker):
            return
        gone_s = self._engine.config.worker_gone_s
        if self._engine.census.unheard_s(worker) >= gone_s:
            await self._declare(worker, f"nobody has heard it for more than {gone_s:g} s")
        elif worker.cordon == RETIRING and await self.losses(worker.name) == Losses():
            await self._declare(worker, "it was being retired, and nothing of it is left")

    async def _declare(self, known: Worker, why: str) -> Worker | None:
        """None: it has been heard meanwhile."""

        def change(record: Worker) -> Worker | None:
            if record.incarnation != known.incarnation or record.last_seen != known.last_seen:
                return None
            if self._engine.census.may_be_heard(record):
                return None
            gone = control.gone(member_of(record), []).member
            return replace(record, state=WorkerState.GONE, cordon="", message=why, distrust=gone.quarantined)

        gone = await self._engine.members.change(known.name, change)
        if gone is not None:
            log.warning("worker is gone", worker=known.name, incarnation=known.incarnation, why=why)
            await self.settle(gone)
            await self._engine.uploads.sweep()
        return gone

    async def settle(self, worker: Worker) -> None:
        """What was awake on a worker that is GONE is CRASHED, which frees its slots. What an operation holds there is
        that operation's to end, and looked at again by the next sweep."""
        why = f"worker {worker.name} is gone: {worker.message}"
        for actor in await self._engine.census.all(Actor, worker=worker.name):
            if actor.state not in BUSY:
                await self._engine.reconciler.crash(actor, actor.generation, "WorkerLost", why, lost=True)

    # --- somebody has looked ------------------------------------------------------------------------------

    async def acknowledge(self, name: str) -> Worker:
        """The database is right as it is: what it does not know on this worker may go. Nothing to do is success.

        Raises:
            NotFound: no such worker.
        """
        await self._store.get(Worker, name)

        def change(worker: Worker) -> Worker:
            if not worker.distrust:
                return worker
            looked = control.acknowledge(member_of(worker), []).member
            log.warning("acknowledged: the database is right as it is", worker=name, distrust=worker.distrust)
            return replace(worker, distrust=looked.quarantined, message="")

        written = await self._engine.members.change(name, change)
        if written is None:
            raise NotFound(f"worker {name} does not exist any more", reason="WORKER_NOT_FOUND")
        if name in self._engine.hub.connected():
            self._engine.spawn(self._engine.reconciler.compare_quietly(name), f"compare-{name}")
        return written


def _counted(losses: Losses) -> str:
    parts = []
    if losses.actors:
        parts.append(f"what {len(losses.actors)} awake actors did since they woke")
    if losses.snapshots:
        parts.append(f"{len(losses.snapshots)} snapshots that are nowhere else")
    return " and ".join(parts)
