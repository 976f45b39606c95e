"""Of the contract of stores: snapshots that an actor has, and what becomes of them."""

import pytest
from msgspec.structs import replace

from greenroom.core.commands import (
    Advance,
    BeginDelete,
    BeginResume,
    BeginSuspend,
    FallBack,
    Outcome,
)
from greenroom.core.errors import (
    FailedPrecondition,
)
from greenroom.core.records import (
    ActorState,
    Operation,
    Snapshot,
    SnapshotState,
    TemplateState,
)
from greenroom.store.port import Store
from greenroom.testing.contracts.store_world import (
    World,
    template,
    worker,
)


class Snapshots:
    """What an actor can wake from."""

    # corrupt snapshots

    async def test_fall_back_to_the_snapshot_before(self, world: World) -> None:
        key = await world.create()
        kept = []
        for _ in range(2):
            await world.do(BeginResume, key)
            kept.append((await world.do(BeginSuspend, key)).snapshot)
        good, bad = kept
        op = await world.begin(BeginResume, key)
        fall = world.step(FallBack, op, snapshot_id=bad, detail="memory.img: wrong digest")
        change = await world.apply(fall)
        assert change.source and change.source.id == good and change.operation and change.operation.snapshot == good
        assert (await world.store.get(Snapshot, bad)).state is SnapshotState.CORRUPT
        again = await world.apply(fall)
        assert again.outcome is Outcome.REPEATED and again.source and again.source.id == good
        await world.finish(change.operation)
        actor = await world.actor(key)
        assert actor.reason == "SnapshotCorrupt" and "wrong digest" in actor.message
        new = (await world.do(BeginSuspend, key)).snapshot
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (new, good), "the corrupt one is no way back"
        found = {s.id: s.state for s in await world.store.list(Snapshot, where={"actor_uid": actor.uid})}
        assert found == {
            good: SnapshotState.PRESENT,
            bad: SnapshotState.CORRUPT,
            new: SnapshotState.PRESENT,
        }
        await world.do(BeginDelete, key)
        found = {s.id: s.state for s in await world.store.list(Snapshot, where={"actor_uid": actor.uid})}
        assert set(found.values()) == {SnapshotState.CONDEMNED}

    async def test_fall_back_to_the_golden_snapshot_and_no_further(self, world: World) -> None:
        key, _ = await world.in_state(ActorState.RUNNING)
        bad = (await world.do(BeginSuspend, key)).snapshot
        op = await world.begin(BeginResume, key)
        change = await world.apply(world.step(FallBack, op, snapshot_id=bad, detail="short"))
        assert change.source and change.source.id == "golden" and change.operation
        assert (await world.actor(key)).snapshot == "" and "golden" in (await world.actor(key)).message
        with pytest.raises(FailedPrecondition) as end:
            await world.apply(world.step(FallBack, op, snapshot_id="golden", detail="short too"))
        assert end.value.reason == "SNAPSHOT_CORRUPT"
        await world.back_out(change.operation, ActorState.SUSPENDED)

    async def test_fall_back_moves_to_a_worker_that_can_run_the_older_snapshot(self, store: Store) -> None:
        world = await World(store).setup({"old": 1})
        key = await world.create()
        for _ in range(2):
            await world.do(BeginResume, key)
            await world.do(BeginSuspend, key)
        latest = await store.get(Snapshot, (await world.actor(key)).snapshot)
        await store.put(replace(latest, fingerprint="f2"))
        await store.put(worker("new", fingerprint="f2"))
        op = await world.begin(BeginResume, key)
        assert op.worker == "new"
        change = await world.apply(world.step(FallBack, op, snapshot_id=latest.id, detail="short"))
        assert change.operation and change.operation.worker == "old"
        await world.finish(change.operation)

    async def test_a_condemned_snapshot_is_not_resumed_from(self, world: World) -> None:
        key = await world.create()
        golden = await world.store.get(Snapshot, "golden")
        await world.store.put(replace(golden, state=SnapshotState.CONDEMNED))
        with pytest.raises(FailedPrecondition) as refused:
            await world.begin(BeginResume, key)
        assert refused.value.reason == "SNAPSHOT_CONDEMNED"

    async def test_the_golden_actor_boots_and_leaves_its_snapshot(self, store: Store) -> None:
        world = World(store)
        await store.put(worker("w1"))
        await store.put(template(state=TemplateState.PREPARING, golden_snapshot=""))
        key = await world.create("_golden", golden=True)
        boot = await world.do(BeginResume, key)
        assert boot.snapshot == ""
        made = await world.do(BeginSuspend, key)
        await world.do(BeginDelete, key)
        left = await store.get(Snapshot, made.snapshot)
        assert left.golden and left.state is SnapshotState.PRESENT

    async def test_advance_records_the_phase(self, world: World) -> None:
        op = await world.begin(BeginResume, await world.create())
        world.now += 5
        await world.apply(world.step(Advance, op, phase="restore"))
        stored = await world.store.get(Operation, op.id)
        assert (stored.phase, stored.updated_at, stored.version) == ("restore", world.now, 2)
