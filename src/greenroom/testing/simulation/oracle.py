"""What must hold, whatever goes wrong: looked at in the instant of every write to the store, every change of a sandbox
and every answer that somebody gets.

The oracle sees everything at once, which nobody in the real world does. It does not trust the records: what an actor
must have in memory it follows by itself, from the requests that were carried out.

1. One incarnation. A request is never answered by a sandbox that another one has followed, and never are there two
   running sandboxes of one actor that replicas would route to.
2. Nothing is lost silently. An actor wakes with exactly what it had when it was suspended; what else takes it back is a
   recorded crash, or a recorded loss of its snapshot, and these need a cause.
3. Slots are what actors are bound, never more than there are.
4. Only legal transitions; versions and generations only grow; who lost an operation changes nothing, neither in the
   store nor on a worker.
5. A worker counts as lost only when nobody has heard it for long, and by then its agent knows that it is alone, nobody
   routes there, and nothing goes on there that does not know better.
6. Whatever `greenroom.testing.contracts.store_world.audit` checks. Here it is checked for the records that a write
   touched; the whole of it from time to time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from greenroom.core import states
from greenroom.core.agentapi import ActorCall
from greenroom.core.commands import Begin, Command, OperationCommand, TakeOver
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    Snapshot,
    SnapshotState,
    Worker,
)
from greenroom.engine.bindings import BindingTable
from greenroom.store.memory import MemoryStore
from greenroom.store.port import EventType, Free, Stored
from greenroom.testing.contracts.store_world import audit
from greenroom.testing.simulation.database import Effects, Write, at_once
from greenroom.testing.simulation.machine import Machine, Sandbox

#: The whole audit is done after every so many writes.
WHOLE_AUDIT_EVERY = 100


class Violation(AssertionError):
    """Something that must hold does not."""


class World(Protocol):
    """What the oracle looks at."""

    machines: dict[str, Machine]

    def tables(self) -> list[BindingTable]: ...
    def stored_count(self, snapshot_id: str) -> int | None: ...
    def is_damaged(self, snapshot_id: str) -> bool: ...
    def knows_it_is_alone(self, worker: str) -> bool | None:
        """Whether its agent does; None when there is no agent."""

    def sandbox_at(self, path: str) -> Sandbox | None: ...


@dataclass(slots=True)
class Line:
    """The life of one actor.

    Attributes:
        actor: its record as last written.
        current: the sandbox that the last resume came to; None while it sleeps, or has crashed.
        latest: the same, kept when it has ended.
        saved: what it has in its latest snapshot.
        asleep: suspended, and not awake again yet.
        acked: the highest count that somebody has been told since the last loss.
        losses: how often it was set back.
    """

    actor: Actor
    current: Sandbox | None = None
    latest: Sandbox | None = None
    saved: int = 0
    asleep: bool = False
    acked: int = 0
    losses: int = 0
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that was carried out: ``count`` is what it counted to, ``stale`` what is wrong with the sandbox that
    did it ("" for nothing), ``losses`` those of the line until then."""

    sandbox: Sandbox
    key: Key
    count: int
    stale: str
    losses: int


@dataclass(slots=True)
class Oracle:
    store: MemoryStore
    world: World
    stop: Callable[[], None]
    now: Callable[[], float]
    #: `EngineConfig.worker_return_s`, where there are several replicas.
    return_s: float | None
    #: When it was last written down that somebody heard a worker.
    heard_at: dict[str, float] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    by_key: dict[str, Line] = field(default_factory=dict)
    records: dict[tuple[type[Stored], str], Stored] = field(default_factory=dict)
    #: How operations ended, by (kind, end); crashes by reason; and what else is worth to be seen.
    ends: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    #: The call of the highest generation that has reached a machine, by machine and actor.
    seen: dict[tuple[str, str], ActorCall] = field(default_factory=dict)
    #: Actors with more than one running sandbox.
    suspects: dict[str, Key] = field(default_factory=dict)
    #: What does not hold. The first one ends the simulation.
    found: list[Violation] = field(default_factory=list)

    def broken(self, what: str) -> Violation:
        """To be raised. Whoever swallows it does not make it undone."""
        self.found.append(Violation(what))
        self.stop()
        return self.found[-1]

    # --- the store ----------------------------------------------------------------------------------------

    def wrote(self, who: str, write: Write | None, effects: Effects) -> None:
        """After every write, in the same instant."""
        self.writes += 1
        if isinstance(write, OperationCommand):
            self._check_owner(who, write)
        elif write is not None and not isinstance(write, Command):
            self._check_read(who, write)
        for kind, record in effects:
            known = (type(record), record.pk)
            before = self.records.get(known)
            if kind is EventType.DELETED:
                self.records.pop(known, None)
            else:
                self.records[known] = record
            match record:
                case Actor():
                    self._actor(before, record, write, deleted=kind is EventType.DELETED)
                case Operation():
                    self._operation(before, record, deleted=kind is EventType.DELETED)
                case Worker():
                    self._worker(before, record)
                case Snapshot():
                    self._snapshot(before, record)
                case _:
                    self._version(before, record)
        for _, record in effects:
            if isinstance(record, Actor):
                self._audit(record)
        if self.writes % WHOLE_AUDIT_EVERY == 0:
            self.audit()
        if self.suspects:
            self.look_for_two()

    def audit(self) -> None:
        """The whole of `audit`."""
        at_once(audit(self.store))

    def _check_owner(self, who: str, c: OperationCommand) -> None:
        """Of a command that has changed something: the records of before the write are still those known here."""
        actor = self.records.get((Actor, str(c.key)))
        if not isinstance(actor, Actor) or (actor.operation, actor.generation) != (c.operation_id, c.generation):
            raise self.broken(f"{who} has lost {c.key} and has changed it all the same: {c}; it was {actor}")

    def _check_read(self, who: str, record: Free) -> None:
        """Of a record that was stored: it was made from the one that was there."""
        before = self.records.get((type(record), record.pk))
        if record.version != getattr(before, "version", 0):
            raise self.broken(f"a write was lost: {who} replaced {before}, which it had not read, by {record}")

    def _version(self, before: Stored | None, record: Stored) -> None:
        if isinstance(record, Lease) or before is None or before is record:
            return
        old, new = getattr(before, "version", 0), getattr(record, "version", 0)
        if new != old + 1:
            raise self.broken(f"a write was lost: version {new} replaces version {old} of {record}")

    def _worker(self, before: Stored | None, worker: Worker) -> None:
        if isinstance(before, Worker) and worker.version < before.version:
            raise self.broken(
                f"a write was lost: version {worker.version} replaces version {before.version} of {worker}"
            )
        if not isinstance(before, Worker) or worker.last_seen != before.last_seen:
            self.heard_at[worker.name] = self.now()
        bound = self.store._rows.bound_to(worker.name)
        if worker.used != bound:
            raise self.broken(f"{worker.used} slots of worker {worker.name} are taken, by {bound} actors")
        if worker.used > worker.capacity and (before is None or worker.used > before.used):  # type: ignore[union-attr]
            raise self.broken(f"worker {worker.name} has {worker.capacity} slots, and {worker.used} are taken")

    def _operation(self, before: Stored | None, op: Operation, *, deleted: bool) -> None:
        if deleted:
            return
        if isinstance(before, Operation):
            self._version(before, op)
            again = op.kind is OperationKind.PREPARE and (op.state, op.error) == (before.state, before.error)
            if before.state is not OperationState.RUNNING and not again:
                raise self.broken(f"an operation that has ended was changed: {before} -> {op}")
            if op.generation < before.generation:
                raise self.broken(f"the generation went back: {before} -> {op}")
        if op.state is not OperationState.RUNNING:
            self.ends[f"{op.kind} {op.state}"] += 1
            if op.takeovers:
                self.ends[f"{op.kind} taken over"] += 1
            if op.kind is OperationKind.CRASH and op.error is not None:
                self.ends[f"crash: {op.error.reason}"] += 1

    # --- actors -------------------------------------------------------------------------------------------

    def _actor(self, before: Stored | None, actor: Actor, write: Write | None, *, deleted: bool) -> None:
        old = before if isinstance(before, Actor) and before.uid == actor.uid else None
        if deleted:
            self.lines[actor.uid].deleted = True
            self.lines[actor.uid].current = None
            self.by_key.pop(actor.pk, None)
            return
        if old is None:
            if actor.uid in self.lines or actor.state is not ActorState.SUSPENDED:
                raise self.broken(f"not how an actor begins: {actor}")
            self.lines[actor.uid] = self.by_key[actor.pk] = Line(actor)
            return
        line = self.lines[actor.uid]
        line.actor = actor
        self._version(old, actor)
        if actor.generation < old.generation:
            raise self.broken(f"the generation went back: {old} -> {actor}")
        if isinstance(write, Begin | TakeOver) and actor.generation <= old.generation:
            raise self.broken(f"somebody took it without a new generation: {old} -> {actor}")
        if actor.state is not old.state:
            if actor.state not in states.LEGAL[old.state]:
                raise self.broken(f"no legal transition: {old} -> {actor}")
            self._moved(line, old, actor)
        elif actor.snapshot != old.snapshot:
            self._set_back(line, old, actor)

    def _moved(self, line: Line, old: Actor, actor: Actor) -> None:
        S = ActorState
        match (old.state, actor.state):
            case (S.RESUMING, S.RUNNING):
                self._resumed(line, actor)
            case (S.SUSPENDING, S.SUSPENDED):
                self._suspended(line, actor)
            case (_, S.CRASHED):
                self._crashed(line, old, actor)
            case (S.CRASHED, S.RESUMING) if actor.snapshot != old.snapshot:
                self._set_back(line, old, actor)  # begun anew, as its template says
            case _:
                if actor.snapshot != old.snapshot:
                    raise self.broken(f"another snapshot for no reason: {old} -> {actor}")

    def _resumed(self, line: Line, actor: Actor) -> None:
        assert actor.endpoint is not None
        sandbox = self.world.sandbox_at(actor.endpoint.path)
        if sandbox is None or sandbox.uid != actor.uid or sandbox.machine.name != actor.worker:
            raise self.broken(f"it runs where nothing of it is: {actor}, {sandbox}")
        if line.current is not None:  # it was paused
            if sandbox is not line.current:
                raise self.broken(f"thawed as another one: {line.current} -> {sandbox}")
            return
        if sandbox.origin != line.saved:
            raise self.broken(f"it woke with {sandbox.origin} instead of {line.saved}: {sandbox}, {actor}")
        if sandbox.origin < line.acked:
            raise self.broken(f"it woke with {sandbox.origin}, and {line.acked} was answered: {sandbox}, {actor}")
        line.current = line.latest = sandbox
        line.asleep = False

    def _suspended(self, line: Line, actor: Actor) -> None:
        sandbox, count = line.current, self.world.stored_count(actor.snapshot)
        if sandbox is None:
            raise self.broken(f"it was suspended and did not run: {actor}")
        made = self.store._rows.read(Snapshot, actor.snapshot)
        if count is None and made is not None and made.state is SnapshotState.LOCAL:
            count = sandbox.count  # it was on that worker's disk, and that was lost meanwhile
        if count is None:
            raise self.broken(f"its snapshot is not there: {actor}")
        if not (sandbox.frozen or sandbox.gone):
            raise self.broken(f"it counts as suspended, and runs: {sandbox}, {actor}")
        if count != sandbox.count:
            raise self.broken(f"its snapshot has {count}: {sandbox}, {actor}")
        if sandbox.ended_by_call:
            raise self.broken(f"it was destroyed before its snapshot was committed: {sandbox}, {actor}")
        line.saved, line.current, line.asleep = count, None, True

    def _crashed(self, line: Line, old: Actor, actor: Actor) -> None:
        if actor.unsaved_since is None or not actor.reason:
            raise self.broken(f"it does not say since when it has lost something, or why: {actor}")
        sandbox = line.current
        if actor.reason == "WorkerLost" and sandbox is not None and not (sandbox.frozen or sandbox.gone):
            self._lost(old)
        line.current, line.asleep = None, False
        self._set_back(line, old, actor)

    def _lost(self, actor: Actor) -> None:
        """What must be so when an actor is lost with its worker, and runs there still. In a world of one replica it is
        that replica's own business."""
        if self.return_s is None:
            return
        unheard_s = self.now() - self.heard_at.get(actor.worker, 0.0)
        if unheard_s < self.return_s:
            raise self.broken(f"{actor.worker} counts as lost, and was heard {unheard_s:.3f} s ago: {actor}")
        if self.world.knows_it_is_alone(actor.worker) is False:
            raise self.broken(f"{actor.worker} counts as lost, and does not know that it is alone: {actor}")
        routed = [b for t in self.world.tables() if (b := t.get(actor.key)) is not None and b.worker == actor.worker]
        if routed:
            raise self.broken(f"{actor.worker} counts as lost, and somebody routes there: {routed}, {actor}")

    def _set_back(self, line: Line, old: Actor, actor: Actor) -> None:
        """It has lost something, and says so."""
        if actor.snapshot != old.snapshot:
            begun_anew = old.state is ActorState.CRASHED and actor.state is ActorState.RESUMING
            not_begun = old.state is ActorState.RESUMING and actor.state is ActorState.CRASHED and not old.snapshot
            if not (begun_anew or not_begun or self._is_bad(old.snapshot)):
                raise self.broken(f"another snapshot for no reason: {old} -> {actor}")
            self.ends[f"set back: {actor.reason or 'boot'}"] += 1
            line.saved = (self.world.stored_count(actor.snapshot) or 0) if actor.snapshot else 0
        line.losses += 1
        line.acked = line.saved

    def _is_bad(self, snapshot_id: str) -> bool:
        record = self.records.get((Snapshot, snapshot_id))
        return isinstance(record, Snapshot) and record.state is SnapshotState.CORRUPT

    def _snapshot(self, before: Stored | None, record: Snapshot) -> None:
        self._version(before, record)
        if record.state is SnapshotState.CORRUPT and isinstance(before, Snapshot) and not self._is_bad_now(before):
            raise self.broken(f"a good snapshot counts as corrupt: {before} -> {record}")

    def _is_bad_now(self, snapshot: Snapshot) -> bool:
        """Whether it may be given up: nobody can read it, or only a worker that has been away for long."""
        damaged = self.world.stored_count(snapshot.id) is None or self.world.is_damaged(snapshot.id)
        return damaged or snapshot.state in (SnapshotState.LOCAL, SnapshotState.CORRUPT)

    # --- the audit of what was touched --------------------------------------------------------------------

    def _audit(self, actor: Actor) -> None:
        """`audit`, as far as it is about this actor."""
        rows = self.store._rows
        now = rows.read(Actor, actor.pk)
        if now is None or now is not actor:
            return
        lease = rows.read(Lease, actor.uid)
        if (actor.state in states.BOUND) > bool(actor.worker and rows.read(Worker, actor.worker)):
            raise self.broken(f"bound to no worker: {actor}")
        if actor.worker and actor.state not in states.BOUND | {ActorState.DELETING}:
            raise self.broken(f"keeps a slot: {actor}")
        if actor.state is ActorState.RUNNING and actor.endpoint is None:
            raise self.broken(f"running, but where? {actor}")
        for name in filter(None, (actor.snapshot, actor.previous_snapshot)):
            snapshot = rows.read(Snapshot, name)
            if snapshot is None or snapshot.state is SnapshotState.CONDEMNED:
                raise self.broken(f"snapshot {name} is gone or condemned: {actor}")
        if not actor.operation:
            if actor.state in states.BUSY - {ActorState.DELETING}:
                raise self.broken(f"nobody will go on with {actor}")
            if lease is not None:
                raise self.broken(f"a lease without an operation: {lease}, {actor}")
            return
        op = rows.read(Operation, actor.operation)
        if actor.state not in states.BUSY or op is None or op.state is not OperationState.RUNNING:
            raise self.broken(f"its operation is not under way: {actor}, {op}")
        if (op.uid, op.generation) != (actor.uid, actor.generation):
            raise self.broken(f"another's operation: {actor}, {op}")
        if lease is None or (lease.operation, lease.generation) != (op.id, actor.generation):
            raise self.broken(f"no lease, or a stale one: {lease}, {actor}")

    # --- sandboxes ----------------------------------------------------------------------------------------

    def call_arrived(self, machine: str, call: ActorCall) -> bool:
        """Whether its owner has been followed by another one, as far as this machine has seen."""
        key = (machine, call.actor_uid)
        seen = self.seen.get(key)
        if seen is None or call.generation >= seen.generation:
            self.seen[key] = call
            return False
        return True

    def call_acts(self, machine: str, call: ActorCall) -> None:
        """It is about to change a sandbox. Who goes on with an operation may have joined the call of the owner
        before."""
        seen = self.seen[machine, call.actor_uid]
        joined = (type(seen), seen.operation_id) == (type(call), call.operation_id)
        if call.generation < seen.generation and not joined:
            raise self.broken(f"a stale owner changes a sandbox on {machine}, which has seen {seen}: {call}")

    def goes_on(self, sandbox: Sandbox) -> None:
        """Somebody has it thawed."""
        line = self.lines[sandbox.uid]
        if line.current is not sandbox and line.actor.state is not ActorState.DELETING and not line.deleted:
            raise self.broken(f"it goes on, and its actor is not there any more: {sandbox}, {line.actor}")

    def runs(self, sandbox: Sandbox) -> None:
        """A sandbox runs from this instant."""
        others = [
            s
            for m in self.world.machines.values()
            if (s := m.sandboxes.get(sandbox.uid)) is not None and s is not sandbox and not s.frozen
        ]
        if others:
            self.suspects[sandbox.uid] = Key(sandbox.identity.namespace, sandbox.identity.name)
            self.look_for_two()

    def look_for_two(self) -> None:
        """Whether two running sandboxes of an actor can be reached."""
        for uid, key in list(self.suspects.items()):
            running = {
                s.endpoint.path: s
                for m in self.world.machines.values()
                if (s := m.sandboxes.get(uid)) is not None and not s.frozen
            }
            if len(running) < 2:
                del self.suspects[uid]
                continue
            reached = {b.endpoint.path for t in self.world.tables() if (b := t.get(key)) is not None} & set(running)
            if len(reached) > 1:
                raise self.broken(
                    f"two incarnations that requests reach: {[running[path] for path in sorted(reached)]}"
                )

    # --- requests -----------------------------------------------------------------------------------------

    def counted(self, sandbox: Sandbox, count: int) -> Answer:
        """A sandbox has carried out a request."""
        key = Key(sandbox.identity.namespace, sandbox.identity.name)
        line, stale = self.lines[sandbox.uid], ""
        named = self.by_key.get(str(key))
        if line.latest is not sandbox:
            stale = f"{line.latest} has followed it"
        elif line.asleep:
            stale = f"it was suspended before: {line.actor}"
        elif named is not None and named is not line and named.current is not None:
            stale = f"another actor has its name: {named.actor}"
        return Answer(sandbox, key, count, stale, line.losses)

    def before_suspend(self, key: Key) -> tuple[Line, int, int] | None:
        """What an actor must have in its snapshot when a suspend that is asked for now is said to be done."""
        line = self.by_key.get(str(key))
        return None if line is None else (line, line.acked, line.losses)

    def after_suspend(self, before: tuple[Line, int, int] | None) -> None:
        """A suspend was said to be done."""
        if before is None:
            return
        line, acked, losses = before
        if line.losses == losses and line.saved < acked and not line.deleted:
            raise self.broken(
                f"suspended, as was said, with {line.saved}, and {acked} was answered before: {line.actor}"
            )

    def answered(self, answer: Answer) -> None:
        """Somebody has the answer."""
        self.ends["answers"] += 1
        if answer.stale:
            raise self.broken(f"answered by {answer.sandbox}, but {answer.stale}")
        line = self.lines[answer.sandbox.uid]
        if line.losses == answer.losses:
            line.acked = max(line.acked, answer.count)
