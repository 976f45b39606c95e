"""What must hold whatever happens: random commands, sensible and not, to a few actors on two small workers.

The memory store does nothing but load the `View`, call `decide` and write the `Change`, in one step of Python, so this
is the pure core and a dictionary.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core import states
from greenroom.core.errors import GreenroomError
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    OnCrash,
    Operation,
    OperationState,
    Snapshot,
    SnapshotState,
    Template,
    Worker,
    WorkerState,
)
from greenroom.store.memory import MemoryStore
from greenroom.testing.contracts.store_world import ENDPOINT, FAILURE, World, audit, dump, made_by

NAMES = ("a", "b", "c")
OWNERS = ("one", "two")
BEGIN = (lc.BeginResume, lc.BeginSuspend, lc.BeginPause, lc.BeginDelete)
PRESENT, LOCAL, CONDEMNED = SnapshotState.PRESENT, SnapshotState.LOCAL, SnapshotState.CONDEMNED

names = st.sampled_from(NAMES)
owners = st.sampled_from(OWNERS)


def run(call: Coroutine[Any, Any, Any]) -> Any:
    """The memory store never waits."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class Records:
    """Everything at one moment."""

    def __init__(self, store: MemoryStore) -> None:
        self.all = run(dump(store))
        found: dict[type, dict[str, Any]] = {Actor: {}, Operation: {}, Snapshot: {}, Worker: {}}
        for record in self.all.values():
            found.get(type(record), {})[record.pk] = record
        self.actors: dict[str, Actor] = {a.uid: a for a in found[Actor].values()}
        self.operations: dict[str, Operation] = found[Operation]
        self.snapshots: dict[str, Snapshot] = found[Snapshot]
        self.workers: dict[str, Worker] = found[Worker]

    def kept(self, actor: Actor | None) -> list[Snapshot]:
        """What the actor could wake from beside the template's snapshot, the latest first."""
        ids = (actor.snapshot, actor.previous_snapshot) if actor else ()
        return [self.snapshots[i] for i in ids if i]

    def durable(self, actor: Actor | None) -> list[Snapshot]:
        return [s for s in self.kept(actor) if s.state is PRESENT]


class Core(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(clock=lambda: 0.0)
        self.world = World(self.store)
        self.generations: dict[str, int] = {}  # by uid, also of actors that are gone
        self.stale: list[Operation] = []  # as they were before they were taken over or ended

    @initialize(on_crash=st.sampled_from(OnCrash))
    def start(self, on_crash: OnCrash) -> None:
        run(self.world.setup({"w1": 1, "w2": 2}))
        template = run(self.store.get(Template, "ns/t"))
        run(self.store.put(replace(template, spec=replace(template.spec, on_crash=on_crash))))
        for name in NAMES:
            self.create(name)

    # what always holds

    def apply(self, command: Any) -> lc.Change | None:
        """None when it is refused."""
        before = Records(self.store)
        try:
            change: lc.Change | None = run(self.store.apply(command))
        except GreenroomError:
            change = None
        after = Records(self.store)
        run(audit(self.store))
        if change is None or change.outcome is not lc.Outcome.CHANGED:
            assert after.all == before.all, "what is refused, or was done before, changes nothing"
        self.check_operations(after)
        self.check_fence(before, after, command)
        for uid in before.actors.keys() | after.actors.keys():
            self.check_actor(before, after, uid, command)
        for old in before.snapshots.values():
            self.check_snapshot(before, after, old, command)
        for worker in after.workers.values():
            assert 0 <= worker.used <= worker.capacity
        return change

    def check_operations(self, after: Records) -> None:
        under_way = [o for o in after.operations.values() if o.state is OperationState.RUNNING]
        assert len({o.uid for o in under_way}) == len(under_way), "one operation at a time"
        for op in after.operations.values():
            assert (op.error is None) <= (op.state is not OperationState.FAILED)
            ended_with = {op.to_state} if op.state is not OperationState.RUNNING else {None}
            assert ended_with <= {None, *ActorState} - states.BUSY | {ActorState.DELETING}, op

    def check_fence(self, before: Records, after: Records, command: Any) -> None:
        if isinstance(command, lc.OperationCommand):
            now = [a for a in before.actors.values() if a.key == command.key]
            current = [(a.operation, a.generation) for a in now]
            if (command.operation_id, command.generation) not in current:
                assert after.all == before.all, "a stale owner changes nothing"

    def check_actor(self, before: Records, after: Records, uid: str, command: Any) -> None:
        old, new = before.actors.get(uid), after.actors.get(uid)
        if new is None:
            assert old and old.state is ActorState.DELETING and isinstance(command, lc.FinishDelete)
            return
        known = self.generations.get(uid, 0)
        assert new.generation >= known, "a generation only grows"
        self.generations[uid] = new.generation
        if old is None:
            assert new.state is ActorState.SUSPENDED and new.generation == 0
            return
        assert new.state is old.state or new.state in states.LEGAL[old.state], (old.state, new.state)
        assert new.version in (old.version, old.version + 1) and (new == old) == (new.version == old.version)
        assert not old.operation or new.operation in ("", old.operation), "an operation ends before the next"
        new_lease = new.operation != old.operation and new.operation
        assert not new_lease or new.generation > old.generation, "each operation fences those before it"
        durable = after.durable(new)
        assert new.durable_at == (max(s.created_at for s in durable) if durable else None), "as durable as it says"
        if isinstance(command, lc.FinishSuspend) and new != old:
            assert before.durable(old) == [] or new.previous_snapshot in [s.id for s in before.durable(old)]
            good = [s for s in before.kept(old) if s.state in (PRESENT, LOCAL)]
            assert not good or new.previous_snapshot in [s.id for s in good], "there is a way back if there was any"
        if new.state is ActorState.CRASHED:
            assert new.unsaved_since is not None, "what is lost is said"
            latest = after.kept(new)[0] if new.snapshot else None
            if latest is not None and latest.state in (PRESENT, LOCAL):
                assert new.unsaved_since >= latest.created_at

    def check_snapshot(self, before: Records, after: Records, old: Snapshot, command: Any) -> None:
        new = after.snapshots[old.id]
        if new.state is not CONDEMNED or old.state is CONDEMNED:
            return
        if isinstance(command, lc.FinishDelete):
            assert not new.golden
            return
        actor = after.actors.get(new.actor_uid)
        assert new not in after.kept(actor), "what is condemned is no way back"
        if old.state is PRESENT:
            assert after.durable(actor), "what is durable goes only for something else that is"

    # what happens

    def actor(self, name: str) -> Actor | None:
        try:
            found: Actor = run(self.store.get(Actor, f"ns/{name}"))
        except GreenroomError:
            return None
        return found

    def operation(self, name: str) -> Operation | None:
        actor = self.actor(name)
        return run(self.store.get(Operation, actor.operation)) if actor and actor.operation else None

    def local(self) -> list[Snapshot]:
        found: list[Snapshot] = run(self.store.list(Snapshot, where={"state": LOCAL}))
        return found

    @rule(name=names)
    def create(self, name: str) -> None:
        ids = {"operation_id": self.world.id("op-"), "uid": self.world.id("uid-")}
        self.apply(lc.CreateActor(key=Key("ns", name), now=self.world.now, template="t", **ids))

    @rule(name=names, cls=st.sampled_from(BEGIN), owner=owners, hold=st.booleans())
    def begin(self, name: str, cls: type[lc.Begin], owner: str, hold: bool) -> None:
        self.world.now += 1
        extra = {"hold_crashed": hold} if cls is lc.BeginResume else {}
        self.apply(self.world.begin_command(cls, Key("ns", name), owner=owner, **extra))

    @rule(name=names, local=st.booleans())
    def wake_and_suspend(self, name: str, local: bool) -> None:
        """A whole life, so that actors have snapshots to lose."""
        self.wake(name)
        self.begin(name, lc.BeginSuspend, "one", hold=False)
        self.finish(name, local)

    @rule(name=names)
    def wake(self, name: str) -> None:
        self.begin(name, lc.BeginResume, "one", hold=False)
        self.finish(name, local=False)

    @rule(name=names, local=st.booleans())
    def finish(self, name: str, local: bool) -> None:
        op = self.operation(name)
        if op is None:
            return
        self.world.now += 1
        command = self.world.finish_command(op)
        if isinstance(command, lc.FinishSuspend) and local:
            command = replace(command, snapshot=made_by(op, state=LOCAL))
        self.stale.append(op)
        change = self.apply(command)
        again = self.apply(command)
        assert change is None or (again is not None and again.outcome is lc.Outcome.REPEATED)

    @rule(name=names, to=st.none() | st.sampled_from(ActorState))
    def back_out(self, name: str, to: ActorState | None) -> None:
        op = self.operation(name)
        if op is None:
            return
        to = to or op.from_state or ActorState.DELETING
        self.stale.append(op)
        self.apply(self.world.step(lc.BackOut, op, to_state=to, error=FAILURE, endpoint=ENDPOINT))

    @rule(name=names)
    def rebind(self, name: str) -> None:
        if op := self.operation(name):
            self.apply(self.world.step(lc.Rebind, op, attempts=op.attempts, avoid=(op.worker,), why="failed"))

    @rule(name=names)
    def fall_back(self, name: str) -> None:
        if op := self.operation(name):
            self.apply(self.world.step(lc.FallBack, op, snapshot_id=op.snapshot, detail="bad"))

    @rule(name=names, owner=owners, seconds=st.sampled_from((0.0, 40.0)), force=st.booleans())
    def take_over(self, name: str, owner: str, seconds: float, force: bool) -> None:
        if op := self.operation(name):
            self.world.now += seconds
            self.stale.append(op)
            about = {"operation_id": op.id, "owner": owner, "force": force}
            self.apply(lc.TakeOver(key=op.key, now=self.world.now, **about))

    @rule(name=names, owner=owners, release=st.booleans())
    def lease(self, name: str, owner: str, release: bool) -> None:
        if op := self.operation(name):
            self.apply(self.world.step(lc.ReleaseLease if release else lc.RenewLease, op, owner=owner))

    @rule(name=names)
    def cancel(self, name: str) -> None:
        if op := self.operation(name):
            self.apply(lc.RequestCancel(key=op.key, now=self.world.now, operation_id=op.id))

    @rule(name=names)
    def wake_and_crash(self, name: str) -> None:
        self.wake(name)
        self.crash(name, behind=0)

    @rule(name=names, behind=st.sampled_from((0, 0, 0, 1)))
    def crash(self, name: str, behind: int) -> None:
        actor = self.actor(name)
        if actor is None:
            return
        about = {"uid": actor.uid, "worker": actor.worker, "generation": actor.generation - behind}
        about |= {"operation_id": self.world.id("op-"), "reason": "Gone", "message": "killed"}
        self.apply(lc.Crash(key=actor.key, now=self.world.now, **about))

    @precondition(lambda self: self.local())
    @rule(data=st.data(), lost=st.booleans())
    def after_a_local_suspend(self, data: st.DataObject, lost: bool) -> None:
        s = data.draw(st.sampled_from(self.local()))
        about = {"key": Key("ns", s.actor), "now": self.world.now, "snapshot_id": s.id}
        if lost:
            self.apply(lc.LoseSnapshot(**about, operation_id=self.world.id("op-"), message="lost"))
        else:
            self.apply(lc.FinishUpload(**about))

    @rule(name=st.sampled_from(("w1", "w2")), state=st.sampled_from(WorkerState), bad=st.booleans())
    def worker(self, name: str, state: WorkerState, bad: bool) -> None:
        until = self.world.now + 20 if bad else 0.0
        found = run(self.store.get(Worker, name))
        run(self.store.put(replace(found, state=state, quarantined_until=until)))

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def somebody_who_was_fenced(self, data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(self.stale))
        command = data.draw(
            st.sampled_from(
                (
                    self.world.finish_command(op),
                    self.world.step(lc.BackOut, op, to_state=op.from_state or ActorState.CRASHED, error=FAILURE),
                    self.world.step(lc.Rebind, op),
                    self.world.step(lc.FallBack, op, snapshot_id=op.snapshot, detail="bad"),
                    self.world.step(lc.Advance, op, phase="later"),
                    self.world.step(lc.RenewLease, op, owner="one"),
                    self.world.step(lc.ReleaseLease, op, owner="one"),
                )
            )
        )
        self.apply(command)


Core.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestCore = Core.TestCase
