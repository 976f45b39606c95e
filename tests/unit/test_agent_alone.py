"""An agent that hears no control plane freezes what runs, and nobody but a control plane thaws it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agent_kit import PATIENCE_S, SPEC, Bench, short_directory, until
from msgspec.structs import replace

from greenroom.agent import agent as agent_module
from greenroom.agent import clock
from greenroom.agent.agent import Agent
from greenroom.agent.alone import SCAN_S, AloneWatch
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState, Welcome
from greenroom.core.errors import FailedPrecondition, GreenroomError, Internal, LeaseLost, Unavailable
from greenroom.core.records import Probe, Snapshot, SnapshotScope, SnapshotState
from greenroom.sandbox.sim import MethodScript, ScriptedFailure, SimScript
from greenroom.testing.local_hub import LocalHub

#: No test waits this long: it passes on the machine's clock when a test says so (`Clock`).
ALONE_S = 3600.0


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with short_directory() as root:
        async with Bench(root) as bench:
            yield bench


def hear(agent: Agent, alone_s: float = ALONE_S) -> None:
    agent.heard(Welcome(replica="r", alone_s=alone_s), clock.boot_time())


class Clock:
    """The machine's clock, which a test lets jump as a sleep of the machine does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept_s = 0.0
        real = clock.boot_time
        monkeypatch.setattr(clock, "boot_time", lambda: real() + self.slept_s)


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def frozen(bench: Bench, uid: str = "a") -> None:
    await until(lambda: bench.state(uid) is ResidentState.FROZEN)


async def looked() -> None:
    """The agent has looked by now whether it is alone, more than once."""
    await asyncio.sleep(3 * SCAN_S)


async def test_what_runs_is_frozen_when_nobody_is_heard_and_not_before(bench: Bench, sleeper: Clock) -> None:
    await bench.boot("one", uid="a")
    await bench.boot("two", uid="b")
    hear(bench.agent)
    sleeper.slept_s += 0.9 * ALONE_S
    await looked()
    assert bench.state("a") is bench.state("b") is ResidentState.RUNNING
    sleeper.slept_s += 0.1 * ALONE_S
    await frozen(bench, "a")
    await frozen(bench, "b")
    assert {r.state for r in bench.agent.heartbeat().residents} == {ResidentState.FROZEN}
    hear(bench.agent)  # to be heard again is not enough: it may be that it runs elsewhere by now
    await bench.boot("three", uid="c")
    assert bench.state("a") is ResidentState.FROZEN and bench.state("c") is ResidentState.RUNNING
    await bench.call(api.Thaw(**bench.ids("thaw")))
    assert bench.state("a") is ResidentState.RUNNING and bench.state("b") is ResidentState.FROZEN


async def test_a_replica_that_is_heard_on_any_link_is_enough(bench: Bench, sleeper: Clock) -> None:
    hubs = [LocalHub(), LocalHub()]
    for number, hub in enumerate(hubs):
        hub.welcome = Welcome(replica=f"r{number}", alone_s=ALONE_S)
        hub.connect(bench.agent)
    await bench.boot()
    hubs[0].disconnect("w")
    for _ in range(4):
        hubs[1].heartbeat("w")
        sleeper.slept_s += 0.6 * ALONE_S
        await looked()
        assert bench.state() is ResidentState.RUNNING
    sleeper.slept_s += 0.4 * ALONE_S
    await frozen(bench)  # connected, and silent


async def test_never_is_never_and_the_latest_word_counts(bench: Bench, sleeper: Clock) -> None:
    await bench.boot()
    hear(bench.agent)
    hear(bench.agent, alone_s=0.0)
    sleeper.slept_s += 2 * ALONE_S
    await looked()
    assert bench.state() is ResidentState.RUNNING
    hear(bench.agent, alone_s=0.05)
    await frozen(bench)


async def test_what_counts_is_when_the_replica_was_asked_not_when_its_answer_came(bench: Bench) -> None:
    await bench.boot()
    asked = clock.boot_time() - 60
    bench.agent.heard(Welcome(alone_s=30), clock.boot_time())
    bench.agent.heard(Welcome(alone_s=30), asked)  # was on the way for a minute
    await asyncio.sleep(0.05)
    assert bench.state() is ResidentState.RUNNING
    async with Bench(bench.root / "other") as late:
        await late.boot()
        late.agent.heard(Welcome(alone_s=30), asked)
        assert late.state() is ResidentState.RUNNING  # its own beginning counts as well
    bench.agent.heard(Welcome(alone_s=0.01), asked)
    await frozen(bench)


async def alone_during(checkpoint: Snapshot, bench: Bench, sleeper: Clock) -> asyncio.Task[Any]:
    hear(bench.agent)
    task = asyncio.create_task(bench.checkpoint(checkpoint))
    await until(lambda: bench.backend.calls["checkpoint"])
    sleeper.slept_s += ALONE_S
    return task


async def test_a_call_under_way_is_not_stopped_and_what_it_leaves_running_is_frozen(
    bench: Bench, sleeper: Clock
) -> None:
    await bench.boot()
    bench.backend.script = SimScript(methods={"checkpoint": MethodScript(latency_s=5 * SCAN_S)})
    snapshot = bench.manifest()
    await (await alone_during(snapshot, bench, sleeper))  # it ends well though the agent is alone for most of it
    assert bench.agent._alone.alone and bench.state() is ResidentState.FROZEN
    assert (await bench.publish(snapshot)).state is SnapshotState.LOCAL
    await bench.discard()


async def test_a_call_that_comes_while_it_freezes_waits_for_that(bench: Bench) -> None:
    await bench.boot()
    bench.backend.script = SimScript(methods={"freeze": MethodScript(latency_s=0.2)})
    hear(bench.agent, alone_s=0.01)
    await until(lambda: bench.backend.calls["freeze"])
    assert bench.state() is ResidentState.RUNNING
    hear(bench.agent, alone_s=60)
    await bench.call(api.Thaw(**bench.ids("thaw", 2)))
    assert bench.backend.calls["freeze"] == 1 and bench.state() is ResidentState.RUNNING
    with pytest.raises(LeaseLost):
        await bench.call(api.Thaw(**bench.ids("old", 1)))


async def test_a_freeze_that_fails_is_tried_again(bench: Bench) -> None:
    await bench.boot()
    failures = tuple(ScriptedFailure(call=number) for number in (1, 2))
    bench.backend.script = SimScript(methods={"freeze": MethodScript(failures=failures)})
    hear(bench.agent, alone_s=0.01)
    await frozen(bench)
    assert bench.backend.calls["freeze"] == 3


async def test_an_agent_that_begins_alone_remembers_for_how_long(bench: Bench, sleeper: Clock) -> None:
    await bench.boot()
    hear(bench.agent)
    await bench.restart()
    assert bench.state() is ResidentState.RUNNING
    sleeper.slept_s += ALONE_S
    await frozen(bench)
    await bench.restart()
    assert bench.state() is ResidentState.FROZEN
    (bench.root / "w" / "welcome.json").write_text("{torn")
    await bench.restart()


async def test_what_is_paused_or_ended_meanwhile_is_left_alone(bench: Bench, sleeper: Clock) -> None:
    await bench.boot("one", uid="a")
    await bench.boot("two", uid="b")
    await bench.call(api.Freeze(**bench.ids("pause", 2)))
    ends: list[Any] = []
    bench.agent.on_exit = ends.append
    hear(bench.agent)
    bench.backend._leave(bench.backend._resident["ns/b"], 3)
    await until(lambda: ends)
    sleeper.slept_s += ALONE_S
    await looked()
    assert bench.agent._alone.alone
    assert bench.backend.calls["freeze"] == 1 and bench.state("b") is None


# --- a machine that sleeps ----------------------------------------------------------------------------------------


async def test_the_time_that_the_machine_sleeps_counts(bench: Bench, sleeper: Clock) -> None:
    await bench.boot()
    hear(bench.agent, alone_s=60)
    await bench.restart()
    assert not bench.agent._alone.alone
    sleeper.slept_s += 61
    await frozen(bench)  # soon, though the loop's clock stood still meanwhile
    assert bench.agent._alone.epoch == 1


async def test_what_ran_before_is_frozen_also_when_somebody_is_heard_at_once(bench: Bench, sleeper: Clock) -> None:
    """It may run elsewhere by now; that a replica is heard again does not say that it does not."""
    await bench.boot("one", uid="a")
    hear(bench.agent, alone_s=60)
    sleeper.slept_s += 61
    hear(bench.agent, alone_s=60)
    assert not bench.agent._alone.alone and bench.agent._alone.epoch == 1
    await bench.boot("two", uid="b")
    await frozen(bench, "a")
    await bench.call(api.Thaw(**bench.ids("thaw", 2), epoch=1))
    assert bench.agent._stale() == []
    assert bench.state("a") is bench.state("b") is ResidentState.RUNNING


async def test_an_answer_that_was_on_the_way_while_the_machine_slept_proves_nothing(
    tmp_path: Path, sleeper: Clock
) -> None:
    async def stop(uid: str) -> None: ...

    watch = AloneWatch(tmp_path / "welcome.json", lambda: (), stop)
    asked = clock.boot_time()
    watch.heard(Welcome(alone_s=60), asked)
    sleeper.slept_s += 61
    watch.heard(Welcome(alone_s=60), asked)
    assert watch.alone and watch.now == -1
    watch.heard(Welcome(alone_s=60), clock.boot_time())
    assert not watch.alone and watch.now == watch.epoch == 1
    again = AloneWatch(tmp_path / "welcome.json", lambda: (), stop)
    assert again.now == 1
    sleeper.slept_s -= 1e9  # the machine was booted anew: its clock begins again
    again = AloneWatch(tmp_path / "welcome.json", lambda: (), stop)
    assert again.now == 1 and 59 < again._left_s() <= 60


# --- wakes --------------------------------------------------------------------------------------------------------


async def woken_alone(wake: asyncio.Task[Any], bench: Bench) -> None:
    """It ended, may be tried again, and has left nothing."""
    with pytest.raises(Unavailable) as alone:
        async with asyncio.timeout(PATIENCE_S):
            await wake
    assert alone.value.reason == "WORKER_ALONE"
    await until(lambda: bench.state() is None and not bench.backend._sandboxes)


async def test_a_boot_that_waits_until_it_is_ready_is_ended(bench: Bench) -> None:
    """Its program runs meanwhile, for as long as the template lets it."""
    spec = replace(SPEC, readyz=Probe(path="/never", timeout_s=600.0))
    wake = asyncio.create_task(bench.boot(spec=spec))
    await until(lambda: bench.state() is ResidentState.STARTING)
    hear(bench.agent, alone_s=0.05)
    await woken_alone(wake, bench)
    hear(bench.agent, alone_s=60)
    await bench.boot("again", 2)
    assert bench.state() is ResidentState.RUNNING


@pytest.mark.parametrize("scope", SnapshotScope)
async def test_a_restore_is_ended(bench: Bench, scope: SnapshotScope) -> None:
    await bench.boot()
    held = replace(await bench.suspend(), scope=scope)
    bench.backend.script = SimScript(methods={"restore": MethodScript(latency_s=600.0)})
    restored = bench.backend.calls["restore"]
    wake = asyncio.create_task(bench.restore(held))
    await until(lambda: bench.backend.calls["restore"] > restored)
    hear(bench.agent, alone_s=0.05)
    await woken_alone(wake, bench)
    bench.backend.script = SimScript()
    hear(bench.agent, alone_s=60)
    await bench.restore(held, "again", 4)
    assert bench.state() is ResidentState.RUNNING


async def test_a_wake_that_ends_in_another_epoch_leaves_nothing(
    bench: Bench, sleeper: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether somebody is heard by then or not, and before anybody has looked."""
    start, again = bench.backend.start, True

    async def and_sleep(*args: Any) -> Any:
        started = await start(*args)
        sleeper.slept_s += 61
        if again:
            hear(bench.agent, alone_s=60)
        return started

    monkeypatch.setattr(bench.backend, "start", and_sleep)
    for number, again in enumerate((True, False), 1):
        hear(bench.agent, alone_s=60)
        await woken_alone(asyncio.create_task(bench.boot(f"op{number}", number)), bench)
        assert bench.agent._alone.alone is not again


async def test_a_wake_that_comes_while_alone_makes_nothing(bench: Bench) -> None:
    hear(bench.agent, alone_s=0.01)
    await until(lambda: bench.agent._alone.alone)
    await woken_alone(asyncio.create_task(bench.boot()), bench)
    assert bench.backend.calls["start"] == 0


async def test_what_a_wake_could_not_end_is_ended_later(bench: Bench) -> None:
    failures = tuple(ScriptedFailure(call=number) for number in (1, 2))
    bench.backend.script = SimScript(methods={"destroy": MethodScript(failures=failures)})
    spec = replace(SPEC, readyz=Probe(path="/never", timeout_s=600.0))
    wake = asyncio.create_task(bench.boot(spec=spec))
    await until(lambda: bench.state() is ResidentState.STARTING)
    hear(bench.agent, alone_s=0.05)
    with pytest.raises(GreenroomError):
        await wake
    await until(lambda: not bench.backend._sandboxes)
    assert bench.backend.calls["destroy"] == 3 and bench.state() is None


# --- going on -----------------------------------------------------------------------------------------------------


async def test_a_thaw_of_an_epoch_that_ends_while_it_waits_is_refused(
    bench: Bench, sleeper: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a call that takes long, or a disk that does."""
    await bench.boot()
    await bench.call(api.Freeze(**bench.ids("pause")))
    hear(bench.agent, alone_s=60)

    def sleep() -> None:
        sleeper.slept_s += 61
        hear(bench.agent, alone_s=60)

    async def thaw(op: str, epoch: int) -> None:
        with pytest.raises(FailedPrecondition) as stale:
            await bench.call(api.Thaw(**bench.ids(op), epoch=epoch))
        assert stale.value.reason == "STALE_EPOCH"

    release = asyncio.Event()
    aside = asyncio.create_task(bench.agent._fence.aside("a", lambda: release.wait()))  # type: ignore[arg-type, return-value]
    await until(lambda: bench.agent._fence.is_busy("a"))
    waiting = asyncio.create_task(thaw("behind a call", 0))
    await asyncio.sleep(0)
    sleep()
    release.set()
    await asyncio.gather(aside, waiting)

    clear = bench.agent._staging.clear

    async def slowly(uid: str) -> None:
        sleep()
        await clear(uid)

    monkeypatch.setattr(bench.agent._staging, "clear", slowly)
    await thaw("behind a disk", 1)
    assert bench.backend.calls["thaw"] == 0 and bench.state() is ResidentState.FROZEN


async def test_a_thaw_that_is_decided_for_what_runs_still_lets_it_run_on(bench: Bench, sleeper: Clock) -> None:
    """The same call was answered in an epoch before; what it lets run is not frozen afterwards."""
    await bench.boot()
    hear(bench.agent, alone_s=60)
    await bench.call(api.Thaw(**bench.ids("reunite"), epoch=0))
    sleeper.slept_s += 61
    hear(bench.agent, alone_s=60)
    await bench.call(api.Thaw(**bench.ids("reunite"), epoch=1))
    assert bench.agent._stale() == [] and bench.state() is ResidentState.RUNNING


async def test_a_checkpoint_that_fails_while_alone_leaves_it_frozen(bench: Bench, sleeper: Clock) -> None:
    await bench.boot()
    script = MethodScript(latency_s=5 * SCAN_S, failures=(ScriptedFailure(),))
    bench.backend.script = SimScript(methods={"checkpoint": script})
    with pytest.raises(Internal):
        await (await alone_during(bench.manifest(), bench, sleeper))
    assert bench.backend.calls["thaw"] == 0 and bench.state() is ResidentState.FROZEN


# --- what is left behind ------------------------------------------------------------------------------------------


async def exits(bench: Bench, *uids: str) -> None:
    """Their sandboxes, by themselves, and the agent has seen it."""
    ends: list[Any] = []
    bench.agent.on_exit = ends.append
    for uid in uids:
        bench.backend._leave(bench.backend._resident[f"ns/{uid}"], 3)
    await until(lambda: {end.actor_uid for end in ends} == {*uids})


async def test_staged_files_without_a_sandbox_are_dropped_when_nobody_asks_for_them(
    bench: Bench, sleeper: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "SWEEP_S", 0.01)
    await bench.restart()
    snapshots = {}
    for uid in ("a", "b", "c"):
        await bench.boot(f"boot-{uid}", uid=uid)
        snapshots[uid] = bench.manifest(uid)
        await bench.checkpoint(snapshots[uid], f"sleep-{uid}")

    def staged() -> set[str]:
        return {*bench.agent._staging.uids()}

    async def swept(times: int = 3) -> None:
        looks = 0
        uids = bench.agent._staging.uids

        def count() -> list[str]:
            nonlocal looks
            looks += 1
            return uids()

        monkeypatch.setattr(bench.agent._staging, "uids", count)
        await until(lambda: looks >= times)  # the last but one has come to its end
        monkeypatch.setattr(bench.agent._staging, "uids", uids)

    await exits(bench, "a", "b")  # c's stays
    await swept()
    assert staged() == {"a", "b", "c"}
    sleeper.slept_s += agent_module.FORSAKEN_S - 30
    await bench.publish(snapshots["b"], "sleep-b")
    sleeper.slept_s += 31
    await until(lambda: staged() == {"b", "c"})
    await swept()
    assert staged() == {"b", "c"}
    sleeper.slept_s += agent_module.FORSAKEN_S
    await until(lambda: staged() == {"c"})
    await swept()
    assert staged() == {"c"} and bench.state("c") is ResidentState.FROZEN
    await bench.publish(snapshots["c"], "sleep-c")


async def test_staged_files_are_not_dropped_under_a_publish_that_takes_long(
    bench: Bench, sleeper: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "SWEEP_S", 0.01)
    await bench.restart()
    await bench.boot()
    snapshot = bench.manifest()
    await bench.checkpoint(snapshot)
    keep, gate, begun = bench.agent._held.keep, asyncio.Event(), asyncio.Event()

    async def slowly(*args: Any) -> Any:
        begun.set()
        await gate.wait()
        return await keep(*args)

    monkeypatch.setattr(bench.agent._held, "keep", slowly)
    publishing = asyncio.create_task(bench.publish(snapshot))
    await begun.wait()
    await exits(bench, "a")
    sleeper.slept_s += 2 * agent_module.FORSAKEN_S
    looked: list[str] = []
    monkeypatch.setattr(
        bench.agent._fence, "is_busy", lambda uid: bool(looked.append(uid)) or uid in bench.agent._fence._running
    )
    await until(lambda: len(looked) >= 3)
    gate.set()
    assert (await publishing).state is SnapshotState.LOCAL
    assert bench.agent._staging.holds("a"), "the driver may ask again"
