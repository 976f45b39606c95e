"""Random commands, sensible and not, to the memory store and another one side by side: the same answers, the same
records, and nothing that `audit` finds after any of them. The seed is in the test's name."""

from __future__ import annotations

import contextlib
import random
import typing
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core import commands as lc
from greenroom.core.errors import GreenroomError, Unavailable
from greenroom.core.records import (
    Actor,
    ActorState,
    Key,
    OnCrash,
    Operation,
    OperationKind,
    Snapshot,
    SnapshotState,
    Template,
    Worker,
    WorkerState,
)
from greenroom.store.memory import MemoryStore
from greenroom.store.port import Event, Store
from greenroom.store.postgres import PostgresStore
from greenroom.store.sqlite import SqliteStore
from greenroom.testing.contracts.store import World, audit, dump
from greenroom.testing.contracts.store_world import (
    ENDPOINT,
    FAILURE,
    made_by,
    operation,
    snapshot,
    template,
    worker,
)

STEPS = 1200
WORKERS = ("w1", "w2", "w3")
NAMES = ("a", "b", "c", "d", "e")
BEGIN = (lc.BeginResume, lc.BeginSuspend, lc.BeginPause, lc.BeginDelete)
FITS: dict[ActorState, tuple[type[lc.Begin], ...]] = {
    ActorState.SUSPENDED: (lc.BeginResume,),
    ActorState.RUNNING: (lc.BeginSuspend, lc.BeginSuspend, lc.BeginPause),
    ActorState.PAUSED: (lc.BeginResume, lc.BeginSuspend),
    ActorState.CRASHED: (lc.BeginResume,),
    ActorState.DELETING: (lc.BeginDelete,),
}


class Walk:
    """Makes the next call from what the records are now; most fit, some are stale, repeated or of the wrong kind."""

    def __init__(self, seed: int, store: MemoryStore) -> None:
        self.random = random.Random(seed)
        self.world = World(store)
        self.store = store
        self.before: list[Any] = []  # commands to repeat

    async def next(self) -> tuple[str, Any]:
        r = self.random
        self.world.now += r.choice((0.0, 0.1, 1.0, 1.0, 5.0, 40.0))
        if r.random() < 0.08 and self.before:
            return "apply", r.choice(self.before[-30:])
        if r.random() < 0.12:
            return await self.single()
        command = await self.command()
        self.before.append(command)
        return "apply", command

    async def single(self) -> tuple[str, Any]:
        r = self.random
        workers = await self.store.list(Worker) or [worker("w1")]
        ill = [w for w in workers if w.state is not WorkerState.ACTIVE or w.quarantined_until > self.world.now]
        match r.randrange(10):
            case 0:
                return "put", replace(r.choice(workers), state=r.choice(list(WorkerState)), used=r.randrange(9))
            case 1:
                return "put", worker(r.choice(WORKERS), fingerprint=r.choice(("f1", "f1", "f2")), labels=self.labels())
            case 5:  # distrusted, trusted, labelled anew
                until = self.world.now + r.choice((-1.0, 20.0))
                w = r.choice(workers)
                return "put", replace(w, failures=r.randrange(4), quarantined_until=until, labels=self.labels())
            case 6:
                t = r.choice(await self.store.list(Template) or [template()])
                return "put", replace(t, spec=replace(t.spec, on_crash=r.choice(list(OnCrash))))
            case 7 | 8 | 9:  # or the walk would soon stand still
                w = r.choice(ill or workers)
                return "put", replace(w, state=WorkerState.ACTIVE, fingerprint="f1", failures=0, quarantined_until=0.0)
            case 2:
                condemned = await self.store.list(Snapshot, where={"state": SnapshotState.CONDEMNED})
                return "remove", r.choice(condemned or [snapshot("none")])
            case 3:
                return "put", operation(self.world.id("prepare-"))
            case _:
                self.before.clear()  # what is dropped is forgotten: its commands would be new ones
                return "trim", r.choice((0, 20, 60))

    def labels(self) -> dict[str, str]:
        return self.random.choice(({"zone": "a"}, {"zone": "a"}, {"zone": "a"}, {}))

    async def uploads(self) -> Any:
        """What becomes of a snapshot that is on its worker only; now and then it is not, or not any more."""
        r = self.random
        local = await self.store.list(Snapshot, where={"state": SnapshotState.LOCAL})
        found = local if local and r.random() < 0.9 else await self.store.list(Snapshot)
        s = r.choice(found)
        about = {"key": Key(s.namespace, s.actor), "now": self.world.now, "snapshot_id": s.id}
        if r.random() < 0.6:
            return lc.FinishUpload(**about)
        return lc.LoseSnapshot(**about, operation_id=self.world.id("op-"), message="lost")

    async def keeping(self) -> Any:
        """What people and templates keep, or no longer."""
        r = self.random
        good = await self.store.list(Snapshot, where={"state": SnapshotState.PRESENT})
        s = r.choice(good if r.random() < 0.9 else await self.store.list(Snapshot))
        about = {"key": Key(s.namespace, s.actor), "now": self.world.now}
        if r.random() < 0.5:
            return lc.Expire(**about, uid=s.actor_uid if r.random() < 0.9 else "another")
        return lc.TagSnapshot(**about, snapshot_id=s.id, tag=r.choice(("x", "y")), undo=r.random() < 0.6)

    async def command(self) -> Any:
        r = self.random
        if r.random() < 0.08:
            return await self.uploads()
        if r.random() < 0.08:
            return await self.keeping()
        key = Key("ns", r.choice(NAMES))
        actors = {a.name: a for a in await self.store.list(Actor)}
        actor = actors.get(key.name)
        now = self.world.now
        if actor is None:
            if r.random() < 0.15:
                return self.world.begin_command(r.choice(BEGIN), key)
            ids = {"operation_id": self.world.id("op-"), "uid": self.world.id("uid-")}
            request = r.choice(("", "", f"create-{r.randrange(5)}"))
            return lc.CreateActor(
                key=key,
                now=now,
                template=r.choice(("t", "t", "t", "x")),
                request_id=request,
                request_digest=r.choice(("", "", "d")),
                golden=r.random() < 0.1,
                worker_selector=r.choice(({}, {}, {"zone": "a"})),
                **ids,
            )
        if actor.operation and r.random() < 0.8:
            return await self.step(actor, await self.store.get(Operation, actor.operation))
        if actor.worker and r.random() < 0.1:
            where = {"uid": actor.uid, "worker": r.choice((actor.worker, actor.worker, "w1"))}
            return lc.Reunite(key=key, now=now, generation=actor.generation - (r.random() < 0.2), **where)
        if r.random() < (0.2 if actor.worker else 0.05):
            generation, name = actor.generation - (r.random() < 0.2), r.choice((actor.worker, actor.worker, "w1"))
            uid = actor.uid if r.random() < 0.9 else "another"
            about = {"operation_id": self.world.id("op-"), "generation": generation, "reason": "Gone", "message": "m"}
            return lc.Crash(key=key, now=now, uid=uid, worker=name, **about)
        request = r.choice(("", "", "", f"r-{r.randrange(20)}"))
        extra = {}
        cls = r.choice(FITS.get(actor.state, BEGIN) if r.random() < 0.8 else BEGIN)
        if cls is lc.BeginResume:
            extra = {"prefer": tuple(r.sample(WORKERS, r.randrange(3))), "hold_crashed": r.random() < 0.5}
            extra["reachable"] = r.choice((None, None, None, tuple(r.sample(WORKERS, 2))))
            if r.random() < 0.2:
                extra["snapshot_id"] = r.choice(await self.store.list(Snapshot)).id
        return self.world.begin_command(cls, key, request_id=request, owner=r.choice(("one", "two")), **extra)

    async def step(self, actor: Actor, op: Operation) -> Any:
        r, world = self.random, self.world
        if r.random() < 0.1:
            op = replace(op, generation=op.generation - 1)  # stale
        if r.random() < 0.05:
            op = replace(op, kind=r.choice([k for k in OperationKind if k is not OperationKind.SUSPEND]))
        match r.randrange(20):
            case 11:
                return world.step(lc.ReleaseLease, op, owner=r.choice(("one", "two")))
            case 12:
                return lc.RequestCancel(key=op.key, now=world.now, operation_id=op.id)
            case 13 | 14 | 15 if op.kind is OperationKind.SUSPEND:
                return world.finish_command(op, snapshot=made_by(op, state=SnapshotState.LOCAL))
            case 0 | 1 | 2 | 3 | 19 if op.kind is OperationKind.SUSPEND:
                return world.finish_command(op, keeps=True)
            case 4:
                origin = ActorState.DELETING if op.kind is OperationKind.DELETE else op.from_state
                to = r.choice((*[origin or ActorState.SUSPENDED] * 8, *ActorState))
                endpoint = r.choice((None, ENDPOINT))
                return world.step(lc.BackOut, op, to_state=to, error=FAILURE, endpoint=endpoint)
            case 5:
                return world.step(lc.Rebind, op, attempts=op.attempts, avoid=(actor.worker,), why="failed")
            case 6 | 17 if op.kind is OperationKind.RESUME:
                return world.step(lc.FallBack, op, snapshot_id=actor.snapshot or "golden", detail="bad")
            case 7 | 8 | 16:
                return world.step(lc.RenewLease, op, owner=r.choice(("one", "one", "two")))
            case 10:
                args = {"operation_id": op.id, "owner": r.choice(("one", "two")), "force": r.random() < 0.3}
                return lc.TakeOver(key=op.key, now=world.now, **args)
            case 9:
                return world.step(lc.Advance, op, phase=f"phase {r.randrange(9)}")
            case _:
                return world.finish_command(op)


async def call(store: Store, what: str, argument: Any) -> Any:
    """The answer, or the whole error."""
    try:
        return await getattr(store, what)(argument)
    except GreenroomError as error:
        return type(error).__name__, error.reason, error.message, error.metadata


async def told(watch: AsyncIterator[Event]) -> list[Any]:
    """The events up to the end of the store. Those of workers are left out: a store need not tell that a slot was taken
    or freed."""
    seen: list[Any] = []
    with contextlib.suppress(Unavailable):
        async for event in watch:
            if not isinstance(event.record, Worker):
                seen.append((event.type, event.record))
    return seen


@pytest.fixture(params=["sqlite", "postgres"])
async def other(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store: Store
    if request.param == "sqlite":
        store = await SqliteStore.open(tmp_path)
    else:
        store = await PostgresStore.open(request.getfixturevalue("database"))
    yield store
    await store.close()


@pytest.mark.parametrize("seed", range(6))
async def test_both_stores_answer_and_hold_the_same(seed: int, other: Store) -> None:
    memory = MemoryStore()
    watch_memory, watch_other = memory.watch(), other.watch()
    met: Counter[str] = Counter()
    try:
        for store in (memory, other):
            await World(store).setup({"w1": 2, "w2": 1})
        walk = Walk(seed, memory)
        for number in range(STEPS):
            what, argument = await walk.next()
            expected, answer = await call(memory, what, argument), await call(other, what, argument)
            assert answer == expected, f"{what} {argument}"
            await audit(memory)
            if number % 10 == 0:  # reading everything takes longer than everything else
                assert await dump(other) == await dump(memory), f"{what} {argument}"
            if not isinstance(expected, lc.Change):
                met[type(expected).__name__] += 1
                continue
            met[expected.outcome] += 1
            met[type(argument).__name__] += expected.outcome is lc.Outcome.CHANGED
        assert await dump(other) == await dump(memory)
        await other.close()
        await memory.close()
        assert await told(watch_other) == await told(watch_memory)
        # The walk is worth something: it went through states, was refused and repeated things.
        assert met["changed"] > STEPS / 5 and met["tuple"] > STEPS / 20 and met["repeated"] > 0, met
        assert {c.__name__ for c in typing.get_args(lc.ActorCommand)} <= set(+met), met
    finally:
        await memory.close()
