"""Of the contract of stores: snapshots that an actor has, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from greenroom.core.commands import (
    Advance,
    BeginDelete,
    BeginResume,
    BeginSuspend,
    Expire,
    FallBack,
    Outcome,
    TagSnapshot,
)
from greenroom.core.errors import FailedPrecondition, NotFound, ResourceExhausted
from greenroom.core.records import (
    ActorState,
    OnCrash,
    Operation,
    OperationKind,
    OperationState,
    Retention,
    Snapshot,
    SnapshotState,
    Template,
    TemplateState,
)
from greenroom.store.port import Store
from greenroom.testing.contracts.store_world import World, template, worker

PRESENT, LOCAL = SnapshotState.PRESENT, SnapshotState.LOCAL
CORRUPT, CONDEMNED = SnapshotState.CORRUPT, SnapshotState.CONDEMNED


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

    # snapshots that are on one worker only

    async def test_a_local_snapshot_wakes_on_its_worker_only_until_it_is_uploaded(self, world: World) -> None:
        key = await world.create()
        await world.do(BeginResume, key, prefer=("w1",))
        made = await world.suspend_locally(key)
        actor = await world.actor(key)
        assert (made.state, made.worker, actor.snapshot, actor.durable_at) == (LOCAL, "w1", made.id, None)
        assert [s.id for s in await world.store.list(Snapshot, where={"state": LOCAL})] == [made.id]
        for other in ("b", "c"):
            await world.do(BeginResume, await world.create(other), prefer=("w1",))
        with pytest.raises(ResourceExhausted, match="on worker w1 only") as full:
            await world.begin(BeginResume, key)
        assert full.value.reason == "NO_CAPACITY"
        await world.upload(made)
        stored, actor = await world.store.get(Snapshot, made.id), await world.actor(key)
        assert (stored.state, stored.version, actor.durable_at) == (PRESENT, made.version + 1, made.created_at)
        assert (await world.upload(made)).outcome is Outcome.ALREADY
        assert (await world.begin(BeginResume, key)).worker == "w2"

    async def test_an_upload_may_end_while_its_actor_is_busy(self, world: World) -> None:
        key = await world.create()
        await world.do(BeginResume, key)
        made = await world.suspend_locally(key)
        op = await world.begin(BeginResume, key)
        await world.upload(made)
        actor = await world.actor(key)
        assert (actor.durable_at, actor.operation, actor.generation) == (made.created_at, op.id, op.generation)
        await world.finish(op)

    async def test_the_way_back_is_durable_however_often_it_is_suspended_locally(self, world: World) -> None:
        key = await world.create()
        await world.do(BeginResume, key)
        durable = (await world.do(BeginSuspend, key)).snapshot
        for _ in range(3):
            await world.do(BeginResume, key)
            made = await world.suspend_locally(key)
            actor = await world.actor(key)
            assert (actor.snapshot, actor.previous_snapshot) == (made.id, durable)
        found = {s.id: s.state for s in await world.store.list(Snapshot, where={"actor_uid": actor.uid})}
        assert found[durable] is PRESENT and found[made.id] is LOCAL
        assert list(found.values()).count(CONDEMNED) == len(found) - 2 == 2
        condemned = next(s for s in await world.store.list(Snapshot) if s.state is CONDEMNED)
        assert (await world.upload(condemned)).outcome is Outcome.ALREADY, "an upload that was under way"
        await world.upload(made)
        await world.do(BeginResume, key)
        latest = (await world.do(BeginSuspend, key)).snapshot
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (latest, made.id)
        assert (await world.store.get(Snapshot, durable)).state is CONDEMNED

    async def test_a_snapshot_lost_with_its_worker_crashes_who_slept_in_it(self, world: World) -> None:
        key = await world.create()
        await world.do(BeginResume, key)
        durable = await world.store.get(Snapshot, (await world.do(BeginSuspend, key)).snapshot)
        await world.do(BeginResume, key)
        made = await world.suspend_locally(key)
        change = await world.lose(made)
        actor = await world.actor(key)
        assert change.actor == actor and (actor.state, actor.reason) == (ActorState.CRASHED, "SnapshotLost")
        assert (actor.snapshot, actor.previous_snapshot) == (durable.id, "")
        assert actor.unsaved_since == actor.durable_at == durable.created_at
        [recorded] = await world.store.list(Operation, where={"kind": OperationKind.CRASH})
        assert recorded == change.operation and recorded.from_state is ActorState.SUSPENDED
        assert recorded.error and recorded.error.code == "DATA_LOSS" and recorded.state is OperationState.DONE
        assert (await world.store.get(Snapshot, made.id)).state is CORRUPT
        for late in (world.lose(made), world.upload(made)):
            assert (await late).outcome is Outcome.ALREADY
        with pytest.raises(FailedPrecondition) as held:
            await world.begin(BeginResume, key, hold_crashed=True)
        assert held.value.reason == "ACTOR_CRASHED"
        woken = await world.do(BeginResume, key)
        assert woken.snapshot == durable.id and (await world.actor(key)).unsaved_since is None

    async def test_a_worker_lost_with_the_actor_and_what_it_woke_from(self, world: World) -> None:
        """In whichever order it is noticed, the actor goes back to what is left, and says since when all is lost."""
        ends = []
        for name, snapshot_first in (("a", True), ("b", False)):
            key = await world.create(name)
            await world.do(BeginResume, key)
            durable = await world.store.get(Snapshot, (await world.do(BeginSuspend, key)).snapshot)
            await world.do(BeginResume, key)
            made = await world.suspend_locally(key)
            await world.do(BeginResume, key)
            if snapshot_first:
                await world.lose(made)
                assert (await world.actor(key)).state is ActorState.RUNNING
            await world.crash(key)
            if not snapshot_first:
                await world.lose(made)
            actor = await world.actor(key)
            assert (actor.snapshot, actor.unsaved_since) == (durable.id, durable.created_at)
            ends.append((actor.state, actor.previous_snapshot))
            assert (await world.do(BeginResume, key)).snapshot == durable.id
        assert ends == [(ActorState.CRASHED, "")] * 2

    async def test_a_wake_up_from_a_snapshot_that_is_lost_meanwhile(self, world: World) -> None:
        key = await world.create()
        await world.do(BeginResume, key)
        made = await world.suspend_locally(key)
        op = await world.begin(BeginResume, key)
        await world.lose(made)
        assert (await world.actor(key)).state is ActorState.RESUMING
        change = await world.back_out(op, ActorState.SUSPENDED)
        actor = await world.actor(key)
        assert (actor.state, actor.snapshot) == (ActorState.CRASHED, ""), "nothing was saved elsewhere"
        assert actor.unsaved_since == actor.created_at
        assert change.operation and change.operation.to_state is ActorState.CRASHED
        assert (await world.do(BeginResume, key)).snapshot == "golden"

    async def test_a_delete_condemns_what_is_not_uploaded_yet(self, world: World) -> None:
        key = await world.create()
        await world.do(BeginResume, key)
        made = await world.suspend_locally(key)
        await world.do(BeginDelete, key)
        assert (await world.store.get(Snapshot, made.id)).state is CONDEMNED
        assert (await world.upload(made)).outcome is (await world.lose(made)).outcome is Outcome.ALREADY

    # what a template says about crashes

    async def test_on_crash_boot_begins_anew_and_keeps_what_was_saved(self, world: World) -> None:
        t = await world.store.get(Template, "ns/t")
        await world.store.put(replace(t, spec=replace(t.spec, on_crash=OnCrash.BOOT)))
        key = await world.create()
        for _ in range(2):
            await world.do(BeginResume, key)
            saved = (await world.do(BeginSuspend, key)).snapshot
        older = (await world.actor(key)).previous_snapshot
        await world.do(BeginResume, key)
        await world.crash(key)
        booted = await world.do(BeginResume, key, hold_crashed=True)
        actor = await world.actor(key)
        assert booted.snapshot == "golden" and (actor.snapshot, actor.previous_snapshot) == ("", saved)
        assert (await world.store.get(Snapshot, older)).state is CONDEMNED, "or nobody would ever delete it"
        first = (await world.do(BeginSuspend, key)).snapshot
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (first, saved)
        await world.do(BeginResume, key)
        second = (await world.do(BeginSuspend, key)).snapshot
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (second, first)
        assert (await world.store.get(Snapshot, saved)).state is CONDEMNED

    async def test_a_boot_that_fails_leaves_what_was_saved(self, world: World) -> None:
        t = await world.store.get(Template, "ns/t")
        await world.store.put(replace(t, spec=replace(t.spec, on_crash=OnCrash.BOOT)))
        key = await world.create()
        await world.do(BeginResume, key)
        saved = (await world.do(BeginSuspend, key)).snapshot
        await world.do(BeginResume, key)
        await world.crash(key)
        await world.back_out(await world.begin(BeginResume, key, hold_crashed=True), ActorState.CRASHED)
        assert (await world.begin(BeginResume, key)).snapshot == saved, "on purpose it goes back to its last snapshot"

    async def test_on_crash_restore_last_wakes_from_the_last_snapshot(self, world: World) -> None:
        t = await world.store.get(Template, "ns/t")
        await world.store.put(replace(t, spec=replace(t.spec, on_crash=OnCrash.RESTORE_LAST)))
        key = await world.create()
        await world.do(BeginResume, key)
        saved = (await world.do(BeginSuspend, key)).snapshot
        await world.do(BeginResume, key)
        await world.crash(key)
        assert (await world.begin(BeginResume, key, hold_crashed=True)).snapshot == saved

    # what is kept

    async def test_what_a_template_keeps_and_people_tag(self, world: World) -> None:
        t = await world.store.get(Template, "ns/t")
        await world.store.put(replace(t, spec=replace(t.spec, retention=Retention(keep_last=3))))
        key = await world.create()
        made = []
        for _ in range(5):
            await world.do(BeginResume, key)
            op = await world.begin(BeginSuspend, key)
            await world.apply(world.finish_command(op, keeps=True))
            made.append(op.snapshot)
        uid = (await world.actor(key)).uid

        async def kept() -> list[str]:
            found = await world.store.list(Snapshot, where={"actor_uid": uid})
            return [s.id for s in found if s.state is PRESENT]

        assert await kept() == made
        about: dict[str, Any] = {"key": key, "now": world.now, "snapshot_id": made[1], "tag": "x"}
        tagged = await world.apply(TagSnapshot(**about))
        assert tagged.source and tagged.source.tags == ("x",)
        assert (await world.apply(TagSnapshot(**about))).outcome is Outcome.ALREADY
        expire = Expire(key=key, now=world.now, uid=uid)
        assert {s.id for s in (await world.apply(expire)).snapshots} == {made[0]}
        assert (await world.apply(expire)).outcome is Outcome.ALREADY
        assert await kept() == made[1:], "three that are new, and one that is tagged"
        with pytest.raises(NotFound):
            await world.apply(TagSnapshot(**about | {"snapshot_id": "unknown"}))
        over = await world.apply(TagSnapshot(**about, undo=True))
        assert over.source and (over.source.state, over.source.tags) == (CONDEMNED, ())
        with pytest.raises(FailedPrecondition):
            await world.apply(TagSnapshot(**about))

    async def test_an_actor_wakes_from_an_older_one(self, world: World) -> None:
        key = await world.create()
        other = await world.create("b")
        made = []
        for _ in range(2):
            await world.do(BeginResume, key)
            made.append((await world.do(BeginSuspend, key)).snapshot)
        old, last = made
        with pytest.raises(NotFound):
            await world.begin(BeginResume, other, snapshot_id=old)
        op = await world.begin(BeginResume, key, snapshot_id=old)
        assert op.snapshot == old
        await world.back_out(op, ActorState.SUSPENDED)
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (last, old), "as before"
        await world.do(BeginResume, key, snapshot_id=old)
        actor = await world.actor(key)
        assert (actor.snapshot, actor.previous_snapshot) == (old, last)
        with pytest.raises(FailedPrecondition):
            await world.begin(BeginResume, key, snapshot_id=last)
