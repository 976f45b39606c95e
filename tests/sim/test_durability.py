"""Suspends that are answered from the worker's disk: uploaded afterwards, and what a lost worker costs until then."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from greenroom.core import agentapi as api
from greenroom.core.errors import DataLoss, FailedPrecondition, ResourceExhausted, Unavailable
from greenroom.core.records import ActorState, Durability, Key, OnCrash, Snapshot, SnapshotState
from greenroom.sandbox.sim import SNAPSHOT_FILE
from greenroom.testing.contracts.snapshots import key_of
from greenroom.testing.world import QUICK, SimWorld


@pytest.fixture
async def world(make_world: Callable[..., Any]) -> AsyncIterator[SimWorld]:
    async with make_world(config=replace(QUICK, worker_return_s=1.0, worker_gone_s=2.0)) as world:
        await world.apply(durability=Durability.LOCAL)
        yield world


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await check():
            await asyncio.sleep(0.002)


async def slept(world: SimWorld, key: Key) -> Snapshot:
    await world.engine.suspend(key)
    return await world.store.get(Snapshot, (await world.actor(key)).snapshot)


def hold_uploads(world: SimWorld) -> asyncio.Event:
    """Uploads wait until it is set."""
    go, publish = asyncio.Event(), world.snapshots.publish

    async def later(*args: Any, **more: Any) -> Snapshot:
        await go.wait()
        return await publish(*args, **more)

    world.snapshots.publish = later  # type: ignore[method-assign]
    return go


async def test_it_is_answered_first_and_uploaded_then(world: SimWorld) -> None:
    key = await world.create("a")
    await world.request(key)
    go = hold_uploads(world)
    made = await slept(world, key)
    assert (made.state, made.held) == (SnapshotState.LOCAL, True)
    actor = await world.actor(key)
    assert actor.state is ActorState.SUSPENDED and actor.durable_at is None, "the loss of its worker would cost it all"
    assert (made.actor_uid, made.id) not in await world.snapshots.list()
    assert (await world.request(key)).count == 2, "it wakes on the worker that has it"
    assert (await world.actor(key)).worker == made.worker
    go.set()

    async def uploaded() -> bool:
        return (await world.actor(key)).durable_at == made.created_at

    await until(uploaded)
    assert (await world.store.get(Snapshot, made.id)).state is SnapshotState.PRESENT
    await world.settle()


async def test_it_waits_for_the_worker_that_has_it(world: SimWorld) -> None:
    key = await world.create("a")
    await world.request(key)
    hold_uploads(world)
    made = await slept(world, key)
    world.configure(capacity_wait_s=0.1)
    await world.kill_agent(made.worker)
    with pytest.raises((ResourceExhausted, Unavailable)):
        await world.request(key)
    assert (await world.actor(key)).state is ActorState.SUSPENDED
    await world.start_agent(made.worker)

    async def wakes() -> bool:
        try:
            return (await world.request(key)).count == 2
        except (ResourceExhausted, Unavailable):
            return False

    await until(wakes)


async def test_a_worker_that_is_gone_costs_what_was_not_uploaded_and_says_so(world: SimWorld) -> None:
    key = await world.create("a")
    assert (await world.request(key)).count == 1
    safe = await slept(world, key)

    async def uploaded() -> bool:
        return (await world.actor(key)).durable_at == safe.created_at

    await until(uploaded)
    assert (await world.request(key)).count == 2
    hold_uploads(world)
    lost = await slept(world, key)
    await world.kill_agent(lost.worker)

    async def crashed() -> bool:
        return (await world.actor(key)).state is ActorState.CRASHED

    await until(crashed)
    actor = await world.actor(key)
    assert (actor.reason, actor.unsaved_since, actor.snapshot) == ("SnapshotLost", safe.created_at, safe.id)
    with pytest.raises(FailedPrecondition) as held:
        await world.request(key)
    assert held.value.reason == "ACTOR_CRASHED", "never silently reset"
    await world.engine.resume(key)
    assert (await world.request(key)).count == 2, "from what was uploaded"
    await world.start_agent(lost.worker)


async def test_a_worker_that_comes_back_with_an_empty_disk_costs_it_too(world: SimWorld) -> None:
    """As a pod does whose volume ends with it."""
    key = await world.create("a")
    await world.request(key)
    hold_uploads(world)
    lost = await slept(world, key)
    await world.kill_agent(lost.worker)
    (world.root / lost.worker / "held").rename(world.root / "before")  # which a thread of its agent may still be at
    await world.start_agent(lost.worker)

    async def crashed() -> bool:
        return (await world.actor(key)).state is ActorState.CRASHED

    await until(crashed)
    assert (await world.actor(key)).reason == "SnapshotLost"


async def test_what_has_rotted_before_it_was_uploaded_is_said_to_be_lost(world: SimWorld) -> None:
    """Not tried again for ever: then nobody would hear of it, and its worker could never end."""
    key = await world.create("a")
    await world.request(key)
    go = hold_uploads(world)
    rotten = await slept(world, key)
    path = world.root / rotten.worker / "held" / key_of(rotten, SNAPSHOT_FILE)
    path.write_bytes(path.read_bytes().replace(b'"count":1', b'"count":7'))
    go.set()

    async def crashed() -> bool:
        return (await world.actor(key)).state is ActorState.CRASHED

    await until(crashed)
    actor = await world.actor(key)
    assert actor.reason == "SnapshotLost" and "damaged" in actor.message and actor.unsaved_since is not None
    await world.engine.resume(key)
    assert (await world.request(key)).count == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError("404"),
        DataLoss("the worker's disk failed", reason="WORKER_IO"),
        Unavailable("away", reason="SNAPSHOT_STORE_REFUSES"),
    ],
)
async def test_an_upload_that_fails_costs_nothing(world: SimWorld, error: Exception) -> None:
    """Whatever it fails with: what is held is as good as before."""
    key = await world.create("a")
    await world.request(key)
    failed, publish = 0, world.snapshots.publish

    async def fails(*args: Any, **more: Any) -> Snapshot:
        nonlocal failed
        failed += 1
        raise error

    world.snapshots.publish = fails  # type: ignore[method-assign]
    made = await slept(world, key)

    async def tried_again() -> bool:
        return failed > 2

    await until(tried_again)
    assert (await world.store.get(Snapshot, made.id)).state is SnapshotState.LOCAL
    assert (await world.actor(key)).state is ActorState.SUSPENDED
    world.snapshots.publish = publish  # type: ignore[method-assign]

    async def uploaded() -> bool:
        return (await world.actor(key)).durable_at == made.created_at

    await until(uploaded)
    assert (await world.request(key)).count == 2


async def test_the_way_back_is_never_one_that_the_same_loss_takes(world: SimWorld) -> None:
    key = await world.create("a")
    await world.request(key)
    safe = await slept(world, key)

    async def uploaded() -> bool:
        return (await world.actor(key)).durable_at == safe.created_at

    await until(uploaded)
    go = hold_uploads(world)
    for _ in range(3):
        await world.request(key)
        await slept(world, key)
    actor = await world.actor(key)
    assert actor.previous_snapshot == safe.id and (await world.store.get(Snapshot, safe.id)).state == "Present"
    go.set()
    await world.settle()
    assert (await world.request(key)).count == 5


async def test_golden_snapshots_are_uploaded_before_the_template_is_ready(world: SimWorld) -> None:
    template = await world.template()
    golden = await world.store.get(Snapshot, template.golden_snapshot)
    assert golden.state is SnapshotState.PRESENT and (golden.actor_uid, golden.id) in await world.snapshots.list()


async def test_a_crashed_actor_that_boots_begins_anew(make_world: Callable[..., Any]) -> None:
    async with make_world() as world:
        await world.apply(on_crash=OnCrash.BOOT)
        key = await world.create("a")
        await world.request(key)
        saved = await slept(world, key)
        await world.request(key)
        world.end_program(key)
        await world.settle()
        assert (await world.actor(key)).state is ActorState.CRASHED
        assert (await world.request(key)).count == 1, "as one that was just created"
        assert (await world.actor(key)).previous_snapshot == saved.id
        await world.settle()


async def test_a_worker_says_what_it_made_and_not_whose_it_is(world: SimWorld) -> None:
    victim, mine = await world.create("victim"), await world.create("mine")
    uid, call = (await world.actor(victim)).uid, world.engine.hub.call

    async def lies(worker: str, what: api.AgentCall, *more: Any) -> Any:
        answer = await call(worker, what, *more)
        if isinstance(answer, api.Published):
            forged = {"actor_uid": uid, "actor": "victim", "tags": ("kept",), "created_at": 1e12, "worker": "w9"}
            return msgspec.structs.replace(answer, snapshot=msgspec.structs.replace(answer.snapshot, **forged))
        return answer

    world.engine.hub.call = lies  # type: ignore[method-assign]
    await world.request(mine)
    where = (await world.actor(mine)).worker
    made = await slept(world, mine)
    world.engine.hub.call = call  # type: ignore[method-assign]
    assert not await world.store.list(Snapshot, where={"actor_uid": uid})
    assert (made.actor, made.actor_uid) == ("mine", (await world.actor(mine)).uid)
    assert (made.tags, made.worker) == ((), where) and made.created_at < 1e11
    assert (await world.request(mine)).count == 2


async def uploads_hang_on_w0(world: SimWorld) -> list[str]:
    """Ten wait there. Returns those that w0 has been asked for."""
    await world.apply(durability=Durability.LOCAL)
    await world.engine.drain_worker("w1")
    call, asked = world.engine.hub.call, list[str]()

    async def hangs(worker: str, what: Any, *more: Any) -> Any:
        if worker == "w0" and isinstance(what, api.Upload):
            asked.append(what.snapshot_id)
            await asyncio.Event().wait()
        return await call(worker, what, *more)

    world.engine.hub.call = hangs  # type: ignore[method-assign]
    for n in range(10):
        key = await world.create(f"a{n}")
        await world.request(key)
        assert (await slept(world, key)).worker == "w0"
    await world.engine.drain_worker("w1", undo=True)
    return asked


async def test_a_worker_that_can_not_upload_keeps_no_other_from_it(make_world: Callable[..., Any]) -> None:
    async with make_world(slots=16, config=replace(QUICK, stall_s=30.0)) as world:
        asked = await uploads_hang_on_w0(world)
        await world.engine.drain_worker("w0")
        key = await world.create("b")
        await world.request(key)
        made = await slept(world, key)

        async def uploaded() -> bool:
            return (await world.store.get(Snapshot, made.id)).state is SnapshotState.PRESENT

        await until(uploaded)
        assert made.worker == "w1" and len(asked) == 2, "it waits for none of those that hang"


async def test_a_worker_from_which_nothing_moved_is_left_out_for_a_while(make_world: Callable[..., Any]) -> None:
    async with make_world(slots=16, config=replace(QUICK, stall_s=1.0)) as world:
        asked = await uploads_hang_on_w0(world)

        async def rests() -> bool:
            return "w0" in world.engine.uploads._silent

        await until(rests)
        assert len(asked) == 2, "not one after the other"

        async def asked_again() -> bool:
            return len(asked) > 2

        await until(asked_again)
