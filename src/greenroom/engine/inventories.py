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

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import Conflict, InvalidArgument, Unavailable
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


#: Handles that one question orders to be destroyed of what is on a disk; the next takes more.
MAX_ORDERS = 5_000
#: Logs of deleted actors that are remembered for a worker until it is asked.
MAX_DELETED = 10_000
#: What people call what a worker has.
KINDS = {gc.Kind.SANDBOX: "sandbox", gc.Kind.SNAPSHOT: "copy", gc.Kind.LOG: "log"}
#: Of a snapshot whose copy on a worker is of no use any more.
GOING = (SnapshotState.CONDEMNED, SnapshotState.CORRUPT)


class There(NamedTuple):
    """Attributes:
    actors: that are bound to the worker by the records; read before it was asked.
    entries: of all its sandboxes.
    disk: a digest of the names of what is on its disk beside these.
    residents: by the handle of their sandbox.
    handles: of the sandboxes of the actors, by uid.
    missing: handles of sandboxes that are not there and can't come any more.
    trusted: whether the records may be acted on.
    destroy: handles that nobody has a record of, to be sent with the next question.
    """

    actors: Sequence[Actor]
    entries: Sequence[gc.Entry]
    disk: str
    residents: dict[str, api.Resident]
    handles: dict[str, str]
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
        #: By worker: what was found to be nobody's on its disk when that was looked at.
        self._nobodys: dict[str, dict[str, gc.Entry]] = {}
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
        rows = [_of_actor(actor) for actor in actors]
        said = await self._sync(worker, record, rows, () if record.distrust else (*orders, *deleted))
        self._deleted.get(worker, set()).difference_update(deleted)
        entries = said.report.inventory or ()
        known = {row.handle for row in rows}
        owners = await self._owners_of([e for e in entries if e.handle not in known])
        bound = {a.uid: a for a in (*actors, *owners.values()) if a.worker == worker}
        handles = {uid: _handle_among(entries, actor) for uid, actor in bound.items()}
        rows = [replace(_of_actor(actor), handle=handles[uid]) for uid, actor in bound.items()]
        record = await self._registered(worker)  # only now comparable with what the worker knows
        generations = {pk: actor.generation for pk, actor in owners.items()}
        decision = control.sync(member_of(record), rows, said.report, generations=generations)
        if decision.alarm:
            why = decision.member.quarantined
            await self._engine.members.distrust(worker, why, decision.alarm, decision.member.seq)
        elif decision.member.seq > record.seq:
            await self._engine.members.raise_seq(worker, decision.member.seq)
        if not isinstance(decision.answer, gc.Orders):
            raise Unavailable(f"worker {worker} has registered anew meanwhile", reason="WORKER_NOT_REGISTERED")
        self._note_gone(worker, entries, lambda kind: kind is gc.Kind.SANDBOX)
        return There(
            actors=actors,
            entries=entries,
            disk=said.disk,
            residents={resident.sandbox or resident.actor_uid: resident for resident in said.residents},
            handles=handles,
            alone_epoch=said.alone_epoch,
            missing=frozenset(row.handle for row in decision.removed),
            trusted=not decision.member.quarantined,
            destroy=decision.answer.destroy,
        )

    async def look(self, worker: str, disk: str) -> tuple[str, ...]:
        """What nobody has a record of on the worker's disk: handles to be ordered with the next question. Nothing when
        it need not be looked at: its names (``disk``: `There.disk`) are the same as before, and the records mostly too.

        Raises:
            Unavailable: it does not answer.
        """
        before, times = self._compared.get(worker, ("", 0))
        if disk == before and times < LOOK_EVERY and not self.is_sweeping(worker):
            self._compared[worker] = disk, times + 1
            return ()
        entries, nobodys, all_of_it = await self._on_disk(worker)
        self._compared[worker] = (disk if all_of_it else ""), 0
        self._nobodys[worker] = {entry.handle: entry for entry in nobodys}
        if all_of_it:
            self._note_gone(worker, entries, lambda kind: kind is not gc.Kind.SANDBOX)
        return tuple(self._nobodys[worker])

    async def listed(self, worker: str) -> list[verdict.There]:
        """Its sandboxes, and the snapshots that it holds; nothing comes of this question. Raises as `ask`."""
        there = await self.ask(worker)
        entries, _, _ = await self._on_disk(worker)
        return [
            verdict.There(worker=worker, kind=KINDS[e.kind], id=e.handle, owner=_owner(e))
            for e in (*there.entries, *entries)
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

    def _note_gone(self, worker: str, entries: Iterable[gc.Entry], of: Callable[[gc.Kind], bool]) -> None:
        """Of what was ordered to be destroyed, what is. ``entries``: everything that is there of the kinds ``of``."""
        there = {entry.handle for entry in entries}
        ordered = self._ordered.get(worker, {})
        for handle in [h for h, entry in ordered.items() if of(entry.kind) and h not in there]:
            entry = ordered.pop(handle)
            whose = f" of actor {entry.owner}" if entry.owner else ""
            why = f"no record speaks of this {entry.kind}{whose}"
            self._engine.removals.add(KINDS[entry.kind], handle, worker, why)

    def forget(self, worker: str) -> None:
        """It has gone."""
        self._nobodys.pop(worker, None)
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
            entries = {entry.handle: entry for entry in last.report.inventory or ()} | self._nobodys.get(worker, {})
            self._ordered.setdefault(worker, {}).update((h, entries[h]) for h in orders if h in entries)
        call = api.Sync(
            epoch=record.epoch,
            incarnation=record.incarnation,
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
            if last is None or last.digest != said.digest:
                raise InvalidArgument(f"worker {worker} says the same as nothing", reason="INVENTORY_INVALID")
            said = replace(said, report=replace(said.report, inventory=last.report.inventory), residents=last.residents)
        self.said[worker] = said
        return said

    async def _owners_of(self, entries: Iterable[gc.Entry]) -> dict[str, Actor]:
        """Of sandboxes that were not seen in the records: those who have their names now."""
        new = [e for e in entries if e.kind is gc.Kind.SANDBOX and e.owner]
        found = await self._all(Actor, "pk", {e.owner for e in new})
        uids = {e.owner: gc.uid_of_log(e.parent) for e in new}
        return {actor.pk: actor for actor in found if actor.uid == uids[actor.pk]}

    async def _on_disk(self, worker: str) -> tuple[list[gc.Entry], list[gc.Entry], bool]:
        """What is on a worker's disk, what of it is nobody's and not ordered yet, and whether that is all."""
        found: list[gc.Entry] = []
        nobodys: list[gc.Entry] = []
        after, more = "", True
        while more and len(nobodys) < MAX_ORDERS:
            page = await self._engine.members.ask(worker, api.ListDisk(after=after))
            assert isinstance(page, api.Disk)
            rows = await self._of_snapshots(worker, [e.handle for e in page.entries if e.kind is gc.Kind.SNAPSHOT])
            rows += await self._of_logs(worker, [e.handle for e in page.entries if e.kind is gc.Kind.LOG])
            wanted = {row.handle for row in rows if row.state is not gc.ResourceState.DESTROYING}
            nobodys += [e for e in page.entries if e.handle not in wanted and e.state is not gc.Local.DYING]
            found += page.entries
            last = max((entry.handle for entry in page.entries), default="")
            more = page.more and last > after
            after = last
        return found, nobodys, not more

    async def _of_snapshots(self, worker: str, handles: Sequence[str]) -> list[gc.Resource]:
        if not handles:
            return []
        # In this order: an operation that has ended before it was looked for has written what it made by then.
        running = await self._engine.census.all(Operation, state=OperationState.RUNNING)
        records = {s.id: s.state for s in await self._all(Snapshot, "pk", {*map(gc.snapshot_of, handles)})}
        rows = {op.snapshot: gc.ResourceState.CREATING for op in running if op.snapshot}
        rows |= {
            snapshot: gc.ResourceState.DESTROYING if state in GOING else gc.ResourceState.LIVE
            for snapshot, state in records.items()
        }
        return [
            gc.Resource(handle=h, worker=worker, create_seq=0, state=rows[gc.snapshot_of(h)], kind=gc.Kind.SNAPSHOT)
            for h in handles
            if gc.snapshot_of(h) in rows
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


def _owner(entry: gc.Entry) -> str:
    """An actor's uid, or a snapshot's id."""
    return gc.uid_of_log(entry.parent) if entry.parent else gc.snapshot_of(entry.handle)


def _handle_among(entries: Iterable[gc.Entry], actor: Actor) -> str:
    """Of the sandbox that an actor is bound to. One that was written by a version that knew no handles is the one that
    is there."""
    if actor.sandbox:
        return actor.sandbox
    its = (e.handle for e in entries if e.parent == gc.log_handle(actor.uid))
    return next(its, actor.uid)


def _of_actor(actor: Actor) -> gc.Resource:
    creating = actor.state is ActorState.RESUMING
    return gc.Resource(
        handle=actor.sandbox or actor.uid,
        worker=actor.worker,
        create_seq=actor.sandbox_seq,
        state=gc.ResourceState.CREATING if creating else gc.ResourceState.LIVE,
        operation=actor.operation,
    )
