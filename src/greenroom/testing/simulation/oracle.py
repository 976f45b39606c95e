"""What must hold, whatever goes wrong: looked at in the instant of every write to the store, every change of a sandbox
and every answer that somebody gets.

The oracle sees everything at once, which nobody in the real world does. It does not trust the records: what an actor
must have in memory it follows by itself, from the requests that were carried out.

1. One incarnation. A request is never answered by a sandbox that another one has followed, and never are there two
   running sandboxes of one actor that replicas would route to.
2. Nothing is lost silently. An actor wakes with exactly what it had when it was suspended; what else takes it back is a
   recorded crash, or a recorded loss of its snapshot, and these need a cause.
3. Who lost an operation changes nothing on a worker.
4. A worker counts as lost only when nobody has heard it for long, and by then its agent knows that it is alone, nobody
   routes there, and nothing goes on there that does not know better.
5. What `bookkeeping` looks at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from greenroom.core.agentapi import ActorCall
from greenroom.core.records import Actor, ActorState, Key, Operation, OperationState, Snapshot, SnapshotState
from greenroom.engine.bindings import BindingTable
from greenroom.store.port import EventType, Stored
from greenroom.testing.simulation.bookkeeping import Bookkeeping, Violation
from greenroom.testing.simulation.database import Effects, Write
from greenroom.testing.simulation.machine import Machine, Sandbox


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


NEVER = -1


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that was carried out: ``count`` is what it counted to, ``stale`` what is wrong with the sandbox that
    did it ("" for nothing), ``losses`` those of the line until then (`NEVER`: it does not matter what it counted
    to)."""

    sandbox: Sandbox
    key: Key
    count: int
    stale: str
    losses: int


@dataclass(slots=True)
class Oracle:
    """Attributes:
    return_s: `EngineConfig.worker_return_s`, where there are several replicas.
    lines: of all actors that there ever were, by uid; ``by_key`` of those that are there.
    seen: the call of the highest generation that has reached a machine, by machine and actor.
    suspects: actors with more than one running sandbox.
    """

    books: Bookkeeping
    world: World
    return_s: float | None
    lines: dict[str, Line] = field(default_factory=dict)
    by_key: dict[str, Line] = field(default_factory=dict)
    seen: dict[tuple[str, str], ActorCall] = field(default_factory=dict)
    suspects: dict[str, Key] = field(default_factory=dict)

    def broken(self, what: str) -> Violation:
        """See `Verdicts.broken`."""
        return self.books.verdicts.broken(what)

    # --- actors -------------------------------------------------------------------------------------------

    def wrote(self, who: str, write: Write | None, effects: Effects) -> None:
        """After every write, in the same instant."""
        before = {record.pk: self.books.records.get((Snapshot, record.pk)) for _, record in effects}
        for old, new in self.books.wrote(who, write, effects):
            self._changed(old, new)
        for kind, record in effects:
            if isinstance(record, Snapshot) and kind is EventType.PUT:
                self._snapshot(before[record.pk], record)
        if self.suspects:
            self.look_for_two()

    def _changed(self, old: Actor | None, actor: Actor | None) -> None:
        if actor is None:
            assert old is not None
            line = self.lines[old.uid]
            line.deleted, line.current = True, None
            self.by_key.pop(old.pk, None)
        elif old is None or old.uid != actor.uid:
            if actor.uid in self.lines or actor.state is not ActorState.SUSPENDED:
                raise self.broken(f"not how an actor begins: {actor}")
            self.lines[actor.uid] = self.by_key[actor.pk] = Line(actor)
        else:
            line = self.lines[actor.uid]
            line.actor = actor
            if actor.state is not old.state:
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
        made = self.books.records.get((Snapshot, actor.snapshot))
        if count is None and isinstance(made, Snapshot) and made.state is SnapshotState.LOCAL:
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
        if actor.reason in ("SandboxLost", "Exited") and sandbox is not None and not sandbox.gone:
            raise self.broken(f"its sandbox counts as gone, and is there: {sandbox}, {actor}")
        line.current, line.asleep = None, False
        self._set_back(line, old, actor)

    def _lost(self, actor: Actor) -> None:
        """What must be so when an actor is lost with its worker, and runs there still. In a world of one replica it is
        that replica's own business."""
        if self.return_s is None:
            return
        unheard_s = self.books.now() - self.books.heard_at.get(actor.worker, 0.0)
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
            if not (begun_anew or not_begun or self._is_bad(old.snapshot) or self._is_left(old, actor)):
                raise self.broken(f"another snapshot for no reason: {old} -> {actor}")
            self.books.ends[f"set back: {actor.reason or 'boot'}"] += 1
            line.saved = (self.world.stored_count(actor.snapshot) or 0) if actor.snapshot else 0
        line.losses += 1
        line.acked = line.saved

    def _is_left(self, old: Actor, actor: Actor) -> bool:
        """Whether it is what a suspend had saved, of an actor that may have run on and says that it lost that."""
        made = self.books.records.get((Snapshot, actor.snapshot))
        suspended = old.state is ActorState.SUSPENDING and actor.state is ActorState.CRASHED
        return suspended and isinstance(made, Snapshot) and made.created_at == actor.unsaved_since

    def _is_bad(self, snapshot_id: str) -> bool:
        record = self.books.records.get((Snapshot, snapshot_id))
        return isinstance(record, Snapshot) and record.state is SnapshotState.CORRUPT

    def _snapshot(self, before: Stored | None, record: Snapshot) -> None:
        if record.state is SnapshotState.CORRUPT and isinstance(before, Snapshot) and not self._is_bad_now(before):
            raise self.broken(f"a good snapshot counts as corrupt: {before} -> {record}")

    def _is_bad_now(self, snapshot: Snapshot) -> bool:
        """Whether it may be given up: nobody can read it, or only a worker that has been away for long."""
        damaged = self.world.stored_count(snapshot.id) is None or self.world.is_damaged(snapshot.id)
        return damaged or snapshot.state in (SnapshotState.LOCAL, SnapshotState.CORRUPT)

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

    def sweeps(self, sandbox: Sandbox) -> None:
        """It is destroyed because nobody has a record of it."""
        actor = self.lines[sandbox.uid].actor
        deleted = self.lines[sandbox.uid].deleted
        if not deleted and (actor.worker, actor.sandbox) == (sandbox.machine.name, sandbox.identity.handle):
            raise self.broken(f"it is swept, and is its actor's: {sandbox}, {actor}")

    def drops(self, machine: str, snapshot_id: str) -> None:
        """What a worker holds is removed because nobody has a record of it."""
        record = self.books.records.get((Snapshot, snapshot_id))
        wanted = isinstance(record, Snapshot) and record.state not in (SnapshotState.CONDEMNED, SnapshotState.CORRUPT)
        makers = [
            o
            for o in self.books.records.values()
            if isinstance(o, Operation) and o.snapshot == snapshot_id and o.state is OperationState.RUNNING
        ]
        if wanted or makers:
            raise self.broken(f"{machine} drops what somebody needs: {record}, {makers}")

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
        # What it still answers when it counts as lost is lost too, as if it had been lost just afterwards.
        return Answer(sandbox, key, count, stale, line.losses if line.current is sandbox else NEVER)

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
        self.books.ends["answers"] += 1
        if answer.stale:
            raise self.broken(f"answered by {answer.sandbox}, but {answer.stale}")
        line = self.lines[answer.sandbox.uid]
        if line.losses == answer.losses:
            line.acked = max(line.acked, answer.count)
