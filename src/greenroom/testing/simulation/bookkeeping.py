"""What must hold of the records alone, after every write.

1. Slots are what actors are bound, never more than there are.
2. Versions and generations only grow; a record is replaced by what was made from it; who lost an operation changes
   nothing; what has ended stays as it is.
3. Whatever `greenroom.testing.contracts.store_world.audit` checks. Here it is checked for the records that a write
   touched; the whole of it from time to time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from greenroom.core import states
from greenroom.core.commands import Begin, Command, OperationCommand, TakeOver
from greenroom.core.records import (
    Actor,
    ActorState,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    SnapshotState,
    Worker,
)
from greenroom.store.memory import MemoryStore
from greenroom.store.port import EventType, Free, Stored
from greenroom.testing.contracts.store_world import audit
from greenroom.testing.simulation.database import Effects, Write, at_once

#: The whole audit is done after every so many writes.
WHOLE_AUDIT_EVERY = 100


class Violation(AssertionError):
    """Something that must hold does not."""


@dataclass(slots=True)
class Verdicts:
    """What does not hold. The first one ends the simulation, by ``stop``."""

    stop: Callable[[], None]
    found: list[Violation] = field(default_factory=list)

    def broken(self, what: str) -> Violation:
        """To be raised. Whoever swallows it does not make it undone."""
        self.found.append(Violation(what))
        self.stop()
        return self.found[-1]


@dataclass(slots=True)
class Bookkeeping:
    """Attributes:
    heard_at: when it was last written down that somebody heard a worker.
    records: all of them, as they were before the write that is looked at.
    ends: how operations ended, by kind and end; crashes by reason.
    """

    store: MemoryStore
    verdicts: Verdicts
    now: Callable[[], float]
    heard_at: dict[str, float] = field(default_factory=dict)
    records: dict[tuple[type[Stored], str], Stored] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    writes: int = 0

    def wrote(self, who: str, write: Write | None, effects: Effects) -> list[tuple[Actor | None, Actor | None]]:
        """After every write, in the same instant. Returns the actors that it has changed: what each was, what it is;
        None for one that was not there before, or is not any more."""
        self.writes += 1
        if isinstance(write, OperationCommand):
            self._check_owner(who, write)
        elif write is not None and not isinstance(write, Command):
            self._check_read(who, write)
        actors: list[tuple[Actor | None, Actor | None]] = []
        for kind, record in effects:
            known, deleted = (type(record), record.pk), kind is EventType.DELETED
            before = self.records.pop(known, None)
            if not deleted:
                self.records[known] = record
                self._check(before, record, write)
            if isinstance(record, Actor):
                assert before is None or isinstance(before, Actor)
                actors.append((before, None if deleted else record))
        for _, actor in actors:
            if actor is not None:
                self._audit(actor)
        if self.writes % WHOLE_AUDIT_EVERY == 0:
            self.audit()
        return actors

    def audit(self) -> None:
        """The whole of `audit`."""
        at_once(audit(self.store))

    # --- one record ---------------------------------------------------------------------------------------

    def _check(self, before: Stored | None, record: Stored, write: Write | None) -> None:
        match record:
            case Worker():
                self._worker(before if isinstance(before, Worker) else None, record)
            case Actor() if isinstance(before, Actor) and before.uid == record.uid:
                self._actor(before, record, write)
            case Operation():
                self._operation(before if isinstance(before, Operation) else None, record)
            case _:
                self._version(before, record)

    def _check_owner(self, who: str, c: OperationCommand) -> None:
        """Of a command that has changed something: the records of before the write are still those known here."""
        actor = self.records.get((Actor, str(c.key)))
        if not isinstance(actor, Actor) or (actor.operation, actor.generation) != (c.operation_id, c.generation):
            raise self.verdicts.broken(f"{who} has lost {c.key} and has changed it all the same: {c}; it was {actor}")

    def _check_read(self, who: str, record: Free) -> None:
        """Of a record that was stored: it was made from the one that was there."""
        before = self.records.get((type(record), record.pk))
        if record.version != getattr(before, "version", 0):
            raise self.verdicts.broken(f"a write was lost: {who} replaced {before}, which it had not read, by {record}")

    def _version(self, before: Stored | None, record: Stored) -> None:
        if isinstance(record, Lease) or before is None or before is record:
            return
        old, new = getattr(before, "version", 0), getattr(record, "version", 0)
        if new != old + 1:
            raise self.verdicts.broken(f"a write was lost: version {new} replaces version {old} of {record}")

    def _worker(self, before: Worker | None, worker: Worker) -> None:
        if before is not None and worker.version < before.version:
            raise self.verdicts.broken(
                f"a write was lost: version {worker.version} replaces version {before.version} of {worker}"
            )
        if before is None or worker.last_seen != before.last_seen:
            self.heard_at[worker.name] = self.now()
        bound = self.store._rows.bound_to(worker.name)
        if worker.used != bound:
            raise self.verdicts.broken(f"{worker.used} slots of worker {worker.name} are taken, by {bound} actors")
        if worker.used > worker.capacity and (before is None or worker.used > before.used):
            raise self.verdicts.broken(f"worker {worker.name} has {worker.capacity} slots, and {worker.used} are taken")

    def _actor(self, before: Actor, actor: Actor, write: Write | None) -> None:
        self._version(before, actor)
        if actor.generation < before.generation:
            raise self.verdicts.broken(f"the generation went back: {before} -> {actor}")
        if isinstance(write, Begin | TakeOver) and actor.generation <= before.generation:
            raise self.verdicts.broken(f"somebody took it without a new generation: {before} -> {actor}")
        if actor.state is not before.state and actor.state not in states.LEGAL[before.state]:
            raise self.verdicts.broken(f"no legal transition: {before} -> {actor}")

    def _operation(self, before: Operation | None, op: Operation) -> None:
        if before is not None:
            self._version(before, op)
            again = op.kind is OperationKind.PREPARE and (op.state, op.error) == (before.state, before.error)
            if before.state is not OperationState.RUNNING and not again:
                raise self.verdicts.broken(f"an operation that has ended was changed: {before} -> {op}")
            if op.generation < before.generation:
                raise self.verdicts.broken(f"the generation went back: {before} -> {op}")
        if op.state is not OperationState.RUNNING:
            self.ends[f"{op.kind} {op.state}"] += 1
            if op.takeovers:
                self.ends[f"{op.kind} taken over"] += 1
            if op.kind is OperationKind.CRASH and op.error is not None:
                self.ends[f"crash: {op.error.reason}"] += 1

    # --- the audit of what was touched ---------------------------------------------------------------------

    def _audit(self, actor: Actor) -> None:
        """`audit`, as far as it is about this actor."""
        rows = self.store._rows
        now = rows.read(Actor, actor.pk)
        if now is None or now is not actor:
            return
        lease = rows.read(Lease, actor.uid)
        if (actor.state in states.BOUND) > bool(actor.worker and rows.read(Worker, actor.worker)):
            raise self.verdicts.broken(f"bound to no worker: {actor}")
        if actor.worker and actor.state not in states.BOUND | {ActorState.DELETING}:
            raise self.verdicts.broken(f"keeps a slot: {actor}")
        if actor.state is ActorState.RUNNING and actor.endpoint is None:
            raise self.verdicts.broken(f"running, but where? {actor}")
        for name in filter(None, (actor.snapshot, actor.previous_snapshot)):
            snapshot = rows.read(Snapshot, name)
            if snapshot is None or snapshot.state is SnapshotState.CONDEMNED:
                raise self.verdicts.broken(f"snapshot {name} is gone or condemned: {actor}")
        if not actor.operation:
            if actor.state in states.BUSY - {ActorState.DELETING}:
                raise self.verdicts.broken(f"nobody will go on with {actor}")
            if lease is not None:
                raise self.verdicts.broken(f"a lease without an operation: {lease}, {actor}")
            return
        op = rows.read(Operation, actor.operation)
        if actor.state not in states.BUSY or op is None or op.state is not OperationState.RUNNING:
            raise self.verdicts.broken(f"its operation is not under way: {actor}, {op}")
        if (op.uid, op.generation) != (actor.uid, actor.generation):
            raise self.verdicts.broken(f"another's operation: {actor}, {op}")
        if lease is None or (lease.operation, lease.generation) != (op.id, actor.generation):
            raise self.verdicts.broken(f"no lease, or a stale one: {lease}, {actor}")
