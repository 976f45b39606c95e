"""A store in a test's words: `World` drives actors by whole operations, `audit` checks what must always hold, `dump` is
all that a store holds. For the contract suite, and for every other test that looks into a store."""

from __future__ import annotations

from collections import Counter
from typing import Any

from greenroom.core import states
from greenroom.core.commands import (
    ActorCommand,
    BackOut,
    Begin,
    BeginDelete,
    BeginPause,
    BeginResume,
    BeginSuspend,
    Change,
    Crash,
    CreateActor,
    FinishDelete,
    FinishPause,
    FinishResume,
    FinishSuspend,
    FinishUpload,
    LoseSnapshot,
    Outcome,
)
from greenroom.core.records import (
    Actor,
    ActorState,
    Endpoint,
    Failure,
    Key,
    Lease,
    Operation,
    OperationKind,
    OperationState,
    PhaseTime,
    Snapshot,
    SnapshotScope,
    SnapshotState,
    Template,
    TemplateSpec,
    TemplateState,
    Worker,
)
from greenroom.store.port import FILTERS, R, Store

ENDPOINT = Endpoint(netns="/run/netns/one", device="veth1", host="10.0.0.2", port=8080)
FAILURE = Failure(code="UNAVAILABLE", reason="WORKER_LOST", message="the worker is gone")


async def list_all(store: Store, cls: type[R], **filters: Any) -> list[R]:
    """All pages of a list."""
    found: list[R] = []
    while page := await store.list(cls, after=found[-1].pk if found else "", **filters):
        found += page
    return found


async def dump(store: Store) -> dict[str, Any]:
    """Every record of the store, by class and key."""
    return {f"{cls.__name__} {r.pk}": r for cls in FILTERS for r in await list_all(store, cls)}  # type: ignore[type-var]


async def audit(store: Store) -> None:
    """Checks what holds after every write, whatever happened before.

    Raises:
        AssertionError: says what does not hold.
    """
    actors = await list_all(store, Actor)
    workers = {w.name: w for w in await list_all(store, Worker)}
    operations = {o.id: o for o in await list_all(store, Operation)}
    leases = {lease.uid: lease for lease in await list_all(store, Lease)}
    snapshots = {s.id: s for s in await list_all(store, Snapshot)}

    bound = Counter(a.worker for a in actors if a.worker)
    for worker in workers.values():
        assert worker.used == bound[worker.name], f"{worker.used} slots of {worker} are taken, by {bound[worker.name]}"
    for actor in actors:
        assert (actor.state in states.BOUND) <= (actor.worker in workers), f"bound to no worker: {actor}"
        assert actor.state in states.BOUND | {ActorState.DELETING} or not actor.worker, f"keeps a slot: {actor}"
        assert actor.state is not ActorState.RUNNING or actor.endpoint, f"running, but where? {actor}"
        assert actor.unsaved_since is None or actor.state in (ActorState.CRASHED, ActorState.RESUMING, *_DELETED), actor
        assert not actor.operation or actor.state in states.BUSY, f"idle with an operation: {actor}"
        assert actor.operation or actor.state not in states.BUSY - _DELETED, f"nobody will go on with {actor}"
        for name in filter(None, (actor.snapshot, actor.previous_snapshot)):
            assert name in snapshots, f"snapshot {name} is gone: {actor}"
            assert snapshots[name].state is not SnapshotState.CONDEMNED, f"wants a condemned snapshot: {actor}"
        if actor.operation:
            op, lease = operations.get(actor.operation), leases.get(actor.uid)
            assert op and op.state is OperationState.RUNNING, f"its operation is not under way: {actor}"
            assert (op.uid, op.generation) == (actor.uid, actor.generation), f"another's operation: {actor} {op}"
            assert lease and lease.operation == op.id, f"no lease for {op}"
            assert lease.generation == actor.generation, f"a stale lease {lease} for {actor}"
    under_way = {a.operation for a in actors if a.operation}
    for op in operations.values():
        if op.state is OperationState.RUNNING and op.kind is not OperationKind.PREPARE:
            assert op.id in under_way, f"no actor points at {op}"
        assert (op.state is OperationState.RUNNING) == (op.finished_at is None), op
    for lease in leases.values():
        assert lease.operation in under_way, f"a lease without its operation: {lease}"


_DELETED = frozenset({ActorState.DELETING})


class World:
    """A template ``t`` with a golden snapshot, workers, and actors driven by whole operations. ``now`` is the clock
    that commands are given."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = 1000.0
        self._ids = 0

    def id(self, prefix: str) -> str:
        self._ids += 1
        return f"{prefix}{self._ids:05}"

    async def setup(self, slots: dict[str, int] | None = None) -> World:
        for name, capacity in (slots or {"w1": 2, "w2": 2}).items():
            await self.store.put(worker(name, capacity=capacity))
        await self.store.put(snapshot("golden", golden=True))
        await self.store.put(template())
        return self

    async def apply(self, command: ActorCommand) -> Change:
        change = await self.store.apply(command)
        await audit(self.store)
        return change

    async def actor(self, key: Key) -> Actor:
        return await self.store.get(Actor, str(key))

    async def create(self, name: str = "a", *, namespace: str = "ns", **fields: Any) -> Key:
        key = Key(namespace, name)
        fields = {"uid": self.id("uid-"), "template": "t", "operation_id": self.id("op-")} | fields
        await self.apply(CreateActor(key=key, now=self.now, **fields))
        return key

    def begin_command(self, cls: type[Begin], key: Key, **fields: Any) -> Any:
        fields = {"operation_id": self.id("op-"), "owner": "one"} | fields
        if cls is BeginSuspend:
            fields.setdefault("snapshot_id", self.id("snap-"))
        return cls(key=key, now=self.now, **fields)

    async def begin(self, cls: type[Begin], key: Key, **fields: Any) -> Operation:
        change = await self.apply(self.begin_command(cls, key, **fields))
        assert change.outcome is Outcome.CHANGED and change.operation is not None
        return change.operation

    def finish_command(self, op: Operation, **fields: Any) -> Any:
        step: dict[str, Any] = {"key": op.key, "now": self.now, "operation_id": op.id, "generation": op.generation}
        step["phases"] = (PhaseTime(name="all", seconds=0.5),)
        match op.kind:
            case OperationKind.RESUME:
                return FinishResume(**step, endpoint=ENDPOINT, **fields)
            case OperationKind.SUSPEND:
                return FinishSuspend(**step, **{"snapshot": made_by(op)} | fields)
            case OperationKind.PAUSE:
                return FinishPause(**step, **fields)
            case _:
                return FinishDelete(**step, **fields)

    async def finish(self, op: Operation) -> Change:
        return await self.apply(self.finish_command(op))

    async def back_out(self, op: Operation, to_state: ActorState) -> Change:
        return await self.apply(self.step(BackOut, op, to_state=to_state, error=FAILURE))

    def step(self, cls: Any, op: Operation, **fields: Any) -> Any:
        fields = {"key": op.key, "now": self.now, "operation_id": op.id, "generation": op.generation} | fields
        return cls(**fields)

    async def do(self, cls: type[Begin], key: Key, **fields: Any) -> Operation:
        """A whole operation."""
        self.now += 1
        op = await self.begin(cls, key, **fields)
        self.now += 1
        change = await self.finish(op)
        assert change.operation is not None
        return change.operation

    async def suspend_locally(self, key: Key) -> Snapshot:
        """A whole suspend whose snapshot is on the disk of the actor's worker only."""
        self.now += 1
        op = await self.begin(BeginSuspend, key)
        self.now += 1
        made = made_by(op, state=SnapshotState.LOCAL)
        await self.apply(self.finish_command(op, snapshot=made))
        return await self.store.get(Snapshot, made.id)

    async def upload(self, made: Snapshot) -> Change:
        key = Key(made.namespace, made.actor)
        return await self.apply(FinishUpload(key=key, now=self.now, snapshot_id=made.id))

    async def lose(self, made: Snapshot) -> Change:
        about: dict[str, Any] = {"key": Key(made.namespace, made.actor), "now": self.now, "message": "lost"}
        return await self.apply(LoseSnapshot(**about, operation_id=self.id("op-"), snapshot_id=made.id))

    async def crash(self, key: Key) -> Change:
        actor = await self.actor(key)
        return await self.apply(
            Crash(
                operation_id=self.id("op-"),
                key=key,
                now=self.now,
                uid=actor.uid,
                worker=actor.worker,
                generation=actor.generation,
                reason="SandboxGone",
                message="killed",
            )
        )

    async def in_state(self, state: ActorState, name: str = "a") -> tuple[Key, Operation | None]:
        """An actor in that state, and the operation that is under way with it."""
        S = ActorState
        key = await self.create(name)
        if state is S.SUSPENDED:
            return key, None
        if state is S.RESUMING:
            return key, await self.begin(BeginResume, key)
        await self.do(BeginResume, key)
        if state is S.CRASHED:
            await self.crash(key)
        elif state is S.PAUSED:
            await self.do(BeginPause, key)
        busy: dict[ActorState, type[Begin]] = {
            S.SUSPENDING: BeginSuspend,
            S.PAUSING: BeginPause,
            S.DELETING: BeginDelete,
        }
        return key, await self.begin(busy[state], key) if state in busy else None


def worker(name: str, /, **fields: Any) -> Worker:
    made: dict[str, Any] = {"pool": "default", "backend": "sim", "fingerprint": "f1", "capacity": 2}
    return Worker(name=name, **made | fields)


def template(name: str = "t", **fields: Any) -> Template:
    made: dict[str, Any] = {"namespace": "ns", "uid": f"uid-{name}", "spec": TemplateSpec(image="oci:/images/t")}
    made |= {"state": TemplateState.READY, "created_at": 1.0, "state_since": 1.0, "golden_snapshot": "golden"}
    return Template(name=name, **made | fields)


def snapshot(name: str, /, **fields: Any) -> Snapshot:
    made: dict[str, Any] = {"namespace": "ns", "actor": "x", "actor_uid": "uid-x", "template": "t", "generation": 1}
    made |= {"scope": SnapshotScope.MEMORY, "backend": "sim", "fingerprint": "f1", "image_digest": "sha256:0"}
    made |= {"hostname": "x", "created_at": 1.0}
    return Snapshot(id=name, **made | fields)


def made_by(op: Operation, **fields: Any) -> Snapshot:
    """The snapshot that a suspend makes, of the moment at which it began."""
    made: dict[str, Any] = {"actor": op.name, "actor_uid": op.uid, "generation": op.generation, "worker": op.worker}
    return snapshot(op.snapshot, **made | {"namespace": op.namespace, "created_at": op.created_at} | fields)


def operation(name: str, /, **fields: Any) -> Operation:
    made: dict[str, Any] = {"kind": OperationKind.PREPARE, "namespace": "ns", "name": "t", "uid": "uid-t"}
    made |= {"created_at": 1.0, "updated_at": 1.0, "deadline_at": 2.0}
    return Operation(id=name, **made | fields)
