"""What is on a worker, asked of it, and what is to be made of that (`greenroom.core.gc`).

The rows that a worker's inventory is compared with are records that are there anyway:

=========  ==========================================================================================================
sandbox    the actor that is bound to the worker; CREATING while it is resuming. There is no DESTROYING: what was bound
           and is not any more has no row, which comes to the same.
snapshot   its record, or the running operation that makes it; DESTROYING once it is condemned.
log        the actor, wherever it is.
=========  ==========================================================================================================

A sandbox's number is the version of the worker's record that its placement was decided from (`Member.shared`): a store
refuses a placement when that record is no longer as it was read, so what is unseen when first the record of version v
and then the actors are read, was placed at v or later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import Conflict, Unavailable
from greenroom.core.gc import control, verdict
from greenroom.core.gc import records as gc
from greenroom.core.records import (
    Actor,
    ActorState,
    Operation,
    OperationState,
    Snapshot,
    SnapshotState,
    Worker,
)
from greenroom.engine.members import member_of
from greenroom.store.port import MAX_PAGE, R

if TYPE_CHECKING:
    from greenroom.engine.engine import Engine

#: What a worker has on its disk is compared with the records when it has changed, and once in so many times: the
#: records may have changed.
LOOK_EVERY = 10


#: Logs of deleted actors that are remembered for a worker until it is asked.
MAX_DELETED = 10_000
#: What people call what a worker has.
KINDS = {gc.Kind.SANDBOX: "sandbox", gc.Kind.SNAPSHOT: "copy", gc.Kind.LOG: "log"}
#: Of a snapshot whose copy on a worker is of no use any more.
GOING = (SnapshotState.CONDEMNED, SnapshotState.CORRUPT)


class There(NamedTuple):
    """Attributes:
    actors: that are bound to the worker by the records; read before it was asked.
    residents: by the handle of their sandbox.
    missing: handles of sandboxes that are not there and can't come any more.
    trusted: whether the records may be acted on.
    destroy: handles that nobody has a record of, to be sent with the next question.
    """

    actors: Sequence[Actor]
    residents: dict[str, api.Resident]
    alone_epoch: int
    missing: frozenset[str]
    trusted: bool
    destroy: tuple[str, ...]


class Inventories:
    """Attributes:
    said: what each worker has said last.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._store = engine.store
        self._ops = engine.ops
        self.said: dict[str, api.Synced] = {}
        #: By worker: the digest of what was on its disk when that was last compared, and how often it was not since.
        self._compared: dict[str, tuple[str, int]] = {}
        #: By worker: logs of actors that were deleted since it was asked last.
        self._deleted: dict[str, set[str]] = {}
        #: By worker: what it was told to destroy and has not said yet to be gone, by handle.
        self._ordered: dict[str, dict[str, gc.Entry]] = {}

    async def ask(self, worker: str, orders: tuple[str, ...] = ()) -> There:
        """``orders``: handles that it is to destroy (`There.destroy`).

        Raises:
            Unavailable: it does not answer, or is not registered (any more).
        """
        record = await self._registered(worker)
        deleted = tuple(sorted(self._deleted.get(worker, ())))
        actors = await self._engine.census.all(Actor, worker=worker)
        rows = {row.handle: row for row in map(_of_actor, actors)}
        said = await self._sync(worker, record, rows.values(), () if record.distrust else (*orders, *deleted))
        self._deleted.get(worker, set()).difference_update(deleted)
        owners = await self._owners_of([e for e in said.report.inventory or () if e.handle not in rows])
        rows |= {row.handle: row for row in map(_of_actor, owners.values()) if row.worker == worker}
        report, on_disk = await self._with_disk(worker, said)
        record = await self._registered(worker)  # only now comparable with what the worker knows
        generations = {pk: actor.generation for pk, actor in owners.items()}
        decision = control.sync(member_of(record), [*rows.values(), *on_disk], report, generations=generations)
        if decision.alarm:
            await self._engine.members.distrust(worker, decision.member.quarantined, decision.alarm)
        if not isinstance(decision.answer, gc.Orders):
            raise Unavailable(f"worker {worker} has registered anew meanwhile", reason="WORKER_NOT_REGISTERED")
        self._note_gone(worker, said.report)
        return There(
            actors=actors,
            residents={resident.sandbox or resident.actor_uid: resident for resident in said.residents},
            alone_epoch=said.alone_epoch,
            missing=frozenset(row.handle for row in decision.removed),
            trusted=not decision.member.quarantined,
            destroy=decision.answer.destroy,
        )

    async def listed(self, worker: str) -> list[verdict.There]:
        """Its sandboxes, and the snapshots that it holds; nothing comes of this question. Raises as `ask`."""
        await self.ask(worker)
        entries = self.said[worker].report.inventory or ()
        return [
            verdict.There(
                worker=worker, kind=KINDS[e.kind], id=e.handle, owner=gc.uid_of_log(e.parent) if e.parent else e.handle
            )
            for e in entries
            if e.kind is not gc.Kind.LOG and e.state is not gc.Local.DYING
        ]

    def deleted(self, actor: Actor) -> None:
        """As the change feed says it. It may have run anywhere; a uid never comes again, so no more has to be known.
        What the feed leaves out, and what a worker is not told now, is found when its disk is looked at."""
        for worker in self._engine.hub.connected():
            logs = self._deleted.setdefault(worker, set())
            if len(logs) < MAX_DELETED:
                logs.add(gc.log_handle(actor.uid))

    def look_closely(self, worker: str) -> None:
        """The next time also at what has not changed on its disk."""
        self._compared.pop(worker, None)

    def is_sweeping(self, worker: str) -> bool:
        """Whether it was told to destroy something and has not said yet that it is gone."""
        return bool(self._ordered.get(worker))

    def _note_gone(self, worker: str, report: gc.Report) -> None:
        """Of what was ordered to be destroyed, what is."""
        if report.inventory is None:
            return
        there = {entry.handle: entry for entry in report.inventory}
        ordered = self._ordered.setdefault(worker, {})
        for handle in [*ordered.keys() - there.keys()]:
            entry = ordered.pop(handle)
            whose = f" of actor {entry.owner}" if entry.owner else ""
            why = f"no record speaks of this {entry.kind}{whose}"
            self._engine.removals.add(KINDS[entry.kind], handle, worker, why)

    def forget(self, worker: str) -> None:
        """It has gone."""
        self._deleted.pop(worker, None)
        self._ordered.pop(worker, None)
        self.said.pop(worker, None)
        self._compared.pop(worker, None)

    async def _registered(self, worker: str) -> Worker:
        record = await self._ops.steadily(lambda: self._engine.members.find(worker))
        if record is None or not record.incarnation:
            self._engine.members.register_again(worker)
            raise Unavailable(f"worker {worker} is not registered", reason="WORKER_NOT_REGISTERED")
        return record

    async def _sync(
        self, worker: str, record: Worker, rows: Iterable[gc.Resource], orders: tuple[str, ...]
    ) -> api.Synced:
        last = self.said.get(worker)
        if orders and last is not None:
            entries = {entry.handle: entry for entry in last.report.inventory or ()}
            self._ordered.setdefault(worker, {}).update((h, entries[h]) for h in orders if h in entries)
        call = api.Sync(
            epoch=record.epoch,
            closed_seq=max(control.closable(member_of(record), rows), 0),
            destroy=orders,
            drain=bool(record.cordon),
            known=last.digest if last else "",
        )
        try:
            said = await self._engine.members.ask(worker, call)
        except Conflict as error:
            if error.reason == "WRONG_EPOCH":
                self._engine.members.register_again(worker)
            raise
        assert isinstance(said, api.Synced)
        if said.same:
            assert last is not None
            said = replace(said, report=replace(said.report, inventory=last.report.inventory), residents=last.residents)
        self.said[worker] = said
        return said

    async def _owners_of(self, entries: Iterable[gc.Entry]) -> dict[str, Actor]:
        """Of sandboxes that were not seen in the records: those who have their names now."""
        new = [e for e in entries if e.kind is gc.Kind.SANDBOX and e.owner]
        found = await self._all(Actor, "pk", {e.owner for e in new})
        uids = {e.owner: gc.uid_of_log(e.parent) for e in new}
        return {actor.pk: actor for actor in found if actor.uid == uids[actor.pk]}

    async def _with_disk(self, worker: str, said: api.Synced) -> tuple[gc.Report, list[gc.Resource]]:
        """The report as far as it is to be looked at now, and the rows of what is on the worker's disk."""
        report = said.report
        if report.inventory is None:
            return report, []
        kept = [e for e in report.inventory if e.kind is not gc.Kind.SANDBOX]
        digest = hashlib.sha256("\n".join(e.handle for e in kept).encode()).hexdigest()
        before, times = self._compared.get(worker, ("", 0))
        if digest == before and times < LOOK_EVERY:
            self._compared[worker] = digest, times + 1
            return replace(report, inventory=tuple(e for e in report.inventory if e.kind is gc.Kind.SANDBOX)), []
        rows = await self._of_snapshots(worker, [e.handle for e in kept if e.kind is gc.Kind.SNAPSHOT])
        rows += await self._of_logs(worker, [e.handle for e in kept if e.kind is gc.Kind.LOG])
        self._compared[worker] = digest, 0
        return report, rows

    async def _of_snapshots(self, worker: str, handles: Sequence[str]) -> list[gc.Resource]:
        if not handles:
            return []
        # In this order: an operation that has ended before it was looked for has written what it made by then.
        running = await self._engine.census.all(Operation, state=OperationState.RUNNING)
        records = {s.id: s.state for s in await self._all(Snapshot, "pk", handles)}
        rows = {op.snapshot: gc.ResourceState.CREATING for op in running if op.snapshot}
        rows |= {
            snapshot: gc.ResourceState.DESTROYING if state in GOING else gc.ResourceState.LIVE
            for snapshot, state in records.items()
        }
        return [
            gc.Resource(handle=h, worker=worker, create_seq=0, state=rows[h], kind=gc.Kind.SNAPSHOT)
            for h in handles
            if h in rows
        ]

    async def _of_logs(self, worker: str, handles: Sequence[str]) -> list[gc.Resource]:
        uids = {gc.uid_of_log(handle) for handle in handles}
        return [
            gc.Resource(
                handle=gc.log_handle(actor.uid),
                worker=worker,
                create_seq=0,
                state=gc.ResourceState.LIVE,
                kind=gc.Kind.LOG,
            )
            for actor in await self._all(Actor, "uid", uids)
        ]

    async def _all(self, cls: type[R], field: str, values: Collection[str]) -> list[R]:
        """The records that have one of these values, which are unique."""
        found: list[R] = []
        ordered = sorted(values)
        for start in range(0, len(ordered), MAX_PAGE):
            some = tuple(ordered[start : start + MAX_PAGE])
            found += await self._ops.steadily(lambda: self._store.list(cls, where={field: some}))  # noqa: B023
        return found


def _of_actor(actor: Actor) -> gc.Resource:
    creating = actor.state is ActorState.RESUMING
    return gc.Resource(
        handle=handle_of(actor),
        worker=actor.worker,
        create_seq=actor.sandbox_seq,
        state=gc.ResourceState.CREATING if creating else gc.ResourceState.LIVE,
        operation=actor.operation,
    )


def handle_of(actor: Actor) -> str:
    """Of the sandbox that an actor is bound to; as `greenroom.core.agentapi.Identity.handle`."""
    return actor.sandbox or actor.uid
