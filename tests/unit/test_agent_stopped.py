"""What is left of calls that were stopped half way, or that another came in between of: the agent says what is so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agent_kit import Bench, short_directory, until
from msgspec.structs import replace

from greenroom.agent.staging import Staging
from greenroom.core import agentapi as api
from greenroom.core.agentapi import ResidentState
from greenroom.core.errors import Conflict, FailedPrecondition, GreenroomError, Unavailable
from greenroom.core.gc.records import Refusal, Refused, Registered
from greenroom.core.records import Endpoint


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with short_directory() as root:
        async with Bench(root) as bench:
            yield bench


@pytest.mark.parametrize("hold", [True, False])
async def test_what_an_actor_did_after_it_was_published_is_not_passed_over(bench: Bench, hold: bool) -> None:
    """Its suspend was put back, and was taken over before anybody wrote that down: the same operation once more."""
    await bench.boot()
    announced = bench.manifest()
    await bench.checkpoint(announced)
    await bench.publish(announced, hold=hold)
    await bench.call(api.Thaw(**bench.ids("sleep", 2)))
    (sandbox,) = bench.backend._sandboxes.values()
    sandbox.count += 100
    await bench.checkpoint(announced, generation=3)
    with pytest.raises(Conflict):  # not what was recorded of the first time
        await bench.publish(announced, generation=3, hold=hold)
    await bench.call(api.Thaw(**bench.ids("sleep", 3)))
    assert bench.state() is ResidentState.RUNNING and sandbox.count > 100


@pytest.mark.parametrize("there_before", [False, True])
async def test_a_checkpoint_that_is_stopped_stages_nothing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    staging = Staging(tmp_path)
    if there_before:
        (staging.path("a", "old") / "x").mkdir(parents=True)
    begun, go, drop = threading.Event(), threading.Event(), staging.drop

    def slowly(uid: str) -> None:
        begun.set()
        go.wait(60)
        drop(uid)

    monkeypatch.setattr(staging, "drop", slowly)
    beginning = asyncio.ensure_future(staging.begin("a", "new"))
    if there_before:
        await until(begun.is_set)
        beginning.cancel()
        await asyncio.sleep(0.05)
        assert not beginning.done(), "whoever looks next must not find what is on its way"
        go.set()
    else:
        await asyncio.sleep(0)
        beginning.cancel()
    await asyncio.wait({beginning})
    left = staging.holds("a")
    await asyncio.sleep(0.05)
    assert staging.holds("a") == left


async def test_a_thaw_that_is_stopped_when_the_sandbox_runs_already(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.boot()
    await bench.call(api.Freeze(**bench.ids("pause", 2)))
    thaw = bench.backend.thaw

    async def stopped(sid: str) -> Endpoint:
        await thaw(sid)
        raise Unavailable("nobody waits for it any more")

    with monkeypatch.context() as stops:
        stops.setattr(bench.backend, "thaw", stopped)
        with pytest.raises(Unavailable):
            await bench.call(api.Thaw(**bench.ids("resume", 3)))
    assert bench.state() is ResidentState.RUNNING
    # So who had it frozen before, in the same operation, is not told that it still is.
    await bench.call(api.Freeze(**bench.ids("pause", 3)))
    assert bench.state() is ResidentState.FROZEN


async def test_a_thaw_that_fails_leaves_it_to_be_frozen_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.boot()
    await bench.call(api.Freeze(**bench.ids("pause", 2)))

    async def fails(sid: str) -> Endpoint:
        raise Unavailable("it does not thaw")

    with monkeypatch.context() as failing:
        failing.setattr(bench.backend, "thaw", fails)
        with pytest.raises(Unavailable):
            await bench.call(api.Thaw(**bench.ids("resume", 3)))
    await bench.call(api.Freeze(**bench.ids("resume", 3)))
    assert bench.state() is ResidentState.FROZEN
    await bench.call(api.Thaw(**bench.ids("again", 4)))
    assert bench.state() is ResidentState.RUNNING


async def test_of_two_replicas_that_tell_it_to_wipe_itself_the_slower_undoes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.boot()
    enrolment, staging = bench.agent._enrolment, bench.agent._staging
    given_up = Refused(claim=enrolment.papers.claim, what=Refusal.WIPE, epoch=enrolment.papers.epoch)
    clearing, go = asyncio.Event(), asyncio.Event()
    clear = staging.clear

    async def slowly(uid: str) -> None:
        clearing.set()
        await go.wait()
        await clear(uid)

    with monkeypatch.context() as slow:
        slow.setattr(staging, "clear", slowly)
        first = asyncio.ensure_future(bench.call(api.Enrol(refused=given_up)))
        await clearing.wait()
    await bench.call(api.Enrol(refused=given_up))
    presented = enrolment.present(0)
    await bench.call(api.Enrol(registered=Registered(claim=presented.claim, epoch=7, closed_seq=0)))
    registered = enrolment.papers
    go.set()
    await first
    assert enrolment.papers == registered and enrolment.is_registered


async def test_a_wake_that_fails_vouches_for_nobody_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox that it was to replace is one that was let run before the worker was alone."""
    await bench.boot()
    resident = bench.agent._residents.find("a")
    assert resident is not None
    resident.epoch = -7

    async def refuses(*_: Any) -> api.Started:
        raise FailedPrecondition("that snapshot does not run here")

    monkeypatch.setattr(bench.agent._waker, "wake", refuses)
    with pytest.raises(GreenroomError):
        await bench.restore(replace(bench.manifest(), state="Present"))  # type: ignore[arg-type]
    assert bench.agent._residents.find("a") is resident and resident.epoch == -7
