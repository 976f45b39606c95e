"""What goes wrong between a control plane and its workers: databases that went back, full disks, strange answers."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace as with_
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from greenroom.core import agentapi as api
from greenroom.core.errors import Unavailable
from greenroom.core.gc import control
from greenroom.core.gc.records import Entry, Local, Member, Papers, Refusal, Refused, Register
from greenroom.core.records import (
    Actor,
    ActorState,
    Worker,
)
from greenroom.testing.world import QUICK, SimWorld


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="gr-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
async def world(place: Path) -> AsyncIterator[SimWorld]:
    async with SimWorld(place, workers=1) as world:
        await world.apply()
        yield world


async def record(world: SimWorld, name: str = "w0") -> Worker:
    return await world.store.get(Worker, name)


async def until(is_so: Callable[[], Any], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while True:
            got = is_so()
            if asyncio.iscoroutine(got):
                got = await got
            if got:
                return
            await asyncio.sleep(0.005)


async def database_goes_back(world: SimWorld, closed: int = 1_000_000) -> None:
    """The worker has closed far more than the record's version: what a database that was restored to an hour ago (2400
    versions) or lost its last seconds in a failover looks like."""
    agent = world.agents["w0"]
    enrolment = agent._enrolment
    enrolment._write(replace(enrolment.papers, closed_seq=closed))


# --- 1: after a restored database nothing wakes on the worker, and the operation never ends -----------------------


async def test_a_wake_on_a_worker_that_has_closed_more_than_the_database_knows_ends(world: SimWorld) -> None:
    """It may fail and it may succeed: but it has to end, and not hold its slot for ever."""
    key = await world.create("a")
    await database_goes_back(world)
    waking = asyncio.ensure_future(world.engine.wake(key))
    await asyncio.wait({waking}, timeout=30)
    actor = await world.actor(key)
    waking.cancel()
    await asyncio.gather(waking, return_exceptions=True)
    assert actor.state is not ActorState.RESUMING, f"after {actor.generation} generations still {actor.state}"


async def test_an_acknowledged_worker_stays_trusted(world: SimWorld) -> None:
    await database_goes_back(world)

    async def distrusted() -> bool:
        return bool((await record(world)).distrust)

    await until(distrusted)
    await world.engine.acknowledge_worker("w0")
    for _ in range(2):
        await world.engine.reconciler.compare("w0", anew=True)
    assert not (await record(world)).distrust


# --- 2: a full disk ---------------------------------------------------------------------------------------------


async def test_on_a_full_disk_what_is_nobodys_is_destroyed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T34 as the control plane really asks: every 30 s, and every 1.5 s the record has a new version, so each question
    closes a higher number, which can't be written down."""
    async with SimWorld(place, workers=1, config=with_(QUICK, reconcile_s=3600.0)) as world:
        await asyncio.sleep(0.2)  # what is asked at the start is answered

        def full(*_: object) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        enrolment = world.agents["w0"]._enrolment
        monkeypatch.setattr(enrolment, "_write", full)
        nobodys = world.root / "w0" / "logs" / "nobody"
        nobodys.mkdir()
        for _ in range(4):

            async def noted() -> bool:
                return (await record(world)).version > enrolment.papers.closed_seq + 1

            await until(noted)
            await world.engine.reconciler.compare_quietly("w0")
        await until(lambda: not nobodys.exists())


# --- 3: who says a high epoch takes a name from a worker that is heard --------------------------------------------


def test_a_foreign_disk_with_a_higher_epoch_does_not_take_the_name_of_one_that_is_heard() -> None:
    healthy = Member(name="w", incarnation="mine", claim="c", epoch=3, seq=50, shared=True)
    foreign = Register(worker="w", incarnation="other", claim="x", epoch=9)
    decision = control.register(healthy, [], foreign, heard=True)
    # What the healthy one is told when it says who it is the next time:
    mine = Register(worker="w", incarnation="mine", claim="c", epoch=3)
    answer = control.register(decision.member, [], mine, heard=True).answer
    assert not (isinstance(answer, Refused) and answer.what is Refusal.WIPE), "a healthy worker is told to wipe itself"


async def test_a_foreign_agent_with_a_high_epoch_ends_nobodys_actors(world: SimWorld, place: Path) -> None:
    key = await world.create("a")
    await world.request(key)
    healthy, backend = world.agents["w0"], world.backends["w0"]
    from greenroom.agent.agent import Agent, AgentConfig
    from greenroom.images.store import DiskImageStore
    from greenroom.sandbox.sim import SimBackend

    config = AgentConfig(worker="w0", pool="default", capacity=8, state_dir=place / "f" / "w0", warm=0)
    (place / "f" / "w0").mkdir(parents=True)
    (place / "f" / "w0" / "papers.json").write_bytes(msgspec.json.encode(Papers(incarnation="f" * 32, epoch=99)))
    other = Agent(config, SimBackend(world.script), DiskImageStore(place / "images"), world.snapshots)
    await other.open()
    try:
        world.hub.connect(other)
        await until(lambda: other._enrolment.papers.answered or other.shutdown.done())
        world.hub.connect(healthy)
        await asyncio.sleep(0.5)
        assert backend._sandboxes, "the actor of the healthy worker was destroyed"
    finally:
        world.hub.connect(healthy)
        await other.close(wipe=True)


# --- 5: a question of the metrics takes the look at the disk away -------------------------------------------------


async def test_a_scrape_does_not_keep_the_collection_from_seeing_what_is_on_the_disk(place: Path) -> None:
    async with SimWorld(place, workers=1, config=with_(QUICK, reconcile_s=3600.0)) as world:
        (world.root / "w0" / "logs" / "nobody").mkdir()
        assert await world.engine.inventories.listed("w0") is not None  # as GET /metrics does
        await world.engine.reconciler.compare("w0", anew=True)
        await until(lambda: not (world.root / "w0" / "logs" / "nobody").exists())


async def test_old_news_of_a_worker_that_is_being_welcomed_do_not_shut_it_out(world: SimWorld) -> None:
    """It was asked as the agent before it: the answer, that this is no longer registered, comes when it has registered
    anew and before it is compared."""
    compare, late = world.engine.reconciler.compare, True

    async def after_old_news(worker: str, *, anew: bool = False) -> list[str]:
        nonlocal late
        if late:
            late = False
            world.engine.members.register_again(worker)
        return await compare(worker, anew=anew)

    await world.kill_agent("w0")
    world.engine.reconciler.compare = after_old_news  # type: ignore[method-assign]
    await world.start_agent("w0")
    await until(lambda: not late)
    await world.settle()
    assert world.engine.members.enrolled() == ["w0"]


# --- 6: a worker that always has something new --------------------------------------------------------------------


async def test_a_worker_that_always_has_something_new_does_not_keep_a_comparison_for_ever(place: Path) -> None:
    async with SimWorld(place, workers=1, config=with_(QUICK, reconcile_s=3600.0)) as world:
        ask, asked = world.engine.members.ask, 0

        async def lies(worker: str, call: api.AgentCall) -> Any:
            nonlocal asked
            answer = await ask(worker, call)
            if isinstance(answer, api.Synced):
                asked += 1
                await asyncio.sleep(0)
                entry = Entry(handle=f"h{asked}", create_seq=0, state=Local.LIVE)
                report = replace(answer.report, inventory=(entry,))
                return replace(answer, report=report, same=False, digest=f"{asked}")
            return answer

        world.engine.members.ask = lies  # type: ignore[method-assign]
        comparing = asyncio.ensure_future(world.engine.reconciler.compare("w0", anew=True))
        await asyncio.wait({comparing}, timeout=30)
        done = comparing.done()
        world.engine.members.ask = ask  # type: ignore[method-assign]
        await comparing
        assert done, f"still asking, after {asked} questions"


# --- 7: an erase that comes late ----------------------------------------------------------------------------------


async def test_an_erase_that_was_decided_before_does_not_meet_what_was_placed_since(world: SimWorld) -> None:
    """Retirement is decided (the record is read), somebody undoes it, an actor wakes there; then the erase is sent."""
    key = await world.create("a")
    await world.request(key)
    await world.engine.suspend(key)
    ask, was_late = world.engine.members.ask, asyncio.Event()

    async def late(worker: str, call: api.AgentCall) -> Any:
        if not isinstance(call, api.Shutdown):
            return await ask(worker, call)
        try:
            await world.engine.drain_worker("w0", undo=True)
            await world.request(key)
            return await ask(worker, call)
        finally:
            was_late.set()

    world.engine.members.ask = late  # type: ignore[method-assign]
    await world.engine.retire_worker("w0")
    await asyncio.wait_for(was_late.wait(), 60)
    world.engine.members.ask = ask  # type: ignore[method-assign]
    agent = world.agents["w0"]
    assert agent._ending is None and [r.actor_uid for r in agent.hello().residents], "awake, and its worker is erased"


# --- 12: one worker's answer ends the round for all ---------------------------------------------------------------


async def test_a_strange_answer_of_one_worker_does_not_end_a_round_for_all(place: Path) -> None:
    async with SimWorld(place, workers=2) as world:
        await world.apply()
        await asyncio.sleep(0.2)
        ask = world.engine.members.ask

        async def lies(worker: str, call: api.AgentCall) -> Any:
            answer = await ask(worker, call)
            if isinstance(answer, api.Synced) and worker == "w0":
                # A comparison that asked before this was in place may write down what it was told at any moment.
                return replace(answer, same=True, digest="what nobody said")
            return answer

        world.engine.members.ask = lies  # type: ignore[method-assign]
        try:
            report = await world.engine.garbage.collect(dry_run=True)
            assert any("w0" in failure for failure in report.failures)
        finally:
            world.engine.members.ask = ask  # type: ignore[method-assign]


# --- 13: a replica of the version before writes the record of an awake actor ---------------------------------------


async def test_what_a_replica_of_the_version_before_writes_ends_no_actor(world: SimWorld) -> None:
    """Replicas that share a database are replaced one by one. One of the version before does not know `sandbox`: an
    actor that was woken by a new one, and that it pauses, resumes, reunites or puts back, has none afterwards."""
    key = await world.create("a")
    await world.request(key)
    rows = world.store._rows.table(Actor)  # type: ignore[attr-defined]
    before = rows[str(key)]
    rows[str(key)] = replace(
        before, sandbox="", sandbox_seq=0, generation=before.generation, version=before.version + 1
    )
    await world.engine.reconciler.compare("w0", anew=True)
    await asyncio.sleep(0.3)
    after = await world.actor(key)
    assert after.state is ActorState.RUNNING and world.backends["w0"]._sandboxes, (after.state, after.reason)


_ = (Unavailable,)
