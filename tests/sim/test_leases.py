"""The lease of a running operation: kept for as long as it takes, given up when it is gone, never brought back.

The cases are those in which a lease that doubled as a deadline, or that nobody fenced, went wrong elsewhere; on every
store.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from greenroom.core.commands import ActorCommand, BeginSuspend, Change, FinishSuspend, RenewLease, TakeOver
from greenroom.core.errors import LeaseHeld, LeaseLost, NotFound, Unavailable
from greenroom.core.records import Key, Lease, Operation, OperationState, Template, TemplateState
from greenroom.engine.leases import MARGIN_SHARE, RunningOperation
from greenroom.store.port import Store
from greenroom.testing.world import SimWorld

#: It is renewed after a third and given up after nine tenths of that: a machine that stands still for two seconds in
#: between loses none.
TTL_S = 4.0
#: For a test that waits for the end of one.
SHORT_TTL_S = 2.0


class Interposed:
    """A store some of whose commands a test holds up or refuses: ``before`` is awaited before each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.seen: list[ActorCommand] = []

    async def before(self, command: ActorCommand) -> None:
        """Replaced by a test."""

    async def apply(self, command: ActorCommand) -> Change:
        self.seen.append(command)
        await self.before(command)
        return await self._store.apply(command)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.fixture
def store(any_store: Store) -> Interposed:
    return Interposed(any_store)


@pytest.fixture
async def world(make_world: Callable[..., Any], store: Interposed) -> AsyncIterator[SimWorld]:
    async with make_world(store=store) as world:
        await world.apply()
        world.configure(lease_ttl_s=TTL_S)
        yield world


class Suspend(NamedTuple):
    """Of an actor: its checkpoint ends when ``go`` is set."""

    key: Key
    call: asyncio.Future[Operation]
    op: Operation
    running: RunningOperation
    go: asyncio.Event


async def suspending(world: SimWorld) -> Suspend:
    key, go = await world.create("a"), asyncio.Event()
    await world.request(key)
    for backend in world.backends.values():
        backend.gates["checkpoint"] = go
    call = asyncio.ensure_future(world.engine.suspend(key))
    # It is in the store a moment before its driver runs.
    while (running := world.engine.ops.running.get((await world.actor(key)).operation)) is None:
        await asyncio.sleep(0.005)
    return Suspend(key, call, await world.store.get(Operation, running.operation.id), running, go)


@asynccontextmanager
async def standstills(tick_s: float = 0.01) -> AsyncIterator[list[float]]:
    """How many seconds the event loop was late, each time that it was by much: what a busy machine took, and not the
    code."""
    late: list[float] = []

    async def measure() -> None:
        clock = asyncio.get_running_loop().time
        while True:
            before = clock()
            await asyncio.sleep(tick_s)
            if (by := clock() - before - tick_s) > 2 * tick_s:
                late.append(by)

    measuring = asyncio.ensure_future(measure())
    try:
        yield late
    finally:
        measuring.cancel()


def take_over(it: Suspend, world: SimWorld, *, force: bool = False) -> TakeOver:
    return TakeOver(
        key=it.key,
        now=world.engine.now(),
        operation_id=it.op.id,
        owner="stranger/1",
        lease_ttl_s=SHORT_TTL_S,
        force=force,
    )


async def test_an_operation_longer_than_its_lease_holds_it_throughout(world: SimWorld) -> None:
    it = await suspending(world)
    clock = asyncio.get_running_loop().time
    refused, until = 0, clock() + 1.5 * TTL_S
    while clock() < until:
        with pytest.raises(LeaseHeld) as held:
            await world.store.apply(take_over(it, world))
        refused += 1
        assert held.value.metadata["holder"] == world.engine.config.owner
        await asyncio.sleep(TTL_S / 40)
    it.go.set()
    assert (await it.call).state is OperationState.DONE
    assert refused > 10, "it was tried all the time"
    assert (await world.store.get(Operation, it.op.id)).takeovers == 0


async def test_a_stolen_lease_stops_the_driver_with_its_own_cause(world: SimWorld) -> None:
    key, call, op, running, go = it = await suspending(world)
    stolen = await world.store.apply(take_over(it, world, force=True))
    assert stolen.actor is not None and stolen.actor.generation == op.generation + 1
    await asyncio.wait({running.task}, timeout=60)
    assert running.task.cancelled() and isinstance(running.lost, LeaseLost)
    assert (running.lost.code, running.lost.reason) == ("ABORTED", "LEASE_LOST")
    go.set()
    # The thief never goes on with it: when its lease has run out, the operation is driven on, and its caller is told.
    assert (await call).state is OperationState.DONE
    assert (await world.actor(key)).generation == op.generation + 2
    await world.settle()


async def test_a_heartbeat_that_comes_after_the_end_brings_no_lease_back(world: SimWorld, store: Interposed) -> None:
    late, finished = asyncio.Event(), asyncio.Event()

    async def before(command: ActorCommand) -> None:
        if isinstance(command, RenewLease):
            late.set()
            await finished.wait()

    store.before = before  # type: ignore[method-assign]
    _, call, op, running, go = await suspending(world)
    await late.wait()
    go.set()
    assert (await call).state is OperationState.DONE
    finished.set()
    await world.settle()
    assert running.lost is None
    with pytest.raises(NotFound):
        await world.store.get(Lease, op.uid)
    ends = [i for i, c in enumerate(store.seen) if isinstance(c, FinishSuspend) and c.operation_id == op.id]
    begun = [i for i, c in enumerate(store.seen) if isinstance(c, RenewLease)]
    assert max(begun) < min(ends), "and none is sent after it"


async def test_a_held_lease_says_who_holds_it_for_what_and_until_when(world: SimWorld) -> None:
    key, call, op, _, go = it = await suspending(world)
    lease = await world.store.get(Lease, op.uid)
    pause = BeginSuspend(key=key, now=world.engine.now(), operation_id="other", owner="stranger/1", snapshot_id="s")
    joined = await world.store.apply(pause)
    assert joined.operation is not None and joined.operation.id == op.id, "the same is joined"
    with pytest.raises(LeaseHeld) as held:
        await world.store.apply(take_over(it, world))
    assert held.value.code == "ABORTED"
    assert held.value.metadata["holder"] == world.engine.config.owner == lease.owner
    assert held.value.metadata["operation"] == op.id
    assert world.engine.now() < float(held.value.metadata["until"]) <= world.engine.now() + TTL_S
    go.set()
    await call


async def test_a_store_that_is_away_for_less_than_the_lease_stops_nothing(world: SimWorld, store: Interposed) -> None:
    _, call, op, running, go = await suspending(world)
    asked, tried = running.asked, 0

    async def before(command: ActorCommand) -> None:
        nonlocal tried
        if isinstance(command, RenewLease) and (tried := tried + 1) <= 10:
            raise Unavailable("the store is away")

    store.before = before  # type: ignore[method-assign]
    while running.asked == asked and not running.task.done():
        await asyncio.sleep(0.01)
    go.set()
    assert (await call).state is OperationState.DONE
    assert running.lost is None and running.asked > asked and tried > 10, "it was renewed afterwards"
    assert (await world.store.get(Operation, op.id)).takeovers == 0


@pytest.mark.parametrize("hangs", [False, True])
async def test_an_owner_is_silent_before_its_lease_can_be_taken(
    world: SimWorld, store: Interposed, hangs: bool
) -> None:
    """When the store answers nothing, its own clock stops the owner; counted from before the last renewal was sent."""
    world.configure(lease_ttl_s=SHORT_TTL_S)
    _, call, op, running, go = await suspending(world)

    async def before(command: ActorCommand) -> None:
        if isinstance(command, RenewLease):
            if hangs:
                await asyncio.get_running_loop().create_future()
            raise Unavailable("the store is away")

    store.before = before  # type: ignore[method-assign]
    async with standstills() as late:
        await asyncio.wait({running.task})
        now = world.engine.now()  # before the store is asked, which may take as long as the margin
        stopped = asyncio.get_running_loop().time() - running.asked
        lease = await world.store.get(Lease, op.uid)
        await asyncio.sleep(0.05)  # until the last standstill is noted, too
    assert isinstance(running.lost, LeaseLost)
    assert now < lease.expires_at + sum(late), "before anybody could have it"
    assert SHORT_TTL_S / 3 < stopped < SHORT_TTL_S * (1 - MARGIN_SHARE / 2) + sum(late)
    store.before = Interposed.before.__get__(store)  # type: ignore[method-assign]
    go.set()
    assert (await call).state is OperationState.DONE, "the janitor goes on with it"
    await world.settle()


async def test_namesakes_in_two_namespaces_never_block_each_other(world: SimWorld) -> None:
    there = Key("other", "t")
    await world.engine.apply_template(there, (await world.template()).spec)
    while (await world.store.get(Template, str(there))).state is not TemplateState.READY:
        await asyncio.sleep(0.005)
    key, call, _, _, go = await suspending(world)
    namesake = Key(there.namespace, key.name)
    await world.engine.create_actor(namesake, there.name)
    assert (await world.engine.resume(namesake)).state is OperationState.DONE
    assert not call.done(), "the other one was held all the time"
    go.set()
    await call
